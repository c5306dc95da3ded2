// Chooses the best of many scores without sorting them, and writes their ids in ascending order.
//
//   score   →  key: 32 bits in the same order as the scores; key 0 is never taken, kForced comes first
//   cut     →  the smallest key that is still taken, and how many of the ids with exactly this key are taken
//   compact →  the ids whose key is above the cut, and the first ids at the cut, by ballots and popcounts
//
// The cut is found from the top bit of the key down. Each pass asks how much weight is at or above each candidate. A
// warp tries three candidates in each pass over its row and keeps the sums in registers. The weight is 1 to take a
// number of ids, or a share of the mass to take a share. A block, for 131,072 columns and more, finds 11 bits in each
// pass, through a histogram in shared memory. All sums are sums of integers, so their order does not matter: the same
// scores give the same ids. Of equal scores, the lower ids are taken.
#pragma once

#include "device.h"

namespace headstart {
namespace cuda {

constexpr uint32_t kForced = 0xFFFFFFFFu;
constexpr uint32_t kWarp = 0xFFFFFFFFu;

// The key of a score, at least 1. +0 and -0 have the same key. NaN has a key, too.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  const uint32_t key = bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFu : 0x80000000u);
  return key == 0 ? 1 : key;
}

// Takes the ids with keys above `key`, and the `ties` lowest ids with exactly this key.
struct Cut {
  uint32_t key, ties;
};

// The number and the weight of the ids above a cut, and the number of the ids at it.
struct Census {
  uint32_t above, at, weight_above, weight_of_one;
};

__device__ __forceinline__ uint32_t lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ uint32_t lower_lanes() { return (1u << lane_id()) - 1; }

// --- by a warp ----------------------------------------------------------------------------------------------------
// Key and Weight are functions of the id in [begin, end).

// The largest key such that the ids at or above it weigh `goal` or more. 0 if all ids together weigh less.
template <typename Key, typename Weight>
__device__ __forceinline__ uint32_t cut_by_weight(int begin, int end, const Key& key, const Weight& weight,
                                                  uint32_t goal) {
  uint32_t found = 0;
  for (int shift = 30; shift >= 0; shift -= 2) {
    uint32_t held[3] = {0, 0, 0};
    for (int id = begin + static_cast<int>(lane_id()); id < end; id += 32) {
      const uint32_t k = key(id), w = weight(id);
#pragma unroll
      for (uint32_t i = 0; i < 3; ++i) held[i] += k >= (found | (i + 1) << shift) ? w : 0;
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) held[i] = __reduce_add_sync(kWarp, held[i]);
    const uint32_t step = held[2] >= goal ? 3 : held[1] >= goal ? 2 : held[0] >= goal ? 1 : 0;
    found |= step << shift;
  }
  return found;
}

template <typename Key, typename Weight>
__device__ __forceinline__ Census census(int begin, int end, const Key& key, const Weight& weight, uint32_t cut) {
  Census count{0, 0, 0, 0};
  for (int id = begin + static_cast<int>(lane_id()); id < end; id += 32) {
    const uint32_t k = key(id);
    if (k > cut) {
      ++count.above;
      count.weight_above += weight(id);
    } else if (k == cut) {
      ++count.at;
      count.weight_of_one = weight(id);  // ids with the same key have the same weight, except forced ids
    }
  }
  return {__reduce_add_sync(kWarp, count.above), __reduce_add_sync(kWarp, count.at),
          __reduce_add_sync(kWarp, count.weight_above), __reduce_max_sync(kWarp, count.weight_of_one)};
}

// The cut that takes the `count` best ids.
template <typename Key>
__device__ __forceinline__ Cut cut_by_count(int begin, int end, const Key& key, uint32_t count) {
  const auto one = [](int) { return 1u; };
  const uint32_t cut = cut_by_weight(begin, end, key, one, count);
  return {cut, count - census(begin, end, key, one, cut).above};
}

// Writes the ids in [begin, end) that pass `cut` to `to` and returns their number.
template <typename Key>
__device__ __forceinline__ int compact(int begin, int end, const Key& key, Cut cut, int32_t* to) {
  int written = 0;
  for (int base = begin; base < end; base += 32) {
    const int id = base + static_cast<int>(lane_id());
    const uint32_t k = id < end ? key(id) : 0;
    const bool tie = k == cut.key && k != 0;
    const uint32_t ties = __ballot_sync(kWarp, tie);
    const bool taken = k > cut.key || (tie && static_cast<uint32_t>(__popc(ties & lower_lanes())) < cut.ties);
    const uint32_t all = __ballot_sync(kWarp, taken);
    if (taken) to[written + __popc(all & lower_lanes())] = id;
    written += __popc(all);
    const uint32_t used = static_cast<uint32_t>(__popc(ties));
    cut.ties -= cut.ties < used ? cut.ties : used;
  }
  return written;
}

// Sets the unused entries of a list to 0.
__device__ __forceinline__ void clear_rest(int32_t* list, int64_t written, int64_t capacity) {
  for (int64_t i = written + lane_id(); i < capacity; i += 32) list[i] = 0;
}

// --- by a block ---------------------------------------------------------------------------------------------------

struct BlockSelect {
  static constexpr int kThreads = 1024, kWarps = kThreads / 32;
  static constexpr int kDigitBits = 11, kBins = 1 << kDigitBits, kBinsPerLane = kBins / 32;

  // This struct lies in shared memory.
  uint32_t bins[kBins];
  uint32_t above[kWarps], at[kWarps];
  uint32_t prefix, left;
  int done;

  // Writes the `count` best ids of [0, n), ascending, to list[0, count). If there are fewer, the rest of the list is 0.
  // Returns the number of ids.
  template <typename Key>
  __device__ __forceinline__ int best(int n, const Key& key, uint32_t count, int32_t* list) {
    const Cut cut = find(n, key, count);
    // Every warp handles a run of ids. First all warps count. Then each warp knows where to write.
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int64_t run = (static_cast<int64_t>(n) + kThreads - 1) / kThreads * 32;
    const int begin = static_cast<int>(warp * run < n ? warp * run : n);
    const int end = static_cast<int>(begin + run < n ? begin + run : n);
    const auto one = [](int) { return 1u; };
    const Census own = census(begin, end, key, one, cut.key);
    if (lane_id() == 0) {
      above[warp] = own.above;
      at[warp] = own.at;
    }
    __syncthreads();
    uint32_t above_before = 0, at_before = 0, above_all = 0, at_all = 0;
    for (int w = 0; w < kWarps; ++w) {
      above_before += w < warp ? above[w] : 0;
      at_before += w < warp ? at[w] : 0;
      above_all += above[w];
      at_all += at[w];
    }
    const uint32_t ties_before = min(cut.ties, at_before);
    compact(begin, end, key, {cut.key, cut.ties - ties_before}, list + above_before + ties_before);
    const int written = static_cast<int>(above_all + min(cut.ties, at_all));
    for (int i = written + static_cast<int>(threadIdx.x); i < static_cast<int>(count); i += kThreads) list[i] = 0;
    return written;
  }

 private:
  template <typename Key>
  __device__ __forceinline__ Cut find(int n, const Key& key, uint32_t count) {
    if (threadIdx.x == 0) {
      prefix = 0;
      left = count;
      done = 0;
    }
    for (int shift = 32 - kDigitBits, known = 0; known < 32;) {
      const int bits = shift >= 0 ? kDigitBits : kDigitBits + shift;
      const int low = shift >= 0 ? shift : 0;
      for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) bins[i] = 0;
      __syncthreads();
      const uint32_t high = prefix;
      for (int64_t id = threadIdx.x; id < n; id += kThreads) {
        const uint32_t k = key(static_cast<int>(id));
        if (k != 0 && static_cast<uint64_t>(k ^ high) >> (low + bits) == 0) {
          atomicAdd(&bins[k >> low & ((1u << bits) - 1)], 1u);
        }
      }
      __syncthreads();
      if (threadIdx.x < 32) choose_bin(low);
      __syncthreads();
      if (done) return {0, 0};
      known += bits;
      shift -= kDigitBits;
    }
    return {prefix, left};
  }

  // The first warp finds the bin, from the top, in which the number of ids still to take is reached.
  __device__ __forceinline__ void choose_bin(int low) {
    const uint32_t lane = lane_id();
    const uint32_t* own = bins + lane * kBinsPerLane;
    uint32_t sum = 0;
    for (uint32_t i = 0; i < kBinsPerLane; ++i) sum += own[(i + lane) % kBinsPerLane];  // no two lanes in one bank
    uint32_t from_here = sum;  // becomes the sum of this lane and all lanes above
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_down_sync(kWarp, from_here, step);
      from_here += lane + step < 32 ? other : 0;
    }
    const uint32_t want = left;
    __syncwarp();
    if (lane == 0 && from_here < want) done = 1;  // there are fewer ids than wanted: take all
    if (from_here >= want && from_here - sum < want) {
      uint32_t held = from_here - sum;
      int bin = kBinsPerLane - 1;
      while (held + own[bin] < want) held += own[bin--];
      prefix |= (lane * kBinsPerLane + static_cast<uint32_t>(bin)) << low;
      left = want - held;
    }
  }
};

}  // namespace cuda
}  // namespace headstart

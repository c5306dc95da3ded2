// adaptive_block_index: antidiagonal scores, softmax, mass of every block, and as many blocks as hold the goal.
//
// A query group is `stride` tokens, a key group the same, its tokens taken in reverse: the mean along the antidiagonal
// of their tile is one dot product of depth stride · D. A block of threads fetches a job (128 query groups of a head,
// longest first), walks the key groups it may see, and chooses the blocks of its rows at once:
//
//        128 key groups a tile                 one pass over the keys: every warp keeps, of its 32 query groups and its
//      ┌─────────┬─────────┐                   half of every tile, the running maximum and sum in registers.
//      │ warp 0  │ warp 1  │ ×4   128 query    To scratch go, for each query group and key block, the sum of
//      │ 32 × 64 │         │      groups       exp2(score - maximum so far), and for each half tile that maximum.
//      └─────────┴─────────┘
//      then a warp a row:  mass[block] = Σ over the row's query groups of  part · exp2(maximum then - at last) / sum
//                          cut by mass (select.h), forced blocks first, ids compacted in order
//
// With samples, mass[block] is the largest of the groups' parts, and then as large as any of the exact shares of some
// queries of the row. 64 sampled queries at a time, of as many of the job's rows as that holds:
//
//        256 keys a tile                       tokens as they are, gathered rows against plain ones: D deep.
//      ┌────────┬────────┬────────┬────────┐   To scratch goes, for each query and run of 64 keys,
//      │ warp 0 │ warp 1 │ warp 2 │ warp 3 │ ×2     lse = maximum + log2 Σ exp2(score - maximum)
//      └────────┴────────┴────────┴────────┘   then a warp a row: lse of all runs, share = Σ over the block's runs of
//       32 × 64                                exp2(lse of the run - lse of all), mass = max(mass, share)
//
// Floor: Nq · Nk · D / (2 · stride) multiply-adds a head, causal, at the tensor cores' rate; operands stream from L2
// as 128 + 128 rows of 128 bytes for 128 · 128 · 64 multiply-adds. Samples add Nq · Nk · D · samples / (2 · block_q),
// where a job's rows fill tiles of 64. Scratch is [128, T] floats for each block of threads that is resident, and with
// samples [64, Nk / 64] more, whatever B, Hq and Nq are. Shared memory: 3 stages of 32 KiB; of samples, 2 of 40 KiB.

#include <cmath>

#include "prefill_index.h"

namespace headstart {
namespace cuda {
namespace {

template <typename T>
using Tile = ScoreTile<T, 4, 2, 3>;
constexpr int kGroups = Tile<float>::kRows, kThreads = Tile<float>::kThreads;
constexpr int kTileGroups = Tile<float>::kColumns, kHalf = kTileGroups / 2;
constexpr float kWeightOne = 2147483648.0f;  // the mass of a full row, as an integer weight

template <typename T>
using SampleTile = ScoreTile<T, 2, 4, 2>;
constexpr int kSampled = SampleTile<float>::kRows, kSampleKeys = SampleTile<float>::kColumns;
constexpr int kRun = 64;  // keys of a warp's part of a tile
static_assert(SampleTile<float>::kThreads == kThreads, "both multiply on the same threads");
static_assert(SampleTile<float>::kSharedBytes <= Tile<float>::kSharedBytes, "and in the same stages");

// Behind the stages: statistics of both halves of the tiles, and the job.
template <typename T>
struct Shared {
  TileRows<T> q, k;
  float top[2][kGroups], sum[2][kGroups];
  int seen_end[kGroups];
  GatheredRows<T> sampled;
  const T* sampled_row[kSampled];
  unsigned long long job;
};

struct Plan {
  int64_t heads, rows, query_groups, chunks;  // chunks of kGroups query groups
  int64_t block_pitch, half_pitch;
  int64_t run_pitch;
  int groups_per_row, groups_per_block, runs_per_block;
  int rows_sampled;  // at a time
  bool query_vectors, key_vectors;
  float* part;  // [resident][kGroups][block_pitch]
  float* then;  // [resident][kGroups][half_pitch]: the maximum that the parts of a half tile refer to
  float* lse;   // [resident][kSampled][run_pitch]: of the sampled queries, to base 2, of a run of keys
  unsigned long long* counter;

  struct Place {
    int64_t head, first_group;
  };
  // Later groups see more keys: the last chunk of a head first. Blocks that run together share its keys in L2.
  __device__ __forceinline__ Place place(int64_t job) const {
    return {job / chunks, (chunks - 1 - job % chunks) * kGroups};
  }
};

// The rows of queries that a job chooses for. Told from its number as often as needed: registers are short.
struct JobRows {
  int64_t head, first;
  int count;

  __device__ __forceinline__ JobRows(const Plan& plan, unsigned long long job) {
    const Plan::Place place = plan.place(static_cast<int64_t>(job));
    head = place.head;
    first = place.first_group / plan.groups_per_row;
    const int64_t left = plan.rows - first;
    count = kGroups / plan.groups_per_row;
    if (left < count) count = static_cast<int>(left);
  }

  __device__ __forceinline__ int64_t batch(const AdaptiveArgs& args) const { return head / args.heads_q; }
};

__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / 32; }

// Key groups of a query group that it sees: none, or [start / stride, end).
__device__ __forceinline__ int seen_end(const AdaptiveArgs& args, const Plan& plan, int64_t start, int64_t group) {
  if (group >= plan.query_groups) return 0;
  const int64_t end = (group + 1) * args.stride < args.nq ? (group + 1) * args.stride : args.nq;
  const int64_t last = end - 1 + args.nk - args.nq;
  return last < start ? 0 : static_cast<int>(last / args.stride + 1);
}

// Sums over key blocks of kWidth groups of a row's weights in a half tile: to[0], to[1], ... in the order of the keys.
template <int kWidth>
__device__ __forceinline__ void store_parts(const float (&pair)[8], float* to, int room) {
  const int t = static_cast<int>(lane_id() % 4);
  if constexpr (kWidth == 2) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (n * 4 + t < room) to[n * 4 + t] = pair[n];
    }
  } else if constexpr (kWidth == 4) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float sum = pair[n] + __shfl_xor_sync(kWarp, pair[n], 1);
      if (t % 2 == 0 && n * 2 + t / 2 < room) to[n * 2 + t / 2] = sum;
    }
  } else {
    constexpr int kTogether = kWidth / 8;
#pragma unroll
    for (int block = 0; block < 8 / kTogether; ++block) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) sum += pair[block * kTogether + i];
      sum += __shfl_xor_sync(kWarp, sum, 1);
      sum += __shfl_xor_sync(kWarp, sum, 2);
      if (t == block % 4 && block < room) to[block] = sum;
    }
  }
}

template <typename T>
__device__ __forceinline__ void estimate(const AdaptiveArgs& args, const Plan& plan, unsigned char* stages,
                                         Shared<T>& shared, int64_t job, float* part, float* then) {
  const auto [head, first_group] = plan.place(job);
  const int64_t b = head / args.heads_q, h = head % args.heads_q;
  const int64_t start = start_of(args, b);
  const uint32_t stride = static_cast<uint32_t>(args.stride);
  // What a row or an operand needs waits in shared memory: registers are short while tiles multiply.
  if (threadIdx.x == 0) {
    shared.q = {
        tokens_of<T>(args.q, b, h),     args.q.token,      static_cast<uint32_t>(first_group) * stride, stride, 1, 0,
        static_cast<uint32_t>(args.nq), plan.query_vectors};
    shared.k = {
        tokens_of<T>(args.k, b, kv_head_of(args, h)), args.k.token,    0, stride, -1, static_cast<uint32_t>(start),
        static_cast<uint32_t>(args.nk - start),       plan.key_vectors};
  }
  const float scale = args.scale / static_cast<float>(args.stride) * kLog2E;
  const int seen_begin = static_cast<int>(start / args.stride);
  const int64_t last_group =
      first_group + kGroups < plan.query_groups ? first_group + kGroups - 1 : plan.query_groups - 1;
  const int tiles_end = seen_end(args, plan, start, last_group);
  Tile<T> tile;
  for (int row = static_cast<int>(threadIdx.x); row < kGroups; row += kThreads) {
    shared.top[0][row] = shared.top[1][row] = -INFINITY;
    shared.sum[0][row] = shared.sum[1][row] = 0.0f;
    shared.seen_end[row] = seen_end(args, plan, start, first_group + row);
  }
  for (int first = seen_begin / kTileGroups * kTileGroups; first < tiles_end; first += kTileGroups) {
    if (threadIdx.x == 0) shared.k.first = static_cast<uint32_t>(first) * stride + stride - 1;
    __syncthreads();
    tile.multiply(stages, shared.q, shared.k, args.stride, static_cast<int>(args.head_dim));
    const int half = first / kHalf + tile.warp_column();
    const int first_block = half * kHalf / plan.groups_per_block;
    const int room = static_cast<int>(plan.block_pitch) - first_block;
    float* to = part + tile.row(0, 0) * plan.block_pitch + first_block;
    float* then_to = then + tile.row(0, 0) * plan.half_pitch + half;
#pragma unroll
    for (int r = 0; r < 4; ++r, to += 8 * plan.block_pitch, then_to += 8 * plan.half_pitch) {
      const int row = tile.row(0, 0) + 8 * r;
      // Groups that the row sees, counted from the tile's first.
      const int begin = seen_begin - first, end = shared.seen_end[row] - first;
      float& top = shared.top[tile.warp_column()][row];
      float& sum = shared.sum[tile.warp_column()][row];
      const float last_top = top, last_sum = sum;
      float best = last_top;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = tile.score[r / 2][n][r % 2 * 2 + i];
          const int column = tile.column(n, i);
          x = column >= begin && column < end ? x * scale : -INFINITY;
          best = fmaxf(best, x);
        }
      }
      best = fmaxf(best, __shfl_xor_sync(kWarp, best, 1));
      best = fmaxf(best, __shfl_xor_sync(kWarp, best, 2));
      const float shift = best == -INFINITY ? 0.0f : best;
      float pair[8], total = 0.0f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float* x = &tile.score[r / 2][n][r % 2 * 2];
        pair[n] = exp2f(x[0] - shift) + exp2f(x[1] - shift);
        total += pair[n];
      }
      total += __shfl_xor_sync(kWarp, total, 1);
      total += __shfl_xor_sync(kWarp, total, 2);
      if (lane_id() % 4 == 0) {
        top = best;
        sum = last_sum * exp2f(last_top - shift) + total;
        *then_to = best;
      }
      switch (plan.groups_per_block) {
        case 2:
          store_parts<2>(pair, to, room);
          break;
        case 4:
          store_parts<4>(pair, to, room);
          break;
        case 8:
          store_parts<8>(pair, to, room);
          break;
        case 16:
          store_parts<16>(pair, to, room);
          break;
        default:
          store_parts<32>(pair, to, room);
      }
    }
  }
}

// Joins the halves: top[0] becomes a query group's maximum, sum[0] one over its sum (0 if it sees nothing).
template <typename T>
__device__ __forceinline__ void join_halves(Shared<T>& shared) {
  const int g = static_cast<int>(threadIdx.x);
  if (g >= kGroups) return;
  const float best = fmaxf(shared.top[0][g], shared.top[1][g]), shift = best == -INFINITY ? 0.0f : best;
  const float total =
      shared.sum[0][g] * exp2f(shared.top[0][g] - shift) + shared.sum[1][g] * exp2f(shared.top[1][g] - shift);
  shared.top[0][g] = shift;
  shared.sum[0][g] = total == 0.0f ? 0.0f : 1.0f / total;
}

// By a warp: the mass of the row's visible blocks, into the first line of its parts. With samples, the largest part.
template <bool kLargest, typename T>
__device__ __forceinline__ void gather_mass(const Plan& plan, const Shared<T>& shared, const RowBlocks& row,
                                            int first_group, float* part, const float* then) {
  for (int block = row.begin + static_cast<int>(lane_id()); block < row.end; block += 32) {
    const int64_t half = static_cast<int64_t>(block) * plan.groups_per_block / kHalf;
    float mass = 0.0f;
    for (int g = first_group; g < first_group + plan.groups_per_row; ++g) {
      const float factor = exp2f(then[g * plan.half_pitch + half] - shared.top[0][g]) * shared.sum[0][g];
      const float share = part[g * plan.block_pitch + block] * factor;
      mass = kLargest ? fmaxf(mass, share) : mass + share;
    }
    part[first_group * plan.block_pitch + block] = mass;
  }
}

// The sampled queries of a job's rows from `base` on: what each has of every run of 64 keys.
template <typename T>
__device__ __forceinline__ void score_samples(const AdaptiveArgs& args, const Plan& plan, unsigned char* stages,
                                              Shared<T>& shared, const JobRows& given, int base) {
  const int64_t b = given.batch(args), h = given.head % args.heads_q, first_row = given.first + base;
  const int rows = given.count - base < plan.rows_sampled ? given.count - base : plan.rows_sampled;
  const int start = static_cast<int>(start_of(args, b)), offset = static_cast<int>(args.nk - args.nq);
  const int samples = static_cast<int>(args.samples);
  if (threadIdx.x == 0) {
    shared.sampled = {shared.sampled_row, plan.query_vectors};
    shared.k = {tokens_of<T>(args.k, b, kv_head_of(args, h)), args.k.token,    0, 1, 0, static_cast<uint32_t>(start),
                static_cast<uint32_t>(args.nk - start),       plan.key_vectors};
  }
  for (int s = static_cast<int>(threadIdx.x); s < kSampled; s += kThreads) {
    // Spread evenly, the last one being the row's last query.
    const int64_t end = (first_row + s / samples) * args.block_q + (s % samples + 1) * args.block_q / samples;
    const int query = s < rows * samples ? static_cast<int>(end < args.nq ? end : args.nq) - 1 : -1;
    shared.sampled_row[s] = query < 0 ? nullptr : tokens_of<T>(args.q, b, h) + query * args.q.token;
    shared.seen_end[s] = query < 0 ? 0 : query + offset + 1;
  }
  const float scale = args.scale * kLog2E;
  const int64_t queries_end = (first_row + rows) * args.block_q;
  const int tiles_end = static_cast<int>(queries_end < args.nq ? queries_end : args.nq) + offset;
  SampleTile<T> tile;
  for (int first = start / kSampleKeys * kSampleKeys; first < tiles_end; first += kSampleKeys) {
    if (threadIdx.x == 0) shared.k.first = static_cast<uint32_t>(first);
    __syncthreads();
    tile.multiply(stages, shared.sampled, shared.k, 1, static_cast<int>(args.head_dim));
    float* to = plan.lse + (static_cast<int64_t>(blockIdx.x) * kSampled + tile.row(0, 0)) * plan.run_pitch +
                first / kRun + tile.warp_column();
#pragma unroll
    for (int r = 0; r < 4; ++r, to += 8 * plan.run_pitch) {
      const int row = tile.row(0, 0) + 8 * r;
      // Keys that the query sees, counted from the tile's first.
      const int begin = start - first, end = shared.seen_end[row] - first;
      float best = -INFINITY;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = tile.score[r / 2][n][r % 2 * 2 + i];
          const int column = tile.column(n, i);
          x = column >= begin && column < end ? x * scale : -INFINITY;
          best = fmaxf(best, x);
        }
      }
      best = fmaxf(best, __shfl_xor_sync(kWarp, best, 1));
      best = fmaxf(best, __shfl_xor_sync(kWarp, best, 2));
      const float shift = best == -INFINITY ? 0.0f : best;
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float* x = &tile.score[r / 2][n][r % 2 * 2];
        total += exp2f(x[0] - shift) + exp2f(x[1] - shift);
      }
      total += __shfl_xor_sync(kWarp, total, 1);
      total += __shfl_xor_sync(kWarp, total, 2);
      if (lane_id() % 4 == 0) *to = shift + log2f(total);
    }
  }
}

// By a warp: raises the mass of the row's visible blocks to the shares of its sampled queries.
__device__ __forceinline__ void add_samples(const Plan& plan, const RowBlocks& row, int samples, const float* lse,
                                            float* mass) {
  const int lane = static_cast<int>(lane_id()), runs = plan.runs_per_block;
  for (int s = 0; s < samples; ++s, lse += plan.run_pitch) {
    float best = -INFINITY, total = 0.0f;
    for (int run = row.begin * runs + lane; run < row.end * runs; run += 32) best = fmaxf(best, lse[run]);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) best = fmaxf(best, __shfl_xor_sync(kWarp, best, step));
    if (best == -INFINITY) continue;  // it stands in the padding
    for (int run = row.begin * runs + lane; run < row.end * runs; run += 32) total += exp2f(lse[run] - best);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(kWarp, total, step);
    const float all = best + log2f(total);
    for (int block = row.begin + lane; block < row.end; block += 32) {
      float share = 0.0f;
      for (int run = block * runs; run < (block + 1) * runs; ++run) share += exp2f(lse[run] - all);
      mass[block] = fmaxf(mass[block], share);
    }
  }
}

// Raises the mass of a job's rows to the shares of their sampled queries.
template <typename T>
__device__ __forceinline__ void take_samples(const AdaptiveArgs& args, const Plan& plan, unsigned char* stages,
                                             Shared<T>& shared, float* part) {
  for (int base = 0; base < kGroups / plan.groups_per_row; base += plan.rows_sampled) {
    __syncthreads();  // the last rows' scores are read
    if (base >= JobRows(plan, shared.job).count) return;
    score_samples(args, plan, stages, shared, JobRows(plan, shared.job), base);
    __syncthreads();
    const JobRows given(plan, shared.job);
    const float* lse = plan.lse + static_cast<int64_t>(blockIdx.x) * kSampled * plan.run_pitch;
    for (int at = warp_id(); at < plan.rows_sampled && base + at < given.count; at += kThreads / 32) {
      add_samples(plan, RowBlocks(args, given.batch(args), given.first + base + at), static_cast<int>(args.samples),
                  lse + at * args.samples * plan.run_pitch,
                  part + (base + at) * plan.groups_per_row * plan.block_pitch);
    }
  }
  __syncthreads();
}

// By a warp: forced blocks, then the heaviest until they hold `threshold` of the mass, at most `capacity` of them.
// All mass together is no more than `full`.
__device__ __forceinline__ Cut choose(const RowBlocks& row, const float* mass, float threshold, int full,
                                      uint32_t capacity) {
  const float unit = kWeightOne / static_cast<float>(full);
  const auto key = [&](int block) { return row.forced(block) ? kForced : key_of(mass[block]); };
  const auto weight = [&](int block) {
    const float x = mass[block] * unit;  // a row's sum to 2^31, or hardly more
    return x > 0.0f ? __float2uint_rn(fminf(x, kWeightOne)) : 0u;
  };
  const uint32_t forced = census(row.begin, row.end, key, weight, kForced).at;
  const uint32_t total = census(row.begin, row.end, key, weight, 0).weight_above;
  const double share = threshold < 1.0f ? static_cast<double>(threshold) : 1.0;
  const uint32_t goal = share > 0.0 ? static_cast<uint32_t>(ceil(share * static_cast<double>(total))) : 0;
  Cut cut{kForced - 1, 0};  // the forced ones alone
  uint32_t taken = forced;
  if (goal > 0) {
    const uint32_t key_at = cut_by_weight(row.begin, row.end, key, weight, goal);
    if (key_at != kForced) {
      const Census here = census(row.begin, row.end, key, weight, key_at);
      const uint32_t missing = goal > here.weight_above ? goal - here.weight_above : 0, one = here.weight_of_one;
      const uint32_t ties = one == 0 ? here.at : (missing - (missing > 0)) / one + (missing > 0);
      cut = {key_at, ties < here.at ? ties : here.at};
      taken = here.above + cut.ties;
    }
  }
  return taken > capacity ? cut_by_count(row.begin, row.end, key, capacity) : cut;
}

template <typename T, bool kWithSamples>
__global__ void __launch_bounds__(kThreads, std::is_same_v<T, float> || kWithSamples ? 1 : 2)
    adaptive_kernel(const AdaptiveArgs args, const Plan plan) {
  unsigned char* stages = shared_memory();
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(stages + Tile<T>::kSharedBytes);
  float* part = plan.part + static_cast<int64_t>(blockIdx.x) * kGroups * plan.block_pitch;
  float* then = plan.then + static_cast<int64_t>(blockIdx.x) * kGroups * plan.half_pitch;
  const int64_t jobs = plan.heads * plan.chunks;
  for (;;) {
    const int64_t job = next_job(plan.counter, &shared.job);
    if (job >= jobs) return;
    estimate<T>(args, plan, stages, shared, job, part, then);
    __syncthreads();
    join_halves(shared);
    __syncthreads();
    if constexpr (kWithSamples) {
      const JobRows given(plan, shared.job);
      for (int at = warp_id(); at < given.count; at += kThreads / 32) {
        gather_mass<true>(plan, shared, RowBlocks(args, given.batch(args), given.first + at), at * plan.groups_per_row,
                          part, then);
      }
      take_samples<T>(args, plan, stages, shared, part);
    }
    const JobRows given(plan, shared.job);
    const float threshold =
        args.head_threshold == nullptr ? args.threshold : args.head_threshold[given.head % args.heads_q];
    const int groups = plan.groups_per_row, samples = kWithSamples ? static_cast<int>(args.samples) : 0;
    for (int at = warp_id(); at < given.count; at += kThreads / 32) {
      const int64_t r = given.first + at;
      const RowBlocks row(args, given.batch(args), r);
      if constexpr (!kWithSamples) gather_mass<false>(plan, shared, row, at * groups, part, then);
      const float* mass = part + at * groups * plan.block_pitch;
      const Cut cut = choose(row, mass, threshold, groups + samples, static_cast<uint32_t>(args.block_capacity));
      const auto key = [&](int block) { return row.forced(block) ? kForced : key_of(mass[block]); };
      const int64_t to = given.head * plan.rows + r;
      int32_t* index = args.block_index + to * args.block_capacity;
      const int written = compact(row.begin, row.end, key, cut, index);
      clear_rest(index, written, args.block_capacity);
      if (lane_id() == 0) args.block_count[to] = written;
    }
  }
}

// --- host ---------------------------------------------------------------------------------------------------------

Plan plan_of(const AdaptiveArgs& args, Carver& carver) {
  Plan plan{};
  plan.heads = args.batch * args.heads_q;
  plan.rows = ceil_div(args.nq, args.block_q);
  plan.query_groups = ceil_div(args.nq, args.stride);
  plan.chunks = ceil_div(plan.query_groups, kGroups);
  plan.block_pitch = round_up(ceil_div(args.nk, args.block_k), 32);
  plan.half_pitch = round_up(ceil_div(args.nk, args.stride), kTileGroups) / kHalf;
  plan.run_pitch = round_up(args.nk, kSampleKeys) / kRun;
  plan.groups_per_row = args.block_q / args.stride;
  plan.groups_per_block = args.block_k / args.stride;
  plan.runs_per_block = args.block_k / kRun;
  plan.rows_sampled = args.samples > 0 ? kSampled / static_cast<int>(args.samples) : 0;
  plan.query_vectors = reads_query_vectors(args);
  plan.key_vectors = reads_key_vectors(args);
  const int64_t resident = resident_blocks(plan.heads * plan.chunks);
  plan.part = carver.take<float>(resident * kGroups * plan.block_pitch);
  plan.then = carver.take<float>(resident * kGroups * plan.half_pitch);
  plan.lse = carver.take<float>(args.samples > 0 ? resident * kSampled * plan.run_pitch : 0);
  plan.counter = carver.take<unsigned long long>(1);
  return plan;
}

}  // namespace

int64_t adaptive_workspace(const AdaptiveArgs& args) {
  Carver carver(nullptr);
  plan_of(args, carver);
  return carver.bytes();
}

const char* adaptive_block_index(const AdaptiveArgs& args, void* workspace, CUstream_st* stream) {
  if (args.batch * args.heads_q == 0) return nullptr;
  Carver carver(workspace);
  const Plan plan = plan_of(args, carver);
  const char* error = zero(plan.counter, sizeof *plan.counter, stream);
  if (error != nullptr) return error;
  return by_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    return launch(args.samples > 0 ? adaptive_kernel<T, true> : adaptive_kernel<T, false>,
                  resident_blocks(plan.heads * plan.chunks), kThreads,
                  Tile<T>::kSharedBytes + static_cast<int>(sizeof(Shared<T>)), stream, args, plan);
  });
}

}  // namespace cuda
}  // namespace headstart

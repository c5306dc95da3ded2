// adaptive_block_index: computes antidiagonal scores, their softmax and the mass of every block, and chooses as many
// blocks as hold the goal.
//
// A query group and a key group are `stride` tokens each. The tokens of the key group are taken in reverse order. So
// the mean along the antidiagonal of their tile is one dot product of depth stride · D. A thread block fetches a job:
// 128 query groups of a head, longest first. It walks through the key groups that they may see, and then chooses the
// blocks of its rows:
//
//        128 key groups a tile                 One pass over the keys. For its 32 query groups and its half of every
//      ┌─────────┬─────────┐                   tile, each warp keeps the running maximum and sum. It writes to scratch:
//      │ warp 0  │ warp 1  │ ×4   128 query    for each query group and key block, the part, which is the sum of
//      │ 32 × 64 │         │      groups       exp2(score - maximum so far); for each half tile, that maximum.
//      └─────────┴─────────┘                   On Hopper, a warp has 16 query groups and both halves (score_tile.h).
//      Then one warp per row:  mass[block] = Σ over the row's query groups of part · exp2(maximum then - last) / sum
//                              cut by mass (select.h), forced blocks first; ids compacted in order
//
// With samples, mass[block] is the largest of the query groups' shares and of the exact shares of some queries of the
// row. 64 sampled queries are scored at a time, from as many of the job's rows as they fill:
//
//        256 keys a tile                       Gathered query rows · plain key rows, of depth D (single tokens).
//      ┌────────┬────────┬────────┬────────┐   Written to scratch for each query and run of 64 keys:
//      │ warp 0 │ warp 1 │ warp 2 │ warp 3 │ ×2     lse = maximum + log2 Σ exp2(score - maximum)
//      └────────┴────────┴────────┴────────┘   Then one warp per row: lse of all runs, share = Σ over the block's runs
//       32 × 64                                of exp2(lse of the run - lse of all), mass = max(mass, share)
//
// Floor: Nq · Nk · D / (2 · stride) multiply-adds per head (causal) at the tensor cores' rate. Operands stream from L2:
// 128 + 128 rows of 128 bytes for 128 · 128 · 64 multiply-adds, which a Hopper's tensor cores do in 512 cycles. There,
// two thread blocks share a multiprocessor: one multiplies while the other computes exponentials. Samples add Nq · Nk ·
// D · samples / (2 · block_q) multiply-adds if a job's rows fill tiles of 64. The scratch is [128, T] floats for each
// resident thread block, and [64, Nk / 64] more with samples. It does not depend on B, Hq and Nq. Shared memory: 3
// stages of 32 KiB; for samples, 2 stages of 40 KiB.

#include <cmath>

#include "prefill_index.h"

namespace headstart {
namespace cuda {
namespace {

template <typename T, bool kHopper>
using Tile = std::conditional_t<kHopper, GroupTile<T, 2, 1, 3>, ScoreTile<T, 4, 2, 3>>;
using AnyTile = Tile<float, false>;
constexpr int kGroups = AnyTile::kRows, kThreads = AnyTile::kThreads;
constexpr int kTileGroups = AnyTile::kColumns, kHalf = kTileGroups / 2;
constexpr float kWeightOne = 2147483648.0f;  // the mass of a full row, as an integer weight

template <typename T, bool kHopper>
using SampleTile = std::conditional_t<kHopper, GroupTile<T, 1, 2, 2>, ScoreTile<T, 2, 4, 2>>;
using AnySampleTile = SampleTile<float, false>;
constexpr int kSampled = AnySampleTile::kRows, kSampleKeys = AnySampleTile::kColumns;
constexpr int kRun = 64;  // the keys of a warp's part of a tile
static_assert(AnySampleTile::kThreads == kThreads, "both multiply on the same threads");
static_assert(AnySampleTile::kSharedBytes <= AnyTile::kSharedBytes, "and in the same stages");
template <typename T>
constexpr bool kSameTiles = Tile<T, true>::kRows == kGroups && Tile<T, true>::kColumns == kTileGroups &&
                            SampleTile<T, true>::kRows == kSampled && SampleTile<T, true>::kColumns == kSampleKeys &&
                            Tile<T, true>::kThreads == kThreads && SampleTile<T, true>::kThreads == kThreads &&
                            Tile<T, true>::kSharedBytes == AnyTile::kSharedBytes &&
                            SampleTile<T, true>::kSharedBytes == AnySampleTile::kSharedBytes;
static_assert(kSameTiles<BFloat16>, "a Hopper's tiles have the same shapes");

// The shared memory after the stages: operands, statistics of both halves of the tiles, and the job.
template <typename T>
struct Shared {
  TileRows<T> q, k;
  float top[2][kGroups], sum[2][kGroups];
  int first_half, seen_begin, seen_end[kGroups];
  GatheredRows<T> sampled;
  const T* sampled_row[kSampled];
  unsigned long long job;
};

struct Plan {
  int64_t heads, rows, query_groups, chunks;  // a chunk is kGroups query groups
  int64_t alone;  // the jobs with a multiprocessor of their own until the next job joins it; 0: not all run at once
  int64_t block_pitch, half_pitch;
  int64_t run_pitch;
  int groups_per_row, groups_per_block, runs_per_block;
  int rows_sampled;  // the rows whose samples are scored at a time
  bool query_vectors, key_vectors;
  float* part;  // [resident][kGroups][block_pitch]
  float* then;  // [resident][kGroups][half_pitch]: the maximum that was subtracted in the parts of a half tile
  float* lse;   // [resident][kSampled][run_pitch]: base-2 log-sum-exp of a sampled query's scores in a run of keys
  unsigned long long* counter;

  // The scratch of the calling block. Its address is computed each time, because registers are scarce.
  __device__ __forceinline__ float* own_part() const { return part + int64_t{block_id()} * kGroups * block_pitch; }
  __device__ __forceinline__ float* own_then() const { return then + int64_t{block_id()} * kGroups * half_pitch; }
  __device__ __forceinline__ float* own_lse() const { return lse + int64_t{block_id()} * kSampled * run_pitch; }

  struct Place {
    int64_t head, first_group;
  };
  // Later groups see more keys, so the last chunk of a head comes first. Thread blocks that run at the same time share
  // the head's keys in L2. If all jobs run at once, up to two on a multiprocessor, a long one runs beside a short one:
  // the first jobs, one on each multiprocessor, go from the longest down, and the others from the shortest up.
  __device__ __forceinline__ Place place(int64_t job) const {
    const int64_t jobs = heads * chunks;
    if (alone == 0) return {job / chunks, (chunks - 1 - job % chunks) * kGroups};
    const int64_t order = job < alone ? job : jobs - 1 - (job - alone);
    return {order % heads, (chunks - 1 - order / heads) * kGroups};
  }
};

// The rows of queries whose blocks a job chooses. They are computed from the job's number each time, because registers
// are scarce.
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

__device__ __forceinline__ int warp_id() { return static_cast<int>(thread_id() / 32); }

// The end of the key groups [start / stride, end) that a query group sees. 0 if it sees none.
__device__ __forceinline__ int seen_end(const AdaptiveArgs& args, const Plan& plan, int64_t start, int64_t group) {
  if (group >= plan.query_groups) return 0;
  const int64_t end = (group + 1) * args.stride < args.nq ? (group + 1) * args.stride : args.nq;
  const int64_t last = end - 1 + args.nk - args.nq;
  return last < start ? 0 : static_cast<int>(last / args.stride + 1);
}

// Adds up a row's weights in a half tile over key blocks of kWidth groups. Writes the sums to to[0], to[1], ... in the
// order of the keys, at most `room` of them.
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

// Scales the scores of a slice, sets those outside the columns [begin, end) to -inf, and returns the largest of them
// and of `best`.
template <typename AnyScores>
__device__ __forceinline__ float slice_maximum(AnyScores& tile, int r, float scale, int begin, int end, float best) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) tile.at(r, n, i) *= scale;
  }
  if (begin > 0 || end < kRun) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = run_column(n, i);
        if (column < begin || column >= end) tile.at(r, n, i) = -INFINITY;
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 8; ++n) best = fmaxf(best, fmaxf(tile.at(r, n, 0), tile.at(r, n, 1)));
  best = fmaxf(best, __shfl_xor_sync(kWarp, best, 1));
  return fmaxf(best, __shfl_xor_sync(kWarp, best, 2));
}

template <typename T, bool kHopper>
__device__ __forceinline__ void estimate(const AdaptiveArgs& args, const Plan& plan, unsigned char* stages,
                                         Shared<T>& shared, int64_t job) {
  const auto [head, first_group] = plan.place(job);
  const int64_t b = head / args.heads_q, h = head % args.heads_q;
  const int64_t start = start_of(args, b);
  const uint32_t stride = static_cast<uint32_t>(args.stride);
  const float scale = args.scale / static_cast<float>(args.stride) * kLog2E;
  const int seen_begin = static_cast<int>(start / args.stride);
  const int64_t last_group =
      first_group + kGroups < plan.query_groups ? first_group + kGroups - 1 : plan.query_groups - 1;
  const int tiles_begin = seen_begin / kTileGroups * kTileGroups, tiles_end = seen_end(args, plan, start, last_group);
  // Keep the data of rows and operands in shared memory, because registers are scarce while tiles multiply.
  if (threadIdx.x == 0) {
    shared.first_half = tiles_begin / kHalf;
    shared.seen_begin = seen_begin;
    shared.q = {
        tokens_of<T>(args.q, b, h),     args.q.token,      static_cast<uint32_t>(first_group) * stride, stride, 1, 0,
        static_cast<uint32_t>(args.nq), plan.query_vectors};
    shared.k = {tokens_of<T>(args.k, b, kv_head_of(args, h)),
                args.k.token,
                static_cast<uint32_t>(tiles_begin) * stride + stride - 1,
                stride,
                -1,
                static_cast<uint32_t>(start),
                static_cast<uint32_t>(args.nk - start),
                plan.key_vectors,
                kTileGroups * stride};
  }
  for (int row = static_cast<int>(thread_id()); row < kGroups; row += kThreads) {
    shared.top[0][row] = shared.top[1][row] = -INFINITY;
    shared.sum[0][row] = shared.sum[1][row] = 0.0f;
    shared.seen_end[row] = seen_end(args, plan, start, first_group + row);
  }
  __syncthreads();
  Tile<T, kHopper> tile;
  const TileDepth depth{(tiles_end - tiles_begin + kTileGroups - 1) / kTileGroups, args.stride,
                        static_cast<int>(args.head_dim)};
  tile.begin(stages, shared.q, shared.k, depth);
  for (int t = 0; t < depth.tiles; ++t) {
    tile.next(stages, shared.q, shared.k, depth);
    float *part = plan.own_part(), *then = plan.own_then();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = tile.slice_row(r), half = shared.first_half + 2 * t + tile.slice_run(r);
      const int first_block = half * kHalf / plan.groups_per_block;
      const int room = static_cast<int>(plan.block_pitch) - first_block;
      float* to = part + row * plan.block_pitch + first_block;
      // The key groups [begin, end) that the row sees, counted from the half tile's first group.
      const int begin = shared.seen_begin - half * kHalf, end = shared.seen_end[row] - half * kHalf;
      float& top = shared.top[tile.slice_run(r)][row];
      float& sum = shared.sum[tile.slice_run(r)][row];
      const bool keeps = lane_id() % 4 == 0;  // the lane that alone reads and writes the row's maximum and sum
      const float last_top = keeps ? top : -INFINITY, last_sum = keeps ? sum : 0.0f;
      float best = slice_maximum(tile, r, scale, begin, end, last_top);
      const float shift = best == -INFINITY ? 0.0f : best;
      float pair[8], total = 0.0f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        pair[n] = exp2_or_zero(tile.at(r, n, 0) - shift) + exp2_or_zero(tile.at(r, n, 1) - shift);
        total += pair[n];
      }
      total += __shfl_xor_sync(kWarp, total, 1);
      total += __shfl_xor_sync(kWarp, total, 2);
      if (keeps) {
        top = best;
        sum = last_sum * exp2f(last_top - shift) + total;
        then[row * plan.half_pitch + half] = best;
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

// Merges the halves. top[0] becomes a query group's maximum, and sum[0] becomes 1 / its sum, or 0 if it sees nothing.
template <typename T>
__device__ __forceinline__ void join_halves(Shared<T>& shared) {
  const int g = static_cast<int>(thread_id());
  if (g >= kGroups) return;
  const float best = fmaxf(shared.top[0][g], shared.top[1][g]), shift = best == -INFINITY ? 0.0f : best;
  const float total =
      shared.sum[0][g] * exp2f(shared.top[0][g] - shift) + shared.sum[1][g] * exp2f(shared.top[1][g] - shift);
  shared.top[0][g] = shift;
  shared.sum[0][g] = total == 0.0f ? 0.0f : 1.0f / total;
}

// A warp computes the mass of the row's visible blocks and writes it to the first line of the row's parts. With
// kLargest, the mass is the largest share of a query group; otherwise it is the sum of the shares.
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

// Scores the sampled queries of up to rows_sampled of a job's rows, from row `base` on. Writes the lse of every query
// and run of 64 keys.
template <typename T, bool kHopper>
__device__ __forceinline__ void score_samples(const AdaptiveArgs& args, const Plan& plan, unsigned char* stages,
                                              Shared<T>& shared, const JobRows& given, int base) {
  const int64_t b = given.batch(args), h = given.head % args.heads_q, first_row = given.first + base;
  const int rows = given.count - base < plan.rows_sampled ? given.count - base : plan.rows_sampled;
  const int start = static_cast<int>(start_of(args, b)), offset = static_cast<int>(args.nk - args.nq);
  const int samples = static_cast<int>(args.samples);
  const int tiles_begin = start / kSampleKeys * kSampleKeys;
  if (threadIdx.x == 0) {
    shared.sampled = {shared.sampled_row, plan.query_vectors};
    shared.k = {tokens_of<T>(args.k, b, kv_head_of(args, h)),
                args.k.token,
                static_cast<uint32_t>(tiles_begin),
                1,
                0,
                static_cast<uint32_t>(start),
                static_cast<uint32_t>(args.nk - start),
                plan.key_vectors,
                kSampleKeys};
  }
  for (int s = static_cast<int>(thread_id()); s < kSampled; s += kThreads) {
    // The samples are spread evenly, and the last one is the row's last query.
    const int64_t end = (first_row + s / samples) * args.block_q + (s % samples + 1) * args.block_q / samples;
    const int query = s < rows * samples ? static_cast<int>(end < args.nq ? end : args.nq) - 1 : -1;
    shared.sampled_row[s] = query < 0 ? nullptr : tokens_of<T>(args.q, b, h) + query * args.q.token;
    shared.seen_end[s] = query < 0 ? 0 : query + offset + 1;
  }
  const float scale = args.scale * kLog2E;
  const int64_t queries_end = (first_row + rows) * args.block_q;
  const int tiles_end = static_cast<int>(queries_end < args.nq ? queries_end : args.nq) + offset;
  __syncthreads();
  SampleTile<T, kHopper> tile;
  const TileDepth depth{(tiles_end - tiles_begin + kSampleKeys - 1) / kSampleKeys, 1, static_cast<int>(args.head_dim)};
  tile.begin(stages, shared.sampled, shared.k, depth);
  for (int first = tiles_begin; first < tiles_end; first += kSampleKeys) {
    tile.next(stages, shared.sampled, shared.k, depth);
    float* lse = plan.own_lse();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = tile.slice_row(r), run = first / kRun + tile.slice_run(r);
      // The keys that the query sees, counted from the run's first key.
      const int begin = start - run * kRun, end = shared.seen_end[row] - run * kRun;
      const float best = slice_maximum(tile, r, scale, begin, end, -INFINITY);
      const float shift = best == -INFINITY ? 0.0f : best;
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        total += exp2_or_zero(tile.at(r, n, 0) - shift) + exp2_or_zero(tile.at(r, n, 1) - shift);
      }
      total += __shfl_xor_sync(kWarp, total, 1);
      total += __shfl_xor_sync(kWarp, total, 2);
      if (lane_id() % 4 == 0) {
        lse[row * plan.run_pitch + run] = shift + log2f(total);
      }
    }
  }
}

// A warp raises the mass of the row's visible blocks to the shares of its sampled queries.
__device__ __forceinline__ void add_samples(const Plan& plan, const RowBlocks& row, int samples, const float* lse,
                                            float* mass) {
  const int lane = static_cast<int>(lane_id()), runs = plan.runs_per_block;
  for (int s = 0; s < samples; ++s, lse += plan.run_pitch) {
    float best = -INFINITY, total = 0.0f;
    for (int run = row.begin * runs + lane; run < row.end * runs; run += 32) best = fmaxf(best, lse[run]);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) best = fmaxf(best, __shfl_xor_sync(kWarp, best, step));
    if (best == -INFINITY) continue;  // the query is in the padding
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
template <typename T, bool kHopper>
__device__ __forceinline__ void take_samples(const AdaptiveArgs& args, const Plan& plan, unsigned char* stages,
                                             Shared<T>& shared) {
  for (int base = 0; base < kGroups / plan.groups_per_row; base += plan.rows_sampled) {
    __syncthreads();  // all warps have read the scores of the previous rows
    if (base >= JobRows(plan, shared.job).count) return;
    score_samples<T, kHopper>(args, plan, stages, shared, JobRows(plan, shared.job), base);
    __syncthreads();
    const JobRows given(plan, shared.job);
    const float* lse = plan.own_lse();
    float* part = plan.own_part();
    for (int at = warp_id(); at < plan.rows_sampled && base + at < given.count; at += kThreads / 32) {
      add_samples(plan, RowBlocks(args, given.batch(args), given.first + base + at), static_cast<int>(args.samples),
                  lse + at * args.samples * plan.run_pitch,
                  part + (base + at) * plan.groups_per_row * plan.block_pitch);
    }
  }
  __syncthreads();
}

// A warp chooses the forced blocks and then the heaviest blocks until the blocks hold `threshold` of the mass. It
// chooses at most `capacity` blocks. The total mass is at most `full`.
__device__ __forceinline__ Cut choose(const RowBlocks& row, const float* mass, float threshold, int full,
                                      uint32_t capacity) {
  const float unit = kWeightOne / static_cast<float>(full);
  const auto key = [&](int block) { return row.forced(block) ? kForced : key_of(mass[block]); };
  const auto weight = [&](int block) {
    const float x = mass[block] * unit;  // a row's weights add up to 2^31, or slightly more
    return x > 0.0f ? __float2uint_rn(fminf(x, kWeightOne)) : 0u;
  };
  const uint32_t forced = census(row.begin, row.end, key, weight, kForced).at;
  const uint32_t total = census(row.begin, row.end, key, weight, 0).weight_above;
  const double share = threshold < 1.0f ? static_cast<double>(threshold) : 1.0;
  const uint32_t goal = share > 0.0 ? static_cast<uint32_t>(ceil(share * static_cast<double>(total))) : 0;
  Cut cut{kForced - 1, 0};  // only the forced blocks
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

template <typename T, bool kWithSamples, bool kHopper>
__global__ void __launch_bounds__(kThreads, kHopper || !(std::is_same_v<T, float> || kWithSamples) ? 2 : 1)
    adaptive_kernel(const AdaptiveArgs args, const Plan plan) {
#if !defined(HEADSTART_WGMMA) && !defined(HEADSTART_LANE_MODEL)
  if constexpr (kHopper) return;
#endif
  unsigned char* stages = shared_memory();
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(stages + AnyTile::kSharedBytes);
  const int64_t jobs = plan.heads * plan.chunks;
  for (;;) {
    const int64_t job = next_job(plan.counter, &shared.job);
    if (job >= jobs) return;
    estimate<T, kHopper>(args, plan, stages, shared, job);
    __syncthreads();
    join_halves(shared);
    __syncthreads();
    if constexpr (kWithSamples) {
      const JobRows given(plan, shared.job);
      for (int at = warp_id(); at < given.count; at += kThreads / 32) {
        gather_mass<true>(plan, shared, RowBlocks(args, given.batch(args), given.first + at), at * plan.groups_per_row,
                          plan.own_part(), plan.own_then());
      }
      take_samples<T, kHopper>(args, plan, stages, shared);
    }
    const JobRows given(plan, shared.job);
    const float threshold =
        args.head_threshold == nullptr ? args.threshold : args.head_threshold[given.head % args.heads_q];
    float *part = plan.own_part(), *then = plan.own_then();
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
  const int64_t jobs = plan.heads * plan.chunks, resident = resident_blocks(jobs);
  plan.alone = resident == jobs ? multiprocessors() : 0;
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
    const auto start = [&](auto kernel) {
      return launch(kernel, resident_blocks(plan.heads * plan.chunks), kThreads,
                    AnyTile::kSharedBytes + static_cast<int>(sizeof(Shared<T>)), stream, args, plan);
    };
    if constexpr (!std::is_same_v<T, float>) {
      if (has_warp_groups())
        return start(args.samples > 0 ? adaptive_kernel<T, true, true> : adaptive_kernel<T, false, true>);
    }
    return start(args.samples > 0 ? adaptive_kernel<T, true, false> : adaptive_kernel<T, false, false>);
  });
}

}  // namespace cuda
}  // namespace headstart

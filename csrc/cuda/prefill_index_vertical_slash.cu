// vertical_slash_index: the columns and bands of diagonals that the last queries attend most.
//
//   1 statistics   ─────────────── Nk ───────────────       A block takes 64 queries × a split of 1,024 to 4,096 keys,
//            64 q  │ split 0 │ split 1 │  ...        │      in tiles of 64 × 128 (score_tile.h). It keeps the maximum
//                  └─────────┴─────────┴─────────────┘      and sum of every query in registers and writes them.
//   2 combine      One warp per query merges these partial results to the maximum and 1 / sum.
//   3 sums         The tiles are computed again, as weights, in shared memory:
//
//                      128 keys              Thread j adds up column j, and diagonals j and j + 128. The diagonals of a
//                  ┌──────────────┐          split are added up in shared memory. At the end of the split, one warp per
//            64 q  │  ╲  ╲ │ ╲    │          band adds them up, each weighted by its share that falls in the band.
//                  └──────────────┘
//   4 select       Two blocks per head choose the columns and the bands (BlockSelect).
//   5 rows         One warp per row of the index: a kept band t is block (last key) / block_k - t.
//
// Scores are computed twice and not stored: last_q · Nk floats per head would be 32 MiB at 131,072 keys. Floor: 4 · B ·
// Hq · last_q · Nk · D multiply-adds in two passes, and twice the bytes of K. K comes from memory only once, because
// the heads of a group run side by side. Stored between the kernels: [B, Hq, Nk] column sums, and partial results of
// the splits.

#include <cmath>

#include "prefill_index.h"

namespace headstart {
namespace cuda {
namespace {

constexpr int kTileQ = 64, kTileK = 128;
constexpr int kThreads = 128;
constexpr int kWeightPitch = kTileK + 8;  // 8 rows of an accumulator fall in different banks
constexpr int kHalves = 2;                // two warps share a row of scores; each keeps its own statistics

template <typename T>
using Tile = ScoreTile<T, 2, 2, 2>;
static_assert(Tile<float>::kThreads == kThreads && Tile<float>::kRows == kTileQ && Tile<float>::kColumns == kTileK);
static_assert(kTileQ * kWeightPitch * 4 <= Tile<float>::kSharedBytes, "weights lie where the operands lay");

struct Plan {
  int64_t heads;  // batch · heads_q
  int last_q, query_tiles;
  int64_t split, splits;  // the keys of a split; the number of splits
  int bands;
  int split_bands;  // the most bands that a split can touch
  bool query_vectors, key_vectors;
  float* partial_top;  // [heads][splits][kHalves][query_tiles · 64]
  float* partial_sum;
  float* top;  // [heads][query_tiles · 64]
  float* inverse;
  float* column;       // [heads][nk]
  float* band_part;    // [heads][splits][split_bands]
  float* band;         // [heads][bands]
  int32_t* kept_band;  // [heads][block_capacity], ascending

  // The smallest offset (query position - key position) between one of the last queries and a key of split s, at least
  // 0.
  __device__ __forceinline__ int64_t first_offset(const VerticalSlashArgs& args, int64_t s) const {
    const int64_t end = (s + 1) * split < args.nk ? (s + 1) * split : args.nk;
    const int64_t offset = args.nk - last_q - (end - 1);
    return offset > 0 ? offset : 0;
  }
};

__host__ __device__ int64_t band_width(const PrefillIndexArgs& a) {
  return a.block_q > a.block_k ? a.block_q : a.block_k;
}

// The distance from a full row's last query to the end of its key block. 0 if block_q < block_k: then the distance
// alternates between rows.
__host__ __device__ int64_t edge(const PrefillIndexArgs& a) {
  return a.block_q >= a.block_k ? a.block_k - 1 - (a.nk - a.nq + a.block_q - 1) % a.block_k : 0;
}

template <typename T>
struct Operands {
  TileRows<T> q, k;
};

template <typename T>
constexpr int kOperandsEnd = Tile<T>::kSharedBytes + static_cast<int>(sizeof(Operands<T>));

// The queries of one thread block: the operands of their products with keys, in shared memory, and their positions.
template <typename T>
struct LastQueries {
  const VerticalSlashArgs& args;
  const Plan& plan;
  unsigned char* shared;  // stages, then operands
  int64_t start;
  int first;  // the tile's first query, counted among the last queries

  __device__ __forceinline__ Operands<T>& operands() const {
    return *reinterpret_cast<Operands<T>*>(shared + Tile<T>::kSharedBytes);
  }

  __device__ __forceinline__ LastQueries(const VerticalSlashArgs& args, const Plan& plan, unsigned char* shared,
                                         int64_t head)
      : args(args), plan(plan), shared(shared) {
    const int64_t b = head / args.heads_q, h = head % args.heads_q;
    start = start_of(args, b);
    if (threadIdx.x == 0) {
      const int64_t before = args.nq - plan.last_q;
      operands().q = {tokens_of<T>(args.q, b, h) + before * args.q.token,
                      args.q.token,
                      0,
                      1,
                      0,
                      0,
                      static_cast<uint32_t>(plan.last_q),
                      plan.query_vectors};
      operands().k = {
          tokens_of<T>(args.k, b, kv_head_of(args, h)), args.k.token,    0, 1, 0, static_cast<uint32_t>(start),
          static_cast<uint32_t>(args.nk - start),       plan.key_vectors};
    }
  }

  // Whether some query of the tile sees some key of the tile of keys.
  __device__ __forceinline__ bool sees(int64_t first_key) const {
    return first_key + kTileK > start && first_key <= args.nk - plan.last_q + first + kTileQ - 1;
  }

  // Multiplies the tile's queries with the keys from first_key on. All threads must call it.
  __device__ __forceinline__ void multiply(Tile<T>& tile, int64_t first_key) {
    if (threadIdx.x == 0) {
      operands().q.first = static_cast<uint32_t>(first);
      operands().k.first = static_cast<uint32_t>(first_key);
    }
    __syncthreads();
    tile.multiply(shared, operands().q, operands().k, 1, static_cast<int>(args.head_dim));
  }

  // Sets [begin, end) to the keys of the tile that the row's query sees, counted from the tile's first key.
  __device__ __forceinline__ void seen(int row, int64_t first_key, int& begin, int& end) const {
    const int64_t last = args.nk - plan.last_q + first + row - first_key;
    begin = static_cast<int>(start - first_key > 0 ? start - first_key : 0);
    end = first + row >= plan.last_q || last < 0 ? 0 : static_cast<int>(last < kTileK ? last + 1 : kTileK);
  }
};

// --- 1: statistics ------------------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads, std::is_same_v<T, float> ? 2 : 3)
    statistics_kernel(const VerticalSlashArgs args, const Plan plan) {
  const int64_t split = blockIdx.x % plan.splits, rest = blockIdx.x / plan.splits;
  const int64_t head = rest / plan.query_tiles;
  LastQueries<T> queries(args, plan, shared_memory(), head);
  queries.first = static_cast<int>(rest % plan.query_tiles) * kTileQ;
  const float scale = args.scale * kLog2E;
  // Maximum and sum of the lane's own columns. Lanes are merged at the end, warps and splits in the next kernel.
  float top[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  Tile<T> tile;
  const int64_t end_key = (split + 1) * plan.split < args.nk ? (split + 1) * plan.split : args.nk;
  for (int64_t first_key = split * plan.split; first_key < end_key; first_key += kTileK) {
    if (!queries.sees(first_key)) continue;
    queries.multiply(tile, first_key);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      int begin, end;
      queries.seen(tile.row(r / 2, r % 2), first_key, begin, end);
      float best = top[r];
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
      const float shift = best == -INFINITY ? 0.0f : best;
      float total = sum[r] * exp2f(top[r] - shift);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) total += exp2f(tile.score[r / 2][n][r % 2 * 2 + i] - shift);
      }
      top[r] = best;
      sum[r] = total;
    }
  }
  const int64_t row0 = ((head * plan.splits + split) * kHalves + tile.warp_column()) * plan.query_tiles * kTileQ;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    float best = fmaxf(top[r], __shfl_xor_sync(kWarp, top[r], 1));
    best = fmaxf(best, __shfl_xor_sync(kWarp, best, 2));
    float total = sum[r] * exp2f(top[r] - (best == -INFINITY ? 0.0f : best));
    total += __shfl_xor_sync(kWarp, total, 1);
    total += __shfl_xor_sync(kWarp, total, 2);
    if (lane_id() % 4 == 0) {
      const int64_t at = row0 + queries.first + tile.row(r / 2, r % 2);
      plan.partial_top[at] = best;
      plan.partial_sum[at] = total;
    }
  }
}

// --- 2: combine ---------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) combine_kernel(const Plan plan) {
  const int64_t rows = static_cast<int64_t>(plan.query_tiles) * kTileQ;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (at >= plan.heads * rows) return;
  const int64_t first = at / rows * plan.splits * kHalves * rows + at % rows, parts = plan.splits * kHalves;
  float top = -INFINITY;
  for (int64_t i = lane_id(); i < parts; i += 32) top = fmaxf(top, plan.partial_top[first + i * rows]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));
  const float shift = top == -INFINITY ? 0.0f : top;
  float sum = 0.0f;
  for (int64_t i = lane_id(); i < parts; i += 32) {
    sum += plan.partial_sum[first + i * rows] * exp2f(plan.partial_top[first + i * rows] - shift);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kWarp, sum, step);
  if (lane_id() == 0) {
    plan.top[at] = shift;
    plan.inverse[at] = sum == 0.0f ? 0.0f : 1.0f / sum;
  }
}

// --- 3: sums of columns and bands ---------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads, std::is_same_v<T, float> ? 2 : 3)
    sums_kernel(const VerticalSlashArgs args, const Plan plan) {
  unsigned char* shared = shared_memory();
  float* weights = reinterpret_cast<float*>(shared);                     // [64][kWeightPitch]
  float* diagonal = reinterpret_cast<float*>(shared + kOperandsEnd<T>);  // [split + 64]
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t split = blockIdx.x % plan.splits, head = blockIdx.x / plan.splits;
  const int64_t key0 = split * plan.split, end_key = key0 + plan.split < args.nk ? key0 + plan.split : args.nk;
  float* column = plan.column + head * args.nk;
  float* bands = plan.band_part + (head * plan.splits + split) * plan.split_bands;
  for (int i = thread; i < plan.split_bands; i += kThreads) bands[i] = 0.0f;
  for (int64_t i = key0 + thread; i < end_key; i += kThreads) column[i] = 0.0f;
  const float scale = args.scale * kLog2E;
  LastQueries<T> queries(args, plan, shared, head);
  Tile<T> tile;
  for (int query_tile = 0; query_tile < plan.query_tiles; ++query_tile) {
    queries.first = query_tile * kTileQ;
    const int64_t row0 = head * plan.query_tiles * kTileQ + queries.first;
    for (int64_t i = thread; i < plan.split + kTileQ; i += kThreads) diagonal[i] = 0.0f;
    __syncthreads();
    for (int64_t first_key = key0; first_key < end_key; first_key += kTileK) {
      if (!queries.sees(first_key)) continue;
      queries.multiply(tile, first_key);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = tile.row(r / 2, r % 2);
        const float top = plan.top[row0 + row], inverse = plan.inverse[row0 + row];
        int begin, end;
        queries.seen(row, first_key, begin, end);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          float2 pair;
          const int at = tile.column(n, 0);
          const float* x = &tile.score[r / 2][n][r % 2 * 2];
          pair.x = at >= begin && at < end ? exp2f(x[0] * scale - top) * inverse : 0.0f;
          pair.y = at + 1 >= begin && at + 1 < end ? exp2f(x[1] * scale - top) * inverse : 0.0f;
          *reinterpret_cast<float2*>(weights + row * kWeightPitch + at) = pair;
        }
      }
      __syncthreads();
      float down = 0.0f;
      for (int row = 0; row < kTileQ; ++row) down += weights[row * kWeightPitch + thread];
      if (first_key + thread < end_key) column[first_key + thread] += down;
      // Diagonal d of the tile consists of the weights (row, d + row - 63).
      for (int d = thread; d < kTileK + kTileQ - 1; d += kThreads) {
        const int begin = d < kTileQ - 1 ? kTileQ - 1 - d : 0;
        const int end = kTileK + kTileQ - 1 - d < kTileQ ? kTileK + kTileQ - 1 - d : kTileQ;
        float along = 0.0f;
        for (int row = begin; row < end; ++row) along += weights[row * kWeightPitch + d + row - (kTileQ - 1)];
        diagonal[first_key - key0 + d] += along;
      }
      __syncthreads();
    }
    const int64_t width = band_width(args), first_edge = edge(args);
    const int64_t first_band = (plan.first_offset(args, split) + first_edge) / args.block_k;
    // diagonal[c] has the offset zero_offset - c. With x = offset + edge, it covers [x, x + width). A band takes the
    // part that lies inside the band.
    const int64_t zero_offset = args.nk - plan.last_q + queries.first - key0 + kTileQ - 1;
    const int64_t size = plan.split + kTileQ;
    for (int i = thread / 32; i < plan.split_bands; i += kThreads / 32) {
      const int64_t low = (first_band + i) * args.block_k, high = low + args.block_k;
      // The diagonals with x in (low - width, high).
      int64_t from = zero_offset + first_edge - (high - 1), to = zero_offset + first_edge - (low - width);
      from = from > 0 ? from : 0;
      to = to < size ? to : size;
      float sum = 0.0f;
      for (int64_t c = from + lane_id(); c < to; c += 32) {
        const int64_t x = zero_offset - c + first_edge;
        if (x < first_edge) continue;  // the key is after the query, so there is no weight
        const int64_t inside = (x + width < high ? x + width : high) - (x > low ? x : low);
        sum += diagonal[c] * (static_cast<float>(inside) / static_cast<float>(width));
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kWarp, sum, step);
      if (lane_id() == 0) bands[i] += sum;
    }
    __syncthreads();
  }
}

// --- 4: selection -------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(BlockSelect::kThreads) select_kernel(const VerticalSlashArgs args, const Plan plan) {
  auto* select = reinterpret_cast<BlockSelect*>(shared_memory());
  const int64_t head = blockIdx.x / 2;
  if (blockIdx.x % 2 == 0) {
    const float* column = plan.column + head * args.nk;
    const int64_t start = start_of(args, head / args.heads_q);
    const int64_t sink = args.sink < args.nk ? start + args.sink : args.nk;
    const auto key = [=](int id) { return id < start ? 0 : id < sink ? kForced : key_of(column[id]); };
    const int count = select->best(static_cast<int>(args.nk), key, static_cast<uint32_t>(args.column_capacity),
                                   args.column_index + head * args.column_capacity);
    if (threadIdx.x == 0) args.column_count[head] = count;
  } else {
    float* band = plan.band + head * plan.bands;
    for (int t = static_cast<int>(threadIdx.x); t < plan.bands; t += BlockSelect::kThreads) {
      float sum = 0.0f;
      for (int64_t s = 0; s < plan.splits; ++s) {
        const int64_t at = t - (plan.first_offset(args, s) + edge(args)) / args.block_k;
        if (at >= 0 && at < plan.split_bands) sum += plan.band_part[(head * plan.splits + s) * plan.split_bands + at];
      }
      band[t] = sum;
    }
    __syncthreads();
    const int64_t local_end =
        args.local > 0 ? ((args.local < args.nk ? args.local : args.nk) - 1 + edge(args)) / args.block_k + 1 : 0;
    const auto key = [=](int t) { return t < local_end ? kForced : key_of(band[t]); };
    select->best(plan.bands, key, static_cast<uint32_t>(args.block_capacity),
                 plan.kept_band + head * args.block_capacity);
  }
}

// --- 5: rows ------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) rows_kernel(const VerticalSlashArgs args, const Plan plan) {
  const int64_t rows = ceil_div(args.nq, args.block_q), capacity = args.block_capacity;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (at >= plan.heads * rows) return;
  const int64_t head = at / rows;
  const RowBlocks row(args, head / args.heads_q, at % rows);
  const int32_t* kept = plan.kept_band + head * capacity;
  // Blocks ascend when bands descend, so write the first `count` bands backwards.
  const int64_t anchor = row.end - 1, farthest = anchor - row.begin;
  int count = 0;
  for (int64_t i = lane_id(); i < round_up(capacity, 32); i += 32) {
    count += __popc(__ballot_sync(kWarp, i < capacity && kept[i] <= farthest));
  }
  int32_t* index = args.block_index + at * capacity;
  for (int64_t i = lane_id(); i < count; i += 32) index[i] = static_cast<int32_t>(anchor - kept[count - 1 - i]);
  clear_rest(index, count, capacity);
  if (lane_id() == 0) args.block_count[at] = count;
}

// --- host ---------------------------------------------------------------------------------------------------------

Plan plan_of(const VerticalSlashArgs& args, Carver& carver) {
  Plan plan{};
  plan.heads = args.batch * args.heads_q;
  plan.last_q = static_cast<int>(args.last_q < args.nq ? args.last_q : args.nq);
  plan.query_tiles = static_cast<int>(ceil_div(plan.last_q, kTileQ));
  const int64_t even = round_up(ceil_div(args.nk, 64), kTileK);
  plan.split = even < 1024 ? 1024 : even < 4096 ? even : 4096;
  plan.splits = ceil_div(args.nk, plan.split);
  plan.bands = static_cast<int>(args.nk / args.block_k + 2 + args.block_q / args.block_k);
  // The offsets of a split are split + last_q - 1 values. Up to width / block_k + 1 bands share an offset.
  plan.split_bands = static_cast<int>((plan.split + plan.last_q) / args.block_k + 3 + band_width(args) / args.block_k);
  plan.query_vectors = reads_query_vectors(args);
  plan.key_vectors = reads_key_vectors(args);
  const int64_t rows = plan.heads * plan.query_tiles * kTileQ;
  plan.partial_top = carver.take<float>(rows * plan.splits * kHalves);
  plan.partial_sum = carver.take<float>(rows * plan.splits * kHalves);
  plan.top = carver.take<float>(rows);
  plan.inverse = carver.take<float>(rows);
  plan.column = carver.take<float>(plan.heads * args.nk);
  plan.band_part = carver.take<float>(plan.heads * plan.splits * plan.split_bands);
  plan.band = carver.take<float>(plan.heads * plan.bands);
  plan.kept_band = carver.take<int32_t>(plan.heads * args.block_capacity);
  return plan;
}

}  // namespace

int64_t vertical_slash_workspace(const VerticalSlashArgs& args) {
  Carver carver(nullptr);
  plan_of(args, carver);
  return carver.bytes();
}

const char* vertical_slash_index(const VerticalSlashArgs& args, void* workspace, CUstream_st* stream) {
  if (args.batch * args.heads_q == 0) return nullptr;
  Carver carver(workspace);
  const Plan plan = plan_of(args, carver);
  const int64_t parts = plan.heads * plan.splits;
  const auto warps = [](int64_t count) { return ceil_div(count * 32, kThreads); };
  const char* error = by_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const char* failed =
        launch(statistics_kernel<T>, parts * plan.query_tiles, kThreads, kOperandsEnd<T>, stream, args, plan);
    if (failed != nullptr) return failed;
    failed = launch(combine_kernel, warps(plan.heads * plan.query_tiles * kTileQ), kThreads, 0, stream, plan);
    if (failed != nullptr) return failed;
    const int diagonals = static_cast<int>(plan.split + kTileQ) * static_cast<int>(sizeof(float));
    return launch(sums_kernel<T>, parts, kThreads, kOperandsEnd<T> + diagonals, stream, args, plan);
  });
  if (error != nullptr) return error;
  error = launch(select_kernel, plan.heads * 2, BlockSelect::kThreads, static_cast<int>(sizeof(BlockSelect)), stream,
                 args, plan);
  if (error != nullptr) return error;
  return launch(rows_kernel, warps(plan.heads * ceil_div(args.nq, args.block_q)), kThreads, 0, stream, args, plan);
}

}  // namespace cuda
}  // namespace headstart

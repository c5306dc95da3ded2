// centroid_lookup: finds the clusters that a row of queries keeps, and writes their runs of permuted keys.
//
// A row is a block of queries of a KV head's group: group · block_q query vectors that share one selection. The same
// three kernels run for the parents and for the clusters. With parents, the run of a parent is a run of clusters, and a
// row scores only the clusters of the parents that it keeps. The centroids of other clusters are not read.
//
//   1 lse    A block takes a tile of a row's vectors × a split of the clusters. It keeps the maximum and sum of every
//            vector in shared memory. n_j exp2(S_ij) is computed as exp2(S_ij + log2 n_j). It writes log2 of the
//            split's sum.
//
//                   clusters, or the row's list, 128 a tile       few rows (decode):  32 × 128, 64 threads
//                ┌─────────┬─────────┬─ ─                         many (prefill):    128 × 128, 256 threads
//      vectors   │ S       │ S       │   one after another        both operands are gathered: rows by pointers in
//                └─────────┴─────────┴─ ─                         shared memory; empty clusters are null, never read
//
//   2 best   A block takes 128 clusters and all tiles of the row's vectors. A vector's splits are merged in a fixed
//            order. best[row][cluster] = the largest S_ij - lse_i of the vectors that keep the cluster
//            (S_ij > lse_i + log2 threshold).
//
//                ┌─────────┐   columns: maximum over a lane's 4 rows, then over the 8 lanes of the same column,
//                │ S       │ ↓ then over the warps, in shared memory
//                └─────────┘
//   3 take   A block takes a row. If the kept runs do not fit, it finds the score at which they fill the capacity, two
//            bits in each pass. Then every warp scans 32 clusters at a time. It knows how much the warps before it
//            take, and all its lanes write each run together.
//
// Scores are computed twice and not stored. Floor: 4 · B · Hq · Nq · C · D operations. A decode step reads every
// centroid once from memory, which is 2 · Hkv · C · D bytes, and once from L2, and writes 4 bytes per kept key.
// Workspace: 4 · C bytes per row (8 · C with parents). Rows are processed in turns of at most 256 MiB of workspace. All
// orders are fixed, and no sum uses atomics.

#include <cmath>
#include <cstddef>

#include "prefill_index.h"

namespace headstart {
namespace cuda {
namespace {

template <typename T>
using Few = ScoreTile<T, 1, 2, 4>;
template <typename T>
using Many = ScoreTile<T, 4, 2, 3>;
constexpr int kFewVectors = Few<float>::kRows;
constexpr int kColumns = Few<float>::kColumns;
static_assert(kColumns == Many<float>::kColumns && kColumns == 2 * 64, "two warps side by side");
constexpr int kTakeThreads = 512, kTakeWarps = kTakeThreads / 32;
#ifdef HEADSTART_LANE_MODEL
constexpr int64_t kTurnBytes = 1 << 10;  // so that a small test has several turns
#else
constexpr int64_t kTurnBytes = 256 << 20;
#endif
constexpr int64_t kMaxSplits = 64, kBlocksPerMultiprocessor = 4;

// One level (parents or clusters) for the rows [first, first + rows).
struct Turn {
  CentroidLevel level;
  bool of_parents;
  bool query_vectors, centroid_vectors;
  int64_t first, rows;
  int tiles;  // the tiles of a row's vectors
  int splits;
  const int32_t* list;  // [rows][level.count]: the entries of the level that a row sees; null means all
  const int32_t* list_count;
  float* part;  // [splits][rows][tiles][the tile's rows]
  float* best;  // [rows][level.count], indexed by the place in the list

  __device__ __forceinline__ int listed(int64_t row) const {
    const int all = static_cast<int>(level.count);
    return list == nullptr ? all : min(list_count[row], all);
  }
};

// The batch, KV head and first query of a row of the turn.
struct Place {
  int64_t batch, head, first_query;

  __device__ __forceinline__ Place(const CentroidLookupArgs& args, const Turn& turn, int64_t row) {
    const int64_t per_head = ceil_div(args.nq, args.block_q), stream = (turn.first + row) / per_head;
    batch = stream / args.heads_kv;
    head = stream % args.heads_kv;
    first_query = (turn.first + row) % per_head * args.block_q;
  }
};

// A query vector of a row, or null past its last vector. Sets `head` to the query head.
template <typename T>
__device__ __forceinline__ const T* vector_of(const CentroidLookupArgs& args, const Place& place, int64_t vector,
                                              int64_t& head) {
  const uint32_t block = static_cast<uint32_t>(args.block_q), at = static_cast<uint32_t>(vector);
  const int64_t group = args.heads_q / args.heads_kv, query = place.first_query + at % block;
  head = place.head * group + at / block;
  if (at / block >= group || query >= args.nq) return nullptr;
  return static_cast<const T*>(args.q.data) + place.batch * args.q.batch + head * args.q.head + query * args.q.token;
}

__device__ __forceinline__ int64_t inside(int64_t x, int64_t end) { return x < 0 ? 0 : x < end ? x : end; }

// The number of keys below entry `id` of a level. Nobody has checked the offsets, so they are clamped: they must not
// lead out of the array.
__device__ __forceinline__ int keys_of(const CentroidLookupArgs& args, const Turn& turn, int64_t head, int64_t id) {
  int64_t begin = id, end = id + 1;
  if (turn.of_parents) {
    const int32_t* children = turn.level.run_offsets + head * (turn.level.count + 1);
    begin = inside(children[id], args.clusters.count);
    end = inside(children[id + 1], args.clusters.count);
  }
  const int32_t* offsets = args.clusters.run_offsets + head * (args.clusters.count + 1);
  return offsets[end] - offsets[begin];
}

// The shared memory after the stages: both operands of a tile, and log2 of each cluster's number of keys (-inf for 0
// keys).
template <typename T, typename Tile>
struct Operands {
  const T* vector[Tile::kRows];
  const T* centroid[kColumns];
  float weight[kColumns];

  __device__ __forceinline__ void set_centroids(const CentroidLookupArgs& args, const Turn& turn, const Place& place,
                                                int64_t row, int first, int listed) {
    const CentroidLevel& level = turn.level;
    for (int c = static_cast<int>(threadIdx.x); c < kColumns; c += Tile::kThreads) {
      int64_t id = -1;
      if (first + c < listed) id = turn.list == nullptr ? first + c : turn.list[row * level.count + first + c];
      const int keys = id >= 0 && id < level.count ? keys_of(args, turn, place.head, id) : 0;
      weight[c] = keys > 0 ? log2f(static_cast<float>(keys)) : -INFINITY;
      centroid[c] = keys > 0 ? static_cast<const T*>(level.centroids.data) + place.head * level.centroids.head +
                                   id * level.centroids.token
                             : nullptr;
    }
  }
};

// --- 1: log of the sum --------------------------------------------------------------------------------------------

template <typename T, typename Tile>
struct LseShared {
  Operands<T, Tile> operands;
  float top[2][Tile::kRows], sum[2][Tile::kRows];  // for each of the two warps that share a row of scores
  Place place;                                     // here, because registers are scarce while tiles multiply
  int listed;
};

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, std::is_same_v<T, float> ? 1 : 2)
    lse_kernel(const CentroidLookupArgs args, const Turn turn) {
  unsigned char* stages = shared_memory();
  auto& shared = *reinterpret_cast<LseShared<T, Tile>*>(stages + Tile::kSharedBytes);
  const int64_t units = turn.rows * turn.tiles, unit = blockIdx.x % units, split = blockIdx.x / units;
  const int64_t row = unit / turn.tiles;
  const Place place(args, turn, row);
  if (threadIdx.x == 0) {
    shared.place = place;
    shared.listed = turn.listed(row);
  }
  for (int r = static_cast<int>(threadIdx.x); r < Tile::kRows; r += Tile::kThreads) {
    int64_t head;
    shared.operands.vector[r] = vector_of<T>(args, place, unit % turn.tiles * Tile::kRows + r, head);
    shared.top[0][r] = shared.top[1][r] = -INFINITY;
    shared.sum[0][r] = shared.sum[1][r] = 0.0f;
  }
  const int listed = turn.listed(row), column_tiles = (listed + kColumns - 1) / kColumns;
  const int share = (column_tiles + turn.splits - 1) / turn.splits, begin = static_cast<int>(split) * share;
  const int end = min(begin + share, column_tiles);
  const float scale = args.scale * kLog2E;
  Tile tile;
  for (int t = begin; t < end; ++t) {
    __syncthreads();  // all threads have read the last tile's weights
    shared.operands.set_centroids(args, turn, shared.place, row, t * kColumns, shared.listed);
    __syncthreads();
    tile.multiply(stages, GatheredRows<T>{shared.operands.vector, turn.query_vectors},
                  GatheredRows<T>{shared.operands.centroid, turn.centroid_vectors}, 1, static_cast<int>(args.head_dim));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int at = tile.row(0, 0) + 8 * r;
      float& top = shared.top[tile.warp_column()][at];
      float& sum = shared.sum[tile.warp_column()][at];
      const float last_top = top, last_sum = sum;
      float best = last_top;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = tile.score[r / 2][n][r % 2 * 2 + i];
          const float weight = shared.operands.weight[tile.column(n, i)];
          x = weight == -INFINITY ? -INFINITY : fmaf(x, scale, weight);
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
      if (lane_id() % 4 == 0) {
        top = best;
        sum = last_sum * exp2f(last_top - shift) + total;
      }
    }
  }
  __syncthreads();
  float* part = turn.part + (split * units + unit) * Tile::kRows;
  for (int r = static_cast<int>(threadIdx.x); r < Tile::kRows; r += Tile::kThreads) {
    const float best = fmaxf(shared.top[0][r], shared.top[1][r]), shift = best == -INFINITY ? 0.0f : best;
    const float total =
        shared.sum[0][r] * exp2f(shared.top[0][r] - shift) + shared.sum[1][r] * exp2f(shared.top[1][r] - shift);
    part[r] = total == 0.0f ? -INFINITY : shift + log2f(total);
  }
}

// --- 2: best scores -----------------------------------------------------------------------------------------------

template <typename T, typename Tile>
struct BestShared {
  Operands<T, Tile> operands;
  float lse[Tile::kRows], limit[Tile::kRows];  // a limit of +inf means that the vector does not exist
  float best[Tile::kRows / 32][kColumns];      // for each of the warps that share a column of scores
};

// The base-2 lse of a vector, merged from its splits, or NaN if the sum is not finite. A whole warp calls it if there
// are several splits, a single thread if there is one. Every comparison with NaN is false, so a query with a NaN keeps
// all clusters instead of none.
__device__ __forceinline__ float join_splits(const float* part, int64_t pitch, int splits) {
  if (splits == 1) return *part > -INFINITY ? *part : NAN;
  float top = -INFINITY, total = 0.0f;
  for (int s = static_cast<int>(lane_id()); s < splits; s += 32) top = fmaxf(top, part[s * pitch]);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));
  if (top == -INFINITY) return NAN;
  for (int s = static_cast<int>(lane_id()); s < splits; s += 32) total += exp2f(part[s * pitch] - top);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(kWarp, total, step);
  return total > 0.0f ? top + log2f(total) : NAN;
}

template <typename T, typename Tile>
__device__ __forceinline__ void set_vectors(const CentroidLookupArgs& args, const Turn& turn, const Place& place,
                                            int64_t row, int tile, BestShared<T, Tile>& shared) {
  const int64_t units = turn.rows * turn.tiles, unit = row * turn.tiles + tile;
  const int together = turn.splits == 1 ? 1 : 32;  // the threads that work on one vector
  for (int r = static_cast<int>(threadIdx.x) / together; r < Tile::kRows; r += Tile::kThreads / together) {
    int64_t head;
    const T* vector = vector_of<T>(args, place, static_cast<int64_t>(tile) * Tile::kRows + r, head);
    float lse = 0.0f, limit = INFINITY;
    if (vector != nullptr) {
      lse = join_splits(turn.part + unit * Tile::kRows + r, units * Tile::kRows, turn.splits);
      const float threshold = turn.level.threshold[head * turn.level.thresholds / args.heads_q];
      limit = threshold <= 0.0f ? lse - INFINITY : lse + log2f(threshold);
    }
    if (together == 1 || lane_id() == 0) {
      shared.operands.vector[r] = vector;
      shared.lse[r] = lse;
      shared.limit[r] = limit;
    }
  }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, std::is_same_v<T, float> ? 1 : 2)
    best_kernel(const CentroidLookupArgs args, const Turn turn) {
  unsigned char* stages = shared_memory();
  auto& shared = *reinterpret_cast<BestShared<T, Tile>*>(stages + Tile::kSharedBytes);
  const int64_t row = blockIdx.x % turn.rows;
  const int first = static_cast<int>(blockIdx.x / turn.rows) * kColumns, listed = turn.listed(row);
  if (first >= listed) return;
  const Place place(args, turn, row);
  shared.operands.set_centroids(args, turn, place, row, first, listed);
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows / 32 * kColumns; i += Tile::kThreads) {
    shared.best[i / kColumns][i % kColumns] = -INFINITY;
  }
  const float scale = args.scale * kLog2E;
  Tile tile;
  for (int t = 0; t < turn.tiles; ++t) {
    __syncthreads();  // all threads have read the last tile's limits
    set_vectors(args, turn, place, row, t, shared);
    __syncthreads();
    tile.multiply(stages, GatheredRows<T>{shared.operands.vector, turn.query_vectors},
                  GatheredRows<T>{shared.operands.centroid, turn.centroid_vectors}, 1, static_cast<int>(args.head_dim));
    float lse[4], limit[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      lse[r] = shared.lse[tile.row(0, 0) + 8 * r];
      limit[r] = shared.limit[tile.row(0, 0) + 8 * r];
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float best = -INFINITY;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float x = tile.score[r / 2][n][r % 2 * 2 + i] * scale, score = x - lse[r];
          const bool kept = limit[r] != INFINITY && !(x <= limit[r]);
          best = fmaxf(best, !kept ? -INFINITY : score == score ? score : INFINITY);
        }
#pragma unroll
        for (int step = 4; step < 32; step *= 2) best = fmaxf(best, __shfl_xor_sync(kWarp, best, step));
        float& column = shared.best[tile.warp_row()][tile.column(n, i)];
        if (lane_id() < 4) column = fmaxf(column, best);
      }
    }
  }
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < kColumns && first + c < listed; c += Tile::kThreads) {
    float best = -INFINITY;
    for (int w = 0; w < Tile::kRows / 32; ++w) best = fmaxf(best, shared.best[w][c]);
    turn.best[row * turn.level.count + first + c] = shared.operands.weight[c] == -INFINITY ? -INFINITY : best;
  }
}

// --- 3: runs ------------------------------------------------------------------------------------------------------

// Replaces x by its sums over all threads of the block.
template <int kCount>
__device__ __forceinline__ void block_sums(uint32_t (&x)[kCount], uint32_t (*slots)[kTakeWarps]) {
  __syncthreads();  // all threads have read the last sums
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t sum = __reduce_add_sync(kWarp, x[i]);
    if (lane_id() == 0) slots[i][threadIdx.x / 32] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = 0;
    for (int w = 0; w < kTakeWarps; ++w) x[i] += slots[i][w];
  }
}

__device__ __forceinline__ uint32_t sum_of_lower_lanes(uint32_t x) {
  uint32_t sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kWarp, sum, step);
    sum += static_cast<int>(lane_id()) >= step ? other : 0;
  }
  return sum - x;
}

__global__ void __launch_bounds__(kTakeThreads)
    take_kernel(const CentroidLookupArgs args, const Turn turn, int32_t* count, int32_t* index, int64_t capacity) {
  auto* slots = reinterpret_cast<uint32_t (*)[kTakeWarps]>(shared_memory());
  const int64_t row = blockIdx.x, entries = turn.level.count;
  const Place place(args, turn, row);
  const int32_t* offsets = turn.level.run_offsets + place.head * (entries + 1);
  const float* best = turn.best + row * entries;
  const int32_t* list = turn.list == nullptr ? nullptr : turn.list + row * entries;
  const int listed = turn.listed(row);
  const uint32_t room = static_cast<uint32_t>(capacity);
  int32_t* to = index + row * capacity;

  // The entry at place i: the key of its score (0 if the entry is not kept), and its run.
  struct Entry {
    uint32_t key, length;
    int32_t start;
  };
  const auto entry = [&](int i) -> Entry {
    if (i >= listed || best[i] == -INFINITY) return {0, 0, 0};
    const int64_t id = list == nullptr ? i : list[i];
    if (id < 0 || id >= entries) return {0, 0, 0};
    const int32_t start = offsets[id], length = offsets[id + 1] - start;
    return {key_of(best[i]), length > 0 ? static_cast<uint32_t>(length) : 0, start};
  };

  const int thread = static_cast<int>(threadIdx.x);
  uint32_t wanted[1] = {0};
  for (int i = thread; i < listed; i += kTakeThreads) wanted[0] += entry(i).length;
  block_sums(wanted, slots);
  // The largest key such that the entries at or above it fill the room. 0 if all entries fit.
  uint32_t cut = 0;
  if (wanted[0] > room) {
    for (int shift = 30; shift >= 0; shift -= 2) {
      uint32_t held[3] = {0, 0, 0};
      for (int i = thread; i < listed; i += kTakeThreads) {
        const Entry e = entry(i);
#pragma unroll
        for (uint32_t step = 0; step < 3; ++step) held[step] += e.key >= (cut | (step + 1) << shift) ? e.length : 0;
      }
      block_sums(held, slots);
      cut |= static_cast<uint32_t>(held[2] >= room ? 3 : held[1] >= room ? 2 : held[0] >= room ? 1 : 0) << shift;
    }
  }

  // Every warp handles a stretch of the list. First all warps count. Then each warp knows where to write.
  const int warp = thread / 32, stretch = (listed + kTakeThreads - 1) / kTakeThreads * 32;
  const int begin = min(warp * stretch, listed), end = min(begin + stretch, listed);
  uint32_t above = 0, tied = 0;
  for (int i = begin + static_cast<int>(lane_id()); i < end; i += 32) {
    const Entry e = entry(i);
    above += e.key > cut ? e.length : 0;
    tied += e.key == cut ? e.length : 0;
  }
  above = __reduce_add_sync(kWarp, above);
  tied = __reduce_add_sync(kWarp, tied);
  __syncthreads();  // all threads have read the last sums
  if (lane_id() == 0) {
    slots[0][warp] = above;
    slots[1][warp] = tied;
  }
  __syncthreads();
  uint32_t above_all = 0, above_before = 0, tied_before = 0, tied_all = 0;
  for (int w = 0; w < kTakeWarps; ++w) {
    above_before += w < warp ? slots[0][w] : 0;
    tied_before += w < warp ? slots[1][w] : 0;
    above_all += slots[0][w];
    tied_all += slots[1][w];
  }
  const uint32_t room_for_ties = above_all < room ? room - above_all : 0;
  uint32_t written = above_before + min(tied_before, room_for_ties);
  for (int base = begin; base < end; base += 32) {
    const int i = base + static_cast<int>(lane_id());
    const Entry e = i < end ? entry(i) : Entry{0, 0, 0};
    const uint32_t tie = e.key == cut ? e.length : 0, before = tied_before + sum_of_lower_lanes(tie);
    uint32_t taken = before < room_for_ties ? min(tie, room_for_ties - before) : 0;
    if (e.key > cut) taken = e.length;
    const uint32_t at = written + sum_of_lower_lanes(taken);
    for (uint32_t left = __ballot_sync(kWarp, taken > 0); left != 0; left &= left - 1) {
      const int lane = __ffs(left) - 1;
      const uint32_t length = __shfl_sync(kWarp, taken, lane), first = __shfl_sync(kWarp, at, lane);
      const int32_t start = __shfl_sync(kWarp, e.start, lane);
      for (uint32_t j = lane_id(); j < length && first + j < room;
           j += 32) {  // past the room only if offsets are invalid
        to[first + j] = start + static_cast<int32_t>(j);
      }
    }
    written += __reduce_add_sync(kWarp, taken);
    tied_before += __reduce_add_sync(kWarp, tie);
  }
  if (thread == 0) count[row] = static_cast<int32_t>(min(above_all + min(tied_all, room_for_ties), room));
}

// --- host ---------------------------------------------------------------------------------------------------------

struct Plan {
  int64_t rows, at_once;
  Turn clusters, parents;
  int32_t* list;
  int32_t* list_count;
};

int64_t vectors_of(const CentroidLookupArgs& args) { return args.heads_q / args.heads_kv * args.block_q; }

// The number of rows of the tile that the vectors of a row use.
int tile_rows(const CentroidLookupArgs& args) {
  return vectors_of(args) <= kFewVectors ? Few<float>::kRows : Many<float>::kRows;
}

Turn turn_of(const CentroidLookupArgs& args, const CentroidLevel& level, int64_t rows) {
  Turn turn{};
  turn.level = level;
  turn.query_vectors = reads_vectors(args.q, args.batch, args.heads_q, args.nq, args.dtype);
  turn.centroid_vectors = reads_vectors(level.centroids, 1, args.heads_kv, level.count, args.dtype);
  turn.tiles = static_cast<int>(ceil_div(vectors_of(args), tile_rows(args)));
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * multiprocessors(), rows * turn.tiles);
  const int64_t most = ceil_div(level.count, kColumns) < kMaxSplits ? ceil_div(level.count, kColumns) : kMaxSplits;
  turn.splits = static_cast<int>(wanted < most ? wanted : most);
  return turn;
}

Plan plan_of(const CentroidLookupArgs& args, Carver& carver) {
  Plan plan{};
  plan.rows = args.batch * args.heads_kv * ceil_div(args.nq, args.block_q);
  const int64_t entries = args.parents.count > args.clusters.count ? args.parents.count : args.clusters.count;
  const int64_t vectors = round_up(vectors_of(args), tile_rows(args)), lists = args.parents.count > 0 ? 1 : 0;
  const int64_t fit = kTurnBytes / (4 * (entries * (1 + lists) + vectors));
  plan.at_once = fit < 1 ? 1 : fit < plan.rows ? fit : plan.rows;
  plan.clusters = turn_of(args, args.clusters, plan.at_once);
  if (lists > 0) plan.parents = turn_of(args, args.parents, plan.at_once);
  plan.parents.of_parents = true;
  const int splits = plan.parents.splits > plan.clusters.splits ? plan.parents.splits : plan.clusters.splits;
  plan.clusters.part = plan.parents.part = carver.take<float>(splits * plan.at_once * vectors);
  plan.clusters.best = plan.parents.best = carver.take<float>(plan.at_once * entries);
  plan.list = carver.take<int32_t>(lists * plan.at_once * args.clusters.count);
  plan.list_count = carver.take<int32_t>(lists * plan.at_once);
  if (lists > 0) {
    plan.clusters.list = plan.list;
    plan.clusters.list_count = plan.list_count;
  }
  return plan;
}

template <typename T, typename Tile>
const char* score(const CentroidLookupArgs& args, const Turn& turn, CUstream_st* stream) {
  const char* error = launch(lse_kernel<T, Tile>, turn.rows * turn.tiles * turn.splits, Tile::kThreads,
                             Tile::kSharedBytes + static_cast<int>(sizeof(LseShared<T, Tile>)), stream, args, turn);
  if (error != nullptr) return error;
  return launch(best_kernel<T, Tile>, turn.rows * ceil_div(turn.level.count, kColumns), Tile::kThreads,
                Tile::kSharedBytes + static_cast<int>(sizeof(BestShared<T, Tile>)), stream, args, turn);
}

const char* look_up(const CentroidLookupArgs& args, const Turn& turn, int32_t* count, int32_t* index, int64_t capacity,
                    CUstream_st* stream) {
  const bool few = vectors_of(args) <= kFewVectors;
  const char* error = by_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    return few ? score<T, Few<T>>(args, turn, stream) : score<T, Many<T>>(args, turn, stream);
  });
  if (error != nullptr) return error;
  return launch(take_kernel, turn.rows, kTakeThreads, 3 * kTakeWarps * static_cast<int>(sizeof(uint32_t)), stream, args,
                turn, count, index, capacity);
}

}  // namespace

int64_t centroid_lookup_workspace(const CentroidLookupArgs& args) {
  if (args.batch * args.heads_q * args.nq == 0) return 0;
  Carver carver(nullptr);
  plan_of(args, carver);
  return carver.bytes();
}

const char* centroid_lookup(const CentroidLookupArgs& args, void* workspace, CUstream_st* stream) {
  if (args.batch * args.heads_q * args.nq == 0) return nullptr;
  Carver carver(workspace);
  Plan plan = plan_of(args, carver);
  for (int64_t first = 0; first < plan.rows; first += plan.at_once) {
    const int64_t rows = plan.rows - first < plan.at_once ? plan.rows - first : plan.at_once;
    plan.clusters.first = plan.parents.first = first;
    plan.clusters.rows = plan.parents.rows = rows;
    const char* error = nullptr;
    if (args.parents.count > 0) {
      error = look_up(args, plan.parents, plan.list_count, plan.list, args.clusters.count, stream);
      if (error != nullptr) return error;
    }
    error = look_up(args, plan.clusters, args.column_count + first, args.column_index + first * args.capacity,
                    args.capacity, stream);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace headstart

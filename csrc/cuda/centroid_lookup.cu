// centroid_lookup: finds the clusters that a row of queries keeps, and writes their runs of permuted keys.
//
// A row is a block of queries of a KV head's group: group · block_q query vectors that share one selection. The same
// kernels run for the parents and for the clusters. With parents, the run of a parent is a run of clusters, and a row
// scores only the clusters of the parents that it keeps. n_j exp2(S_ij) is computed as exp2(S_ij + log2 n_j).
//
// A row of up to 32 vectors (decode) takes two kernels, and computes every score once:
//
//   1 score  A block takes 64 clusters of a row, a warp 16 of them. A warp reads a centroid from memory into the
//            fragments of mma.m16n8k16, 16 bytes a lane, and multiplies it with all vectors of the row. (A sum over
//            depth may take its elements in any order.) It writes the scores, and the block writes log2 of its sum.
//
//                 8 vectors a tile, up to 4 tiles           a lane's 16 bytes of 32 elements of depth:
//               ┌───┬───┬─ ─                                   t=0    t=1    t=2    t=3
//     16        │ S │ S │                                    ┌──┬──┬──┬──┬─ ─
//     clusters  └───┴───┴─ ─                                 │ ab cd│ ab cd│      a, b: k of the first mma
//               float32 multiplies with FMA                  └──┴──┴──┴──┴─ ─     c, d: k of the second
//
//   2 take   A block takes a row and merges the sums of its vectors in a fixed order. The best score of a cluster is
//            the largest S_ij - lse_i of the vectors that keep it (S_ij > lse_i + log2 threshold). If the kept runs do
//            not fit, it finds the score at which they fill the capacity, by histograms of up to 11 bits of the scores'
//            range. Then every warp scans 32 clusters at a time. It knows how much the warps before it take, and all
//            its lanes write each run together.
//
// Rows of more vectors (prefill) take three kernels, which compute every score twice and store none:
//
//   1 lse    A block takes a tile of a row's vectors × a split of the clusters. It keeps the maximum and sum of every
//            vector in shared memory. It writes log2 of the split's sum.
//
//                   clusters, or the row's list, 128 a tile
//                ┌─────────┬─────────┬─ ─                     128 × 128, 256 threads (score_tile.h). Both operands
//      vectors   │ S       │ S       │   one after another    are gathered: rows by pointers in shared memory; empty
//                └─────────┴─────────┴─ ─                     clusters are null, never read.
//
//   2 best   A block takes 128 clusters and all tiles of the row's vectors. A vector's splits are merged in a fixed
//            order. best[row][cluster] = the best score of the cluster: a maximum over a row of the tile.
//
//                   vectors, 128 a tile
//                ┌─────────┬─────────┬─ ─
//      clusters  │ S       │ S       │
//                └─────────┴─────────┴─ ─
//
//   3 take   as above, from the best scores
//
// Floor of a decode step: every centroid is read once, which is 2 · Hkv · C · D bytes. The scores go through L2: 16
// bytes per cluster for 4 vectors. 4 bytes are written per kept key. Floor of many vectors: 4 · B · Hq · Nq · C · D
// operations. Workspace: 4 bytes per row and cluster (8 with parents), times the vectors of a decode row, rounded up
// to 4. Rows are processed in turns of at most 256 MiB of workspace. All orders are fixed, and no sum of floats uses
// atomics.

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "prefill_index.h"

namespace headstart {
namespace cuda {
namespace {

template <typename T, bool kHopper>
using Many = std::conditional_t<kHopper, GroupTile<T, 2, 1, 3>, ScoreTile<T, 4, 2, 3>>;
constexpr int kManyThreads = Many<float, false>::kThreads;
constexpr int kManyVectors = Many<float, false>::kRows, kColumns = Many<float, false>::kColumns;
static_assert(kManyVectors == kColumns && kColumns == 2 * 64, "two runs side by side, of either operand");
static_assert(Many<BFloat16, true>::kRows == kManyVectors && Many<BFloat16, true>::kColumns == kColumns);
constexpr int kFewVectors = 32, kScoreThreads = 128, kScoreWarps = kScoreThreads / 32;
constexpr int kFewColumns = kScoreWarps * mma::kRows;
static_assert(kFewColumns <= kScoreThreads, "a thread weighs a cluster");
constexpr int kTakeThreads = 1024, kTakeWarps = kTakeThreads / 32;
#ifdef HEADSTART_LANE_MODEL
constexpr int64_t kTurnBytes = 1 << 10, kSharedEntries = 128;  // so that small tests see several turns, and both places
#else
constexpr int64_t kTurnBytes = 256 << 20, kSharedEntries = 10 << 10;
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
  float* part;    // [splits][rows][tiles][the tile's rows]; few vectors: [splits][rows][kFewVectors]
  int per_entry;  // the scores stored per entry: 1, or few vectors rounded up to 4
  float* scores;  // [rows][level.count][per_entry], indexed by the place in the list: best scores, or base-2 S_ij
  uint2* kept;    // [rows][level.count]; null if shared memory has room for a row

  __device__ __forceinline__ int listed(int64_t row) const {
    const int all = static_cast<int>(level.count);
    return list == nullptr ? all : min(list_count[row], all);
  }

  // The entry of the level at place i of a row's list, or -1.
  __device__ __forceinline__ int id_at(int64_t row, int i) const {
    if (list == nullptr) return i;
    const int id = list[row * level.count + i];
    return id < level.count ? id : -1;
  }
};

// The batch, KV head and first query of a row of the turn.
struct Place {
  int batch, head, first_query;

  __device__ __forceinline__ Place(const CentroidLookupArgs& args, const Turn& turn, int64_t row) {
    const int64_t per_head = ceil_div(args.nq, args.block_q), stream = (turn.first + row) / per_head;
    batch = static_cast<int>(stream / args.heads_kv);
    head = static_cast<int>(stream % args.heads_kv);
    first_query = static_cast<int>((turn.first + row) % per_head * args.block_q);
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
__device__ __forceinline__ int keys_of(const CentroidLookupArgs& args, const Turn& turn, int head, int64_t id) {
  int64_t begin = id, end = id + 1;
  if (turn.of_parents) {
    const int32_t* children = turn.level.run_offsets + head * (turn.level.count + 1);
    begin = inside(children[id], args.clusters.count);
    end = inside(children[id + 1], args.clusters.count);
  }
  const int32_t* offsets = args.clusters.run_offsets + head * (args.clusters.count + 1);
  return offsets[end] - offsets[begin];
}

// log2 of the number of keys below entry `id`, -inf if there are none.
__device__ __forceinline__ float log2_keys(const CentroidLookupArgs& args, const Turn& turn, int head, int id) {
  const int keys = id >= 0 ? keys_of(args, turn, head, id) : 0;
  return keys > 0 ? log2f(static_cast<float>(keys)) : -INFINITY;
}

// The centroids of a tile of columns, and log2 of each cluster's number of keys. A cluster without keys is null.
template <typename T>
struct Centroids {
  const T** row;
  float* weight;

  __device__ __forceinline__ void set(const CentroidLookupArgs& args, const Turn& turn, const Place& place,
                                      int64_t row_id, int first, int listed) const {
    const CentroidLevel& level = turn.level;
    for (int c = static_cast<int>(threadIdx.x); c < kColumns; c += static_cast<int>(kManyThreads)) {
      const int id = first + c < listed ? turn.id_at(row_id, first + c) : -1;
      weight[c] = log2_keys(args, turn, place.head, id);
      row[c] = weight[c] > -INFINITY ? static_cast<const T*>(level.centroids.data) + place.head * level.centroids.head +
                                           id * level.centroids.token
                                     : nullptr;
    }
  }
};

// --- few vectors: scores ------------------------------------------------------------------------------------------

// Four bytes at `from`, where nothing more than the alignment of T is known.
template <typename T>
__device__ __forceinline__ uint32_t load_word(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(*from);
  } else {
    return from[0].bits | static_cast<uint32_t>(from[1].bits) << 16;
  }
}

template <bool kVectors, typename T>
__device__ __forceinline__ uint4 load_unit(const T* from, bool valid) {
  constexpr int kWord = 4 / static_cast<int>(sizeof(T));
  uint4 unit{0, 0, 0, 0};
  if constexpr (kVectors) {
    load_if(valid, unit, reinterpret_cast<const uint4*>(from));
  } else if (valid) {
    unit = {load_word(from), load_word(from + kWord), load_word(from + 2 * kWord), load_word(from + 3 * kWord)};
  }
  return unit;
}

// The scores of a warp: 16 clusters × kTiles · 8 vectors, in the lanes of mma.m16n8k16's sums. Lane 4 g + t reads unit
// 4 c + t of clusters g and g + 8 for every c.
template <typename T, int kTiles>
struct FewScores {
  static constexpr bool kTensorCores = !std::is_same_v<T, float>;
  static constexpr int kUnit = mma::kUnitBytes / static_cast<int>(sizeof(T)), kChunk = 4 * kUnit;
  static constexpr int kAhead = 4;  // chunks of a lane's clusters in registers

  uint4 left[kAhead][2];
  float sum[kTiles][4] = {};                                     // 2 half + i: cluster g + 8 half, vector 2 t + i
  float part[kTensorCores ? 1 : kTiles][2][mma::kColumns] = {};  // float32: over the depth that the lane reads

  __device__ __forceinline__ void load(const T* const (&cluster)[2], int chunk, int head_dim, bool vectors) {
    if (vectors) {
      load<true>(cluster, chunk, head_dim);
    } else {
      load<false>(cluster, chunk, head_dim);
    }
  }

  template <bool kVectors>
  __device__ __forceinline__ void load(const T* const (&cluster)[2], int chunk, int head_dim) {
    const int dim = chunk * kChunk + static_cast<int>(lane_id() % 4) * kUnit;
#pragma unroll
    for (int c = 0; c < kAhead; ++c) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool valid = cluster[half] != nullptr && dim + c * kChunk < head_dim;
        left[c][half] = load_unit<kVectors>(cluster[half] + dim + c * kChunk, valid);
      }
    }
  }

  // `queries` holds [chunk][kTiles][32] units: unit t of vector g at 4 g + t.
  __device__ __forceinline__ void multiply(const uint4* queries, int chunks) {
#pragma unroll
    for (int c = 0; c < kAhead; ++c) {
      if (c >= chunks) return;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint4* right = queries + (c * kTiles + n) * 32;
        if constexpr (kTensorCores) {
          const uint4 b = right[lane_id()], x = left[c][0], y = left[c][1];
          multiply_add<T>(sum[n], {x.x, y.x, x.y, y.y}, b.x, b.y);
          multiply_add<T>(sum[n], {x.z, y.z, x.w, y.w}, b.z, b.w);
        } else {
#pragma unroll
          for (int v = 0; v < mma::kColumns; ++v) {
            const uint4 b = right[v * 4 + lane_id() % 4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const uint4 a = left[c][half];
              float& x = part[n][half][v];
              x = fmaf(__uint_as_float(a.x), __uint_as_float(b.x), x);
              x = fmaf(__uint_as_float(a.y), __uint_as_float(b.y), x);
              x = fmaf(__uint_as_float(a.z), __uint_as_float(b.z), x);
              x = fmaf(__uint_as_float(a.w), __uint_as_float(b.w), x);
            }
          }
        }
      }
    }
  }

  // float32: adds the parts of the four lanes with the same clusters. Each lane keeps its own two vectors.
  __device__ __forceinline__ void join() {
    if constexpr (!kTensorCores) {
      const bool high = lane_id() % 4 >= 2, odd = lane_id() % 2 == 1;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* x = part[n][half];
          float four[4];
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            four[v] = (high ? x[4 + v] : x[v]) + __shfl_xor_sync(kWarp, high ? x[v] : x[4 + v], 2);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sum[n][2 * half + i] =
                (odd ? four[2 + i] : four[i]) + __shfl_xor_sync(kWarp, odd ? four[i] : four[2 + i], 1);
          }
        }
      }
    }
  }
};

// The shared memory of a block, before the queries.
struct ScoreShared {
  float weight[kFewColumns];  // log2 of each cluster's number of keys
  float top[kScoreWarps][kFewVectors], sum[kScoreWarps][kFewVectors];
};

template <typename T, int kTiles>
constexpr int kScoreBlocks = kTiles > 1                 ? 2
                             : std::is_same_v<T, float> ? 4
                                                        : 7;  // on a multiprocessor

template <typename T, int kTiles>
__global__ void __launch_bounds__(kScoreThreads, kScoreBlocks<T, kTiles>)
    score_kernel(const CentroidLookupArgs args, const Turn turn) {
  using Scores = FewScores<T, kTiles>;
  auto& shared = *reinterpret_cast<ScoreShared*>(shared_memory());
  auto* queries = reinterpret_cast<uint4*>(shared_memory() + sizeof(ScoreShared));
  const uint32_t rows = static_cast<uint32_t>(turn.rows), row = blockIdx.x % rows, split = blockIdx.x / rows;
  const int first = static_cast<int>(split) * kFewColumns, listed = turn.listed(row);
  if (first >= listed) return;
  const Place place(args, turn, row);
  const int head_dim = static_cast<int>(args.head_dim), chunks = (head_dim + Scores::kChunk - 1) / Scores::kChunk;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(lane_id());
  const int own = first + warp * mma::kRows + mma::c_row(lane, 0);
  const T* cluster[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int id = own + 8 * half < listed ? turn.id_at(row, own + 8 * half) : -1;
    cluster[half] = id < 0 ? nullptr
                           : static_cast<const T*>(turn.level.centroids.data) + place.head * turn.level.centroids.head +
                                 id * turn.level.centroids.token;
  }
  Scores scores;
  scores.load(cluster, 0, head_dim, turn.centroid_vectors);
  for (int i = static_cast<int>(threadIdx.x); i < chunks * kTiles * 32; i += kScoreThreads) {
    int64_t head;
    const T* vector = vector_of<T>(args, place, i / 32 % kTiles * mma::kColumns + i % 32 / 4, head);
    const int dim = (i / 32 / kTiles * 4 + i % 4) * Scores::kUnit;
    const bool valid = vector != nullptr && dim < head_dim;
    queries[i] = turn.query_vectors ? load_unit<true>(vector + dim, valid) : load_unit<false>(vector + dim, valid);
  }
  if (threadIdx.x < kFewColumns) {
    const int at = first + static_cast<int>(threadIdx.x);
    shared.weight[threadIdx.x] = log2_keys(args, turn, place.head, at < listed ? turn.id_at(row, at) : -1);
  }
  __syncthreads();
  for (int chunk = 0;;) {
    scores.multiply(queries + chunk * kTiles * 32, chunks - chunk);
    chunk += Scores::kAhead;
    if (chunk >= chunks) break;
    scores.load(cluster, chunk, head_dim, turn.centroid_vectors);
  }
  scores.join();

  const float weight[2] = {shared.weight[own - first], shared.weight[own - first + 8]};
  const float scale = args.scale * kLog2E;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int vector = n * mma::kColumns + mma::c_column(lane, 0);
    float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* sum = scores.sum[n] + 2 * half;
      const bool empty = weight[half] == -INFINITY;
      if (own + 8 * half < listed && vector < turn.per_entry) {
        float* to = turn.scores + (row * turn.level.count + own + 8 * half) * turn.per_entry + vector;
        *reinterpret_cast<float2*>(to) =
            make_float2(empty ? -INFINITY : sum[0] * scale, empty ? -INFINITY : sum[1] * scale);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = scores.sum[n][2 * half + i];
        x = empty ? -INFINITY : fmaf(x, scale, weight[half]);
        best[i] = fmaxf(best[i], x);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) best[i] = fmaxf(best[i], __shfl_xor_sync(kWarp, best[i], step));
      const float shift = best[i] == -INFINITY ? 0.0f : best[i];
      float total = exp2f(scores.sum[n][i] - shift) + exp2f(scores.sum[n][2 + i] - shift);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(kWarp, total, step);
      if (lane < 4) {
        shared.top[warp][vector + i] = best[i];
        shared.sum[warp][vector + i] = total;
      }
    }
  }
  __syncthreads();
  const int vector = static_cast<int>(threadIdx.x);
  if (vector >= kTiles * mma::kColumns) return;
  float best = -INFINITY, total = 0.0f;
  for (int w = 0; w < kScoreWarps; ++w) best = fmaxf(best, shared.top[w][vector]);
  const float shift = best == -INFINITY ? 0.0f : best;
  for (int w = 0; w < kScoreWarps; ++w) total += shared.sum[w][vector] * exp2f(shared.top[w][vector] - shift);
  turn.part[(split * turn.rows + row) * kFewVectors + vector] = total == 0.0f ? -INFINITY : shift + log2f(total);
}

// --- many vectors: log of the sum ---------------------------------------------------------------------------------

constexpr int kRing = GatheredRows<float>::kRing;

// The shared memory after the stages. The lists of several tiles are known, because their copies start ahead.
template <typename T>
struct LseShared {
  const T* vector[kManyVectors];
  const T* centroid[kRing][kColumns];
  float weight[kRing][kColumns];
  float top[2][kManyVectors], sum[2][kManyVectors];  // for each of the two runs of 64 columns
  Place place;                                       // here, because registers are scarce while tiles multiply
  int listed;
};

template <typename T, bool kHopper>
__global__ void __launch_bounds__(kManyThreads, std::is_same_v<T, float> ? 1 : 2)
    lse_kernel(const CentroidLookupArgs args, const Turn turn) {
#if !defined(HEADSTART_WGMMA) && !defined(HEADSTART_LANE_MODEL)
  if constexpr (kHopper) return;
#endif
  using Tile = Many<T, kHopper>;
  unsigned char* stages = shared_memory();
  auto& shared = *reinterpret_cast<LseShared<T>*>(stages + Tile::kSharedBytes);
  const int64_t units = turn.rows * turn.tiles, unit = blockIdx.x % units, split = blockIdx.x / units;
  const int64_t row = unit / turn.tiles;
  const Place place(args, turn, row);
  if (threadIdx.x == 0) {
    shared.place = place;
    shared.listed = turn.listed(row);
  }
  for (int r = static_cast<int>(threadIdx.x); r < kManyVectors; r += kManyThreads) {
    int64_t head;
    shared.vector[r] = vector_of<T>(args, place, unit % turn.tiles * kManyVectors + r, head);
    shared.top[0][r] = shared.top[1][r] = -INFINITY;
    shared.sum[0][r] = shared.sum[1][r] = 0.0f;
  }
  const int listed = turn.listed(row), column_tiles = (listed + kColumns - 1) / kColumns;
  const int share = (column_tiles + turn.splits - 1) / turn.splits, begin = static_cast<int>(split) * share;
  const TileDepth depth{min(share, column_tiles - begin), 1, static_cast<int>(args.head_dim)};
  __syncthreads();
  const auto set_centroids = [&](int t) {
    if (t >= depth.tiles) return;
    Centroids<T>{shared.centroid[t % kRing], shared.weight[t % kRing]}.set(args, turn, shared.place, row,
                                                                           (begin + t) * kColumns, shared.listed);
  };
  const GatheredRows<T> vectors{shared.vector, turn.query_vectors};
  const GatheredRows<T> centroids{shared.centroid[0], turn.centroid_vectors, true};
  Tile tile;
  for (int t = 0; t < Tile::Stages::kAhead; ++t) set_centroids(t);
  __syncthreads();
  tile.begin(stages, vectors, centroids, depth);
  const float scale = args.scale * kLog2E;
  for (int t = 0; t < depth.tiles; ++t) {
    set_centroids(t + Tile::Stages::kAhead);
    tile.next(stages, vectors, centroids, depth);
    const float* weights = shared.weight[t % kRing];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float& top = shared.top[tile.slice_run(r)][tile.slice_row(r)];
      float& sum = shared.sum[tile.slice_run(r)][tile.slice_row(r)];
      const bool keeps = lane_id() % 4 == 0;  // the lane that alone reads and writes the row's maximum and sum
      const float last_top = keeps ? top : -INFINITY, last_sum = keeps ? sum : 0.0f;
      float best = last_top;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float2 weight = *reinterpret_cast<const float2*>(weights + 64 * tile.slice_run(r) + run_column(n, 0));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = tile.at(r, n, i);
          const float log2_n = i == 0 ? weight.x : weight.y;
          x = log2_n == -INFINITY ? -INFINITY : fmaf(x, scale, log2_n);
          best = fmaxf(best, x);
        }
      }
      best = fmaxf(best, __shfl_xor_sync(kWarp, best, 1));
      best = fmaxf(best, __shfl_xor_sync(kWarp, best, 2));
      const float shift = best == -INFINITY ? 0.0f : best;
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        total += exp2_or_zero(tile.at(r, n, 0) - shift) + exp2_or_zero(tile.at(r, n, 1) - shift);
      }
      total += __shfl_xor_sync(kWarp, total, 1);
      total += __shfl_xor_sync(kWarp, total, 2);
      if (keeps) {
        top = best;
        sum = last_sum * exp2f(last_top - shift) + total;
      }
    }
  }
  __syncthreads();
  float* part = turn.part + (split * units + unit) * kManyVectors;
  for (int r = static_cast<int>(threadIdx.x); r < kManyVectors; r += kManyThreads) {
    const float best = fmaxf(shared.top[0][r], shared.top[1][r]), shift = best == -INFINITY ? 0.0f : best;
    const float total =
        shared.sum[0][r] * exp2f(shared.top[0][r] - shift) + shared.sum[1][r] * exp2f(shared.top[1][r] - shift);
    part[r] = total == 0.0f ? -INFINITY : shift + log2f(total);
  }
}

// --- many vectors: best scores ------------------------------------------------------------------------------------

// The shared memory after the stages. The clusters are rows of the tile, and the vectors are its columns.
template <typename T>
struct BestShared {
  const T* centroid[kColumns];
  float weight[kColumns];
  const T* vector[kRing][kManyVectors];
  float lse[kRing][kManyVectors], limit[kRing][kManyVectors];  // a limit of +inf means that the vector does not exist
  float best[2][kColumns];                                     // for each of the two runs of 64 vectors
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

// The score that a query head's vector with this lse must exceed.
__device__ __forceinline__ float limit_of(const CentroidLookupArgs& args, const Turn& turn, int64_t head, float lse) {
  const float threshold = turn.level.threshold[head * turn.level.thresholds / args.heads_q];
  return threshold <= 0.0f ? lse - INFINITY : lse + log2f(threshold);
}

// How well a vector scores a cluster, -inf if it does not keep it.
__device__ __forceinline__ float kept_score(float x, float lse, float limit) {
  const float score = x - lse;
  const bool kept = limit != INFINITY && !(x <= limit);
  return !kept ? -INFINITY : score == score ? score : INFINITY;
}

template <typename T>
__device__ __forceinline__ void set_vectors(const CentroidLookupArgs& args, const Turn& turn, const Place& place,
                                            int64_t row, int tile, BestShared<T>& shared) {
  if (tile >= turn.tiles) return;
  const int64_t units = turn.rows * turn.tiles, unit = row * turn.tiles + tile;
  const int together = turn.splits == 1 ? 1 : 32;  // the threads that work on one vector
  for (int r = static_cast<int>(threadIdx.x) / together; r < kManyVectors; r += kManyThreads / together) {
    int64_t head;
    const T* vector = vector_of<T>(args, place, static_cast<int64_t>(tile) * kManyVectors + r, head);
    float lse = 0.0f, limit = INFINITY;
    if (vector != nullptr) {
      lse = join_splits(turn.part + unit * kManyVectors + r, units * kManyVectors, turn.splits);
      limit = limit_of(args, turn, head, lse);
    }
    if (together == 1 || lane_id() == 0) {
      shared.vector[tile % kRing][r] = vector;
      shared.lse[tile % kRing][r] = lse;
      shared.limit[tile % kRing][r] = limit;
    }
  }
}

template <typename T, bool kHopper>
__global__ void __launch_bounds__(kManyThreads, std::is_same_v<T, float> ? 1 : 2)
    best_kernel(const CentroidLookupArgs args, const Turn turn) {
#if !defined(HEADSTART_WGMMA) && !defined(HEADSTART_LANE_MODEL)
  if constexpr (kHopper) return;
#endif
  using Tile = Many<T, kHopper>;
  unsigned char* stages = shared_memory();
  auto& shared = *reinterpret_cast<BestShared<T>*>(stages + Tile::kSharedBytes);
  const int64_t row = blockIdx.x % turn.rows;
  const int first = static_cast<int>(blockIdx.x / turn.rows) * kColumns, listed = turn.listed(row);
  if (first >= listed) return;
  const Place place(args, turn, row);
  Centroids<T>{shared.centroid, shared.weight}.set(args, turn, place, row, first, listed);
  const GatheredRows<T> centroids{shared.centroid, turn.centroid_vectors};
  const GatheredRows<T> vectors{shared.vector[0], turn.query_vectors, true};
  const TileDepth depth{turn.tiles, 1, static_cast<int>(args.head_dim)};
  const float scale = args.scale * kLog2E;
  Tile tile;
  float best[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  for (int t = 0; t < Tile::Stages::kAhead; ++t) set_vectors(args, turn, place, row, t, shared);
  __syncthreads();
  tile.begin(stages, centroids, vectors, depth);
  for (int t = 0; t < turn.tiles; ++t) {
    set_vectors(args, turn, place, row, t + Tile::Stages::kAhead, shared);
    tile.next(stages, centroids, vectors, depth);
    const float *lses = shared.lse[t % kRing], *limits = shared.limit[t % kRing];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int vector = 64 * tile.slice_run(r) + run_column(n, 0);
        const float2 lse = *reinterpret_cast<const float2*>(lses + vector);
        const float2 limit = *reinterpret_cast<const float2*>(limits + vector);
        best[r] = fmaxf(best[r], kept_score(tile.at(r, n, 0) * scale, lse.x, limit.x));
        best[r] = fmaxf(best[r], kept_score(tile.at(r, n, 1) * scale, lse.y, limit.y));
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    best[r] = fmaxf(best[r], __shfl_xor_sync(kWarp, best[r], 1));
    best[r] = fmaxf(best[r], __shfl_xor_sync(kWarp, best[r], 2));
    if (lane_id() % 4 == 0) shared.best[tile.slice_run(r)][tile.slice_row(r)] = best[r];
  }
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < kColumns && first + c < listed; c += kManyThreads) {
    turn.scores[row * turn.level.count + first + c] =
        shared.weight[c] == -INFINITY ? -INFINITY : fmaxf(shared.best[0][c], shared.best[1][c]);
  }
}

// --- runs ---------------------------------------------------------------------------------------------------------

struct TakeShared {
  static constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
  uint32_t bins[kBins];
  uint32_t slots[3][kTakeWarps];
  uint32_t bin, above;
  float lse[kFewVectors], limit[kFewVectors];  // a limit of +inf means that the vector does not exist
};
static_assert(TakeShared::kBins == 2 * kTakeThreads && kTakeWarps == 32, "two bins a thread, a slot a lane");

__device__ __forceinline__ uint32_t sum_of_lower_lanes(uint32_t x) {
  uint32_t sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kWarp, sum, step);
    sum += static_cast<int>(lane_id()) >= step ? other : 0;
  }
  return sum - x;
}

// The sum of a value over all warps, and over the warps before the caller's.
struct WarpSums {
  uint32_t all, before;

  __device__ __forceinline__ WarpSums(const uint32_t (&slots)[kTakeWarps]) {
    const uint32_t x = slots[lane_id()];
    all = __reduce_add_sync(kWarp, x);
    before = __reduce_add_sync(kWarp, lane_id() < threadIdx.x / 32 ? x : 0);
  }
};

// Few vectors: a warp merges the sums of a vector.
__device__ __forceinline__ void set_limits(const CentroidLookupArgs& args, const Turn& turn, const Place& place,
                                           int64_t row, int listed, TakeShared& shared) {
  const int vector = static_cast<int>(threadIdx.x) / 32, splits = (listed + kFewColumns - 1) / kFewColumns;
  int64_t head;
  float lse = 0.0f, limit = INFINITY;
  if (vector_of<char>(args, place, vector, head) != nullptr) {
    lse = join_splits(turn.part + row * kFewVectors + vector, turn.rows * kFewVectors, splits);
    limit = limit_of(args, turn, head, lse);
  }
  if (lane_id() == 0) {
    shared.lse[vector] = lse;
    shared.limit[vector] = limit;
  }
}

// The largest key in [low, high] such that the entries at or above it fill the room, if all together do.
__device__ __forceinline__ uint32_t cut_key(const uint2* entries, int listed, uint32_t low, uint32_t high,
                                            uint32_t room, TakeShared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t found = low, above = 0;  // above: the length of the entries that are known to lie above the key
  int bits = 0;                     // of the range above `found` in which the key lies
  while (bits < 32 && (high - low) >> bits != 0) ++bits;
  while (bits > 0) {
    const int digit = min(bits, TakeShared::kDigitBits), shift = bits - digit;
    shared.bins[2 * thread] = shared.bins[2 * thread + 1] = 0;
    if (thread == 0) {
      shared.bin = 0;
      shared.above = above;
    }
    __syncthreads();
    for (int i = thread; i < listed; i += kTakeThreads) {
      const uint2 entry = entries[i];
      const uint32_t bin = (entry.x - found) >> shift;
      if (entry.y > 0 && entry.x >= found && bin < 1u << digit) atomicAdd(&shared.bins[bin], entry.y);
    }
    __syncthreads();
    // From the top bin down, two bins a thread.
    const uint32_t top = static_cast<uint32_t>(TakeShared::kBins - 1 - 2 * thread);
    const uint32_t upper = shared.bins[top], both = upper + shared.bins[top - 1];
    const uint32_t of_warp = __reduce_add_sync(kWarp, both);
    if (lane_id() == 0) shared.slots[0][thread / 32] = of_warp;
    __syncthreads();
    const uint32_t before = above + WarpSums(shared.slots[0]).before + sum_of_lower_lanes(both);
    if (before < room && before + both >= room) {
      const bool in_upper = before + upper >= room;
      shared.bin = in_upper ? top : top - 1;
      shared.above = in_upper ? before : before + upper;
    }
    __syncthreads();
    found += shared.bin << shift;
    above = shared.above;
    bits = shift;
    __syncthreads();  // all threads have read the bin
  }
  return found;
}

template <bool kFew>
__global__ void __launch_bounds__(kTakeThreads)
    take_kernel(const CentroidLookupArgs args, const Turn turn, int32_t* count, int32_t* index, int64_t capacity) {
  auto& shared = *reinterpret_cast<TakeShared*>(shared_memory());
  const int64_t row = blockIdx.x, level_entries = turn.level.count;
  const Place place(args, turn, row);
  const int32_t* offsets = turn.level.run_offsets + place.head * (level_entries + 1);
  const float* scores = turn.scores + row * level_entries * turn.per_entry;
  // The key of the score (0 if the entry is not kept) and the length of the run, of the entry at each place.
  uint2* entries = turn.kept != nullptr ? turn.kept + row * level_entries
                                        : reinterpret_cast<uint2*>(shared_memory() + sizeof(TakeShared));
  const int listed = turn.listed(row), thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const uint32_t room = static_cast<uint32_t>(capacity);
  int32_t* to = index + row * capacity;

  constexpr int kTogether = 4;
  int32_t start[kTogether], end[kTogether];
  float4 first[kTogether] = {};  // few vectors: the scores of the first four
  const auto load = [&](int base) {
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int i = base + j * kTakeThreads;
      const int id = i < listed ? turn.id_at(row, i) : -1;
      start[j] = id >= 0 ? offsets[id] : 0;
      end[j] = id >= 0 ? offsets[id + 1] : 0;
      if (i >= listed) continue;
      const float* from = scores + static_cast<int64_t>(i) * turn.per_entry;
      if constexpr (kFew) {
        first[j] = *reinterpret_cast<const float4*>(from);
      } else {
        first[j].x = *from;
      }
    }
  };
  load(thread);
  if constexpr (kFew) {
    set_limits(args, turn, place, row, listed, shared);  // while the first scores are on their way
    __syncthreads();
  }
  const auto best_of = [&](const float4& x, int v) {
    return fmaxf(
        fmaxf(kept_score(x.x, shared.lse[v], shared.limit[v]), kept_score(x.y, shared.lse[v + 1], shared.limit[v + 1])),
        fmaxf(kept_score(x.z, shared.lse[v + 2], shared.limit[v + 2]),
              kept_score(x.w, shared.lse[v + 3], shared.limit[v + 3])));
  };
  uint32_t wanted = 0, highest = 0, lowest = 0;  // `lowest` is the complement of a key
  for (int base = thread; base < listed;) {
    float best[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) best[j] = kFew ? best_of(first[j], 0) : first[j].x;
    for (int v = 4; kFew && v < turn.per_entry; v += 4) {
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int i = base + j * kTakeThreads;
        if (i >= listed) continue;
        const float* from = scores + static_cast<int64_t>(i) * turn.per_entry + v;
        best[j] = fmaxf(best[j], best_of(*reinterpret_cast<const float4*>(from), v));
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int i = base + j * kTakeThreads, length = end[j] - start[j];
      const bool kept = best[j] != -INFINITY && length > 0;
      const uint2 entry{kept ? key_of(best[j]) : 0, kept ? static_cast<uint32_t>(length) : 0};
      if (i < listed) entries[i] = entry;
      wanted += entry.y;
      highest = entry.x > highest ? entry.x : highest;
      lowest = kept && ~entry.x > lowest ? ~entry.x : lowest;
    }
    base += kTogether * kTakeThreads;
    load(base);
  }
  wanted = __reduce_add_sync(kWarp, wanted);
  highest = __reduce_max_sync(kWarp, highest);
  lowest = __reduce_max_sync(kWarp, lowest);
  if (lane_id() == 0) {
    shared.slots[0][warp] = wanted;
    shared.slots[1][warp] = highest;
    shared.slots[2][warp] = lowest;
  }
  __syncthreads();  // the entries are written, too
  wanted = WarpSums(shared.slots[0]).all;
  highest = __reduce_max_sync(kWarp, shared.slots[1][lane_id()]);
  lowest = ~__reduce_max_sync(kWarp, shared.slots[2][lane_id()]);
  __syncthreads();  // all threads have read the slots
  const uint32_t cut = wanted > room ? cut_key(entries, listed, lowest, highest, room, shared) : 0;

  // Every warp handles a stretch of the list. First all warps count. Then each warp knows where to write.
  const int stretch = (listed + kTakeThreads - 1) / kTakeThreads * 32;
  const int stretch_begin = min(warp * stretch, listed), stretch_end = min(stretch_begin + stretch, listed);
  uint32_t above = 0, tied = 0;
  for (int i = stretch_begin + static_cast<int>(lane_id()); i < stretch_end; i += 32) {
    const uint2 entry = entries[i];
    above += entry.x > cut ? entry.y : 0;
    tied += entry.x == cut ? entry.y : 0;
  }
  above = __reduce_add_sync(kWarp, above);
  tied = __reduce_add_sync(kWarp, tied);
  if (lane_id() == 0) {
    shared.slots[0][warp] = above;
    shared.slots[1][warp] = tied;
  }
  __syncthreads();
  const WarpSums of_above(shared.slots[0]), of_tied(shared.slots[1]);
  const uint32_t room_for_ties = of_above.all < room ? room - of_above.all : 0;
  uint32_t tied_before = of_tied.before, written = of_above.before + min(tied_before, room_for_ties);
  for (int base = stretch_begin; base < stretch_end; base += 32) {
    const int i = base + static_cast<int>(lane_id());
    const uint2 entry = i < stretch_end ? entries[i] : uint2{0, 0};
    const uint32_t tie = entry.x == cut ? entry.y : 0, before = tied_before + sum_of_lower_lanes(tie);
    uint32_t taken = before < room_for_ties ? min(tie, room_for_ties - before) : 0;
    if (entry.x > cut) taken = entry.y;
    const int32_t own_start = taken > 0 ? offsets[turn.id_at(row, i)] : 0;
    const uint32_t at = written + sum_of_lower_lanes(taken);
    for (uint32_t left = __ballot_sync(kWarp, taken > 0); left != 0; left &= left - 1) {
      const int lane = __ffs(left) - 1;
      const uint32_t length = __shfl_sync(kWarp, taken, lane), begin = __shfl_sync(kWarp, at, lane);
      const int32_t from = __shfl_sync(kWarp, own_start, lane);
      // past the room only if offsets are invalid
      for (uint32_t j = lane_id(); j < length && begin + j < room; j += 32)
        to[begin + j] = from + static_cast<int32_t>(j);
    }
    written += __reduce_add_sync(kWarp, taken);
    tied_before += __reduce_add_sync(kWarp, tie);
  }
  if (thread == 0) count[row] = static_cast<int32_t>(min(of_above.all + min(of_tied.all, room_for_ties), room));
}

// --- host ---------------------------------------------------------------------------------------------------------

struct Plan {
  int64_t rows, at_once;
  Turn clusters, parents;
  int32_t* list;
  int32_t* list_count;
};

int64_t vectors_of(const CentroidLookupArgs& args) { return args.heads_q / args.heads_kv * args.block_q; }

bool is_few(const CentroidLookupArgs& args) { return vectors_of(args) <= kFewVectors; }

Turn turn_of(const CentroidLookupArgs& args, const CentroidLevel& level, int64_t rows) {
  Turn turn{};
  turn.level = level;
  turn.query_vectors = reads_vectors(args.q, args.batch, args.heads_q, args.nq, args.dtype);
  turn.centroid_vectors = reads_vectors(level.centroids, 1, args.heads_kv, level.count, args.dtype);
  if (is_few(args)) {
    turn.tiles = 1;
    turn.splits = static_cast<int>(ceil_div(level.count, kFewColumns));
    turn.per_entry = static_cast<int>(round_up(vectors_of(args), 4));
  } else {
    turn.tiles = static_cast<int>(ceil_div(vectors_of(args), kManyVectors));
    const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * multiprocessors(), rows * turn.tiles);
    turn.splits = static_cast<int>(std::min({wanted, ceil_div(level.count, kColumns), kMaxSplits}));
    turn.per_entry = 1;
  }
  return turn;
}

Plan plan_of(const CentroidLookupArgs& args, Carver& carver) {
  Plan plan{};
  plan.rows = args.batch * args.heads_kv * ceil_div(args.nq, args.block_q);
  const int64_t entries = std::max(args.parents.count, args.clusters.count), lists = args.parents.count > 0 ? 1 : 0;
  const int64_t vectors = round_up(vectors_of(args), is_few(args) ? kFewVectors : kManyVectors);
  const int64_t scores = entries * turn_of(args, args.clusters, 1).per_entry;
  const int64_t kept = entries > kSharedEntries ? entries : 0;
  const int64_t parts = is_few(args) ? vectors * ceil_div(entries, kFewColumns) : vectors;
  const int64_t fit = kTurnBytes / (4 * (scores + lists * args.clusters.count + 2 * kept + parts));
  plan.at_once = fit < 1 ? 1 : fit < plan.rows ? fit : plan.rows;
  plan.clusters = turn_of(args, args.clusters, plan.at_once);
  if (lists > 0) plan.parents = turn_of(args, args.parents, plan.at_once);
  plan.parents.of_parents = true;
  const int splits = std::max(plan.parents.splits, plan.clusters.splits);
  plan.clusters.part = plan.parents.part = carver.take<float>(splits * plan.at_once * vectors);
  plan.clusters.scores = plan.parents.scores = carver.take<float>(plan.at_once * scores);
  if (kept > 0) plan.clusters.kept = plan.parents.kept = carver.take<uint2>(plan.at_once * kept);
  plan.list = carver.take<int32_t>(lists * plan.at_once * args.clusters.count);
  plan.list_count = carver.take<int32_t>(lists * plan.at_once);
  if (lists > 0) {
    plan.clusters.list = plan.list;
    plan.clusters.list_count = plan.list_count;
  }
  return plan;
}

template <typename T, int kTiles>
const char* score_few(const CentroidLookupArgs& args, const Turn& turn, CUstream_st* stream) {
  const int64_t units = ceil_div(args.head_dim, FewScores<T, kTiles>::kChunk) * kTiles * 32;
  return launch(score_kernel<T, kTiles>, turn.rows * turn.splits, kScoreThreads,
                static_cast<int>(sizeof(ScoreShared) + units * mma::kUnitBytes), stream, args, turn);
}

template <typename T, bool kHopper>
const char* score_many(const CentroidLookupArgs& args, const Turn& turn, CUstream_st* stream) {
  constexpr int kStages = Many<T, kHopper>::kSharedBytes;
  const char* error = launch(lse_kernel<T, kHopper>, turn.rows * turn.tiles * turn.splits, kManyThreads,
                             kStages + static_cast<int>(sizeof(LseShared<T>)), stream, args, turn);
  if (error != nullptr) return error;
  return launch(best_kernel<T, kHopper>, turn.rows * ceil_div(turn.level.count, kColumns), kManyThreads,
                kStages + static_cast<int>(sizeof(BestShared<T>)), stream, args, turn);
}

const char* look_up(const CentroidLookupArgs& args, const Turn& turn, int32_t* count, int32_t* index, int64_t capacity,
                    CUstream_st* stream) {
  const bool few = is_few(args), one_tile = vectors_of(args) <= mma::kColumns;
  const char* error = by_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, float>) {
      if (!few && has_warp_groups()) return score_many<T, true>(args, turn, stream);
    }
    if (!few) return score_many<T, false>(args, turn, stream);
    return one_tile ? score_few<T, 1>(args, turn, stream)
                    : score_few<T, kFewVectors / mma::kColumns>(args, turn, stream);
  });
  if (error != nullptr) return error;
  const int64_t entries = turn.kept == nullptr ? turn.level.count : 0;
  return launch(few ? take_kernel<true> : take_kernel<false>, turn.rows, kTakeThreads,
                static_cast<int>(sizeof(TakeShared) + entries * sizeof(uint2)), stream, args, turn, count, index,
                capacity);
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

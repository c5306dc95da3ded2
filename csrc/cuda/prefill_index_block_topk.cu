// block_topk_index: computes the means of blocks of queries and of keys and their dot products, and chooses the best
// blocks of every row.
//
//   1 pool     One thread block per block of tokens. A thread reads 16 bytes of a token; several tokens are read at
//              once. Sums are kept in registers and merged in shared memory. float32 means go to memory.
//   2 choose   A thread block fetches a job: 64 rows of a head, longest first. It computes tiles of 64 rows × 128 key
//              blocks with FMA (score_tile.h) into its scratch [64, T]. Then one warp per row cuts and compacts
//              (select.h).
//
// Floor: step 1 reads Q and K once and is bound by memory. Step 2 takes Nq · Nk · D / (2 · 64 · 64) multiply-adds per
// head in float32, 1 / 4096 of dense attention's products. The scratch is [64, T] floats for each resident thread
// block.

#include <cstring>

#include "prefill_index.h"

namespace headstart {
namespace cuda {
namespace {

using Tile = ScoreTile<float, 2, 2, 2>;
constexpr int kRows = Tile::kRows;
constexpr int kPoolThreads = 256;

struct Plan {
  int64_t heads, rows, blocks, chunks;  // chunks of kRows rows
  int64_t pitch;
  bool query_vectors, key_vectors;
  float* query_mean;  // [batch · heads_q][rows][head_dim]
  float* key_mean;    // [batch · heads_kv][blocks][head_dim]
  float* score;       // [resident][kRows][pitch]
  unsigned long long* counter;
};

// Writes the mean of tokens [first, end) of a head, or 0 if there are no tokens.
template <typename T>
__device__ __forceinline__ void pool(const T* tokens, int64_t token_stride, int64_t first, int64_t end, int head_dim,
                                     bool vectors, float* to) {
  constexpr int kUnit = mma::kUnitBytes / static_cast<int>(sizeof(T));
  float* part = reinterpret_cast<float*>(shared_memory());  // [tokens at once][head_dim]
  const int thread = static_cast<int>(threadIdx.x), units = head_dim / kUnit, at_once = kPoolThreads / units;
  const int unit = thread % units, mine = thread / units;
  if (mine < at_once) {
    float sum[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) sum[i] = 0.0f;
    for (int64_t n = first + mine; n < end; n += at_once) {
      const T* from = tokens + n * token_stride + unit * kUnit;
      T x[kUnit];
      if (vectors) {
        const uint4 words = *reinterpret_cast<const uint4*>(from);
        memcpy(x, &words, sizeof words);
      } else {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) x[i] = from[i];
      }
#pragma unroll
      for (int i = 0; i < kUnit; ++i) sum[i] += to_float(x[i]);
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) part[mine * head_dim + unit * kUnit + i] = sum[i];
  }
  __syncthreads();
  const float count = static_cast<float>(end > first ? end - first : 1);
  for (int d = thread; d < head_dim; d += kPoolThreads) {
    float total = 0.0f;
    for (int i = 0; i < at_once; ++i) total += part[i * head_dim + d];
    to[d] = total / count;
  }
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads) pool_kernel(const PrefillIndexArgs args, const Plan plan) {
  const int head_dim = static_cast<int>(args.head_dim);
  const int64_t query_blocks = plan.heads * plan.rows;
  if (blockIdx.x < query_blocks) {
    const int64_t at = blockIdx.x, head = at / plan.rows, b = head / args.heads_q, r = at % plan.rows;
    // Query n has the position of key nk - nq + n. Queries in the padding are left out.
    const int64_t padding = start_of(args, b) - (args.nk - args.nq), begin = r * args.block_q;
    const int64_t end = begin + args.block_q < args.nq ? begin + args.block_q : args.nq;
    pool(tokens_of<T>(args.q, b, head % args.heads_q), args.q.token, begin > padding ? begin : padding, end, head_dim,
         plan.query_vectors, plan.query_mean + at * head_dim);
  } else {
    const int64_t at = blockIdx.x - query_blocks, head = at / plan.blocks, b = head / args.heads_kv;
    const int64_t start = start_of(args, b), begin = at % plan.blocks * args.block_k;
    const int64_t end = begin + args.block_k < args.nk ? begin + args.block_k : args.nk;
    pool(tokens_of<T>(args.k, b, head % args.heads_kv), args.k.token, begin > start ? begin : start, end, head_dim,
         plan.key_vectors, plan.key_mean + at * head_dim);
  }
}

__global__ void __launch_bounds__(Tile::kThreads) choose_kernel(const PrefillIndexArgs args, const Plan plan) {
  unsigned char* stages = shared_memory();
  auto* slot = reinterpret_cast<unsigned long long*>(stages + Tile::kSharedBytes);
  float* score = plan.score + static_cast<int64_t>(blockIdx.x) * kRows * plan.pitch;
  const int64_t jobs = plan.heads * plan.chunks, head_dim = args.head_dim;
  for (;;) {
    const int64_t job = next_job(plan.counter, slot);
    if (job >= jobs) return;
    const int64_t head = job / plan.chunks, first_row = (plan.chunks - 1 - job % plan.chunks) * kRows;
    const int64_t b = head / args.heads_q, kv_head = b * args.heads_kv + kv_head_of(args, head % args.heads_q);
    const TileRows<float> q{plan.query_mean + head * plan.rows * head_dim,
                            head_dim,
                            static_cast<uint32_t>(first_row),
                            1,
                            0,
                            0,
                            static_cast<uint32_t>(plan.rows),
                            true};
    TileRows<float> k{plan.key_mean + kv_head * plan.blocks * head_dim,
                      head_dim,
                      0,
                      1,
                      0,
                      0,
                      static_cast<uint32_t>(plan.blocks),
                      true};
    const int64_t last_row = first_row + kRows < plan.rows ? first_row + kRows - 1 : plan.rows - 1;
    const RowBlocks last(args, b, last_row);
    Tile tile;
    for (int64_t first = last.begin / Tile::kColumns * Tile::kColumns; first < last.end; first += Tile::kColumns) {
      k.first = static_cast<uint32_t>(first);
      tile.multiply(stages, q, k, 1, static_cast<int>(head_dim));
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float* to = score + tile.row(r / 2, r % 2) * plan.pitch + first;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const float* x = &tile.score[r / 2][n][r % 2 * 2];
          *reinterpret_cast<float2*>(to + tile.column(n, 0)) = make_float2(x[0], x[1]);
        }
      }
    }
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x) / 32; at < kRows; at += Tile::kThreads / 32) {
      const int64_t r = first_row + at;
      if (r >= plan.rows) break;
      const RowBlocks row(args, b, r);
      const float* own = score + at * plan.pitch;
      const auto key = [&](int block) { return row.forced(block) ? kForced : key_of(own[block]); };
      const Cut cut = cut_by_count(row.begin, row.end, key, static_cast<uint32_t>(args.block_capacity));
      const int64_t to = head * plan.rows + r;
      int32_t* index = args.block_index + to * args.block_capacity;
      const int written = compact(row.begin, row.end, key, cut, index);
      clear_rest(index, written, args.block_capacity);
      if (lane_id() == 0) args.block_count[to] = written;
    }
  }
}

// --- host ---------------------------------------------------------------------------------------------------------

Plan plan_of(const PrefillIndexArgs& args, Carver& carver) {
  Plan plan{};
  plan.heads = args.batch * args.heads_q;
  plan.rows = ceil_div(args.nq, args.block_q);
  plan.blocks = ceil_div(args.nk, args.block_k);
  plan.chunks = ceil_div(plan.rows, kRows);
  plan.pitch = round_up(plan.blocks, Tile::kColumns);
  plan.query_vectors = reads_query_vectors(args);
  plan.key_vectors = reads_key_vectors(args);
  plan.query_mean = carver.take<float>(plan.heads * plan.rows * args.head_dim);
  plan.key_mean = carver.take<float>(args.batch * args.heads_kv * plan.blocks * args.head_dim);
  plan.score = carver.take<float>(resident_blocks(plan.heads * plan.chunks) * kRows * plan.pitch);
  plan.counter = carver.take<unsigned long long>(1);
  return plan;
}

}  // namespace

int64_t block_topk_workspace(const PrefillIndexArgs& args) {
  Carver carver(nullptr);
  plan_of(args, carver);
  return carver.bytes();
}

const char* block_topk_index(const PrefillIndexArgs& args, void* workspace, CUstream_st* stream) {
  if (args.batch * args.heads_q == 0) return nullptr;
  Carver carver(workspace);
  const Plan plan = plan_of(args, carver);
  const char* error = by_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kUnit = mma::kUnitBytes / static_cast<int>(sizeof(T));
    const int64_t blocks = plan.heads * plan.rows + args.batch * args.heads_kv * plan.blocks;
    return launch(pool_kernel<T>, blocks, kPoolThreads, kPoolThreads * kUnit * static_cast<int>(sizeof(float)), stream,
                  args, plan);
  });
  if (error != nullptr) return error;
  error = zero(plan.counter, sizeof *plan.counter, stream);
  if (error != nullptr) return error;
  return launch(choose_kernel, resident_blocks(plan.heads * plan.chunks), Tile::kThreads,
                Tile::kSharedBytes + static_cast<int>(sizeof *plan.counter), stream, args, plan);
}

}  // namespace cuda
}  // namespace headstart

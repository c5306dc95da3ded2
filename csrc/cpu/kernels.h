// What a CPU kernel family is, seen from outside: plain arguments, and one table of functions per tier.
//
// Kernels take raw pointers and strides (in elements) and know no framework. `register.cpp` checks the tensors and
// fills the arguments; `tiers.cpp` picks the table for this CPU.
#pragma once

#include <cstdint>

namespace headstart {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class Dtype : int { kFloat32, kFloat16, kBFloat16 };

// [batch][head][token][dim], dim contiguous.
struct Tensor4 {
  const void* data;
  int64_t batch, head, token;
};

// Runs body(context, worker) once for every worker in [0, workers), on several threads where there are some.
struct Parallel {
  int workers;
  void (*run)(int workers, void (*body)(void* context, int worker), void* context);
};

// headstart::BlockIndex. Batch and head strides may be 0 (expanded); rows and entries are contiguous.
struct IndexArgs {
  const int32_t* block_count;
  const int32_t* block_index;
  const int32_t* column_count;  // null: no columns
  const int32_t* column_index;
  int64_t count_batch, count_head, index_batch, index_head;
  int64_t column_count_batch, column_count_head, column_index_batch, column_index_head;
  int64_t heads, block_capacity, column_capacity;
  bool shared_columns;  // one list of columns for all rows of a head
};

struct SparseAttentionArgs {
  Dtype dtype;
  Tensor4 q, k, v;
  void* out;   // [B, Hq, Nq, D] contiguous
  float* lse;  // [B, Hq, Nq] contiguous
  IndexArgs index;
  const int32_t* kv_start;  // null: 0
  int64_t batch, heads_q, heads_kv, nq, nk, head_dim;
  int block_q, block_k;
  bool causal;
  float scale;
  int64_t window;  // keys up to a query's own position that it may see; nk or more: no window
};

struct MergeAttentionArgs {
  Dtype dtype;
  Tensor4 out_a, out_b;
  const float* lse_a;  // the three lse tensors are contiguous [B, H, N]
  const float* lse_b;
  void* out;
  float* lse;
  int64_t batch, heads, tokens, head_dim;
};

// What all index builders share. The outputs are contiguous: block_count [B, Hq, R], block_index [B, Hq, R, T].
struct PrefillIndexArgs {
  Dtype dtype;
  Tensor4 q, k;
  const int32_t* kv_start;
  int64_t batch, heads_q, heads_kv, nq, nk, head_dim;
  int block_q, block_k;
  int64_t sink, local;
  float scale;
  int32_t* block_count;
  int32_t* block_index;
  int64_t block_capacity;
};

struct VerticalSlashArgs : PrefillIndexArgs {
  int64_t last_q;
  int32_t* column_count;  // [B, Hq]
  int32_t* column_index;  // [B, Hq, column_capacity]
  int64_t column_capacity;
};

struct AdaptiveArgs : PrefillIndexArgs {
  float threshold;
  const float* head_threshold;  // [Hq] or null
  int stride;
  int64_t samples;  // queries of a row whose scores are computed exactly
};

struct Kernels {
  void (*sparse_attention)(const SparseAttentionArgs&, const Parallel&);
  void (*merge_attention)(const MergeAttentionArgs&, const Parallel&);
  void (*vertical_slash_index)(const VerticalSlashArgs&, const Parallel&);
  void (*block_topk_index)(const PrefillIndexArgs&, const Parallel&);
  void (*adaptive_block_index)(const AdaptiveArgs&, const Parallel&);
};

// The table of the tier in use (tiers.cpp).
const Kernels& kernels();

// Each tier's sources define its functions in a namespace of their own: generic::, avx2::, avx512::, avx512_bf16::.
#define HEADSTART_DECLARE_TIER(tier)                                    \
  namespace tier {                                                      \
  void sparse_attention(const SparseAttentionArgs&, const Parallel&);   \
  void merge_attention(const MergeAttentionArgs&, const Parallel&);     \
  void vertical_slash_index(const VerticalSlashArgs&, const Parallel&); \
  void block_topk_index(const PrefillIndexArgs&, const Parallel&);      \
  void adaptive_block_index(const AdaptiveArgs&, const Parallel&);      \
  }
HEADSTART_DECLARE_TIER(generic)
HEADSTART_DECLARE_TIER(avx2)
HEADSTART_DECLARE_TIER(avx512)
HEADSTART_DECLARE_TIER(avx512_bf16)
HEADSTART_DECLARE_TIER(avx512_bf16_emulated)
#undef HEADSTART_DECLARE_TIER

}  // namespace headstart

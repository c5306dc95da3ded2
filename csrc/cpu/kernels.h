// What a CPU kernel family is, seen from outside: plain arguments, and one table of functions per tier.
//
// Kernels take raw pointers and strides (in elements) and know no framework. `register.cpp` checks the tensors and
// fills the arguments; `tiers.cpp` picks the table for this CPU.
#pragma once

#include "../arguments.h"

namespace headstart {

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

// headstart::KeyClusters, or the level of parents above them; offsets and thresholds are contiguous.
struct ClusterArgs {
  const void* centroids;       // [Hkv][count][D], dim contiguous
  int64_t head, row;           // strides
  const int32_t* offsets;      // [Hkv][count + 1]: of keys, or for parents of clusters
  const float* log_threshold;  // [Hq], natural log
  int64_t count;
};

struct CentroidLookupArgs {
  Dtype dtype;
  Tensor4 q;
  ClusterArgs clusters, parents;  // parents.count 0: no parents
  int64_t batch, heads_q, heads_kv, nq, head_dim;
  int64_t block_q, max_columns;
  float scale;
  int32_t* column_count;  // [B, Hkv, R]
  int32_t* column_index;  // [B, Hkv, R, max_columns]; entries past the count may be anything
};

struct Int4PackArgs {
  uint8_t* codes;  // [N, K] contiguous; one of the two is written
  uint32_t* packed;
  int64_t n, k;
};

struct Kernels {
  void (*sparse_attention)(const SparseAttentionArgs&, const Parallel&);
  void (*merge_attention)(const MergeAttentionArgs&, const Parallel&);
  void (*vertical_slash_index)(const VerticalSlashArgs&, const Parallel&);
  void (*block_topk_index)(const PrefillIndexArgs&, const Parallel&);
  void (*adaptive_block_index)(const AdaptiveArgs&, const Parallel&);
  void (*centroid_lookup)(const CentroidLookupArgs&, const Parallel&);
  void (*int4_gemm)(const Int4GemmArgs&, const Parallel&);
  void (*int4_pack)(const Int4PackArgs&, const Parallel&);
  void (*int4_unpack)(const Int4PackArgs&, const Parallel&);
  void (*bitmap_mask)(const BitmapCompressArgs&, const Parallel&);
  void (*bitmap_gather)(const BitmapCompressArgs&, const Parallel&);
  void (*bitmap_decompress)(const BitmapDecompressArgs&, const Parallel&);
  void (*bitmap_gemm)(const BitmapGemmArgs&, const Parallel&);
};

// The table of the tier in use (tiers.cpp).
const Kernels& kernels();

// Each tier's sources define its functions in a namespace of their own: generic::, avx2::, avx512::, avx512_bf16::. The
// bitmap kernels are compiled for VBMI2 besides, which some CPUs of the last two tiers have.
#define HEADSTART_DECLARE_BITMAP(tier)                                  \
  namespace tier {                                                      \
  void bitmap_mask(const BitmapCompressArgs&, const Parallel&);         \
  void bitmap_gather(const BitmapCompressArgs&, const Parallel&);       \
  void bitmap_decompress(const BitmapDecompressArgs&, const Parallel&); \
  void bitmap_gemm(const BitmapGemmArgs&, const Parallel&);             \
  }
#define HEADSTART_DECLARE_TIER(tier)                                    \
  namespace tier {                                                      \
  void sparse_attention(const SparseAttentionArgs&, const Parallel&);   \
  void merge_attention(const MergeAttentionArgs&, const Parallel&);     \
  void vertical_slash_index(const VerticalSlashArgs&, const Parallel&); \
  void block_topk_index(const PrefillIndexArgs&, const Parallel&);      \
  void adaptive_block_index(const AdaptiveArgs&, const Parallel&);      \
  void centroid_lookup(const CentroidLookupArgs&, const Parallel&);     \
  void int4_gemm(const Int4GemmArgs&, const Parallel&);                 \
  void int4_pack(const Int4PackArgs&, const Parallel&);                 \
  void int4_unpack(const Int4PackArgs&, const Parallel&);               \
  }                                                                     \
  HEADSTART_DECLARE_BITMAP(tier)
HEADSTART_DECLARE_TIER(generic)
HEADSTART_DECLARE_TIER(avx2)
HEADSTART_DECLARE_TIER(avx512)
HEADSTART_DECLARE_TIER(avx512_bf16)
HEADSTART_DECLARE_TIER(avx512_bf16_emulated)
HEADSTART_DECLARE_BITMAP(avx512_vbmi2)
HEADSTART_DECLARE_BITMAP(avx512_bf16_vbmi2)
#undef HEADSTART_DECLARE_BITMAP
#undef HEADSTART_DECLARE_TIER

}  // namespace headstart

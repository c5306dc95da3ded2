// Plain arguments of all kernel families: raw pointers, and strides in elements.
//
// This file depends on no framework. csrc/torch/ fills the arguments.
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

// A tensor [batch][head][token][dim] with its strides. dim is contiguous.
struct Tensor4 {
  const void* data;
  int64_t batch, head, token;
};

// The tensors of a headstart.BlockIndex. Batch and head strides may be 0 (expanded). Rows and entries are contiguous.
struct IndexArgs {
  const int32_t* block_count;
  const int32_t* block_index;
  const int32_t* column_count;  // null if there are no columns
  const int32_t* column_index;
  int64_t count_batch, count_head, index_batch, index_head;
  int64_t column_count_batch, column_count_head, column_index_batch, column_index_head;
  int64_t heads, block_capacity, column_capacity;
  bool shared_columns;  // all rows of a head share one list of columns
};

struct SparseAttentionArgs {
  Dtype dtype;
  Tensor4 q, k, v;
  void* out;   // [B, Hq, Nq, D] contiguous
  float* lse;  // [B, Hq, Nq] contiguous
  IndexArgs index;
  const int32_t* kv_start;  // [B]; null means 0
  int64_t batch, heads_q, heads_kv, nq, nk, head_dim;
  int block_q, block_k;
  bool causal;
  float scale;
  int64_t window;  // a query sees the last `window` keys up to its own position; nk or more means no window
};

// float32 values [batch][head][token] with their strides.
struct Rows3 {
  const float* data;
  int64_t batch, head, token;
};

struct MergeAttentionArgs {
  Dtype dtype;
  Tensor4 out_a, out_b;
  Rows3 lse_a, lse_b;
  void* out;   // [B, H, N, D] contiguous
  float* lse;  // [B, H, N] contiguous
  int64_t batch, heads, tokens, head_dim;
};

// The arguments that all index builders share. The outputs are contiguous: block_count [B, Hq, R] and block_index
// [B, Hq, R, block_capacity], where R is the number of query blocks.
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
  int64_t samples;  // the number of queries of a row whose scores are computed exactly
};

// The centroids of every KV head. A centroid stands for a run of permuted keys, or for a run of the centroids one level
// below.
struct CentroidLevel {
  Tensor4 centroids;           // one batch, heads_kv heads, `count` tokens
  const int32_t* run_offsets;  // [heads_kv][count + 1]
  const float* threshold;      // [thresholds]; a threshold of 0 or less keeps everything
  int64_t count, thresholds;   // thresholds is 1, heads_kv or heads_q
};

// The outputs are contiguous: column_count [B, Hkv, R] and column_index [B, Hkv, R, capacity]. Entries of column_index
// past a row's count may hold any value.
struct CentroidLookupArgs {
  Dtype dtype;
  Tensor4 q;
  CentroidLevel clusters, parents;  // parents.count is 0 if there are no parents
  int64_t batch, heads_q, heads_kv, nq, head_dim;
  int64_t block_q;  // 1 to nq
  float scale;
  int32_t* column_count;
  int32_t* column_index;
  int64_t capacity;
};

// A linear layer with a headstart.Int4Weight (layouts/int4.h). All tensors except x are contiguous. The rows of x are
// `x_row` elements apart.
struct Int4GemmArgs {
  Dtype dtype, scale_dtype;
  const void* x;  // [M, K]
  int64_t x_row;
  const uint32_t* packed;
  const void* scales;
  const uint8_t* zeros;  // null means the middle code (8, or 128 in 8 bits), or 0 if there are minimums
  const void* minimums;  // in scale_dtype, or null; a weight is code * scale + minimum
  const void* bias;      // [N] or null
  void* out;             // [M, N]
  int64_t m, n, k;
  int64_t group_size;     // a multiple of a slab, or -1 for the whole row
  int bits;               // of a code: 4 or 8
  bool int8_activations;  // a CPU kernel may round x to int8; on a GPU, x is not rounded
};

struct Int4PackArgs {
  uint8_t* codes;  // [N, K] contiguous; int4_pack reads codes and writes packed, int4_unpack does the reverse
  uint32_t* packed;
  int64_t n, k;
  int bits;
};

// A headstart.BitmapWeight [N, K]. All tensors are contiguous. The rows may be a slice of a larger weight.
struct BitmapWeight {
  const void* values;          // row-major; 4-bit values are signed nibbles, two a byte: value 2i low, 2i + 1 high
  const uint8_t* bitmask;      // [N, ceil(K / 8)]: column k is bit k % 8 of byte k / 8; pad bits may be 0 or 1
  const int64_t* row_offsets;  // [N + 1]: the index of a row's first value
  const void* scales;          // [N, ceil(K / group_size)]; null if the values are the weights, bit by bit
  Dtype scale_dtype;
  int value_bits;      // 8, 16 or 32 without scales; 8 (int8) or 4 with scales
  int64_t group_size;  // 1 to max(K, 1)
  int64_t n, k;
  int64_t stored;  // the number of values; a kernel must not read past them
};

struct BitmapDecompressArgs {
  BitmapWeight weight;
  void* out;        // [N, K]: the values' bits; with scales, the weights in scale_dtype
  int64_t out_row;  // distance between rows
};

// out = x · wᵀ + bias. A quantised weight is value · scale; a kernel may round it to scale_dtype.
struct BitmapGemmArgs {
  BitmapWeight weight;  // without scales, its values have the type `dtype`
  Dtype dtype;
  const void* x;  // [M, K]
  int64_t x_row;
  const void* bias;  // [N] or null
  void* out;         // [M, N]
  int64_t m;
};

// Compression has two steps. bitmap_mask writes bitmask and row_offsets. Then the caller allocates `values` for
// row_offsets[N] values, and bitmap_gather writes them.
struct BitmapCompressArgs {
  const void* w;  // [N, K]
  int64_t w_row;
  int value_bytes;  // 1, 2 or 4
  int64_t n, k;
  uint8_t* bitmask;      // [N, ceil(K / 8)], pad bits 0
  int64_t* row_offsets;  // [N + 1]
  void* values;
};

}  // namespace headstart

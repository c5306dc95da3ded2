// Plain arguments of all kernel families: raw pointers, strides in elements.
//
// No framework here; csrc/torch/ fills them.
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

// [batch][head][token].
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

// Centroids of every KV head, each of which stands for a run: of permuted keys, or of the centroids one level below.
struct CentroidLevel {
  Tensor4 centroids;           // one batch, heads_kv heads, `count` tokens
  const int32_t* run_offsets;  // [heads_kv][count + 1]
  const float* threshold;      // [thresholds]: 1, heads_kv or heads_q; what is 0 or less keeps everything
  int64_t count, thresholds;
};

// The outputs are contiguous: column_count [B, Hkv, R], column_index [B, Hkv, R, capacity]; entries of the latter past a
// row's count may be anything.
struct CentroidLookupArgs {
  Dtype dtype;
  Tensor4 q;
  CentroidLevel clusters, parents;  // parents.count is 0 where there are none
  int64_t batch, heads_q, heads_kv, nq, head_dim;
  int64_t block_q;  // 1 to nq
  float scale;
  int32_t* column_count;
  int32_t* column_index;
  int64_t capacity;
};

// A linear layer with a headstart::Int4Weight (layouts/int4.h). All tensors are contiguous but x, whose rows are
// `x_row` apart.
struct Int4GemmArgs {
  Dtype dtype, scale_dtype;
  const void* x;  // [M, K]
  int64_t x_row;
  const uint32_t* packed;
  const void* scales;
  const uint8_t* zeros;  // null: 8
  const void* bias;      // [N] or null
  void* out;             // [M, N]
  int64_t m, n, k;
  int64_t group_size;     // a multiple of 32, or -1: the whole row
  bool int8_activations;  // x may be rounded to int8; what a GPU computes with is x as it is
};

struct Int4PackArgs {
  uint8_t* codes;  // [N, K] contiguous; one of the two is written
  uint32_t* packed;
  int64_t n, k;
};

// A headstart::BitmapWeight [N, K]. All tensors are contiguous; rows may be a slice of a larger weight.
struct BitmapWeight {
  const void* values;          // row-major; 4 bits: two signed nibbles a byte, value 2i low and 2i + 1 high
  const uint8_t* bitmask;      // [N, ceil(K / 8)]: bit k % 8 of byte k / 8; pad bits are not to be relied on
  const int64_t* row_offsets;  // [N + 1]: where a row's values begin, counted in values
  const void* scales;          // [N, ceil(K / group_size)]; null: the values are the weights, bit by bit
  Dtype scale_dtype;
  int value_bits;      // 8, 16 or 32; with scales 8 (int8) or 4
  int64_t group_size;  // 1 to max(K, 1)
  int64_t n, k;
  int64_t stored;  // how many values there are; none past them may be read
};

struct BitmapDecompressArgs {
  BitmapWeight weight;
  void* out;        // [N, K]: the values' bits, or weights in scale_dtype
  int64_t out_row;  // distance of rows
};

// x · wᵀ + bias. Quantised weights are value · scale, rounded to scale_dtype or not.
struct BitmapGemmArgs {
  BitmapWeight weight;  // without scales, its values are `dtype`
  Dtype dtype;
  const void* x;  // [M, K]
  int64_t x_row;
  const void* bias;  // [N] or null
  void* out;         // [M, N]
  int64_t m;
};

// Two steps: bitmap_mask writes bitmask and row_offsets; after it `values` has room for row_offsets[N] of them, and
// bitmap_gather writes those.
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

// Plain arguments of kernel families that both the CPU and the CUDA library have: raw pointers, strides in elements.
//
// No framework here. `tensors.h` and the `register.cpp` of each library fill them.
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
  int64_t group_size;  // a multiple of 32, or -1: the whole row
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

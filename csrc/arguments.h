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

}  // namespace headstart

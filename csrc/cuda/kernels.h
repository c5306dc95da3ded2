// What the CUDA kernel families are, seen from outside: raw pointers, strides in elements, a stream.
//
// Kernel files know no framework; `register.cpp` checks the tensors and fills the arguments. A launcher returns null,
// or what CUDA says of the launch.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace headstart {
namespace cuda {

enum class Dtype : int { kFloat32, kFloat16, kBFloat16 };

struct Strides3 {
  int64_t batch, head, token;
};

struct MergeArgs {
  const void* out_a;  // [batch, heads, tokens, dim], dim contiguous
  const void* out_b;
  const float* lse_a;  // [batch, heads, tokens]
  const float* lse_b;
  void* out;   // dense
  float* lse;  // dense
  Strides3 stride_out_a, stride_out_b, stride_lse_a, stride_lse_b;
  int64_t batch, heads, tokens, dim;
  Dtype dtype;
};

const char* merge_attention(const MergeArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace headstart

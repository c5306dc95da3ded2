// merge_attention: merges the attention of the same queries over two disjoint sets of keys, with their log-sum-exps.
//
//   top = max(lse_a, lse_b)   w_a = exp(lse_a - top)   w_b = exp(lse_b - top)
//   lse = top + ln(w_a + w_b)                          out = (w_a out_a + w_b out_b) / (w_a + w_b)
//
//                 threadIdx.x: 16 bytes of a row each, D / 8 threads for 16-bit types, D / 4 for float32
//                ┌────┬────┬────┬─ ─ ─ ┬────┐
//   threadIdx.y  │ t0 │ t1 │ t2 │      │    │ row r         A thread holds 16 bytes of out_a, 16 bytes of out_b and
//                ├────┼────┼────┼─ ─ ─ ┼────┤               the row's two weights in registers.
//                │    │    │    │      │    │ row r + 1     Thread 0 of a row writes the row's lse.
//                └────┴────┴────┴─ ─ ─ ┴────┘ ...           No shared memory, no synchronisation.
//   blockIdx.x: tiles of rows of a plane      blockIdx.y: planes (batch · head)
//
// Contiguous tensors collapse to one plane of batch · heads · tokens rows, so a decode step with one token per head
// still fills its blocks. Neighbouring threads read neighbouring 16-byte words across row ends.
//
// Floor: read 2 · rows · D and write rows · D elements; read 8 and write 4 bytes of lse per row. This is rows · (3 · D
// · size + 12) bytes at the memory bandwidth. The operations take far less time: 3 per pair of elements, and two
// exponentials per thread.
//
// If a row, a pointer or a stride is not a multiple of 16 bytes, the same kernel runs with one element at a time.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"
#include "launch.h"

namespace headstart {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void store_float(float* at, float x) { *at = x; }
__device__ __forceinline__ void store_float(__half* at, float x) { *at = __float2half_rn(x); }
__device__ __forceinline__ void store_float(__nv_bfloat16* at, float x) { *at = __float2bfloat16_rn(x); }

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
  T values[kVec];
};

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeAttentionArgs args, int64_t planes) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= args.tokens) return;
  const int64_t parts = args.head_dim / kVec;
  for (int64_t plane = blockIdx.y; plane < planes; plane += gridDim.y) {
    const int64_t batch = plane / args.heads, head = plane - batch * args.heads;
    const auto offset = [&](const auto& x) { return batch * x.batch + head * x.head + token * x.token; };
    const float a = args.lse_a.data[offset(args.lse_a)];
    const float b = args.lse_b.data[offset(args.lse_b)];
    float top = fmaxf(a, b);
    // If neither side saw a key, use a finite maximum. This avoids -inf - -inf in the exponents.
    if (top == -INFINITY) top = 0.0f;
    float weight_a = expf(a - top), weight_b = expf(b - top);
    const float total = weight_a + weight_b;
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    weight_a *= inverse;
    weight_b *= inverse;
    const int64_t row = plane * args.tokens + token;
    if (threadIdx.x == 0) args.lse[row] = top + logf(total);

    using Vector = Pack<T, kVec>;
    const auto* row_a = reinterpret_cast<const Vector*>(static_cast<const T*>(args.out_a.data) + offset(args.out_a));
    const auto* row_b = reinterpret_cast<const Vector*>(static_cast<const T*>(args.out_b.data) + offset(args.out_b));
    auto* row_out = reinterpret_cast<Vector*>(static_cast<T*>(args.out) + row * args.head_dim);
    for (int64_t part = threadIdx.x; part < parts; part += blockDim.x) {
      const Vector va = row_a[part], vb = row_b[part];
      Vector merged;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        store_float(&merged.values[i], weight_a * to_float(va.values[i]) + weight_b * to_float(vb.values[i]));
      }
      row_out[part] = merged;
    }
  }
}

template <typename T, int kVec>
const char* merge(const MergeAttentionArgs& args, CUstream_st* stream) {
  const int64_t parts = args.head_dim / kVec, planes = args.batch * args.heads;
  const unsigned x = static_cast<unsigned>(parts < 1 ? 1 : parts < kThreads ? parts : kThreads);
  const unsigned y = kThreads / x;
  const dim3 grid(static_cast<unsigned>((args.tokens + y - 1) / y),
                  static_cast<unsigned>(planes < kMaxGridY ? planes : kMaxGridY));
  return launch(merge_kernel<T, kVec>, grid, dim3(x, y), 0, stream, args, planes);
}

// Whether two dimensions can become one: their elements are evenly spaced across the border, or one dimension has size
// 1.
bool even(int64_t outer_stride, int64_t outer, int64_t inner_stride, int64_t inner) {
  return outer == 1 || inner == 1 || outer_stride == inner_stride * inner;
}

void collapse(MergeAttentionArgs& args) {
  const auto all = [&](auto condition) {
    return condition(args.out_a) && condition(args.out_b) && condition(args.lse_a) && condition(args.lse_b);
  };
  const auto change = [&](auto action) {
    action(args.out_a), action(args.out_b), action(args.lse_a), action(args.lse_b);
  };
  // The stride of a dimension of size 1 is never used, so it may have any value.
  change([&](auto& x) {
    if (args.batch == 1) x.batch = 0;
    if (args.heads == 1) x.head = 0;
    if (args.tokens == 1) x.token = 0;
  });
  if (!all([&](const auto& x) { return even(x.head, args.heads, x.token, args.tokens); })) return;
  change([&](auto& x) {
    if (args.tokens == 1) x.token = x.head;
  });
  args.tokens *= args.heads;
  args.heads = 1;
  if (!all([&](const auto& x) { return even(x.batch, args.batch, x.token, args.tokens); })) return;
  change([&](auto& x) {
    if (args.tokens == 1) x.token = x.batch;
  });
  args.tokens *= args.batch;
  args.batch = 1;
}

template <typename T>
const char* dispatch(const MergeAttentionArgs& args, CUstream_st* stream) {
  constexpr int kVec = 16 / sizeof(T);
  const auto aligned = [](const Tensor4& x) {
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch % kVec == 0 && x.head % kVec == 0 &&
           x.token % kVec == 0;
  };
  const bool vectors = args.head_dim % kVec == 0 && aligned(args.out_a) && aligned(args.out_b) &&
                       reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  return vectors ? merge<T, kVec>(args, stream) : merge<T, 1>(args, stream);
}

}  // namespace

const char* merge_attention(const MergeAttentionArgs& given, CUstream_st* stream) {
  if (given.batch * given.heads * given.tokens == 0) return nullptr;
  MergeAttentionArgs args = given;
  collapse(args);
  switch (args.dtype) {
    case Dtype::kFloat32:
      return dispatch<float>(args, stream);
    case Dtype::kFloat16:
      return dispatch<__half>(args, stream);
    default:
      return dispatch<__nv_bfloat16>(args, stream);
  }
}

}  // namespace cuda
}  // namespace headstart

// int4_gemm: which kernel multiplies, the parts of K added in order, and the weight dequantised for a plain GEMM.
//
//   add_parts     [4][M][N] float32 to [M][N]: part 0 + part 1 + part 2 + part 3, the bias, one rounding. 18 bytes an
//                 output read and written, mostly in L2.
//   dequantize    a thread a column of a slab: four words, 32 weights, 64 bytes side by side (float32: 128). 2.5 bytes
//                 a weight.

#include "int4_block.h"

namespace headstart {
namespace cuda {

namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const Int4GemmArgs args, const float* parts) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, size = args.m * args.n;
  if (at >= size) return;
  float total = parts[at];
#pragma unroll
  for (int p = 1; p < kParts; ++p) total += parts[p * size + at];
  const float bias = args.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(args.bias)[at % args.n]);
  static_cast<T*>(args.out)[at] = from_float<T>(total + bias);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const Int4GemmArgs args, int64_t group_slabs, bool vectors) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, slabs = int4::slabs(args.k);
  const int64_t column = i / (slabs * int4::kPanel) * int4::kPanel + i % int4::kPanel;
  const int64_t slab = i / int4::kPanel % slabs, groups = (slabs + group_slabs - 1) / group_slabs;
  if (column >= args.n) return;
  const int64_t group = int4::scale_index(column, slab / group_slabs, groups);
  const float scale = load_scale(args.scales, group, args.scale_dtype);
  Codes<float> codes;
  codes.set(args.zeros == nullptr ? kSymmetricZero : args.zeros[group]);
  T* to = static_cast<T*>(args.out) + column * args.k + slab * int4::kSlab;
  const int64_t left = args.k - slab * int4::kSlab;
  uint32_t words[int4::kWordsPerColumn];
#pragma unroll
  for (int t = 0; t < int4::kWordsPerColumn; ++t) {
    words[t] =
        args.packed[int4::slab_word(column / int4::kPanel, slab, args.k) + t * int4::kPanel + column % int4::kPanel];
  }
  constexpr int kUnit = mma::kUnitBytes / static_cast<int>(sizeof(T));
#pragma unroll
  for (int first = 0; first < int4::kSlab; first += kUnit) {
    if (first >= left) break;
    alignas(mma::kUnitBytes) T unit[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const int k = first + i;
      unit[i] = from_float<T>(codes.code(words[k % 8 / 2], k / 8, k % 2) * scale);
    }
    if (vectors) {
      *reinterpret_cast<uint4*>(to + first) = *reinterpret_cast<const uint4*>(unit);
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if (first + i < left) to[first + i] = unit[i];
      }
    }
  }
}

template <typename T>
const char* add_parts(const Int4GemmArgs& args, const float* parts, CUstream_st* stream) {
  return launch(add_parts_kernel<T>, (args.m * args.n + kThreads - 1) / kThreads, kThreads, 0, stream, args, parts);
}

template <typename T>
const char* dequantize(const Int4GemmArgs& args, CUstream_st* stream) {
  const int64_t slabs = int4::slabs(args.k), size = int4::panels(args.n) * slabs * int4::kPanel;
  const int64_t group_slabs = args.group_size < 0 ? slabs : args.group_size / int4::kSlab;
  const bool vectors = args.k * sizeof(T) % mma::kUnitBytes == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  return launch(dequantize_kernel<T>, (size + kThreads - 1) / kThreads, kThreads, 0, stream, args, group_slabs,
                vectors);
}

}  // namespace

int64_t int4_gemm_workspace(const Int4GemmArgs& args) {
  const bool splits = int4_gemm_sm90_runs(args) ? int4_gemm_sm90_splits(args) : int4_gemm_sm80_splits(args);
  return splits ? kParts * args.m * args.n * static_cast<int64_t>(sizeof(float)) : 0;
}

const char* int4_gemm(const Int4GemmArgs& args, void* workspace, CUstream_st* stream) {
  if (args.m * args.n == 0) return nullptr;
  float* parts = int4_gemm_workspace(args) > 0 ? static_cast<float*>(workspace) : nullptr;
  const char* error =
      int4_gemm_sm90_runs(args) ? int4_gemm_sm90(args, parts, stream) : int4_gemm_sm80(args, parts, stream);
  if (error != nullptr || parts == nullptr) return error;
  switch (args.dtype) {
    case Dtype::kFloat32:
      return add_parts<float>(args, parts, stream);
    case Dtype::kFloat16:
      return add_parts<Float16>(args, parts, stream);
    default:
      return add_parts<BFloat16>(args, parts, stream);
  }
}

const char* int4_dequantize(const Int4GemmArgs& args, CUstream_st* stream) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return dequantize<float>(args, stream);
    case Dtype::kFloat16:
      return dequantize<Float16>(args, stream);
    default:
      return dequantize<BFloat16>(args, stream);
  }
}

}  // namespace cuda
}  // namespace headstart

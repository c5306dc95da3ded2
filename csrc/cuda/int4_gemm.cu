// int4_gemm: chooses the kernel that multiplies, adds the parts of K in order, and dequantises the weight for a plain
// GEMM.
//
//   add_parts     [4][M][N] float32 to [M][N]: part 0 + part 1 + part 2 + part 3 + bias, rounded once. Reads and writes
//                 18 bytes per output, mostly in L2.
//   dequantize    A warp handles two slabs of a panel: 512 bytes of words, one load of 16 bytes per lane. Shuffles then
//                 bring each lane the words of 16 neighbouring bytes of a column. A store of the warp fills 128 bytes
//                 of four columns. Moves 2.5 bytes per weight (float32: 4.5).
//
//                 lane 16 s + 4 t + j loads word t of slab s, columns 4 j .. 4 j + 3
//                 lane  8 j + u       stores unit u of 128 bytes of column 4 j + q, for q = 0 .. 3
//
//   open          The same for weights in 8 bits or with minimums: a thread opens a word. It is simple, not fast: its
//                 stores are of 2 or 4 bytes.

#include "int4_block.h"

namespace headstart {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarpSlabs = 2;  // the slabs that a warp dequantises
static_assert(kWarpSlabs * int4::kPanel == 32, "a lane a column and slab");

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
    dequantize_kernel(const Int4GemmArgs args, int64_t group_slabs, bool word_vectors, bool vectors) {
  constexpr int kUnit = mma::kUnitBytes / static_cast<int>(sizeof(T)), kSlabUnits = int4::kSlab / kUnit;
  constexpr int kStoreSlabs = mma::kUnitsPerRow / kSlabUnits;  // the slabs in 128 bytes of a column
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32, slabs = int4::slabs(args.k);
  const int64_t pairs = (slabs + kWarpSlabs - 1) / kWarpSlabs, groups = (slabs + group_slabs - 1) / group_slabs;
  const int64_t panel = warp / pairs, first = warp % pairs * kWarpSlabs;
  if (panel >= int4::panels(args.n)) return;

  // A lane loads four words of the slab of its half warp, and the scale and zero point of one column.
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t slab = first + lane / int4::kPanel;
  uint32_t words[4] = {};
  float scale = 0.0f;
  Codes<float> codes{};
  if (slab < slabs) {
    const uint32_t* from = args.packed + int4::slab_word(panel, first, args.k) + lane * 4;
    if (word_vectors) {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q) words[q] = from[q];
    }
    const int64_t group = int4::scale_index(panel * int4::kPanel + lane % int4::kPanel, slab / group_slabs, groups);
    scale = load_scale(args.scales, group, args.scale_dtype);
    codes.set(args.zeros == nullptr ? kSymmetricZero : args.zeros[group]);
  }

  const int k = lane % kSlabUnits * kUnit;  // the start of the lane's unit in its slab
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int s = 0; s < kWarpSlabs; s += kStoreSlabs) {
      const int own = s + lane % mma::kUnitsPerRow / kSlabUnits,
                holder = own * int4::kPanel;  // the unit's slab, and the first lane that loaded it
      const int column = lane / mma::kUnitsPerRow * 4 + q;
      const float unit_scale = __shfl_sync(kWholeWarp, scale, holder + column);
      const Codes<float> unit_codes{__shfl_sync(kWholeWarp, codes.offset, holder + column)};
      alignas(mma::kUnitBytes) T unit[kUnit];
#pragma unroll
      for (int i = 0; i < kUnit; i += 2) {
        const uint32_t word = __shfl_sync(kWholeWarp, words[q], holder + (k + i) % 8 / 2 * 4 + column / 4) >> k / 8 * 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          unit[i + half] = from_float<T>(unit_codes.code(word, 0, half) * unit_scale);
        }
      }
      const int64_t row = panel * int4::kPanel + column, at = (first + own) * int4::kSlab + k, left = args.k - at;
      if (row >= args.n || left <= 0) continue;
      T* to = static_cast<T*>(args.out) + row * args.k + at;
      if (vectors) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(unit);
      } else {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          if (i < left) to[i] = unit[i];
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) open_kernel(const Int4GemmArgs args, int64_t group_slabs) {
  const int depth = int4::slab_values(args.bits);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;  // of the word
  const int64_t slabs = int4::slabs(args.k, args.bits), groups = (slabs + group_slabs - 1) / group_slabs;
  const int64_t panel = at / int4::kWordsPerSlab / slabs, slab = at / int4::kWordsPerSlab % slabs;
  const int t = static_cast<int>(at / int4::kPanel % int4::kWordsPerColumn);
  const int64_t row = panel * int4::kPanel + at % int4::kPanel;
  if (row >= args.n) return;
  const int64_t group = int4::scale_index(row, slab / group_slabs, groups);
  const float scale = load_scale(args.scales, group, args.scale_dtype);
  const float minimum = args.minimums == nullptr ? 0.0f : load_scale(args.minimums, group, args.scale_dtype);
  const int shared_zero = args.minimums == nullptr ? 1 << (args.bits - 1) : 0;
  const int zero = args.zeros == nullptr ? shared_zero : args.zeros[group];
  const uint32_t word = args.packed[at];
  T* to = static_cast<T*>(args.out) + row * args.k;
  for (int i = 0; i < 32 / args.bits; ++i) {
    const int64_t k = slab * depth + (args.bits == 8 ? 4 * t + i : int4::pair_k(t, i % 4) + i / 4);
    const int code = static_cast<int>(word >> args.bits * i) & ((1 << args.bits) - 1);
    if (k < args.k) to[k] = from_float<T>(__fadd_rn(__fmul_rn(static_cast<float>(code - zero), scale), minimum));
  }
}

template <typename T>
const char* add_parts(const Int4GemmArgs& args, const float* parts, CUstream_st* stream) {
  return launch(add_parts_kernel<T>, (args.m * args.n + kThreads - 1) / kThreads, kThreads, 0, stream, args, parts);
}

template <typename T>
const char* dequantize(const Int4GemmArgs& args, CUstream_st* stream) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % mma::kUnitBytes == 0; };
  const int64_t slabs = int4::slabs(args.k, args.bits);
  const int64_t group_slabs = args.group_size < 0 ? slabs : args.group_size / int4::slab_values(args.bits);
  if (args.bits == 8 || args.minimums != nullptr) {
    const int64_t words = int4::panels(args.n) * slabs * int4::kWordsPerSlab;
    return launch(open_kernel<T>, (words + kThreads - 1) / kThreads, kThreads, 0, stream, args, group_slabs);
  }
  const int64_t warps = int4::panels(args.n) * ((slabs + kWarpSlabs - 1) / kWarpSlabs);
  const bool vectors = args.k * sizeof(T) % mma::kUnitBytes == 0 && aligned(args.out);
  return launch(dequantize_kernel<T>, (warps * 32 + kThreads - 1) / kThreads, kThreads, 0, stream, args, group_slabs,
                aligned(args.packed), vectors);
}

}  // namespace

int64_t int4_gemm_workspace(const Int4GemmArgs& args) {
  if (int4_gemv_runs(args)) return 0;
  const bool splits = int4_gemm_sm90_runs(args) ? int4_gemm_sm90_splits(args) : int4_gemm_sm80_splits(args);
  return splits ? kParts * args.m * args.n * static_cast<int64_t>(sizeof(float)) : 0;
}

const char* int4_gemm(const Int4GemmArgs& args, void* workspace, CUstream_st* stream) {
  if (args.m * args.n == 0) return nullptr;
  if (int4_gemv_runs(args)) return int4_gemv(args, stream);
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

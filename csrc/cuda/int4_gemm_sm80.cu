// int4_gemm on tensor cores from Ampere on: mma.sync, weights dequantised between shared memory and the multiplier.
//
//   a block:  columns (panels of 16) × rows of x × parts of K        a warp: kPanels × kRowTiles accumulators of
//                                                                    mma.m16n8k16, twice: the group's sum, the part's
//             x, rows                       few rows   32 columns, 8 or 16 rows, all four parts of K: 2 × 4 warps,
//            ┌────────┐                                which join in shared memory
//     W      │ warp 0 │  kStages stages of  many rows  128 columns, 32 or 64 rows, 4 warps; a part of K, if there are
//     panels ├────────┤  cp.async in flight            few blocks, whose sums int4_gemm.cu adds; else all, one after
//            │ warp 1 │                                the other, the sum of the parts so far in shared memory
//            └────────┘
//   a stage:  kSlabs slabs of 32 k: words (256 bytes a panel and slab, as they lie), scales and zeros of the groups
//             that begin there, x in rows of 128 bytes, swizzled (layouts/mma.h)
//
// Words go through shared memory because cp.async keeps them in flight without registers and across barriers: with four
// stages and few rows 24 KiB of weights a block. An H100's multiprocessor has room for three blocks of up to 8 rows and
// for two of up to 16, 72 and 48 KiB of weights; its memory wants 17 KiB (3.35 TB/s · 0.65 µs / 132). Straight into
// registers they would take 24 of each lane's, in a loop unrolled by as many stages. A warp reads its 256 bytes of a
// slab back in one access without bank conflicts. All warps of a part read the same fragments of x; none dequantises
// what another does.
//
// Every sum runs over k in the same order whatever the tile: groups within a part, the parts in order. So a row's
// result does not depend on how many rows there are.
//
// Floor: K · N / 2 bytes, scales and zeros, at the memory's rate; x is read once a block from L2: at 8 rows as many
// bytes as the weights of its 32 columns. Instructions a slab and panel (512 weights) beside 2 mma a row tile: 18
// (float16) or 22 (bfloat16) to dequantise, 1 to read the words, 1 ldmatrix a row tile.

#include "int4_block.h"

namespace headstart {
namespace cuda {
namespace {

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2) int4_gemm_kernel(const Int4GemmArgs args, const Int4Plan plan) {
  Shape(args, plan).run();
}

template <typename Shape>
struct Of {
  using Type = Shape;
};

template <typename T, int kRowTiles>
using Few = Int4Block<T, kRowTiles, 1, 2, kParts, kPartStep, std::is_same_v<T, float> ? 2 : 4>;
template <typename T, int kRowTiles>
using Many = Int4Block<T, kRowTiles, 2, 4, 1, 2, 3>;

template <typename T>
const char* run(const Int4GemmArgs& args, float* parts, CUstream_st* stream) {
  const auto start = [&](auto shape) {
    using Shape = typename decltype(shape)::Type;
    return launch_int4<Shape>(int4_gemm_kernel<Shape>, args, parts, stream);
  };
  if (args.m <= Few<T, 1>::kRows) return start(Of<Few<T, 1>>{});
  if (args.m <= kFewRows) return start(Of<Few<T, 2>>{});
  if (args.m <= Many<T, 4>::kRows) return start(Of<Many<T, 4>>{});
  return start(Of<Many<T, 8>>{});
}

}  // namespace

bool int4_gemm_sm80_splits(const Int4GemmArgs& args) {
  if (args.m <= kFewRows) return false;
  const bool small = args.m <= Many<float, 4>::kRows;
  return (small ? int4_blocks<Many<float, 4>>(args) : int4_blocks<Many<float, 8>>(args)) < 2 * multiprocessors();
}

const char* int4_gemm_sm80(const Int4GemmArgs& args, float* parts, CUstream_st* stream) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return run<float>(args, parts, stream);
    case Dtype::kFloat16:
      return run<Float16>(args, parts, stream);
    default:
      return run<BFloat16>(args, parts, stream);
  }
}

}  // namespace cuda
}  // namespace headstart

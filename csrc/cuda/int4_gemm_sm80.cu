// int4_gemm on tensor cores from Ampere on: mma.sync. Weights are dequantised between shared memory and the multiplier.
//
//   a block:  columns (panels of 16) × rows of x × parts of K        a warp: kPanels × kRowTiles accumulators of
//                                                                    mma.m16n8k16, twice: the group's sum, the part's
//             x, rows                       few rows   32 columns, 8 or 16 rows, all four parts of K: 2 × 4 warps,
//            ┌────────┐                                which merge their sums in shared memory
//     W      │ warp 0 │  kStages stages of  many rows  128 columns, 32 or 64 rows, 4 warps. If there are few blocks, a
//     panels ├────────┤  cp.async in flight            block takes one part of K, and int4_gemm.cu adds the sums.
//            │ warp 1 │                                Else it takes all parts, one after another, and keeps the sum
//            └────────┘                                of the parts so far in shared memory.
//   a stage:  kSlabs slabs of 32 k: words (256 bytes per panel and slab, in memory order), scales and zeros of the
//             groups that begin there, x in rows of 128 bytes, swizzled (layouts/mma.h)
//
// Words go through shared memory because cp.async keeps them in flight without registers and across barriers. With four
// stages and few rows, a block has 24 KiB of weights in flight. An H100's multiprocessor has room for three blocks of
// up to 8 rows (72 KiB of weights) and for two blocks of up to 16 rows (48 KiB). Its memory needs 17 KiB in flight
// (3.35 TB/s · 0.65 µs / 132). Loads directly into registers would take 24 registers of each lane, in a loop that is
// unrolled by as many stages. A warp reads its 256 bytes of a slab back in one access without bank conflicts. All warps
// of a part read the same fragments of x. No weight is dequantised twice in a block.
//
// Every sum adds k in the same order for every tile: the groups within a part, then the parts in order. So a row's
// result does not depend on the number of rows.
//
// Floor: K · N / 2 bytes, and the scales and zeros, at the memory bandwidth. Each block reads x once from L2: at 8
// rows, as many bytes as the weights of its 32 columns. Instructions per slab and panel (512 weights), in addition to 2
// mma per row tile: 18 (float16) or 22 (bfloat16) to dequantise, 1 to read the words, 1 ldmatrix per row tile.

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

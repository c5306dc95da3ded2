// int4_gemm on Hopper's tensor cores: wgmma. Operand A is the dequantised weight and comes from registers.
//
//   a block:  128 columns, 64 or 128 rows of x; two groups of four warps, one panel per warp
//
//                  x, rows: operand B, from shared memory as it was copied
//                 ┌────────┐
//        warp 0   │ wgmma  │  A of m64nNk16 is A of mma.m16n8k16, one warp after another: the pairs of a lane's own
//     W  warp 1   │        │  words (int4_weight.h). Between dequantising and multiplying there is no shuffle and no
//        warp 2   │        │  shared memory. A slab of 32 k is two wgmma. While they run, the next slab is dequantised.
//        warp 3   └────────┘  While one group of warps waits for a stage's products, the other group's products run.
//
// Stages, groups, parts and their order are those of int4_gemm_sm80.cu. cp.async copies x in 16-byte pieces, from rows
// of any stride that is a multiple of 16 bytes. Each thread then lets the tensor cores see its pieces before the
// barrier.
//
// We do not know whether wgmma and mma.sync round a sum of 16 products in the same way. So on Hopper, a row's result
// does not depend on the batch among batches of up to 16 rows, nor among larger batches. Between the two kinds it may
// differ by rounding.
//
// Floor: 2 · M · N · K operations at the tensor cores' rate. For 128 rows and both groups of warps, the 4 wgmma of a
// stage and group take 512 cycles of a multiprocessor. The other instructions, about 100 per warp, take 200 cycles of
// its schedulers.

#include "int4_block.h"

namespace headstart {
namespace cuda {
namespace {

template <typename T, int kRowTiles>
using Group = Int4Block<T, kRowTiles, 1, 8, 1, 2, 3, true>;
constexpr int64_t kSmall = Group<BFloat16, 8>::kRows;

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kRows > kSmall ? 1 : 2)
    int4_gemm_group_kernel(const Int4GemmArgs args, const Int4Plan plan) {
#if defined(HEADSTART_WGMMA) || defined(HEADSTART_LANE_MODEL)
  Shape(args, plan).run();
#endif
}

template <typename T>
const char* run(const Int4GemmArgs& args, float* parts, CUstream_st* stream) {
  using Small = Group<T, 8>;
  using Large = Group<T, 16>;
  if (args.m <= kSmall) return launch_int4<Small>(int4_gemm_group_kernel<Small>, args, parts, stream);
  return launch_int4<Large>(int4_gemm_group_kernel<Large>, args, parts, stream);
}

}  // namespace

bool int4_gemm_sm90_runs(const Int4GemmArgs& args) {
  return args.m > kFewRows && args.dtype != Dtype::kFloat32 && has_warp_groups();
}

bool int4_gemm_sm90_splits(const Int4GemmArgs& args) {
  if (args.m <= kSmall) return int4_blocks<Group<BFloat16, 8>>(args) < 2 * multiprocessors();
  return int4_blocks<Group<BFloat16, 16>>(args) < multiprocessors();
}

const char* int4_gemm_sm90(const Int4GemmArgs& args, float* parts, CUstream_st* stream) {
  return args.dtype == Dtype::kFloat16 ? run<Float16>(args, parts, stream) : run<BFloat16>(args, parts, stream);
}

}  // namespace cuda
}  // namespace headstart

// The launchers of the index builders, for ctypes. The workspace starts as NaN.
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "lane_model.h"

namespace {

template <typename Args>
const char* run(const Args& args, int64_t (*bytes)(const Args&),
                const char* (*launcher)(const Args&, void*, CUstream_st*)) {
  constexpr int64_t kGuard = 256;
  const int64_t size = bytes(args);
  std::vector<unsigned char> memory(static_cast<size_t>(size + 2 * kGuard), 0xFF);
  unsigned char* workspace = memory.data() + kGuard - reinterpret_cast<uintptr_t>(memory.data()) % kGuard;
  const char* error = launcher(args, workspace, nullptr);
  for (const unsigned char* at = memory.data(); error == nullptr && at < memory.data() + memory.size(); ++at) {
    if ((at < workspace || at >= workspace + size) && *at != 0xFF) return "a write outside the workspace";
  }
  return error;
}

}  // namespace

using namespace headstart;

extern "C" {

void descending(bool on) { lane_model::descending = on; }
const char* vertical_slash_index(const VerticalSlashArgs& args) {
  return run(args, cuda::vertical_slash_workspace, cuda::vertical_slash_index);
}
const char* block_topk_index(const PrefillIndexArgs& args) {
  return run(args, cuda::block_topk_workspace, cuda::block_topk_index);
}
const char* adaptive_block_index(const AdaptiveArgs& args) {
  return run(args, cuda::adaptive_workspace, cuda::adaptive_block_index);
}

// Where a lane's registers stand in the matrices of mma.m16n8k16, as csrc/layouts/mma.h has it: (row, column) pairs.
void fragment_layout(int32_t (*a)[4][2][2], int32_t (*b)[2][2][2], int32_t (*c)[4][2]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 4; ++r) {
      for (int half = 0; half < 2; ++half) {
        a[lane][r][half][0] = mma::a_row(lane, r);
        a[lane][r][half][1] = mma::a_depth(lane, r, half);
        if (r < 2) {
          b[lane][r][half][0] = mma::b_depth(lane, r, half);
          b[lane][r][half][1] = mma::b_column(lane);
        }
      }
      c[lane][r][0] = mma::c_row(lane, r);
      c[lane][r][1] = mma::c_column(lane, r);
    }
  }
}
}

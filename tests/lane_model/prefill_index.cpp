// The launchers of the index builders, for ctypes.
#include "launch.h"

using namespace headstart;

extern "C" {

void descending(bool on) { lane_model::descending = on; }
void warp_groups(bool on) { lane_model::warp_groups = on; }
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

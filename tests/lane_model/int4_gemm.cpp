// The launchers of int4_gemm, for ctypes.
#include "launch.h"

extern "C" {

void descending(bool on) { lane_model::descending = on; }
void warp_groups(bool on) { lane_model::warp_groups = on; }
const char* int4_gemm(const headstart::Int4GemmArgs& args) {
  return run(args, headstart::cuda::int4_gemm_workspace, headstart::cuda::int4_gemm);
}
const char* int4_dequantize(const headstart::Int4GemmArgs& args) {
  return headstart::cuda::int4_dequantize(args, nullptr);
}
}

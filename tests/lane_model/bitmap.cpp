// The launchers of the bitmap operators, for ctypes.
#include "launch.h"

extern "C" {

void descending(bool on) { lane_model::descending = on; }
const char* bitmap_decompress(const headstart::BitmapDecompressArgs& args) {
  return headstart::cuda::bitmap_decompress(args, nullptr);
}
const char* bitmap_gemm(const headstart::BitmapGemmArgs& args) { return headstart::cuda::bitmap_gemm(args, nullptr); }
}

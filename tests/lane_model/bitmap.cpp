// The launchers of the bitmap operators, for ctypes. A load that reaches outside of its tensor is an error.
#include "launch.h"

namespace {

using headstart::BitmapWeight;

void forbid_around(const void* tensor, int64_t bytes) {
  if (tensor == nullptr) return;
  const auto* first = static_cast<const unsigned char*>(tensor);
  lane_model::outside.insert(lane_model::outside.end(), {first - 1, first + bytes});
}

int64_t bytes_of(headstart::Dtype dtype) { return dtype == headstart::Dtype::kFloat32 ? 4 : 2; }

void forbid_around(const BitmapWeight& weight) {
  lane_model::outside.clear();
  const int64_t groups = (weight.k + weight.group_size - 1) / weight.group_size;
  forbid_around(weight.values, weight.stored * weight.value_bits / 8);
  forbid_around(weight.bitmask, weight.n * ((weight.k + 7) / 8));
  forbid_around(weight.row_offsets, (weight.n + 1) * 8);
  forbid_around(weight.scales, weight.n * groups * bytes_of(weight.scale_dtype));
}

}  // namespace

extern "C" {

void descending(bool on) { lane_model::descending = on; }
const char* bitmap_decompress(const headstart::BitmapDecompressArgs& args) {
  forbid_around(args.weight);
  return headstart::cuda::bitmap_decompress(args, nullptr);
}
const char* bitmap_gemm(const headstart::BitmapGemmArgs& args) {
  forbid_around(args.weight);
  forbid_around(args.x, ((args.m - 1) * args.x_row + args.weight.k) * bytes_of(args.dtype));
  return headstart::cuda::bitmap_gemm(args, nullptr);
}
}

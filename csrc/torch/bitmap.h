// The bitmap operators: checks, output allocation and plain arguments, the same for every device.
//
// `Kernels` holds the kernels as static functions (args, a tensor on the device). cpu.cpp and cuda.cpp each define one.
// `Kernels::check_data(check, weight)` may read the tensors' contents if that needs no synchronisation. If kHasDense is
// true and 16-bit activations have at least bitmap_dense_rows() rows, the weight is decompressed and torch multiplies.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "tensors.h"

namespace headstart {

inline int value_bits(const Tensor& values) {
  switch (values.scalar_type()) {
    case ScalarType::Float:
      return 32;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 16;
    case ScalarType::Byte:
      return 4;
    default:
      return 8;
  }
}

// Checks the tensors of a weight and fills its arguments.
inline BitmapWeight bitmap_weight(const Checks& check, const Tensor& values, const Tensor& bitmask,
                                  const Tensor& row_offsets, int64_t cols, const OptionalTensor& scales,
                                  int64_t group_size) {
  check.expect(cols >= 0, "cols", "no negative number", cols);
  if (scales.has_value()) {
    check.tensor("values", values, {ScalarType::Char, ScalarType::Byte}, {"nnz"});
  } else {
    check.tensor("values", values,
                 {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Float8_e4m3fn,
                  ScalarType::Float8_e5m2, ScalarType::Char},
                 {"nnz"});
  }
  check.tensor("bitmask", bitmask, {ScalarType::Byte}, {"N", ceil_div(cols, 8)}, &values);
  const int64_t n = bitmask.size(0);
  check.tensor("row_offsets", row_offsets, {ScalarType::Long}, {n + 1}, &values);
  if (scales.has_value()) {
    check.expect(group_size == -1 || group_size > 0, "group_size", "a positive number, or -1 (a row)", group_size);
    if (group_size >= cols) group_size = -1;  // so that no kernel multiplies or rounds up a huge number
    check.floating("scales", *scales, {n, group_size == -1 ? 1 : ceil_div(cols, group_size)});
    check.same_device("scales", *scales, values);
  }
  check.contiguous("values", values);
  check.contiguous("bitmask", bitmask);
  check.contiguous("row_offsets", row_offsets);
  BitmapWeight weight{};
  weight.values = values.const_data_ptr();
  weight.bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr());
  weight.row_offsets = static_cast<const int64_t*>(row_offsets.const_data_ptr());
  weight.value_bits = value_bits(values);
  weight.group_size = std::max<int64_t>(1, cols);
  weight.n = n;
  weight.k = cols;
  weight.stored = values.size(0) * (weight.value_bits == 4 ? 2 : 1);
  if (scales.has_value()) {
    check.contiguous("scales", *scales);
    weight.scales = scales->const_data_ptr();
    weight.scale_dtype = dtype_of(*scales);
    if (group_size > 0) weight.group_size = std::min(weight.group_size, group_size);
  }
  return weight;
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor> bitmap_compress(const Tensor w) {
  const Checks check("bitmap_compress");
  check.tensor("w", w,
               {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Float8_e4m3fn,
                ScalarType::Float8_e5m2, ScalarType::Char},
               {"N", "K"});
  const bool rows_lie = w.size(1) <= 1 || w.stride(1) == 1;
  const Tensor rows = rows_lie ? w : dense(w);
  BitmapCompressArgs args{};
  args.n = w.size(0);
  args.k = w.size(1);
  args.w = rows.const_data_ptr();
  args.w_row = rows.stride(0);
  args.value_bytes = value_bits(w) / 8;
  Tensor bitmask = torch::stable::new_empty(w, {args.n, ceil_div(args.k, 8)}, ScalarType::Byte);
  Tensor row_offsets = torch::stable::new_empty(w, {args.n + 1}, ScalarType::Long);
  args.bitmask = static_cast<uint8_t*>(bitmask.mutable_data_ptr());
  args.row_offsets = static_cast<int64_t*>(row_offsets.mutable_data_ptr());
  Tensor values = torch::stable::new_empty(w, {Kernels::bitmap_mask(args, w)});
  args.values = values.mutable_data_ptr();
  Kernels::bitmap_gather(args, w);
  return {values, bitmask, row_offsets};
}

template <typename Kernels>
void bitmap_decompress_to(const Checks& check, const Tensor& values, const BitmapWeight& weight, Tensor& out) {
  Kernels::check_data(check, weight);
  if (weight.n == 0 || weight.k == 0) return;
  BitmapDecompressArgs args{};
  args.weight = weight;
  args.out = out.mutable_data_ptr();
  args.out_row = out.stride(0);
  Kernels::bitmap_decompress(args, values);
}

template <typename Kernels>
Tensor bitmap_decompress(const Tensor values, const Tensor bitmask, const Tensor row_offsets, int64_t cols,
                         const OptionalTensor scales, int64_t group_size) {
  const Checks check("bitmap_decompress");
  const BitmapWeight weight = bitmap_weight(check, values, bitmask, row_offsets, cols, scales, group_size);
  Tensor out = torch::stable::new_empty(scales.has_value() ? *scales : values, {weight.n, cols});
  bitmap_decompress_to<Kernels>(check, values, weight, out);
  return out;
}

template <typename Kernels>
void bitmap_decompress_out(const Tensor values, const Tensor bitmask, const Tensor row_offsets, int64_t cols,
                           const OptionalTensor scales, int64_t group_size, Tensor out) {
  const Checks check("bitmap_decompress");
  const BitmapWeight weight = bitmap_weight(check, values, bitmask, row_offsets, cols, scales, group_size);
  check.tensor("out", out, {scales.has_value() ? scales->scalar_type() : values.scalar_type()}, {weight.n, cols},
               &values);
  check.contiguous_last("out", out);
  bitmap_decompress_to<Kernels>(check, values, weight, out);
}

template <typename Kernels>
Tensor bitmap_gemm(const Tensor x, const Tensor values, const Tensor bitmask, const Tensor row_offsets,
                   const OptionalTensor bias, int64_t cols, const OptionalTensor scales, int64_t group_size) {
  const Checks check("bitmap_gemm");
  std::vector<Dim> any;
  std::vector<int64_t> shape;
  std::string got = dtype_name(x.scalar_type()) + " [";
  for (int64_t i = 0; i < x.dim(); ++i) {
    any.emplace_back(x.size(i));
    shape.push_back(x.size(i));
    got += (i ? ", " : "") + std::to_string(x.size(i));
  }
  check.expect(x.dim() > 0 && shape.back() == cols, "x", "[..., " + std::to_string(cols) + "]", got + "]");
  check.floating("x", x, any);
  check.contiguous_last("x", x);
  if (scales.has_value()) {
    check.floating("scales", *scales, {"N", "groups"});
    check.same_device("scales", *scales, x);
  } else {
    check.tensor("values", values, {x.scalar_type()}, {"nnz"}, &x);
  }
  const BitmapWeight weight = bitmap_weight(check, values, bitmask, row_offsets, cols, scales, group_size);
  if (bias.has_value()) {
    check.tensor("bias", *bias, {x.scalar_type()}, {weight.n}, &x);
    check.contiguous_last("bias", *bias);
  }
  Kernels::check_data(check, weight);
  shape.back() = weight.n;
  BitmapGemmArgs args{};
  const Tensor rows = as_rows(x, args.m, args.x_row);
  if (args.m == 0 || weight.n == 0) return torch::stable::new_empty(x, shape);
  args.weight = weight;
  args.dtype = dtype_of(x);
  args.x = rows.const_data_ptr();
  args.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  if constexpr (Kernels::kHasDense) {
    const bool same = !scales.has_value() || scales->scalar_type() == x.scalar_type();
    if (args.m >= Kernels::bitmap_dense_rows() && args.dtype != Dtype::kFloat32 && same) {
      return linear(x, bitmap_decompress<Kernels>(values, bitmask, row_offsets, cols, scales, group_size), bias);
    }
  }
  Tensor out = torch::stable::new_empty(x, shape);
  args.out = out.mutable_data_ptr();
  Kernels::bitmap_gemm(args, x);
  return out;
}

}  // namespace headstart

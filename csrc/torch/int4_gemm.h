// The int4 operators: checks, output allocation and plain arguments, the same for every device.
//
// `Kernels` holds the kernels as static functions (args, a tensor on the device). cpu.cpp and cuda.cpp each define one.
// If kHasDense is true, torch multiplies with the weight that `Kernels::dequantized(args, x)` returns in two cases: 16-bit
// activations have at least int4_dense_rows() rows, or the weight has 8 bits or minimums.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "../layouts/int4.h"
#include "tensors.h"

namespace headstart {

inline void check_int4_packed(const Checks& check, const Tensor& packed, int64_t n, int64_t k, int64_t bits,
                              const Tensor* like = nullptr) {
  check.expect(bits == 4 || bits == 8, "bits", "4 or 8", bits);
  check.expect(n > 0 && k > 0, "packed", "a weight with at least one row and column",
               "(" + std::to_string(n) + ", " + std::to_string(k) + ")");
  check.tensor("packed", packed, {ScalarType::Int},
               {int4::panels(n), int4::slabs(k, static_cast<int>(bits)), int4::kWordsPerColumn, int4::kPanel}, like);
  check.contiguous("packed", packed);
}

template <typename Kernels>
Tensor int4_gemm(const Tensor x, const Tensor packed, const Tensor scales, const OptionalTensor zeros,
                 const OptionalTensor bias, int64_t group_size, int64_t n, bool int8_activations,
                 const OptionalTensor minimums, int64_t bits) {
  const Checks check("int4_gemm");
  check.expect(x.dim() > 0, "x", "[..., K]", "a scalar");
  std::vector<Dim> any;
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < x.dim(); ++i) {
    any.emplace_back(x.size(i));
    shape.push_back(i + 1 < x.dim() ? x.size(i) : n);
  }
  check.floating("x", x, any);
  check.contiguous_last("x", x);
  const int64_t k = x.size(x.dim() - 1);
  check_int4_packed(check, packed, n, k, bits, &x);
  const int slab = int4::slab_values(static_cast<int>(bits));
  check.expect(group_size == -1 || (group_size > 0 && group_size % slab == 0), "group_size",
               "a positive multiple of " + std::to_string(slab) + ", or -1 (one group a row)", group_size);
  if (group_size >= k) group_size = -1;  // so that no kernel multiplies or rounds up a huge number
  const std::vector<Dim> panels{int4::panels(n), group_size == -1 ? 1 : ceil_div(k, group_size), int4::kPanel};
  check.floating("scales", scales, panels);
  check.same_device("scales", scales, packed);
  check.contiguous("scales", scales);
  if (zeros.has_value()) {
    check.tensor("zeros", *zeros, {ScalarType::Byte}, panels, &packed);
    check.contiguous("zeros", *zeros);
  }
  if (minimums.has_value()) {
    check.expect(!zeros.has_value(), "minimums", "None beside zeros", "both");
    check.tensor("minimums", *minimums, {scales.scalar_type()}, panels, &packed);
    check.contiguous("minimums", *minimums);
  }
  if (bias.has_value()) {
    check.tensor("bias", *bias, {x.scalar_type()}, {n}, &x);
    check.contiguous_last("bias", *bias);
  }
  if (x.numel() == 0) return torch::stable::new_empty(x, shape);
  Int4GemmArgs args{};
  const Tensor rows = as_rows(x, args.m, args.x_row);
  args.dtype = dtype_of(x);
  args.scale_dtype = dtype_of(scales);
  args.x = rows.const_data_ptr();
  args.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
  args.scales = scales.const_data_ptr();
  args.zeros = zeros.has_value() ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr;
  args.minimums = minimums.has_value() ? minimums->const_data_ptr() : nullptr;
  args.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  args.n = n;
  args.k = k;
  args.group_size = group_size;
  args.bits = static_cast<int>(bits);
  args.int8_activations = int8_activations;
  if constexpr (Kernels::kHasDense) {
    const bool many = args.m >= Kernels::int4_dense_rows() && args.dtype != Dtype::kFloat32;
    if (many || bits == 8 || minimums.has_value()) {
      return linear(x, Kernels::dequantized(args, x), bias);
    }
  }
  Tensor out = torch::stable::new_empty(x, shape);
  args.out = out.mutable_data_ptr();
  Kernels::int4_gemm(args, x);
  return out;
}

template <typename Kernels>
Tensor int4_pack(const Tensor codes, int64_t bits) {
  const Checks check("int4_pack");
  check.expect(bits == 4 || bits == 8, "bits", "4 or 8", bits);
  check.tensor("codes", codes, {ScalarType::Byte}, {"N", "K"});
  const int64_t n = codes.size(0), k = codes.size(1);
  Tensor packed = torch::stable::new_empty(
      codes, {int4::panels(n), int4::slabs(k, static_cast<int>(bits)), int4::kWordsPerColumn, int4::kPanel},
      ScalarType::Int);
  if (n * k == 0) return packed;
  const Tensor rows = dense(codes);
  const auto* first = static_cast<const uint8_t*>(rows.const_data_ptr());
  const int largest = *std::max_element(first, first + n * k);
  check.expect(largest < 1 << bits, "codes", "values 0 to " + std::to_string((1 << bits) - 1), largest);
  const Int4PackArgs args{const_cast<uint8_t*>(static_cast<const uint8_t*>(rows.const_data_ptr())),
                          static_cast<uint32_t*>(packed.mutable_data_ptr()), n, k, static_cast<int>(bits)};
  Kernels::int4_pack(args, codes);
  return packed;
}

template <typename Kernels>
Tensor int4_unpack(const Tensor packed, int64_t n, int64_t k, int64_t bits) {
  check_int4_packed(Checks("int4_unpack"), packed, n, k, bits);
  Tensor codes = torch::stable::new_empty(packed, {n, k}, ScalarType::Byte);
  const Int4PackArgs args{static_cast<uint8_t*>(codes.mutable_data_ptr()),
                          const_cast<uint32_t*>(static_cast<const uint32_t*>(packed.const_data_ptr())), n, k,
                          static_cast<int>(bits)};
  Kernels::int4_unpack(args, packed);
  return codes;
}

}  // namespace headstart

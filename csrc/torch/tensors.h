// Conversions from tensors to plain arguments, for the CPU and the CUDA library. Uses only torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "../arguments.h"
#include "checks.h"

namespace headstart {

using OptionalTensor = std::optional<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      return Dtype::kBFloat16;
  }
}

inline Tensor4 view(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

inline Rows3 rows(const Tensor& x) {
  return {static_cast<const float*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

inline const int32_t* ints(const OptionalTensor& x) {
  return x.has_value() ? static_cast<const int32_t*>(x->const_data_ptr()) : nullptr;
}

// x itself if it is contiguous, otherwise a contiguous copy.
inline Tensor dense(const Tensor& x) { return torch::stable::contiguous(x); }

inline OptionalTensor dense(const OptionalTensor& x) {
  if (!x.has_value()) return x;
  return torch::stable::contiguous(*x);
}

inline Tensor new_ints(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Int);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x [..., K] as a matrix of rows: sets `rows` to their number and `stride` to the distance between two rows, in
// elements. If the leading dimensions have no common stride, the result is a contiguous copy.
inline Tensor as_rows(const Tensor& x, int64_t& rows, int64_t& stride) {
  rows = 1;
  stride = 0;
  int64_t expected = 0;  // the stride that dimension i must have to continue the rows found so far
  for (int64_t i = x.dim() - 2; i >= 0; --i) {
    if (x.size(i) != 1) {
      if (rows == 1) {
        stride = expected = x.stride(i);
      } else if (x.stride(i) != expected) {
        const Tensor copy = dense(x);
        rows = 1;
        for (int64_t j = 0; j < x.dim() - 1; ++j) rows *= x.size(j);
        stride = x.size(x.dim() - 1);
        return copy;
      }
    }
    rows *= x.size(i);
    expected *= x.size(i);
  }
  return x;
}

inline Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace headstart

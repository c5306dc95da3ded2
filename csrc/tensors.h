// From tensors to plain arguments, for the `register.cpp` of both libraries. Torch's stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <tuple>

#include "arguments.h"
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

inline const int32_t* ints(const OptionalTensor& x) {
  return x.has_value() ? static_cast<const int32_t*>(x->const_data_ptr()) : nullptr;
}

// At least one element behind the pointer, so that empty tensors need no special case below.
inline Tensor dense(const Tensor& x) { return torch::stable::contiguous(x); }

inline OptionalTensor dense(const OptionalTensor& x) {
  if (!x.has_value()) return x;
  return torch::stable::contiguous(*x);
}

inline Tensor new_ints(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Int);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace headstart

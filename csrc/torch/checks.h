// Input checks with the messages of `python/headstart/ops/_checks.py`: `op: argument: expected X, got Y`.
//
// They protect callers who call a compiled kernel directly through torch.ops. A failed check throws std::runtime_error,
// and torch turns that into Python's RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace headstart {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    default:
      return "dtype " + std::to_string(static_cast<int>(type));
  }
}

// Prints x as Python does: with the fewest digits that identify the float, and with ".0" after a whole number.
inline std::string number(double x) {
  char text[32];
  for (int digits = 1; digits <= 17; ++digits) {
    std::snprintf(text, sizeof text, "%.*g", digits, x);
    if (std::strtod(text, nullptr) == x) break;
  }
  return std::string(text) + (std::strpbrk(text, ".en") == nullptr ? ".0" : "");
}

// One dimension of an expected shape: a fixed size, or a name for a dimension of any size.
struct Dim {
  Dim(int64_t n) : size(n), name(std::to_string(n)) {}
  Dim(const char* free) : size(-1), name(free) {}
  int64_t size;
  std::string name;
};

class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  template <typename Got>
  [[noreturn]] void fail(const char* argument, const std::string& expected, const Got& got) const {
    std::ostringstream message;
    message << op_ << ": " << argument << ": expected " << expected << ", got ";
    if constexpr (std::is_floating_point_v<Got>) {
      message << number(got);
    } else {
      message << got;
    }
    throw std::runtime_error(message.str());
  }

  template <typename Got>
  void expect(bool condition, const char* argument, const std::string& expected, const Got& got) const {
    if (!condition) fail(argument, expected, got);
  }

  void tensor(const char* argument, const Tensor& x, std::initializer_list<ScalarType> dtypes,
              const std::vector<Dim>& shape, const Tensor* like = nullptr) const {
    bool same = x.dim() == static_cast<int64_t>(shape.size()), typed = false;
    for (size_t i = 0; same && i < shape.size(); ++i) {
      same = shape[i].size < 0 || x.size(static_cast<int64_t>(i)) == shape[i].size;
    }
    std::string expected;
    for (const ScalarType type : dtypes) {
      typed |= x.scalar_type() == type;
      expected += (expected.empty() ? "" : " or ") + dtype_name(type);
    }
    if (!typed || !same) {
      std::string dims, got;
      for (const Dim& d : shape) dims += (dims.empty() ? "" : ", ") + d.name;
      for (int64_t i = 0; i < x.dim(); ++i) got += (got.empty() ? "" : ", ") + std::to_string(x.size(i));
      fail(argument, expected + " [" + dims + "]", dtype_name(x.scalar_type()) + " [" + got + "]");
    }
    if (like != nullptr) same_device(argument, x, *like);
  }

  void same_device(const char* argument, const Tensor& x, const Tensor& like) const {
    if (x.device() != like.device()) {
      fail(argument, "a tensor on " + device_name(like), "one on " + device_name(x));
    }
  }

  void floating(const char* argument, const Tensor& x, const std::vector<Dim>& shape) const {
    tensor(argument, x, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}, shape);
  }

  void contiguous_last(const char* argument, const Tensor& x) const {
    const int64_t last = x.dim() - 1;
    if (x.size(last) > 1 && x.stride(last) != 1) {
      fail(argument, "a contiguous last dimension (stride 1)", "stride " + std::to_string(x.stride(last)));
    }
  }

  void contiguous(const char* argument, const Tensor& x) const {
    if (x.is_contiguous()) return;
    std::string strides;
    for (int64_t i = 0; i < x.dim(); ++i) strides += (i ? ", " : "") + std::to_string(x.stride(i));
    fail(argument, "a contiguous tensor", "strides (" + strides + ")");
  }

  void block_size(const char* argument, int64_t value) const {
    expect(value == 64 || value == 128, argument, "64 or 128", value);
  }

  void finite(const char* argument, double value) const {
    expect(std::isfinite(value), argument, "a finite number", value);
  }

  // Checks q [B, Hq, Nq, D] and k [B, Hkv, Nk, D] for the attention operators and the index builders.
  void query_key(const Tensor& q, const Tensor& k, bool causal) const {
    floating("q", q, {"B", "Hq", "Nq", "D"});
    tensor("k", k, {q.scalar_type()}, {q.size(0), "Hkv", "Nk", q.size(3)}, &q);
    const int64_t d = q.size(3), hq = q.size(1), hkv = k.size(1), nk = k.size(2);
    expect(d % 8 == 0 && d >= 8 && d <= 256, "q", "a head dim that is a multiple of 8 up to 256", d);
    expect(hkv > 0 && hq % hkv == 0, "k", "a number of heads that divides q's " + std::to_string(hq), hkv);
    if (causal) {
      expect(q.size(2) <= nk, "q", "no more queries than the " + std::to_string(nk) + " keys (causal)", q.size(2));
    }
    expect(nk < INT32_MAX - 64, "k", "fewer than 2^31 - 64 keys", nk);
    contiguous_last("q", q);
    contiguous_last("k", k);
  }

  void kv_start(const std::optional<Tensor>& start, const Tensor& q) const {
    if (start.has_value()) tensor("kv_start", *start, {ScalarType::Int}, {q.size(0)}, &q);
  }

 private:
  static std::string device_name(const Tensor& x) {
    if (x.is_cpu()) return "cpu";
    if (x.is_cuda()) return "cuda:" + std::to_string(x.get_device());
    return "another device";
  }

  const char* op_;
};

}  // namespace headstart

// The code that the int4 kernels share: turning words of the packed layout into operands of the tensor cores, and the
// division of K into parts.
//
// The product is transposed, outᵀ = W · xᵀ. The weight is operand A, whose 16 rows are a panel's 16 output columns. Of
// every slab of 32 k, a lane (g = lane / 4, t = lane % 4) owns the words t of columns 2g and 2g + 1, which are 8
// neighbouring bytes. These columns are rows g and g + 8 of A. So a warp reads a slab of a panel as 256 bytes in one
// access. The pairs of both words are the registers of two mma, without a shuffle (layouts/mma.h, layouts/int4.h):
//
//             mma of k 0..15        mma of k 16..31
//     A 0     pair 0 of word 2g     pair 2          row g      k 2t, 2t + 1
//     A 1     pair 0 of word 2g+1   pair 2          row g + 8
//     A 2     pair 1 of word 2g     pair 3          row g      k 2t + 8, 2t + 9
//     A 3     pair 1 of word 2g+1   pair 3          row g + 8
//
// Before the product, a pair becomes exactly code - zero. Each code is put into the mantissa of a power of two. One
// fused multiply-add then subtracts this power and the zero point. The group's scale is applied to the float32 sums,
// with one multiply-add per accumulator and group. Scaled fragments would need one multiplication per pair of weights
// and would round each of them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../layouts/int4.h"
#include "device.h"

namespace headstart {
namespace cuda {

constexpr int kSymmetricZero = 8;
// K is divided into this many runs of slabs. Each run is summed separately, and the sums are added in order. The number
// of rows decides who adds them; the places of the cuts depend only on K.
constexpr int kParts = 4;
constexpr int kPartStep = 4;  // a part is a multiple of this many slabs, so it consists of whole steps of every kernel

inline int64_t part_slabs(int64_t k) {
  const int64_t steps = (int4::slabs(k) + kPartStep - 1) / kPartStep;
  return (steps + kParts - 1) / kParts * kPartStep;
}

__device__ __forceinline__ uint32_t both(uint32_t bits) { return bits | bits << 16; }

template <typename T>
__device__ __forceinline__ uint32_t both(float x) {
  return both(static_cast<uint32_t>(from_float<T>(x).bits));
}

// Extracts the codes of one output column and group from words, and subtracts the zero point.
template <typename T>
struct Codes;

// 1024 + code for the lowest nibble of the mantissa, 1024 + 16 · code for the nibble above it. 9 instructions per word.
template <>
struct Codes<Float16> {
  static constexpr uint32_t kMagic = 0x64006400u, kOne = 0x3C003C00u, kSixteenth = 0x2C002C00u;
  uint32_t low, high;

  __device__ __forceinline__ void set(int zero) {
    low = both<Float16>(static_cast<float>(-1024 - zero));
    high = both<Float16>(static_cast<float>(-64 - zero));
  }
  __device__ __forceinline__ bool wide() const { return false; }

  template <bool kWide>
  __device__ __forceinline__ void pairs(uint32_t (&to)[4], uint32_t word) const {
    constexpr uint32_t kUpper = int4::kPairMask << 4;
    const uint32_t upper = word >> 8;
    to[0] = multiply_add_pair<Float16>(and_or(word, int4::kPairMask, kMagic), kOne, low);
    to[1] = multiply_add_pair<Float16>(and_or(word, kUpper, kMagic), kSixteenth, high);
    to[2] = multiply_add_pair<Float16>(and_or(upper, int4::kPairMask, kMagic), kOne, low);
    to[3] = multiply_add_pair<Float16>(and_or(upper, kUpper, kMagic), kSixteenth, high);
  }
};

// 128 + code. 11 instructions per word. If the zero point is less than 128, 128 + zero has eight bits. No quantiser
// makes a larger zero point, but a file may contain one. It is subtracted in two steps.
template <>
struct Codes<BFloat16> {
  static constexpr uint32_t kMagic = 0x43004300u, kOne = 0x3F803F80u;
  static constexpr int kTop = 127;
  uint32_t low;
  int rest;

  __device__ __forceinline__ void set(int zero) {
    const int near = zero < kTop ? zero : kTop;
    low = both(0xC300u + static_cast<uint32_t>(near));  // -128 - near: the last 7 bits count ones
    rest = near - zero;
  }
  __device__ __forceinline__ bool wide() const { return rest != 0; }

  template <bool kWide>
  __device__ __forceinline__ void pairs(uint32_t (&to)[4], uint32_t word) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[i] = multiply_add_pair<BFloat16>(and_or(word >> 4 * i, int4::kPairMask, kMagic), kOne, low);
      if constexpr (kWide) to[i] = multiply_add_pair<BFloat16>(to[i], kOne, both<BFloat16>(static_cast<float>(rest)));
    }
  }
};

// 2^23 + code, one code at a time. No tensor core keeps all bits of float32.
template <>
struct Codes<float> {
  float offset;

  __device__ __forceinline__ void set(int zero) { offset = static_cast<float>((1 << 23) + zero); }
  __device__ __forceinline__ bool wide() const { return false; }
  __device__ __forceinline__ float code(uint32_t word, int pair, int half) const {
    return __uint_as_float(and_or(word >> (4 * pair + 16 * half), 15u, 0x4B000000u)) - offset;
  }
};

__device__ __forceinline__ float load_scale(const void* at, int64_t i, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return static_cast<const float*>(at)[i];
    case Dtype::kFloat16:
      return to_float(static_cast<const Float16*>(at)[i]);
    default:
      return to_float(static_cast<const BFloat16*>(at)[i]);
  }
}

}  // namespace cuda
}  // namespace headstart

// What the int4 kernels share: a word of the packed layout turned into operands of the tensor cores, the cut of K.
//
// The product is taken transposed, outᵀ = W · xᵀ: the weight is operand A, whose 16 rows are a panel's 16 output
// columns. A lane (g = lane / 4, t = lane % 4) owns, of every slab of 32 k, the words t of columns 2g and 2g + 1, which
// are 8 neighbouring bytes; rows g and g + 8 of A are those columns. So a warp reads a slab of a panel as 256 bytes in
// one access, and the pairs of both words are the registers of two mma, no shuffle between them (layouts/mma.h,
// layouts/int4.h):
//
//             mma of k 0..15        mma of k 16..31
//     A 0     pair 0 of word 2g     pair 2          row g      k 2t, 2t + 1
//     A 1     pair 0 of word 2g+1   pair 2          row g + 8
//     A 2     pair 1 of word 2g     pair 3          row g      k 2t + 8, 2t + 9
//     A 3     pair 1 of word 2g+1   pair 3          row g + 8
//
// A pair becomes code - zero, exactly, before it is multiplied: codes are put into the mantissa of a power of two,
// which is taken off with the zero point by one fused multiply-add. The group's scale meets float32 sums: a
// multiply-add per accumulator and group, where scaled fragments would take a multiplication per pair of weights and a
// rounding each.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../layouts/int4.h"
#include "device.h"

namespace headstart {
namespace cuda {

constexpr int kSymmetricZero = 8;
// K is cut into this many runs of slabs, each summed by itself, and added in order. By whom depends on the number of
// rows; where the cuts are depends on K alone.
constexpr int kParts = 4;
constexpr int kPartStep = 4;  // slabs: whole steps of every kernel

inline int64_t part_slabs(int64_t k) {
  const int64_t steps = (int4::slabs(k) + kPartStep - 1) / kPartStep;
  return (steps + kParts - 1) / kParts * kPartStep;
}

__device__ __forceinline__ uint32_t both(uint32_t bits) { return bits | bits << 16; }

template <typename T>
__device__ __forceinline__ uint32_t both(float x) {
  return both(static_cast<uint32_t>(from_float<T>(x).bits));
}

// Of one output column and group: takes codes out of words.
template <typename T>
struct Codes;

// 1024 + code for the nibble at the bottom of the mantissa, 1024 + 16 code for the one above it: 9 instructions a word.
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

// 128 + code: 11 instructions a word. 128 + zero has eight bits as long as the zero point is less than 128; a larger
// one, which no quantiser makes but a file may hold, is taken off in two steps.
template <>
struct Codes<BFloat16> {
  static constexpr uint32_t kMagic = 0x43004300u, kOne = 0x3F803F80u;
  static constexpr int kTop = 127;
  uint32_t low, rest;

  __device__ __forceinline__ void set(int zero) {
    const int near = zero < kTop ? zero : kTop;
    low = both<BFloat16>(static_cast<float>(-128 - near));
    rest = both<BFloat16>(static_cast<float>(near - zero));
  }
  __device__ __forceinline__ bool wide() const { return (rest & 0x7FFF) != 0; }

  template <bool kWide>
  __device__ __forceinline__ void pairs(uint32_t (&to)[4], uint32_t word) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[i] = multiply_add_pair<BFloat16>(and_or(word >> 4 * i, int4::kPairMask, kMagic), kOne, low);
      if constexpr (kWide) to[i] = multiply_add_pair<BFloat16>(to[i], kOne, rest);
    }
  }
};

// float32 has no tensor cores that keep its digits: 2^23 + code, a code at a time.
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

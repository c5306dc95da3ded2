// Moves packed values to their columns: 32 bits of output at a time, with one byte permutation.
//
//   queue   values not yet placed, the next one lowest            a step: the bits of 32 / b columns, b bits a value
//   ┌────┬────┬────┬────┬─ ─ ─                                     out   = permute(queue word 0, zero, selector(bits))
//   │ v0 │ v1 │ v2 │ v3 │        bits 1 0, b 16:   ┌────┬────┐     queue = queue >> b · popcount(bits)
//   └────┴────┴────┴────┴─ ─ ─              out    │ 0  │ v0 │
//                                                  └────┴────┘
// A selector has one nibble for each byte of the output: 0 to 3 select a byte of the queue, 4 to 7 a byte of zero.
// `spread` moves the bit of column i to position 4 i (b = 8) or 8 i (b = 16). The selector is then a linear function of
// the spread bits, for two reasons: a value's place in the queue is the number of set bits before it, and a column
// without a value adds 4 to its nibbles.
//
//   b 8     number of set bits before: spread · 0x1110. Plus 4 where the bit is not set: 0x4444 - 4 spread
//   b 16    low half 0x10, plus 0x44 if its bit is not set. High half the same, plus 0x22 if the low bit is set
//   b 32    all of word 0 of the queue, or zero
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HEADSTART_HOST_DEVICE __host__ __device__
#else
#define HEADSTART_HOST_DEVICE
#endif

namespace headstart::bitmap {

// The spread bits of step `step`. Bit i of `unit` is the bit of column i of the unit.
template <int kBits>
HEADSTART_HOST_DEVICE constexpr std::uint32_t spread(std::uint32_t unit, int step) {
  static_assert(kBits == 8 || kBits == 16 || kBits == 32, "the bytes of a value are moved");
  if constexpr (kBits == 32) {
    return unit >> step & 1;
  } else if constexpr (kBits == 16) {
    return (unit | unit << 7) >> 2 * step & 0x0101;  // right for units of at most 8 columns
  } else {
    const std::uint32_t bits = unit >> 4 * step & 15;
    const std::uint32_t pairs = (bits | bits << 6) & 0x0303;
    return (pairs | pairs << 3) & 0x1111;
  }
}

// The selector for spread bits. Only its lower 16 bits have a meaning.
template <int kBits>
HEADSTART_HOST_DEVICE constexpr std::uint32_t selector(std::uint32_t spread_bits) {
  if constexpr (kBits == 32) return 0x7654 - 0x4444 * spread_bits;
  if constexpr (kBits == 16) return 0x5454 + 0x21BC * spread_bits;
  return 0x4444 + 0x110C * spread_bits;
}

// The position of 16-byte unit `unit` within row `row` of a tile of 512-byte rows. With this swizzle, eight rows of one
// unit cover all 32 banks, and so do four neighbouring units in two neighbouring rows.
HEADSTART_HOST_DEVICE constexpr int tile_unit(int row, int unit) {
  return unit ^ ((row & 1) << 2 | (row & 2) | (row >> 2 & 1));
}

}  // namespace headstart::bitmap

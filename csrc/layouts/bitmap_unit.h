// How packed values find their columns: 32 bits of output at a time, by one byte permutation.
//
//   queue   values yet to be placed, the next one lowest          a step: the bits of 32 / b columns, b bits a value
//   ┌────┬────┬────┬────┬─ ─ ─                                     out   = permute(queue word 0, zero, selector(bits))
//   │ v0 │ v1 │ v2 │ v3 │        bits 1 0, b 16:   ┌────┬────┐     queue = queue >> b · popcount(bits)
//   └────┴────┴────┴────┴─ ─ ─              out    │ 0  │ v0 │
//                                                  └────┴────┘
// A selector has a nibble for each byte of the output: 0 to 3 a byte of the queue, 4 to 7 one of zero. With the bits
// spread out, bit i at position b i / 4 (b 8), 8 i (b 16), it is linear in them, since a value's place in the queue is
// the number of bits set before it and a column without a value adds a 4 to its nibbles:
//
//   b 8     sum of bits before: spread · 0x1110; plus 4 where no bit is: 0x4444 - 4 spread
//   b 16    low half 0x10 and 0x44 if its bit is not set; high half that, and 0x22 if the low bit is set
//   b 32    all of word 0, or nothing of it
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HEADSTART_HOST_DEVICE __host__ __device__
#else
#define HEADSTART_HOST_DEVICE
#endif

namespace headstart::bitmap {

// The bits of step `step` of a unit whose columns' bits are `unit`, spread out.
template <int kBits>
HEADSTART_HOST_DEVICE constexpr std::uint32_t spread(std::uint32_t unit, int step) {
  static_assert(kBits == 8 || kBits == 16 || kBits == 32, "the bytes of a value are moved");
  if constexpr (kBits == 32) {
    return unit >> step & 1;
  } else if constexpr (kBits == 16) {
    return (unit | unit << 7) >> 2 * step & 0x0101;  // of at most 8 columns
  } else {
    const std::uint32_t bits = unit >> 4 * step & 15;
    const std::uint32_t pairs = (bits | bits << 6) & 0x0303;
    return (pairs | pairs << 3) & 0x1111;
  }
}

// Of spread bits; the upper half is not to be looked at.
template <int kBits>
HEADSTART_HOST_DEVICE constexpr std::uint32_t selector(std::uint32_t spread_bits) {
  if constexpr (kBits == 32) return 0x7654 - 0x4444 * spread_bits;
  if constexpr (kBits == 16) return 0x5454 + 0x21BC * spread_bits;
  return 0x4444 + 0x110C * spread_bits;
}

// Where 16-byte unit `unit` of row `row` stands in its row of a tile of 512-byte rows: eight rows of one unit, and two
// neighbouring rows of four neighbouring units, cover all 32 banks.
HEADSTART_HOST_DEVICE constexpr int tile_unit(int row, int unit) {
  return unit ^ ((row & 1) << 2 | (row & 2) | (row >> 2 & 1));
}

}  // namespace headstart::bitmap

// wgmma.m64nNk16 with operand A in registers: who holds what, and how B lies in shared memory.
//
// Four warps multiply together. Warp w owns rows 16 w to 16 w + 15 of A [64][16] and of the sums, in the registers of
// mma.m16n8k16 (layouts/mma.h): A's four, and of the sums four a group of 8 columns, the groups one after the other.
//
// B [N columns][16 deep] lies as rows of 128 bytes, a column each, depth contiguous, in the order of mma::unit_offset:
// that is the hardware's 128-byte swizzle, which exchanges bits 4 to 6 of an address with their exclusive or with bits
// 7 to 9, so a tile begins at a multiple of 1024 bytes. Sixteen deep further on are 32 bytes further on, before the
// exchange. (PTX ISA, "Asynchronous warpgroup level matrix shared memory layout" and "matrix descriptor".)
#pragma once

#include <cstdint>

#include "mma.h"

namespace headstart::wgmma {

constexpr int kWarps = 4;
constexpr int kTileBytes = 8 * mma::kRowBytes;  // what the swizzle repeats after: 8 columns
constexpr uint64_t kSwizzle128 = 1;

// Of the byte of shared memory where B's 16 deep begin, in the row of its first column.
HEADSTART_HOST_DEVICE constexpr uint64_t descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | uint64_t{1} << 16 |
         static_cast<uint64_t>(kTileBytes >> 4) << 32 | kSwizzle128 << 62;
}

}  // namespace headstart::wgmma

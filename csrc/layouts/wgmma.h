// wgmma.m64nNk16: which lane holds which element, and how an operand lies in shared memory.
//
// Four warps multiply together. Warp w owns rows 16 w to 16 w + 15 of A [64][16] and of the sums. Its registers are
// those of mma.m16n8k16 (layouts/mma.h): four registers of A, and four registers of sums for each group of 8 columns,
// one group after the other. A may also lie in shared memory, as B does, with rows in place of columns.
//
// B [N columns][16 deep] lies in rows of 128 bytes. Each row is one column, depth contiguous, in the order of
// mma::unit_offset. That order is the hardware's 128-byte swizzle: it replaces bits 4 to 6 of an address by their
// exclusive or with bits 7 to 9. A tile must therefore begin at a multiple of 1024 bytes. Before the swizzle, the next
// 16 elements of depth begin 32 bytes further on.
//
// Transposed, a row of 128 bytes is one step of depth and holds 64 columns, in the same order. The next 64 columns begin
// `next_columns` bytes further on, the next 16 steps of depth 16 rows further on.
//
// Source: PTX ISA, "Asynchronous warpgroup level matrix shared memory layout" and "matrix descriptor".
#pragma once

#include <cstdint>

#include "mma.h"

namespace headstart::wgmma {

constexpr int kWarps = 4;
constexpr int kTileBytes = 8 * mma::kRowBytes;  // the swizzle repeats after this many bytes, which are 8 columns
constexpr uint64_t kSwizzle128 = 1;

// The matrix descriptor of 16 elements of an operand's depth. `address` is the shared-memory address of the first of
// them, in the row of B's first column or of A's first row. `next_columns` matters only if B is transposed and has more
// than 64 columns.
HEADSTART_HOST_DEVICE constexpr uint64_t descriptor(uint32_t address, uint32_t next_columns = 16) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(next_columns >> 4) << 16 |
         static_cast<uint64_t>(kTileBytes >> 4) << 32 | kSwizzle128 << 62;
}

}  // namespace headstart::wgmma

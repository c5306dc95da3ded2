// Which lane of a warp holds which element of mma.m16n8k16 (16-bit inputs, float32 accumulators), and how a tile of
// 128-byte rows lies in shared memory so that ldmatrix reads the fragments without bank conflicts.
//
//   A [16 rows][16 deep]            B [16 deep][8 columns]     C [16 rows][8 columns]
//   lane = 4 g + t                  register 0: deep 2t, 2t+1  values 0, 1: row g,     columns 2t, 2t+1
//   register 0: row g,     2t..     register 1: deep 2t+8, +9  values 2, 3: row g + 8, columns 2t, 2t+1
//   register 1: row g + 8, 2t..     all of column g
//   register 2: row g,     2t+8..
//   register 3: row g + 8, 2t+8..   a register holds two neighbours in depth, the lower one in its low half
//
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
//
// ldmatrix.x4 reads four 8 × 8 matrices. Lane l gives the address of row l % 8 of matrix l / 8. From each matrix it
// receives the two neighbouring elements 2t, 2t+1 of row g.
//
// Both operands lie with depth contiguous: a row of A or a column of B is a row of 128 bytes, which are eight 16-byte
// units. Unit u of row r is stored at u ^ (r % 8), so eight rows of one unit cover all 32 banks.
#pragma once

#ifdef __CUDACC__
#define HEADSTART_HOST_DEVICE __host__ __device__
#else
#define HEADSTART_HOST_DEVICE
#endif

namespace headstart::mma {

constexpr int kRows = 16;
constexpr int kColumns = 8;
constexpr int kDepth = 16;
constexpr int kRowBytes = 128;  // a row of a tile in shared memory
constexpr int kUnitBytes = 16;  // a lane's copy, and a row of an 8 × 8 matrix
constexpr int kUnitsPerRow = 8;

HEADSTART_HOST_DEVICE constexpr int a_row(int lane, int reg) { return lane / 4 + 8 * (reg % 2); }
HEADSTART_HOST_DEVICE constexpr int a_depth(int lane, int reg, int half) { return lane % 4 * 2 + half + 8 * (reg / 2); }
HEADSTART_HOST_DEVICE constexpr int b_depth(int lane, int reg, int half) { return lane % 4 * 2 + half + 8 * reg; }
HEADSTART_HOST_DEVICE constexpr int b_column(int lane) { return lane / 4; }
HEADSTART_HOST_DEVICE constexpr int c_row(int lane, int value) { return lane / 4 + 8 * (value / 2); }
HEADSTART_HOST_DEVICE constexpr int c_column(int lane, int value) { return lane % 4 * 2 + value % 2; }

// The row and the 16-byte unit whose address a lane gives to ldmatrix.x4. a_load_*: one A fragment (its registers 0 to
// 3). b_load_*: the B fragments of two neighbouring groups of 8 columns (registers 0, 1 of the first group, then of the
// second).
HEADSTART_HOST_DEVICE constexpr int a_load_row(int lane) { return lane % 16; }
HEADSTART_HOST_DEVICE constexpr int a_load_unit(int lane) { return lane / 16; }
HEADSTART_HOST_DEVICE constexpr int b_load_row(int lane) { return lane % 8 + lane / 16 * 8; }
HEADSTART_HOST_DEVICE constexpr int b_load_unit(int lane) { return lane / 8 % 2; }

// The byte offset in a tile of unit `unit` of row `row`.
HEADSTART_HOST_DEVICE constexpr int unit_offset(int row, int unit) {
  return row * kRowBytes + (unit ^ (row % 8)) * kUnitBytes;
}

}  // namespace headstart::mma

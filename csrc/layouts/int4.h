// The packed layout of int4 weights: which nibble of which word holds weight (n, k).
//
// Words are int32 [ceil(N/16)][ceil(K/32)][4][16]: panel of 16 output columns, slab of 32 k-values, t, column.
// A slab of one column is four words; word t holds, as pairs (k, k+1), the k-values
//
//     t = 0:  0,1   8,9  16,17  24,25          bit  31  28  24  20  16  12   8   4   0
//     t = 1:  2,3  10,11  18,19  26,27    word t:   | i3| i2| i1| i0| i3| i2| i1| i0|
//     t = 2:  4,5  12,13  20,21  28,29              |   k + 1 (high)|     k (low)   |    k = 8 i + 2 t
//     t = 3:  6,7  14,15  22,23  30,31
//
// so that (word >> 4 i) & 0x000F000F is pair i, one code in each half of the register: or a magic number in
// (0x6400 for float16, 0x4300 for bfloat16) and both are floats, 1024 or 128 above the code.
//
// Why these k: in mma.m16n8k16 a lane with t = lane % 4 owns k = 2t, 2t+1, 2t+8, 2t+9 of B's column lane / 4, so pairs
// 0, 1 of its word are the B fragment of the slab's first mma and pairs 2, 3 of its second: no shuffle, no shared
// memory.
// A CPU reads the 16 columns of (slab, t) as one vector of 64 bytes and multiplies pair i by the broadcast activation
// pair (x[8i + 2t], x[8i + 2t + 1]) of the slab. A panel depends on its own 16 columns alone: slices of N are slices of
// memory, and so are those of scales and zeros, [ceil(N/16)][groups][16]. Padding is zero.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HEADSTART_HOST_DEVICE __host__ __device__
#else
#define HEADSTART_HOST_DEVICE
#endif

namespace headstart::int4 {

constexpr int kPanel = 16;          // output columns
constexpr int kSlab = 32;           // k-values
constexpr int kWordsPerColumn = 4;  // of a slab
constexpr int kPairsPerWord = 4;
constexpr int kWordsPerSlab = kPanel * kWordsPerColumn;
constexpr std::uint32_t kPairMask = 0x000F000Fu;

struct Place {
  std::int64_t word;
  int shift;
};

HEADSTART_HOST_DEVICE constexpr std::int64_t panels(std::int64_t n) { return (n + kPanel - 1) / kPanel; }
HEADSTART_HOST_DEVICE constexpr std::int64_t slabs(std::int64_t k) { return (k + kSlab - 1) / kSlab; }

// The first of the 64 words of (panel, slab).
HEADSTART_HOST_DEVICE constexpr std::int64_t slab_word(std::int64_t panel, std::int64_t slab, std::int64_t k_size) {
  return (panel * slabs(k_size) + slab) * kWordsPerSlab;
}

// Where weight (n, k) of an [N, k_size] matrix stands.
HEADSTART_HOST_DEVICE constexpr Place place(std::int64_t n, std::int64_t k, std::int64_t k_size) {
  const int in_slab = static_cast<int>(k % kSlab);
  const int t = in_slab % 8 / 2;
  return {slab_word(n / kPanel, k / kSlab, k_size) + t * kPanel + n % kPanel, 4 * (in_slab / 8) + 16 * (in_slab % 2)};
}

// The even k, within its slab, of pair i of word t; the odd one is the next.
HEADSTART_HOST_DEVICE constexpr int pair_k(int t, int i) { return 8 * i + 2 * t; }

// The scale or zero of column n and group g.
HEADSTART_HOST_DEVICE constexpr std::int64_t scale_index(std::int64_t n, std::int64_t group, std::int64_t groups) {
  return (n / kPanel * groups + group) * kPanel + n % kPanel;
}

}  // namespace headstart::int4

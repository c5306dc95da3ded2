// The packed layout of weights in 4 or 8 bits: which bits of which word hold weight (n, k).
//
// 4 bits:
//
// Words are int32 [ceil(N/16)][ceil(K/32)][4][16]: panel of 16 output columns, slab of 32 k-values, t, column.
// A slab of one column is four words. Word t holds these k-values, in pairs (k, k+1):
//
//     t = 0:  0,1   8,9  16,17  24,25          bit  31  28  24  20  16  12   8   4   0
//     t = 1:  2,3  10,11  18,19  26,27    word t:   | i3| i2| i1| i0| i3| i2| i1| i0|
//     t = 2:  4,5  12,13  20,21  28,29              |   k + 1 (high)|     k (low)   |    k = 8 i + 2 t
//     t = 3:  6,7  14,15  22,23  30,31
//
// (word >> 4 i) & 0x000F000F is pair i, with one code in each half of the register. A bitwise or with a magic number in
// each half (0x6400 for float16, 0x4300 for bfloat16) turns both codes into floats, which are 1024 (float16) or 128
// (bfloat16) above the codes.
//
// The reason for this order of k: in mma.m16n8k16 a lane with t = lane % 4 owns k = 2t, 2t+1, 2t+8, 2t+9 of B's column
// lane / 4. So pairs 0 and 1 of its word are the B fragment of the slab's first mma, and pairs 2 and 3 are the B
// fragment of its second mma. This needs no shuffle and no shared memory.
//
// A CPU reads the 16 columns of (slab, t) as one vector of 64 bytes. It multiplies pair i by the broadcast activation
// pair (x[8i + 2t], x[8i + 2t + 1]) of the slab.
//
// 8 bits: a slab has 16 k-values, so it is four words of a column too. Words are int32 [ceil(N/16)][ceil(K/16)][4][16].
// Word t holds k = 4 t, 4 t + 1, 4 t + 2 and 4 t + 3, the first in the lowest byte. A slab is half as long as with 4
// bits, because GGUF's Q6_K has a scale for each 16 weights.
//
// A panel depends only on its own 16 columns, so a slice of N is a slice of memory. The same holds for scales, zeros
// and minimums, which lie as [ceil(N/16)][groups][16]. Padding is zero.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HEADSTART_HOST_DEVICE __host__ __device__
#else
#define HEADSTART_HOST_DEVICE
#endif

namespace headstart::int4 {

constexpr int kPanel = 16;          // output columns
constexpr int kSlab = 32;           // k-values, in 4 bits
constexpr int kWordsPerColumn = 4;  // in a slab
constexpr int kPairsPerWord = 4;
constexpr int kWordsPerSlab = kPanel * kWordsPerColumn;
constexpr std::uint32_t kPairMask = 0x000F000Fu;

struct Place {
  std::int64_t word;
  int shift;
};

HEADSTART_HOST_DEVICE constexpr std::int64_t panels(std::int64_t n) { return (n + kPanel - 1) / kPanel; }
HEADSTART_HOST_DEVICE constexpr int slab_values(int bits) { return kSlab * 4 / bits; }
HEADSTART_HOST_DEVICE constexpr std::int64_t slabs(std::int64_t k, int bits = 4) {
  return (k + slab_values(bits) - 1) / slab_values(bits);
}

// The first of the 64 words of (panel, slab).
HEADSTART_HOST_DEVICE constexpr std::int64_t slab_word(std::int64_t panel, std::int64_t slab, std::int64_t k_size) {
  return (panel * slabs(k_size) + slab) * kWordsPerSlab;
}

// The word and the bit position of weight (n, k) of an [N, k_size] matrix.
HEADSTART_HOST_DEVICE constexpr Place place(std::int64_t n, std::int64_t k, std::int64_t k_size) {
  const int in_slab = static_cast<int>(k % kSlab);
  const int t = in_slab % 8 / 2;
  return {slab_word(n / kPanel, k / kSlab, k_size) + t * kPanel + n % kPanel, 4 * (in_slab / 8) + 16 * (in_slab % 2)};
}

// The even k of pair i of word t, counted from the start of the slab. The odd k is the next one.
HEADSTART_HOST_DEVICE constexpr int pair_k(int t, int i) { return 8 * i + 2 * t; }

// The index of the scale or zero of column n and group `group`.
HEADSTART_HOST_DEVICE constexpr std::int64_t scale_index(std::int64_t n, std::int64_t group, std::int64_t groups) {
  return (n / kPanel * groups + group) * kPanel + n % kPanel;
}

}  // namespace headstart::int4

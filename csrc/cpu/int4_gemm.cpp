// Int4 GEMM on the CPU, and its counterpart for codes in 8 bits. One shift and one and-or per 32 codes of 4 bits prepare
// the weights for the multiplier.
//
// A word of the packed layout (layouts/int4.h) holds eight codes of one column. The 16 columns of a panel are one
// vector of 64 bytes. Codes are extracted in pairs (k, k + 1), as two bf16 values in one lane, each 16 above the code:
//
//   word  ── shift by 4 i - 3 ──▶ & 0x00780078 | 0x41804180 ──▶ │ 16 + code(k + 1) │ 16 + code(k) │
//
//   bf16 pairs   vdpbf16ps takes the pair without conversion                    3 instructions a pair
//   floats       low = pair << 16, exactly 16 + code(k)
//                high = pair, with the low half in its mantissa:                 5 instructions a pair
//                  kHigh + code(k + 1) + code(k) / 65536
//
// The low half adds code(k) / 65536 to `high`, which is linear in code(k). This is corrected in advance, in the
// activation that code(k) is multiplied by: x'(k) = x(k) - x(k + 1) / 65536. The offsets 16 and kHigh are subtracted
// once per group, with the sum of the activations, which all columns share. The zero point and the scale are also
// applied once per group:
//
//   total[n] += scale[n, g] · (start[g] + Σ x' · dequantised - zero[n, g] · Σ x)        start[g] = -offsets · Σ x
//
// bf16 has room for an offset of 128. The smaller offset of 16 costs one more shift per word and makes the sums 8 times
// more exact.
//
//   few rows: one pass over the weights           more rows: a tile of 64 columns, dequantised once for all rows
//
//   x'  ─ broadcast ─┐                              ┌────┐ 64 columns of a block of K:
//   ┌────┬────┬────┬─┴──┐ panels, a register each   │    │ 16 KiB, in L1
//   │word│word│word│word│ all rows of x in          └────┘
//   └────┴────┴────┴────┘ accumulators         x' [6 rows] × [4 registers]: 24 accumulators, 4 loads, 6 broadcasts
//
// Integers. A CPU with VNNI and no bf16 dot product multiplies bytes four times as fast as floats. On such a CPU, the
// values of a span of a row of activations become whole numbers of 23 bits, times a power of two. Each whole number
// becomes three digits of base 256:
//
//   x     = scale_x · (d0 + 256 d1 + 65536 d2), -128 <= d <= 127
//   word  ── shift by 4 i ──▶ & 0x0f0f0f0f ──▶ │ k + 17 │ k + 1 │ k + 16 │ k │   k = 8 i + 2 t, i = 0, 1
//
// bf16 values within 2^14 of the span's largest value are exact, and so are fp16 values within 2^11. Smaller values
// have an error of up to 2^-22 of the largest. One logic operation makes a lane of four codes. One vpdpbusd (without
// VNNI: vpmaddubsw, vpmaddwd and an add) multiplies the lane by one digit of four activations. The sums do not round.
// If the caller allows rounding activations to int8, there is one digit, and scale_x is the largest value divided by
// 127.
//
//   total[n] += scale[n, g] · scale_x · (Σ x code - zero[n, g] · Σ x)
//
// Eight bits. A word holds four codes of a column, k = 4 t to 4 t + 3. For floats, each code is moved to the top of its
// lane, shifted down and converted: codes of a symmetric weight with their sign, after 128 is subtracted; others without
// one. For integers, vpdpbusd takes the word as it is. vpmaddubsw would overflow in pairs of two such products, so the
// tiers without VNNI multiply |code - 128| by x with the sign of code - 128.
//
// Minimums. A weight is code · scale + minimum, so a group adds minimum[n, g] · Σ x.
//
// All ways add the products of a column in the same order, the order of the packed words. A group has one accumulator;
// a longer group has one for each span of 256 values of K. The groups are added in order. So a row's result does not
// depend on the other rows or on the number of threads.
//
// Floor for few rows: K · N / 2 bytes and the scales, at the read bandwidth. Instructions per vector of 64 bytes (128
// weights), with the load:
//
//   bf16 pairs          13 (4 shifts, 4 and-or, 4 dot products), so 6.5 cycles at two instructions a cycle
//   floats on AVX-512   21 (8 shifts, 4 and-or, 8 multiply-adds)
//   three digits        10 (1 shift, 2 and, 6 dot products)
//   one digit           6
//
// Floor for many rows: 2 · M · N · K at the machine's GEMM rate. With one digit that rate is four times that of floats.

#include "../layouts/int4.h"
#include "tile.h"

namespace headstart {
namespace {

using int4::kPairsPerWord;
using int4::kPanel;
using int4::kSlab;
using int4::kWordsPerColumn;
using int4::kWordsPerSlab;

constexpr int kPanelVecs = kPanel / Vec::width;
constexpr float kOffset = 16.0f;                      // the bf16 of a code is this much above the code
constexpr uint32_t kOffsetPair = 0x41804180u;         // 16 and 16 as bf16
constexpr uint32_t kCodePair = int4::kPairMask << 3;  // the bits that hold the codes: code and kOffset make 16 + code
constexpr float kLeak = 0x1p-16f;                     // `high` contains the low code times this factor
constexpr float kHigh = kOffset + 0x4180 * 0x1p-19f;  // the value of `high` for two zero codes
constexpr uint32_t kCodeBytes = 0x0f0f0f0fu;
constexpr float kLargestByte = 127.0f;
constexpr float kVanishing = 1e-30f;  // a span of smaller values becomes 0: the reciprocal of its scale would overflow
constexpr uint32_t kExponent = 0x7f800000u;
constexpr uint32_t kSmallestExponent = 23u << 23;  // 2^-104
constexpr float kFineStep = 0x1p-21f;  // times the largest value's power of two, it is scale_x: 22 bits and a sign

// --- a vector of words ---------------------------------------------------------------------------------------------

#if HEADSTART_TIER_AVX512

struct Words {
  __m512i v;
};
inline Words load_words(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
template <int i>
inline Words pair(Words w) {
  const __m512i placed = i == 0 ? _mm512_slli_epi32(w.v, 3) : _mm512_srli_epi32(w.v, i == 0 ? 0 : 4 * i - 3);
  const __m512i codes = _mm512_set1_epi32(kCodePair), offset = _mm512_set1_epi32(kOffsetPair);
  return {_mm512_ternarylogic_epi32(placed, codes, offset, 0xEA)};  // (placed & codes) | offset
}
template <int i>
inline Words bytes(Words w) {
  return {_mm512_and_si512(i == 0 ? w.v : _mm512_srli_epi32(w.v, 4 * i), _mm512_set1_epi32(kCodeBytes))};
}
inline Vec to_floats(Vec whole) { return {_mm512_cvtepi32_ps(_mm512_castps_si512(whole.v))}; }
inline Vec high(Words pair) { return {_mm512_castsi512_ps(pair.v)}; }
inline Vec low(Words pair) { return {_mm512_castsi512_ps(_mm512_slli_epi32(pair.v, 16))}; }
// Byte `i` of every lane, with its sign or without.
template <int i, bool is_signed>
inline Words byte(Words w) {
  const __m512i top = i == 3 ? w.v : _mm512_slli_epi32(w.v, 24 - 8 * i);
  return {is_signed ? _mm512_srai_epi32(top, 24) : _mm512_srli_epi32(top, 24)};
}
inline Words flip(Words w, uint32_t bits) { return {_mm512_xor_si512(w.v, _mm512_set1_epi32(static_cast<int>(bits)))}; }
inline Words halves(Words w) { return {_mm512_srli_epi32(w.v, 16)}; }
inline Vec to_floats(Words w) { return {_mm512_cvtepi32_ps(w.v)}; }
inline Vec load_zeros(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

#elif HEADSTART_TIER_AVX2

struct Words {
  __m256i v;
};
inline Words load_words(const uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
template <int i>
inline Words pair(Words w) {
  const __m256i placed = i == 0 ? _mm256_slli_epi32(w.v, 3) : _mm256_srli_epi32(w.v, i == 0 ? 0 : 4 * i - 3);
  return {_mm256_or_si256(_mm256_and_si256(placed, _mm256_set1_epi32(kCodePair)), _mm256_set1_epi32(kOffsetPair))};
}
template <int i>
inline Words bytes(Words w) {
  return {_mm256_and_si256(i == 0 ? w.v : _mm256_srli_epi32(w.v, 4 * i), _mm256_set1_epi32(kCodeBytes))};
}
inline Vec to_floats(Vec whole) { return {_mm256_cvtepi32_ps(_mm256_castps_si256(whole.v))}; }
inline Vec high(Words pair) { return {_mm256_castsi256_ps(pair.v)}; }
inline Vec low(Words pair) { return {_mm256_castsi256_ps(_mm256_slli_epi32(pair.v, 16))}; }
template <int i, bool is_signed>
inline Words byte(Words w) {
  const __m256i top = i == 3 ? w.v : _mm256_slli_epi32(w.v, 24 - 8 * i);
  return {is_signed ? _mm256_srai_epi32(top, 24) : _mm256_srli_epi32(top, 24)};
}
inline Words flip(Words w, uint32_t bits) { return {_mm256_xor_si256(w.v, _mm256_set1_epi32(static_cast<int>(bits)))}; }
inline Words halves(Words w) { return {_mm256_srli_epi32(w.v, 16)}; }
inline Vec to_floats(Words w) { return {_mm256_cvtepi32_ps(w.v)}; }
inline Vec load_zeros(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}

#else

struct Words {
  Vec::Words v;
};
inline Words load_words(const uint32_t* p) {
  Words w;
  std::memcpy(&w.v, p, sizeof w.v);
  return w;
}
template <int i>
inline Words pair(Words w) {
  return {((i == 0 ? w.v << 3 : w.v >> (i == 0 ? 0 : 4 * i - 3)) & kCodePair) | kOffsetPair};
}
template <int i>
inline Words bytes(Words w) {
  return {w.v >> 4 * i & kCodeBytes};
}
inline Vec to_floats(Vec whole) { return {__builtin_convertvector((Vec::Ints)whole.v, Vec::Floats)}; }
inline Vec high(Words pair) { return {(Vec::Floats)pair.v}; }
inline Vec low(Words pair) { return {(Vec::Floats)(pair.v << 16)}; }
template <int i, bool is_signed>
inline Words byte(Words w) {
  const Vec::Words top = w.v << (24 - 8 * i);
  return {is_signed ? (Vec::Words)((Vec::Ints)top >> 24) : top >> 24};
}
inline Words flip(Words w, uint32_t bits) { return {w.v ^ bits}; }
inline Words halves(Words w) { return {w.v >> 16}; }
inline Vec to_floats(Words w) { return {__builtin_convertvector((Vec::Ints)w.v, Vec::Floats)}; }
inline Vec load_zeros(const uint8_t* p) {
  return {Vec::Floats{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                      static_cast<float>(p[3])}};
}

#endif

inline Vec load_as(Dtype dtype, const void* from, int64_t at) {
  switch (dtype) {
    case Dtype::kFloat32:
      return load(static_cast<const float*>(from) + at);
    case Dtype::kFloat16:
      return load(static_cast<const Float16*>(from) + at);
    default:
      return load(static_cast<const BFloat16*>(from) + at);
  }
}

// Loads the first n <= width values and fills the rest with zeros.
inline Vec load_first_as(Dtype dtype, const void* from, int64_t at, int n) {
  if (n == Vec::width) return load_as(dtype, from, at);
  switch (dtype) {
    case Dtype::kFloat32:
      return load_first(static_cast<const float*>(from) + at, n);
    case Dtype::kFloat16:
      return load_first(static_cast<const Float16*>(from) + at, n);
    default:
      return load_first(static_cast<const BFloat16*>(from) + at, n);
  }
}

template <typename T>
inline void store_first_of(T* to, Vec x, int n) {
  n == Vec::width ? store(to, x) : store_first(to, x, n);
}

inline void store_first_as(Dtype dtype, void* to, int64_t at, Vec x, int n) {
  switch (dtype) {
    case Dtype::kFloat32:
      return store_first_of(static_cast<float*>(to) + at, x, n);
    case Dtype::kFloat16:
      return store_first_of(static_cast<Float16*>(to) + at, x, n);
    default:
      return store_first_of(static_cast<BFloat16*>(to) + at, x, n);
  }
}

// The nearest whole number of x, |x| < 2^22; halves round to even. The generic round_to_whole is only for exponents,
// because it raises x to at least -126.
inline Vec nearest_whole(Vec x) {
#if HEADSTART_TIER_AVX512 || HEADSTART_TIER_AVX2
  return round_to_whole(x);
#else
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: the addition rounds to an integer
  return (x + magic) - magic;
#endif
}

// --- functions for each unit: floats, bf16 pairs, or bytes ---------------------------------------------------------

// For float32 activations. 24 is subtracted from each dequantised code. This leaves code - 8, and the result keeps
// float32's accuracy.
struct ExactUnit : FloatUnit {};
constexpr float kMiddle = 8.0f;

// For codes in 8 bits. If they are centred, 128 is subtracted from each.
template <bool centred>
struct WideUnit : FloatUnit {};
constexpr int kWideMiddle = 128;
constexpr uint32_t kTopBits = 0x80808080u;  // flipping them subtracts 128 from each code, as a signed byte

template <typename Unit>
constexpr int kBitsOf = 4;
template <bool centred>
constexpr int kBitsOf<WideUnit<centred>> = 8;

template <bool centred>
inline Vec even_code(Words pair, WideUnit<centred>) {
  return to_floats(byte<0, centred>(pair));
}
template <bool centred>
inline Vec odd_code(Words pair, WideUnit<centred>) {
  return to_floats(byte<1, centred>(pair));
}

inline Vec even_code(Words pair, FloatUnit) { return low(pair); }
inline Vec even_code(Words pair, ExactUnit) { return low(pair) - broadcast(kOffset + kMiddle); }
inline Vec odd_code(Words pair, FloatUnit) { return high(pair); }
inline Vec odd_code(Words pair, ExactUnit) { return high(pair) - broadcast(kHigh + kMiddle); }

// Writes a slab of activations in the order of the packed words: [t][i] pairs of k = 8 i + 2 t and k + 1.
inline void order_slab(float* to, const float values[kSlab], FloatUnit) {
  for (int t = 0; t < kWordsPerColumn; ++t) {
    for (int i = 0; i < kPairsPerWord; ++i) {
      const float* x = values + int4::pair_k(t, i);
      float* at = to + 2 * (kPairsPerWord * t + i);
      at[0] = x[0] - x[1] * kLeak;
      at[1] = x[1];
    }
  }
}

// The amount that the offsets of the dequantised codes add to the products of a group. `even` and `odd` are the sums of
// x over even and over odd k.
inline double offsets(double even, double odd, FloatUnit) {
  return kOffset * (even - odd * kLeak) + static_cast<double>(kHigh) * odd;
}
inline double offsets(double even, double odd, ExactUnit) { return -kMiddle * (even + odd - odd * kLeak); }

template <bool centred>
inline void order_slab(float* to, const float* values, WideUnit<centred>) {
  std::memcpy(to, values, int4::slab_values(8) * sizeof(float));
}
template <bool centred>
inline double offsets(double even, double odd, WideUnit<centred>) {
  return centred ? -kWideMiddle * (even + odd) : 0.0;
}

// sum[r][v] += activations of the pair · pair[v], for `rows` rows of x. The units of two rows are `stride` apart.
template <typename Unit, int rows, int vecs>
inline __attribute__((always_inline)) void add_pairs(Vec (&sum)[rows][vecs], const float* x, int64_t stride,
                                                     const Words (&pair)[vecs], Unit unit) {
  Vec even[vecs], odd[vecs];
#pragma GCC unroll 8
  for (int v = 0; v < vecs; ++v) {
    even[v] = even_code(pair[v], unit);
    odd[v] = odd_code(pair[v], unit);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    const Vec first = broadcast(x[r * stride]), second = broadcast(x[r * stride + 1]);
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) sum[r][v] = fma(second, odd[v], fma(first, even[v], sum[r][v]));
  }
}

template <typename Unit>
inline void store_pair(float* to, Words pair, Unit unit) {
  store(to, even_code(pair, unit));
  store(to + kPanel, odd_code(pair, unit));
}

// The number of bytes (digits) of a rounded activation. Each digit is multiplied like a row.
template <typename Unit>
struct DigitsOf {
  static constexpr int value = 1;
};
template <bool vnni, int digits, int bits = 4>
struct ByteUnit;
template <bool vnni, int digits, int bits>
struct DigitsOf<ByteUnit<vnni, digits, bits>> {
  static constexpr int value = digits;
};
template <bool vnni, int digits, int bits>
constexpr int kBitsOf<ByteUnit<vnni, digits, bits>> = bits;

// The same for units that the multiplier takes without conversion.
template <typename Unit, int rows, int vecs>
inline __attribute__((always_inline)) void add_pairs(Vec (&sum)[rows][vecs], const uint32_t* x, int64_t stride,
                                                     const Words (&unit)[vecs], Unit) {
  constexpr int digits = DigitsOf<Unit>::value;
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
    const Vec left = Unit::broadcast_unit(x + r / digits * stride + r % digits);
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) sum[r][v] = Unit::dot(left, high(unit[v]), sum[r][v]);
  }
}
template <typename Unit>
inline void store_pair(uint32_t* to, Words unit, Unit) {
  std::memcpy(to, &unit, sizeof unit);
}

#if HEADSTART_TIER_BF16_DOT

inline void order_slab(uint32_t* to, const float values[kSlab], PairUnit) {
  for (int t = 0; t < kWordsPerColumn; ++t) {
    for (int i = 0; i < kPairsPerWord; ++i) {
      const float* x = values + int4::pair_k(t, i);
      to[kPairsPerWord * t + i] = float_to_bits(x[0]) >> 16 | (float_to_bits(x[1]) & 0xffff0000u);
    }
  }
}

inline double offsets(double even, double odd, PairUnit) { return kOffset * (even + odd); }

#endif

// Four codes and four rounded activations. The sums are int32 in the lanes of a Vec. Whether the CPU has VNNI is known
// only when the kernel runs, so the instruction is written in assembly.
template <bool vnni, int digits, int bits>
struct ByteUnit {
  using Type = uint32_t;
  static constexpr int values = 4;
  static constexpr bool centred = bits == 8 && !vnni;  // whether a unit has code - 128 instead of the code

#if HEADSTART_TIER_AVX512
  static Vec load_units(const uint32_t* p) { return {_mm512_loadu_ps(p)}; }
  static Vec broadcast_unit(const uint32_t* p) {
    return {_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p)))};
  }
  static Vec dot(Vec x, Vec codes, Vec sum) {
    if constexpr (vnni) {
      __asm__("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(codes.v), "v"(x.v));
      return sum;
    } else {
      __m512i factor = _mm512_castps_si512(codes.v), signs = _mm512_castps_si512(x.v);
      if constexpr (centred) {
        signs = _mm512_mask_sub_epi8(signs, _mm512_movepi8_mask(factor), _mm512_setzero_si512(), signs);
        factor = _mm512_abs_epi8(factor);
      }
      const __m512i pairs = _mm512_maddubs_epi16(factor, signs);
      const __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
      return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(sum.v), fours))};
    }
  }
#elif HEADSTART_TIER_AVX2
  static Vec load_units(const uint32_t* p) { return {_mm256_castsi256_ps(load_words(p).v)}; }
  static Vec broadcast_unit(const uint32_t* p) {
    return {_mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(*p)))};
  }
  static Vec dot(Vec x, Vec codes, Vec sum) {
    __m256i factor = _mm256_castps_si256(codes.v), signs = _mm256_castps_si256(x.v);
    if constexpr (centred) {
      signs = _mm256_sign_epi8(signs, factor);
      factor = _mm256_abs_epi8(factor);
    }
    const __m256i pairs = _mm256_maddubs_epi16(factor, signs);
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(sum.v), fours))};
  }
#else
  static Vec load_units(const uint32_t* p) { return {(Vec::Floats)load_words(p).v}; }
  static Vec broadcast_unit(const uint32_t* p) { return {(Vec::Floats)Vec::Words{*p, *p, *p, *p}}; }
  static Vec dot(Vec x, Vec codes, Vec sum) {
    Vec::Ints total = (Vec::Ints)sum.v;
    for (int i = 0; i < 4; ++i) {
      const Vec::Words top = (Vec::Words)codes.v << (24 - 8 * i);
      const auto code = centred ? (Vec::Ints)top >> 24 : (Vec::Ints)(top >> 24);
      total += code * ((Vec::Ints)((Vec::Words)x.v << (24 - 8 * i)) >> 24);
    }
    return {(Vec::Floats)total};
  }
#endif
};

// Writes a slab of rounded activations as `digits` digits of base 256, each between -128 and 127. The units of the
// digits follow each other, the lowest digit first.
template <int digits, int bits>
inline void order_slab(uint32_t* to, const int32_t* values) {
  constexpr int count = int4::slab_values(bits);
  int32_t rest[count];
  std::memcpy(rest, values, sizeof rest);
  for (int d = 0; d < digits; ++d) {
    if constexpr (bits == 8) {
      uint8_t digit[count];
      for (int k = 0; k < count; ++k) {
        digit[k] = static_cast<uint8_t>(rest[k]);
        rest[k] = (rest[k] + 128) >> 8;
      }
      for (int t = 0; t < kWordsPerColumn; ++t) std::memcpy(to + t * digits + d, digit + 4 * t, sizeof *to);
      continue;
    }
    uint16_t pairs[kSlab / 2];  // pair k holds k and k + 16; the pairs k and k + 1 are a unit
    for (int k = 0; k < kSlab / 2; ++k) {
      pairs[k] = static_cast<uint16_t>((rest[k] & 0xff) | (rest[k + kSlab / 2] & 0xff) << 8);
    }
    for (int t = 0; t < kWordsPerColumn; ++t) {
      for (int i = 0; i < 2; ++i) std::memcpy(to + (2 * t + i) * digits + d, pairs + int4::pair_k(t, i), sizeof *to);
    }
    for (int k = 0; k < kSlab; ++k) rest[k] = (rest[k] + 128) >> 8;
  }
}

template <int i, bool vnni, int digits, int bits>
inline Words piece(Words word, ByteUnit<vnni, digits, bits>) {
  if constexpr (bits == 4) return bytes<i>(word);
  return ByteUnit<vnni, digits, bits>::centred ? flip(word, kTopBits) : word;
}
template <int i, bool centred>
inline Words piece(Words word, WideUnit<centred>) {
  const Words moved = centred ? flip(word, kTopBits) : word;
  return i == 0 ? moved : halves(moved);
}
template <int i, typename Unit>
inline Words piece(Words word, Unit) {
  return pair<i>(word);
}

template <int i>
struct PieceNumber {
  static constexpr int value = i;
};

// Calls body for the pieces of a word. With 4 bits: four pairs, or two times four bytes. With 8: half of that.
template <typename Unit, typename Body>
inline __attribute__((always_inline)) void for_each_piece(const Body& body) {
  constexpr int count = (Unit::values < 4 ? 4 : 2) * 4 / kBitsOf<Unit>;
  body(PieceNumber<0>());
  if constexpr (count > 1) body(PieceNumber<1>());
  if constexpr (count > 2) {
    body(PieceNumber<2>());
    body(PieceNumber<3>());
  }
}

// --- the product ---------------------------------------------------------------------------------------------------

constexpr int kPrefetchWords = 192;  // each panel is prefetched 12 cache lines ahead
constexpr int kTilePanels = 4;
constexpr int kTileColumns = kTilePanels * kPanel;
constexpr int kSpanValues = 256;     // a longer group is added up in spans, because short sums round less
constexpr int kBlockUnits = 64;      // the depth of a tile in units; 64 · 64 units are 16 KiB
constexpr int64_t kChunkRows = 252;  // the most rows of a job: totals, sums and a block's activations fit in L2

template <typename Unit>
struct Int4Gemm {
  using U = typename Unit::Type;

  static constexpr bool kRounds = Unit::values == 4;  // whether activations are rounded to integers
  static constexpr int kDigits = DigitsOf<Unit>::value;
  static constexpr int kBits = kBitsOf<Unit>, kSlabValues = int4::slab_values(kBits);
  static constexpr int kWordUnits = kSlabValues / kWordsPerColumn / Unit::values;
  static constexpr int kPieceUnits = kRounds ? 1 : 2 / Unit::values;
  static constexpr int kSlabUnits = kSlabValues / Unit::values;
  static constexpr int64_t kSpanSlabs = kSpanValues / kSlabValues;
  static constexpr int kBlockSlabs = kBlockUnits / kSlabUnits;
  // Up to this many rows are multiplied in one pass over the weights. More rows repay a tile.
  static constexpr int kStreamRows = kRounds && Vec::width == 16 ? 12 / kDigits : 6;
  // The panels of one pass for one row. They give enough independent sums to hide a multiply-add's latency.
  static constexpr int kStreamPanels = Vec::width < 16 ? 2 : Unit::values == 1 || kDigits > 1 ? 4 : 8;

  // For a row and a span: the start value of the sum of products, minus the sum of x, and the scale of rounded x.
  struct Terms {
    float start, minus_sum, scale;
  };

  const Int4GemmArgs& a;
  int64_t panels, slabs, group_slabs, groups;
  int64_t group_spans, spans;  // the spans of a whole group; all spans
  Buffer<U> units;             // x in blocks of K that do not cross spans: [block][row][unit][digit]
  Buffer<Terms> terms;         // [span][row]

  explicit Int4Gemm(const Int4GemmArgs& args)
      : a(args),
        panels(int4::panels(a.n)),
        slabs(int4::slabs(a.k, kBits)),
        group_slabs(a.group_size < 0 ? slabs : min(slabs, a.group_size / kSlabValues)),
        groups(ceil_div(slabs, group_slabs)),
        group_spans(ceil_div(group_slabs, kSpanSlabs)),
        spans((groups - 1) * group_spans + ceil_div(slabs - (groups - 1) * group_slabs, kSpanSlabs)),
        units(slabs * kSlabUnits * kDigits * a.m),
        terms(spans * a.m) {}

  int64_t group_of(int64_t span) const { return span / group_spans; }
  int64_t span_begin(int64_t span) const { return group_of(span) * group_slabs + span % group_spans * kSpanSlabs; }
  int64_t span_end(int64_t span) const {
    return min(span_begin(span) + kSpanSlabs, min(slabs, (group_of(span) + 1) * group_slabs));
  }

  // Calls body(first slab, slabs) for the blocks of a span.
  template <typename Body>
  inline __attribute__((always_inline)) void for_each_block(int64_t span, const Body& body) const {
    const int64_t end = span_end(span);
    // The blocks of a single row follow each other in memory, so they are treated as one.
    const int64_t step = a.m == 1 ? kSpanSlabs : kBlockSlabs;
    for (int64_t slab = span_begin(span); slab < end; slab += step) body(slab, min(step, end - slab));
  }

  U* block_row(int64_t slab, int64_t count, int64_t row) {
    return units + (slab * a.m + row * count) * kSlabUnits * kDigits;
  }

  const uint32_t* words_of(int64_t panel, int64_t slab) const {
    return a.packed + (panel * slabs + slab) * kWordsPerSlab;
  }

  // --- activations ---

  void read_slab(float* values, int64_t row, int64_t slab) const {
    const int64_t left = a.k - slab * kSlabValues, at = row * a.x_row + slab * kSlabValues;
    for (int j = 0; j < kSlabValues; j += Vec::width) {
      const auto n = static_cast<int>(max(0, min(Vec::width, left - j)));
      store(values + j, n == 0 ? broadcast(0.0f) : load_first_as(a.dtype, a.x, at + j, n));
    }
  }

  // The scale of rounded x for a span with this largest absolute value.
  static float scale_of(float largest) {
    if (kDigits == 1) return largest < kVanishing ? 0.0f : largest / kLargestByte;
    // Use a power of two, so values with few enough bits are not rounded at all.
    return bits_to_float(max(float_to_bits(largest) & kExponent, kSmallestExponent)) * kFineStep;
  }

  void prepare_row(int64_t row) {
    for (int64_t s = 0; s < spans; ++s) {
      if constexpr (kRounds) {
        terms[s * a.m + row] = round_span(row, s);
      } else {
        terms[s * a.m + row] = order_span(row, s);
      }
    }
  }

  Terms order_span(int64_t row, int64_t span) {
    float lane[kSlabValues] = {};
    for_each_block(span, [&](int64_t slab, int64_t count) {
      U* to = block_row(slab, count, row);
      for (const int64_t end = slab + count; slab < end; ++slab, to += kSlabUnits) {
        float values[kSlabValues];
        read_slab(values, row, slab);
        order_slab(to, values, Unit());
        for (int j = 0; j < kSlabValues; ++j) lane[j] += values[j];
      }
    });
    for (int width = kSlabValues / 2; width >= 2; width /= 2) {
      for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
    }
    const double even = lane[0], odd = lane[1], zero = a.zeros == nullptr ? shared_zero() : 0;
    const double start = -offsets(even, odd, Unit()) - zero * (even + odd);
    return {static_cast<float>(start), static_cast<float>(-(even + odd)), 1.0f};
  }

  Terms round_span(int64_t row, int64_t span) {
    static_assert(!kRounds || kBlockSlabs == kSpanSlabs, "a block is a span");
    const int64_t first = span_begin(span), count = span_end(span) - first;
    float values[kSpanValues];
    Vec top = broadcast(0.0f), bad = top;
    for (int64_t slab = 0; slab < count; ++slab) read_slab(values + slab * kSlabValues, row, first + slab);
    for (int64_t j = 0; j < count * kSlabValues; j += Vec::width) {
      const Vec x = load(values + j);
      top = max(top, max(x, broadcast(0.0f) - x));
      bad = bad + (x - x);
    }
    // Reduce by hand. GCC 12 would warn here about uninitialised variables in the reductions of its own header.
    float tops[Vec::width], bads[Vec::width], largest = 0.0f, wrong = 0.0f;
    store(tops, top);
    store(bads, bad);
    for (int i = 0; i < Vec::width; ++i) {
      largest = tops[i] > largest ? tops[i] : largest;
      wrong += bads[i];
    }
    const float scale = scale_of(largest) + wrong;  // NaN if a value is not finite
    if (!(scale == scale)) std::memset(values, 0, sizeof values);
    const Vec inverse = broadcast(scale > 0.0f ? 1.0f / scale : 0.0f);
    int32_t lane[kSlabValues] = {};
    U* to = block_row(first, count, row);
    for (int64_t slab = 0; slab < count; ++slab, to += kSlabUnits * kDigits) {
      float* x = values + slab * kSlabValues;
      int32_t whole[kSlabValues];
      for (int j = 0; j < kSlabValues; j += Vec::width) store(x + j, nearest_whole(load(x + j) * inverse));
      for (int j = 0; j < kSlabValues; ++j) {
        whole[j] = static_cast<int32_t>(x[j]);
        lane[j] += whole[j];
      }
      order_slab<kDigits, kBits>(to, whole);
    }
    int32_t sum = 0;
    for (int j = 0; j < kSlabValues; ++j) sum += lane[j];
    return {0.0f, -static_cast<float>(sum), scale};  // the bits of +0 are also the integer 0
  }

  // --- the end of a span and of a row, for few rows and for many ---

  // The zero point of a weight without zeros.
  int shared_zero() const { return a.minimums == nullptr ? 1 << (kBits - 1) : 0; }

  struct Scaling {
    Vec scale, zero, minimum;
  };

  Scaling scaling(int64_t panel, int64_t group, int v) const {
    const int64_t at = (panel * groups + group) * kPanel + v * Vec::width;
    Vec zero =
        a.zeros == nullptr ? broadcast(kRounds ? static_cast<float>(shared_zero()) : 0.0f) : load_zeros(a.zeros + at);
    if constexpr (kRounds) {
      if constexpr (Unit::centred) zero = zero - broadcast(static_cast<float>(kWideMiddle));
    }
    return {load_as(a.scale_dtype, a.scales, at), zero,
            a.minimums == nullptr ? broadcast(0.0f) : load_as(a.scale_dtype, a.minimums, at)};
  }

  // total plus the scaled sum of a span. `sum` points to the sum; for rounded x, it points to the sum of the lowest
  // digit, and the sums of the other digits follow, each `step` further on.
  inline __attribute__((always_inline)) Vec with_span(Vec total, const Vec* sum, int step, Scaling by,
                                                      const Terms& term) const {
    if (a.minimums != nullptr) total = fma(by.minimum, broadcast(-term.minus_sum * term.scale), total);
    if constexpr (kRounds) {
      Vec whole = to_floats(sum[(kDigits - 1) * step]);
#pragma GCC unroll 2
      for (int d = kDigits - 2; d >= 0; --d) whole = fma(whole, broadcast(256.0f), to_floats(sum[d * step]));
      const Vec moved = fma(by.zero, broadcast(term.minus_sum), whole);
      return fma(by.scale * broadcast(term.scale), moved, total);
    } else {
      return fma(by.scale, a.zeros == nullptr ? *sum : fma(by.zero, broadcast(term.minus_sum), *sum), total);
    }
  }

  void write(int64_t row, int64_t column, Vec total) const {
    if (column >= a.n) return;
    const int count = static_cast<int>(min(Vec::width, a.n - column));
    const Vec biased = a.bias == nullptr ? total : total + load_first_as(a.dtype, a.bias, column, count);
    store_first_as(a.dtype, a.out, row * a.n + column, biased, count);
  }

  // --- few rows ---

  template <int rows, int width>
  void stream(int64_t panel) {
    constexpr int vecs = width * kPanelVecs;
    Vec total[rows][vecs];
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vecs; ++v) total[r][v] = broadcast(0.0f);
    for (int64_t s = 0; s < spans; ++s) {
      const Terms* term = terms + s * a.m;
      Vec sum[rows * kDigits][vecs];
#pragma GCC unroll 18
      for (int r = 0; r < rows * kDigits; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vecs; ++v) sum[r][v] = broadcast(term[r / kDigits].start);
      }
      for_each_block(s, [&](int64_t slab, int64_t count) __attribute__((always_inline)) {
        const int64_t stride = count * kSlabUnits * kDigits;
        const U* x = block_row(slab, count, 0);
        const uint32_t* words = words_of(panel, slab);
        for (int64_t w = 0; w < count * kWordsPerColumn; ++w, x += kWordUnits * kDigits, words += kPanel) {
          Words word[vecs];
#pragma GCC unroll 8
          for (int v = 0; v < vecs; ++v) {
            if (v % kPanelVecs == 0)
              __builtin_prefetch(words + v / kPanelVecs * slabs * kWordsPerSlab + kPrefetchWords);
            word[v] = load_words(words + v / kPanelVecs * slabs * kWordsPerSlab + v % kPanelVecs * Vec::width);
          }
          for_each_piece<Unit>([&](auto i) __attribute__((always_inline)) {
            Words part[vecs];
#pragma GCC unroll 8
            for (int v = 0; v < vecs; ++v) part[v] = piece<i.value>(word[v], Unit());
            add_pairs(sum, x + i.value * kPieceUnits * kDigits, stride, part, Unit());
          });
        }
      });
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) {
        const Scaling by = scaling(panel + v / kPanelVecs, group_of(s), v % kPanelVecs);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          total[r][v] = with_span(total[r][v], &sum[r * kDigits][v], vecs, by, term[r]);
        }
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vecs; ++v) write(r, panel * kPanel + v * Vec::width, total[r][v]);
  }

  template <int rows>
  void stream_all(const Parallel& parallel) {
    // AVX-512 has enough registers for two panels of twelve sums. The other tiers have half as many registers, of half
    // the width or less.
    constexpr int sums = rows * kDigits;
    constexpr int width = rows == 1 ? kStreamPanels : Vec::width == 16 ? (sums == 2 ? 4 : 2) : (sums == 2 ? 2 : 1);
    for_each_job(parallel, ceil_div(panels, width), [&](int64_t job, int) {
      int64_t panel = job * width;
      if (panel + width <= panels) return stream<rows, width>(panel);
      for (; panel < panels; ++panel) stream<rows, 1>(panel);
    });
  }

  // Calls stream_all for a.m rows.
  template <int rows = kStreamRows>
  void stream_rows(const Parallel& parallel) {
    if constexpr (rows > 0) a.m == rows ? stream_all<rows>(parallel) : stream_rows<rows - 1>(parallel);
  }

  // --- many rows ---

  struct Tile {
    explicit Tile(int64_t rows)
        : weights(kTileColumns * kBlockUnits), sums(rows * kTileColumns), totals(rows * kTileColumns) {}
    Buffer<U> weights;  // [panel][unit][16]
    Buffer<float> sums, totals;
    Scaling by[kTilePanels * kPanelVecs];
  };

  // Dequantises a block of a panel to [units][16]. The words hold their codes in the order of the units, so the output
  // is written in order.
  static void dequantize(U* to, const uint32_t* words, int64_t count) {
    for (int64_t w = 0; w < count * kWordsPerColumn; ++w) {
      __builtin_prefetch(words + count * kWordsPerSlab);  // the next block: it is needed after this block's products
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) {
        const Words word = load_words(words + v * Vec::width);
        for_each_piece<Unit>([&](auto i) __attribute__((always_inline)) {
          store_pair(to + i.value * kPieceUnits * kPanel + v * Vec::width, piece<i.value>(word, Unit()), Unit());
        });
      }
      words += kPanel;
      to += kWordUnits * kPanel;
    }
  }

  static constexpr int kTileRows = kRows / kDigits;  // the rows whose sums are in registers

  // The start of vector v of a tile's 64 columns in Tile::weights.
  static constexpr int64_t place(int v) {
    return static_cast<int64_t>(v / kPanelVecs) * kBlockUnits * kPanel + v % kPanelVecs * Vec::width;
  }

  struct Block {
    int64_t row, units;  // the first row of the job; the depth in units
    bool first, last;    // whether the block is the first or the last of its span
    const Terms* term;   // the terms of the job's rows
  };

  // sums += x · weights for `rows` rows of the job from row `i` on, and `vecs` vectors of columns from `from` on. At
  // the end of a span, the sums are scaled and added to the totals.
  template <int rows, int vecs>
  void multiply(Tile& tile, const Block& block, const U* x, int64_t i, int from) const {
    constexpr int lines = rows * kDigits;
    float* kept = tile.sums + i * kTileColumns + from * Vec::width;
    Vec sum[lines][vecs];
#pragma GCC unroll 8
    for (int r = 0; r < lines; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) {
        const bool starts = block.first || kRounds;  // with integers, a block is a whole span
        sum[r][v] =
            starts ? broadcast(block.term[i + r / kDigits].start) : load(kept + r * kTileColumns + v * Vec::width);
      }
    }
    const U* weights = tile.weights + place(from);
    add_products<Unit>(
        sum, block.units, 1,
        [&](int r, int64_t u) {
          return Unit::broadcast_unit(x + (r / kDigits * block.units + u) * kDigits + r % kDigits);
        },
        [&](int v, int64_t u) { return Unit::load_units(weights + place(v) + u * kPanel); });
    float* total = tile.totals + i * kTileColumns + from * Vec::width;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) {
        const int at = r * kTileColumns + v * Vec::width;
        if (block.last || kRounds) {
          store(total + at,
                with_span(load(total + at), &sum[r * kDigits][v], vecs, tile.by[from + v], block.term[i + r]));
        } else {
          store(kept + at, sum[r][v]);
        }
      }
    }
  }

  // Calls multiply for `rows` rows.
  template <int vecs, int most = kTileRows>
  void multiply_rows(Tile& tile, const Block& block, const U* x, int64_t i, int64_t rows, int from) const {
    if constexpr (most > 1) {
      if (rows < most) return multiply_rows<vecs, most - 1>(tile, block, x, i, rows, from);
    }
    multiply<most, vecs>(tile, block, x, i, from);
  }

  void multiply_block(Tile& tile, const Block& block, const U* x, int64_t rows, int vecs) const {
    // Make groups of rows of nearly the same size: 7 rows are 4 and 3. A single row would leave the multiplier waiting
    // for its own results.
    for (int64_t i = 0, left = ceil_div(rows, kTileRows), n; i < rows; i += n, --left) {
      n = ceil_div(rows - i, left);
      const U* at = x + i * kDigits * block.units;
      int from = 0;
      for (; from + kVecs <= vecs; from += kVecs) multiply_rows<kVecs>(tile, block, at, i, n, from);
      if constexpr (kVecs == 4) {  // in the other tiers, a panel is a whole number of kVecs vectors
        if (vecs - from == 3) multiply_rows<3>(tile, block, at, i, n, from);
        if (vecs - from == 2) multiply_rows<2>(tile, block, at, i, n, from);
        if (vecs - from == 1) multiply_rows<1>(tile, block, at, i, n, from);
      }
    }
  }

  void run_tile(Tile& tile, int64_t panel, int64_t row, int64_t rows) {
    const int width = static_cast<int>(min(kTilePanels, panels - panel));
    const int vecs = width * kPanelVecs;
    zero(tile.totals, rows * kTileColumns);
    for (int64_t s = 0; s < spans; ++s) {
      for (int v = 0; v < vecs; ++v) tile.by[v] = scaling(panel + v / kPanelVecs, group_of(s), v % kPanelVecs);
      for_each_block(s, [&](int64_t slab, int64_t count) {
        for (int p = 0; p < width; ++p) {
          dequantize(tile.weights + p * kBlockUnits * kPanel, words_of(panel + p, slab), count);
        }
        const Block block{row, count * kSlabUnits, slab == span_begin(s), slab + count == span_end(s),
                          terms + s * a.m + row};
        multiply_block(tile, block, block_row(slab, count, row), rows, vecs);
      });
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int v = 0; v < vecs; ++v) {
        write(row + i, panel * kPanel + v * Vec::width, load(tile.totals + i * kTileColumns + v * Vec::width));
      }
    }
  }

  void tile_all(const Parallel& parallel) {
    // If there are few tiles of columns, split the rows too.
    const int64_t tiles = ceil_div(panels, kTilePanels), wanted = ceil_div(4 * parallel.workers, tiles);
    const int64_t chunk = min(kChunkRows, max(4 * kTileRows, round_up(ceil_div(a.m, wanted), kTileRows)));
    const int64_t chunks = ceil_div(a.m, chunk);
    PerWorker<Tile> scratch(parallel.workers, min(chunk, a.m));
    for_each_job(parallel, tiles * chunks, [&](int64_t job, int worker) {
      const int64_t row = job % chunks * chunk;
      run_tile(scratch[worker], job / chunks * kTilePanels, row, min(chunk, a.m - row));
    });
  }

  void run(const Parallel& parallel) {
    if (a.m <= kStreamRows) {
      for (int64_t row = 0; row < a.m; ++row) prepare_row(row);
      stream_rows(parallel);
    } else {
      for_each_job(parallel, a.m, [&](int64_t row, int) { prepare_row(row); });
      tile_all(parallel);
    }
  }
};

// --- packing -------------------------------------------------------------------------------------------------------

// Packs the four words of a column's slab. They are eight halves of 16 bits: half j holds k = j, 8 + j, 16 + j and
// 24 + j.
inline void pack_slab(uint32_t* to, const uint8_t* codes) {
  uint16_t half[8];
  for (int j = 0; j < 8; ++j) {
    half[j] = static_cast<uint16_t>((codes[j] & 15) | (codes[8 + j] & 15) << 4 | (codes[16 + j] & 15) << 8 |
                                    (codes[24 + j] & 15) << 12);
  }
  for (int t = 0; t < kWordsPerColumn; ++t) to[t * kPanel] = half[2 * t] | static_cast<uint32_t>(half[2 * t + 1]) << 16;
}

inline void unpack_slab(uint8_t* codes, const uint32_t* words) {
  uint16_t half[8];
  for (int t = 0; t < kWordsPerColumn; ++t) {
    half[2 * t] = static_cast<uint16_t>(words[t * kPanel]);
    half[2 * t + 1] = static_cast<uint16_t>(words[t * kPanel] >> 16);
  }
  for (int i = 0; i < kPairsPerWord; ++i) {
    for (int j = 0; j < 8; ++j) codes[8 * i + j] = static_cast<uint8_t>(half[j] >> 4 * i & 15);
  }
}

// The same for codes in 8 bits.
inline void pack_wide_slab(uint32_t* to, const uint8_t* codes) {
  for (int t = 0; t < kWordsPerColumn; ++t) std::memcpy(to + t * kPanel, codes + 4 * t, sizeof *to);
}

inline void unpack_wide_slab(uint8_t* codes, const uint32_t* words) {
  for (int t = 0; t < kWordsPerColumn; ++t) std::memcpy(codes + 4 * t, words + t * kPanel, sizeof *words);
}

void wide_gemm(const Int4GemmArgs& a, const Parallel& parallel) {
#if HEADSTART_TIER_AVX512 && !HEADSTART_EMULATE_BF16_DOT
  if (__builtin_cpu_supports("avx512vnni")) {
    if (a.int8_activations) return Int4Gemm<ByteUnit<true, 1, 8>>(a).run(parallel);
    if (a.dtype != Dtype::kFloat32) return Int4Gemm<ByteUnit<true, 3, 8>>(a).run(parallel);
  }
#endif
  if (a.int8_activations) return Int4Gemm<ByteUnit<false, 1, 8>>(a).run(parallel);
  if (a.zeros == nullptr && a.minimums == nullptr) return Int4Gemm<WideUnit<true>>(a).run(parallel);
  Int4Gemm<WideUnit<false>>(a).run(parallel);
}

}  // namespace

namespace HEADSTART_TIER {

void int4_gemm(const Int4GemmArgs& a, const Parallel& parallel) {
  if (a.bits == 8) return wide_gemm(a, parallel);
#if HEADSTART_TIER_AVX512 && !HEADSTART_EMULATE_BF16_DOT  // so tests can run all units on a CPU with VNNI
  if (__builtin_cpu_supports("avx512vnni")) {
    if (a.int8_activations) return Int4Gemm<ByteUnit<true, 1>>(a).run(parallel);
    const bool pairs = a.dtype == Dtype::kBFloat16 && UnitOf<BFloat16>::Type::values == 2;
    if (a.dtype != Dtype::kFloat32 && !pairs) return Int4Gemm<ByteUnit<true, 3>>(a).run(parallel);
  }
#endif
  if (a.int8_activations) return Int4Gemm<ByteUnit<false, 1>>(a).run(parallel);
  if (a.dtype == Dtype::kFloat32) return Int4Gemm<ExactUnit>(a).run(parallel);
  if (a.dtype == Dtype::kBFloat16) return Int4Gemm<UnitOf<BFloat16>::Type>(a).run(parallel);
  Int4Gemm<FloatUnit>(a).run(parallel);
}

void int4_pack(const Int4PackArgs& a, const Parallel& parallel) {
  const int64_t slabs = int4::slabs(a.k, a.bits), depth = int4::slab_values(a.bits);
  for_each_job(parallel, int4::panels(a.n), [&](int64_t panel, int) {
    uint32_t* to = a.packed + panel * slabs * kWordsPerSlab;
    const int64_t columns = min(kPanel, a.n - panel * kPanel);
    if (columns < kPanel) std::memset(to, 0, static_cast<size_t>(slabs * kWordsPerSlab) * sizeof(uint32_t));
    for (int64_t s = 0; s < slabs; ++s, to += kWordsPerSlab) {
      const int64_t left = a.k - s * depth;
      for (int64_t c = 0; c < columns; ++c) {
        const uint8_t* from = a.codes + (panel * kPanel + c) * a.k + s * depth;
        uint8_t padded[kSlab] = {};
        if (left < depth) {
          std::memcpy(padded, from, static_cast<size_t>(left));
          from = padded;
        }
        a.bits == 8 ? pack_wide_slab(to + c, from) : pack_slab(to + c, from);
      }
    }
  });
}

void int4_unpack(const Int4PackArgs& a, const Parallel& parallel) {
  const int64_t slabs = int4::slabs(a.k, a.bits), depth = int4::slab_values(a.bits);
  for_each_job(parallel, int4::panels(a.n), [&](int64_t panel, int) {
    const uint32_t* from = a.packed + panel * slabs * kWordsPerSlab;
    const int64_t columns = min(kPanel, a.n - panel * kPanel);
    for (int64_t s = 0; s < slabs; ++s, from += kWordsPerSlab) {
      const int64_t left = a.k - s * depth;
      for (int64_t c = 0; c < columns; ++c) {
        uint8_t* to = a.codes + (panel * kPanel + c) * a.k + s * depth;
        uint8_t padded[kSlab];
        uint8_t* whole = left < depth ? padded : to;
        a.bits == 8 ? unpack_wide_slab(whole, from + c) : unpack_slab(whole, from + c);
        if (left < depth) std::memcpy(to, padded, static_cast<size_t>(left));
      }
    }
  });
}

}  // namespace HEADSTART_TIER
}  // namespace headstart

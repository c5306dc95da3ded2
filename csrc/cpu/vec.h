// One register of floats, with the same interface in every tier, and the two dot products that the kernels use.
//
//   tier          registers          dot product of a 32-bit unit
//   generic       4 floats, GCC/Clang vector extension (SSE2, NEON, ...)     multiply, add
//   avx2          8 floats, AVX2 + FMA + F16C                                fused multiply-add
//   avx512        16 floats, AVX-512 F/BW/DQ/VL                              fused multiply-add
//   avx512_bf16   16 floats, AVX-512 BF16                                    as avx512, or vdpbf16ps on bf16 pairs
//
// Everything is in an anonymous namespace. Each tier compiles its own copy, and the linker must never merge a function
// with AVX-512 instructions into a caller that runs on an older CPU. For the same reason no std:: template is used with
// a type that another tier also uses.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if HEADSTART_TIER_AVX2 || HEADSTART_TIER_AVX512
#include <immintrin.h>
#endif

#include "kernels.h"

namespace headstart {
namespace {

constexpr float kNegInf = -__builtin_inff();
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// --- scalar conversions ----------------------------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, nan
  // 2^112 moves the exponent from fp16's bias to fp32's. Subnormals become right because the multiplication normalises.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline void from_float(float x, float* out) { *out = x; }

inline void from_float(float x, BFloat16* out) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    out->bits = static_cast<uint16_t>(bits >> 16 | 0x40);  // a NaN stays one
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

inline void from_float(float x, Float16* out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = static_cast<uint16_t>(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    out->bits = static_cast<uint16_t>(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal in fp16: the addition rounds at 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;
    out->bits = static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000));
  } else {
    out->bits = static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
}

// --- Vec -------------------------------------------------------------------------------------------------------------

#if HEADSTART_TIER_AVX512

struct Vec {
  static constexpr int width = 16;
  __m512 v;
};

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline Vec load(const Float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// If a or b is NaN, the result is b, as in the x86 instruction.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

// x where lo <= position <= hi, else -inf. `position` points to one position per lane.
inline Vec keep_between(Vec x, const int32_t* position, int32_t lo, int32_t hi) {
  const __m512i p = _mm512_loadu_si512(position);
  const __mmask16 keep =
      _mm512_cmpge_epi32_mask(p, _mm512_set1_epi32(lo)) & _mm512_cmple_epi32_mask(p, _mm512_set1_epi32(hi));
  return {_mm512_mask_mov_ps(_mm512_set1_ps(kNegInf), keep, x.v)};
}

// fraction * 2^whole, or 0 where that is below float's normal range. Without the mask, vscalefps would take a microcode
// assist for every lane that underflows, and every masked key underflows. NaN stays NaN.
inline Vec scale_by_power(Vec fraction, Vec whole) {
  const __mmask16 normal = _mm512_cmp_ps_mask(whole.v, _mm512_set1_ps(-125.5f), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(normal, fraction.v, whole.v)};
}
inline Vec round_to_whole(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// keep_above: x where it is above `floor`, else -inf. lanes_above: one bit per lane, set where x is above `floor`.
inline Vec keep_above(Vec x, Vec floor) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.v, floor.v, _CMP_GT_OQ);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(kNegInf), keep, x.v)};
}
inline uint32_t lanes_above(Vec x, Vec floor) { return _mm512_cmp_ps_mask(x.v, floor.v, _CMP_GT_OQ); }

// to[i] = the sum of x[i]. Folding the four registers together takes half the shuffles of four separate sums.
inline void store_sums(float* to, const Vec x[4]) {
  const __m512 low =
      _mm512_add_ps(_mm512_shuffle_f32x4(x[0].v, x[1].v, 0x88), _mm512_shuffle_f32x4(x[0].v, x[1].v, 0xdd));
  const __m512 high =
      _mm512_add_ps(_mm512_shuffle_f32x4(x[2].v, x[3].v, 0x88), _mm512_shuffle_f32x4(x[2].v, x[3].v, 0xdd));
  __m512 sum = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4e));
  sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, sum)));
}

#elif HEADSTART_TIER_AVX2

struct Vec {
  static constexpr int width = 8;
  __m256 v;
};

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline Vec load(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }

inline float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

inline float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline Vec keep_between(Vec x, const int32_t* position, int32_t lo, int32_t hi) {
  const __m256i p = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(position));
  const __m256i drop =
      _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(lo), p), _mm256_cmpgt_epi32(p, _mm256_set1_epi32(hi)));
  return {_mm256_blendv_ps(x.v, _mm256_set1_ps(kNegInf), _mm256_castsi256_ps(drop))};
}

inline Vec scale_by_power(Vec fraction, Vec whole) {
  const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(whole.v), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(fraction.v), shift));
  const __m256 tiny = _mm256_cmp_ps(whole.v, _mm256_set1_ps(-125.5f), _CMP_LT_OQ);
  return {_mm256_andnot_ps(tiny, scaled)};
}
inline Vec round_to_whole(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

inline Vec keep_above(Vec x, Vec floor) {
  const __m256 keep = _mm256_cmp_ps(x.v, floor.v, _CMP_GT_OQ);
  return {_mm256_blendv_ps(_mm256_set1_ps(kNegInf), x.v, keep)};
}
inline uint32_t lanes_above(Vec x, Vec floor) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.v, floor.v, _CMP_GT_OQ)));
}

inline void store_sums(float* to, const Vec x[4]) {
  const __m256 sum = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)));
}

#else  // generic

struct Vec {
  static constexpr int width = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  Floats v;
};

inline Vec broadcast(float x) { return {Vec::Floats{x, x, x, x}}; }
inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof a.v);
  return a;
}
template <typename T>
inline Vec load(const T* p) {
  return {Vec::Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
inline void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof a.v); }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }

inline Vec select(Vec::Ints condition, Vec a, Vec b) {
  Vec r;
  Vec::Ints x, y;
  std::memcpy(&x, &a.v, sizeof x);
  std::memcpy(&y, &b.v, sizeof y);
  x = (x & condition) | (y & ~condition);
  std::memcpy(&r.v, &x, sizeof x);
  return r;
}

inline Vec max(Vec a, Vec b) { return select(a.v > b.v, a, b); }
inline float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float reduce_max(Vec a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1];
  const float y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}

inline Vec keep_between(Vec x, const int32_t* position, int32_t lo, int32_t hi) {
  Vec::Ints p;
  std::memcpy(&p, position, sizeof p);
  return select((p >= lo) & (p <= hi), x, broadcast(kNegInf));
}

inline Vec round_to_whole(Vec x) {
  x = max(broadcast(-126.0f), x);            // converting -inf to an integer is undefined
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: the adder rounds to an integer
  return (x + magic) - magic;
}
inline Vec scale_by_power(Vec fraction, Vec whole) {
  // Unsigned, because the sum of the bits wraps below the range. Those results are dropped.
  const auto shift = (Vec::Words) __builtin_convertvector(whole.v, Vec::Ints) << 23;
  const Vec scaled = {(Vec::Floats)((Vec::Words)fraction.v + shift)};
  return select(whole.v < -125.5f, broadcast(0.0f), scaled);
}

inline Vec keep_above(Vec x, Vec floor) { return select(x.v > floor.v, x, broadcast(kNegInf)); }
inline uint32_t lanes_above(Vec x, Vec floor) {
  const Vec::Ints above = x.v > floor.v;
  return static_cast<uint32_t>((above[0] & 1) | (above[1] & 2) | (above[2] & 4) | (above[3] & 8));
}

inline void store_sums(float* to, const Vec x[4]) {
  for (int i = 0; i < 4; ++i) to[i] = reduce_add(x[i]);
}

#endif

// 2^x for x up to 127. x is split into the nearest whole number and a fraction. A degree-5 minimax polynomial on [-0.5,
// 0.5] gives 2^fraction (relative error 2e-7, and 2^0 = 1 exactly). The whole number is added to the exponent. -inf
// gives 0, NaN stays NaN.
inline Vec exp2(Vec x) {
  const Vec whole = round_to_whole(x);
  const Vec f = x - whole;
  Vec p = broadcast(0.001327647f);
  p = fma(p, f, broadcast(0.009675541f));
  p = fma(p, f, broadcast(0.055507135f));
  p = fma(p, f, broadcast(0.2402212f));
  p = fma(p, f, broadcast(0.69314694f));
  p = fma(p, f, broadcast(1.0f));
  return scale_by_power(p, whole);
}

// x, or 0 where x is -inf.
inline Vec finite_or_zero(Vec x) {
  float lane[Vec::width];
  store(lane, x);
  for (int i = 0; i < Vec::width; ++i) lane[i] = lane[i] == kNegInf ? 0.0f : lane[i];
  return load(lane);
}

inline float exp2(float x) {
  float lane[Vec::width];
  store(lane, exp2(broadcast(x)));
  return lane[0];
}

// Loads the first n < width values and fills the rest with zeros.
template <typename T>
inline Vec load_first(const T* p, int n) {
  T lanes[Vec::width];
  std::memset(lanes, 0, sizeof lanes);
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}

inline void store(BFloat16* p, Vec a) {
#if HEADSTART_TIER_BF16_DOT && !HEADSTART_EMULATE_BF16_DOT
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
#elif HEADSTART_TIER_AVX512
  // Round the bits to nearest even with integer arithmetic. NaNs keep their upper bits and become quiet.
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#else
  float lanes[Vec::width];
  store(lanes, a);
  for (int i = 0; i < Vec::width; ++i) from_float(lanes[i], p + i);
#endif
}

inline void store(Float16* p, Vec a) {
#if HEADSTART_TIER_AVX512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#elif HEADSTART_TIER_AVX2
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#else
  float lanes[Vec::width];
  store(lanes, a);
  for (int i = 0; i < Vec::width; ++i) from_float(lanes[i], p + i);
#endif
}

template <typename T>
inline void store_first(T* p, Vec a, int n) {
  T lanes[Vec::width];
  store(lanes, a);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// --- dot products over 32-bit units ----------------------------------------------------------------------------------
//
// A unit is the operand of one lane of a multiplication: a float, or two bf16 neighbours along the summed dimension.
// With units, one matrix kernel (tile.h) serves both.

struct FloatUnit {
  using Type = float;
  static constexpr int values = 1;
  static Vec load_units(const float* p) { return load(p); }
  static Vec broadcast_unit(const float* p) { return broadcast(*p); }
  static Vec dot(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if HEADSTART_TIER_BF16_DOT

struct PairUnit {
  using Type = uint32_t;
  static constexpr int values = 2;
  static Vec load_units(const uint32_t* p) { return {_mm512_loadu_ps(p)}; }
  static Vec broadcast_unit(const uint32_t* p) {
    return {_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p)))};
  }
  static Vec dot(Vec a, Vec b, Vec c) {
#if HEADSTART_EMULATE_BF16_DOT
    // The same sums with two fused multiply-adds on the halves, for CPUs without the instruction (only in tests).
    const __m512i x = _mm512_castps_si512(a.v), y = _mm512_castps_si512(b.v);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const __m512 even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                                        _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), c.v);
    return {_mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                            _mm512_castsi512_ps(_mm512_and_si512(y, high)), even)};
#else
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
#endif
  }
};

#endif

}  // namespace
}  // namespace headstart

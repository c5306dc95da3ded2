// Bitmap-sparse weights on the CPU. The bits of a row spread its consecutive values over their columns, in registers.
//
//   bits      0 1 1 0 1 0 0 1        16 columns: load 16 values from p, convert to floats (or dwords),
//   values    a b c d                vexpandps by the bits, p += popcount of the bits
//   columns   0 a b 0 c 0 0 d
//
// A load may read past a row's last value; the bits drop those values. A row near the end of all values, where a load
// could read past the end, is first copied to separate memory. int4 values are unpacked to bytes, one row at a time.
//
//   decompress       one row after another; the values some KiB ahead are prefetched
//
//   1 to 4 rows of x     four rows of the weight at once, expanded in registers  more rows     a tile
//   ┌──────────────┐     and multiplied with all rows of x. Their chains of      [16 rows of w][512 columns], expanded
//   │ w 0  ─▶ p0   │     popcounts are independent, and hide the multiply-adds'  once into 32 KiB of the L2 cache;
//   │ w 1  ─▶ p1   │     latency.                                                4 rows of w × 6 of x: 24 accumulators,
//   │ w 2  ─▶ p2   │                                                             10 loads and 24 multiply-adds a step
//   │ w 3  ─▶ p3   │     Lanes are columns (mod the width), added up at the end
//   └──────────────┘
//
// Both ways multiply the columns of a weight's row in order and add them into the same lanes. Both add up 512 columns
// at a time (short sums round less) and fold the lanes in the same way. So a row's result does not depend on the other
// rows or on the number of threads.
//
// Floor: 1 / 8 + density · (bytes of a value) bytes per weight at the read bandwidth. Decompression to bf16 also writes
// 2 bytes per weight. For comparison, memcpy reads 2 and writes 2.
//
// Instructions for 16 columns of bf16 on AVX-512 without VBMI2: load and widen, move the bits to a mask, expand (2),
// shift, multiply-add, and 3 integer instructions. 4 of them run on port 5, so this takes 4 cycles. VBMI2 expands 32
// columns of 16 bits with 2 instructions and one move. AVX-512 BF16 multiplies those columns without conversion.

#include "in_place.h"

namespace headstart {
namespace {

constexpr int kStepColumns = 32;
constexpr int kPast = 64;  // a row may load this many values past its last one

inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

// --- expanding: `width` floats, or 32 elements as raw bits ----------------------------------------------------------

#if HEADSTART_TIER_AVX512 || HEADSTART_TIER_AVX2

// For every mask of 8 bits: the bytes of consecutive words that each of 8 words takes; 0x80 means none.
struct WordPlaces {
  uint8_t of[256][16];
  constexpr WordPlaces() : of() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int i = 0, next = 0; i < 16; ++i) of[bits][i] = bits >> i / 2 & 1 ? static_cast<uint8_t>(next++) : 0x80;
    }
  }
};
alignas(64) constexpr WordPlaces kWordPlaces;

inline __m128i word_places(uint32_t bits) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(kWordPlaces.of[bits & 255]));
}
inline __m128i load_words(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

#endif

#if HEADSTART_TIER_AVX512

inline Vec expand(Vec x, uint32_t bits) { return {_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), x.v)}; }

inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

inline __m512i expand_words(const uint16_t* p, uint32_t bits) {
#if HEADSTART_EMULATE_VBMI2
  uint16_t lanes[kStepColumns];
  for (int i = 0; i < kStepColumns; ++i) lanes[i] = bits >> i & 1 ? *p++ : 0;
  return _mm512_loadu_si512(lanes);
#elif HEADSTART_TIER_VBMI2
  return _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(p));
#else
  // Load eight words into each quarter. Inserts from memory are cheap, and one shuffle then moves all words.
  __m512i x = _mm512_castsi128_si512(load_words(p)), from = _mm512_castsi128_si512(word_places(bits));
  x = _mm512_inserti32x4(x, load_words(p + count_bits(bits << 24)), 1);
  x = _mm512_inserti32x4(x, load_words(p + count_bits(bits << 16)), 2);
  x = _mm512_inserti32x4(x, load_words(p + count_bits(bits << 8)), 3);
  from = _mm512_inserti32x4(from, word_places(bits >> 8), 1);
  from = _mm512_inserti32x4(from, word_places(bits >> 16), 2);
  from = _mm512_inserti32x4(from, word_places(bits >> 24), 3);
  return _mm512_shuffle_epi8(x, from);
#endif
}

inline void expand_raw(uint16_t* to, const uint16_t* p, uint32_t bits) {
  _mm512_storeu_si512(to, expand_words(p, bits));
}

inline void expand_raw(uint32_t* to, const uint32_t* p, uint32_t bits) {
  const uint32_t* q = p + count_bits(bits << 16);
  _mm512_storeu_si512(to, _mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), _mm512_loadu_si512(p)));
  _mm512_storeu_si512(to + 16, _mm512_maskz_expand_epi32(static_cast<__mmask16>(bits >> 16), _mm512_loadu_si512(q)));
}

inline void expand_raw(uint8_t* to, const uint8_t* p, uint32_t bits) {
  __m256i x;
#if HEADSTART_EMULATE_VBMI2
  uint8_t lanes[kStepColumns];
  for (int i = 0; i < kStepColumns; ++i) lanes[i] = bits >> i & 1 ? *p++ : 0;
  x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
#elif HEADSTART_TIER_VBMI2
  x = _mm256_maskz_expand_epi8(bits, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  const auto half = [](const uint8_t* from, uint32_t few) __attribute__((always_inline)) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm512_cvtepi32_epi8(_mm512_maskz_expand_epi32(static_cast<__mmask16>(few), wide));
  };
  x = _mm256_inserti128_si256(_mm256_castsi128_si256(half(p, bits)), half(p + count_bits(bits << 16), bits >> 16), 1);
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
}

#elif HEADSTART_TIER_AVX2

// For every mask of 8 bits: the element, of 8 consecutive ones, that each place takes; 0x80 means none.
struct Places {
  uint8_t of[256][8];
  constexpr Places() : of() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int i = 0, next = 0; i < 8; ++i) of[bits][i] = bits >> i & 1 ? static_cast<uint8_t>(next++) : 0x80;
    }
  }
};
alignas(64) constexpr Places kPlaces;

inline __m128i places(uint32_t bits) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPlaces.of[bits & 255]));
}

inline Vec expand(Vec x, uint32_t bits) {
  const __m256i from = _mm256_cvtepi8_epi32(places(bits));
  const __m256i none = _mm256_srai_epi32(from, 31);
  return {_mm256_andnot_ps(_mm256_castsi256_ps(none), _mm256_permutevar8x32_ps(x.v, from))};
}

inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}

inline void expand_raw(uint32_t* to, const uint32_t* p, uint32_t bits) {
  for (int i = 0; i < kStepColumns; i += 8, bits >>= 8, to += 8) {
    store(reinterpret_cast<float*>(to), expand(load(reinterpret_cast<const float*>(p)), bits));
    p += count_bits(bits & 255);
  }
}

inline void expand_raw(uint16_t* to, const uint16_t* p, uint32_t bits) {
  for (int i = 0; i < kStepColumns; i += 8, bits >>= 8, to += 8) {
    const __m128i x = _mm_shuffle_epi8(load_words(p), word_places(bits));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), x);
    p += count_bits(bits & 255);
  }
}

inline void expand_raw(uint8_t* to, const uint8_t* p, uint32_t bits) {
  for (int i = 0; i < kStepColumns; i += 8, bits >>= 8, to += 8) {
    const __m128i x = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), places(bits));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), x);
    p += count_bits(bits & 255);
  }
}

#else

inline Vec expand(Vec x, uint32_t bits) {
  Vec to = broadcast(0.0f);
  for (int i = 0, next = 0; i < Vec::width; ++i) {
    if (bits >> i & 1) to.v[i] = x.v[next++];
  }
  return to;
}

inline Vec load(const int8_t* p) {
  return {Vec::Floats{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                      static_cast<float>(p[3])}};
}

template <typename T>
inline void expand_raw(T* to, const T* p, uint32_t bits) {
  for (int i = 0; i < kStepColumns; ++i) {
    const T bit = static_cast<T>(bits >> i & 1);
    to[i] = static_cast<T>(*p * bit);
    p += bit;
  }
}

#endif

// --- a step of 32 columns, in units of the multiplication -----------------------------------------------------------

template <typename Unit>
constexpr int kStepUnits = kStepColumns / Unit::values;
template <typename Unit>
constexpr int kStepVecs = kStepUnits<Unit> / Vec::width;

// Whether a step's floats are first its even columns and then its odd columns. In this order, two instructions convert
// 32 bf16 values to floats.
template <typename S, typename Unit>
constexpr bool kEvenOdd = false;
#if HEADSTART_TIER_VBMI2
template <>
constexpr bool kEvenOdd<BFloat16, FloatUnit> = true;
#endif

// The factor of an expanded value: none, the scale of its row's group, or a scale for each column of the step.
struct NoScale {
  Vec times(Vec x, int) const { return x; }
};
struct GroupScale {
  Vec scale;
  Vec times(Vec x, int) const { return x * scale; }
};
struct ColumnScales {
  const float* scales;
  Vec times(Vec x, int v) const { return x * load(scales + v * Vec::width); }
};

template <typename S, typename Scale>
inline __attribute__((always_inline)) void expand_step(Vec* to, const S*& p, uint32_t bits, Scale scale, FloatUnit) {
#pragma GCC unroll 8
  for (int v = 0; v < kStepVecs<FloatUnit>; ++v) {
    // Compute each address from all bits before it, not from the address before it. This avoids a dependency chain, and
    // a 16-bit popcnt, which would wait for the register that it writes.
    const S* from = v == 0 ? p : p + count_bits(bits << (v == 0 ? 0 : kStepColumns - v * Vec::width));
    to[v] = scale.times(expand(load(from), bits >> (v * Vec::width)), v);
  }
  p += count_bits(bits);
}

#if HEADSTART_TIER_VBMI2

inline __attribute__((always_inline)) void expand_step(Vec* to, const BFloat16*& p, uint32_t bits, NoScale, FloatUnit) {
  const __m512i both = expand_words(reinterpret_cast<const uint16_t*>(p), bits);
  to[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
  to[1] = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  p += count_bits(bits);
}

#endif

inline void store_units(float* to, Vec x) { store(to, x); }

#if HEADSTART_TIER_BF16_DOT

inline Vec to_pairs(const Vec* floats) {
#if HEADSTART_EMULATE_BF16_DOT
  BFloat16 lanes[kStepColumns];
  store(lanes, floats[0]);
  store(lanes + Vec::width, floats[1]);
  return {_mm512_loadu_ps(lanes)};
#else
  return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(floats[1].v, floats[0].v))};
#endif
}

template <typename S, typename Scale>
inline __attribute__((always_inline)) void expand_step(Vec* to, const S*& p, uint32_t bits, Scale scale, PairUnit) {
  Vec floats[kStepVecs<FloatUnit>];
  expand_step(floats, p, bits, scale, FloatUnit());
  to[0] = to_pairs(floats);
}

inline __attribute__((always_inline)) void expand_step(Vec* to, const BFloat16*& p, uint32_t bits, NoScale, PairUnit) {
  to[0] = {_mm512_castsi512_ps(expand_words(reinterpret_cast<const uint16_t*>(p), bits))};
  p += count_bits(bits);
}

inline void store_units(uint32_t* to, Vec x) { _mm512_storeu_ps(to, x.v); }

#endif

// --- rows of a weight -----------------------------------------------------------------------------------------------

template <typename S>
constexpr bool kQuantised = false;
template <>
constexpr bool kQuantised<int8_t> = true;

struct Rows {
  const BitmapWeight& w;
  int64_t bytes, whole, steps;  // per row: the bytes of its bits, its whole steps of 32 columns, all its steps

  explicit Rows(const BitmapWeight& weight)
      : w(weight),
        bytes(ceil_div(weight.k, 8)),
        whole(weight.k / kStepColumns),
        steps(ceil_div(weight.k, kStepColumns)) {}

  const uint8_t* bits(int64_t n) const { return w.bitmask + n * bytes; }

  uint32_t bits_at(const uint8_t* row, int64_t step) const {
    uint32_t bits;
    if (step >= whole) return last_bits(row, step);
    std::memcpy(&bits, row + step * sizeof bits, sizeof bits);
    return bits;
  }

  __attribute__((noinline)) uint32_t last_bits(const uint8_t* row, int64_t step) const {
    uint32_t bits = 0;
    const int left = static_cast<int>(w.k % kStepColumns);
    std::memcpy(&bits, row + step * sizeof bits, static_cast<size_t>(ceil_div(left, 8)));
    return bits & ((1u << left) - 1);  // pad bits may be anything
  }

  int64_t count(int64_t n) const {
    int64_t sum = 0;
    for (int64_t s = 0; s < steps; ++s) sum += count_bits(bits_at(bits(n), s));
    return sum;
  }

  // A row's values, in place or in `scratch`, which has room for K + kPast values. A caller may load kPast values past
  // the last one.
  template <typename S>
  const S* values(int64_t n, S* scratch) const {
    const int64_t first = w.row_offsets[n];
    if (w.value_bits == 4) {
      const auto* from = static_cast<const uint8_t*>(w.values) + first / 2;
      auto* to = reinterpret_cast<int8_t*>(scratch);
      const int64_t pairs = ceil_div(first % 2 + count(n), 2);
      for (int64_t i = 0; i < pairs; ++i) {
        to[2 * i] = static_cast<int8_t>(static_cast<int8_t>(from[i] << 4) >> 4);
        to[2 * i + 1] = static_cast<int8_t>(static_cast<int8_t>(from[i]) >> 4);
      }
      return scratch + first % 2;
    }
    const S* from = static_cast<const S*>(w.values) + first;
    if (w.stored - first >= w.k + kPast) return from;
    const int64_t left = min(w.k, w.stored - first);
    if (left > 0)
      std::memcpy(scratch, from, static_cast<size_t>(left) * sizeof(S));  // without values, `from` is invalid
    return scratch;
  }

  float scale(int64_t n, int64_t group) const {
    const int64_t at = n * ceil_div(w.k, w.group_size) + group;
    switch (w.scale_dtype) {
      case Dtype::kFloat32:
        return static_cast<const float*>(w.scales)[at];
      case Dtype::kFloat16:
        return to_float(static_cast<const Float16*>(w.scales)[at]);
      default:
        return to_float(static_cast<const BFloat16*>(w.scales)[at]);
    }
  }

  // Whether every group begins at the start of a step. Then a step has one scale.
  bool whole_groups() const { return w.group_size % kStepColumns == 0 || w.group_size >= w.k; }
  int64_t group_steps() const { return w.group_size >= w.k ? max(steps, 1) : w.group_size / kStepColumns; }

  // Writes the scales of `count` columns from `first` on, one per column. Columns at K or later get 0.
  void column_scales(float* to, int64_t n, int64_t first, int64_t count) const {
    const int64_t end = min(first + count, w.k);
    for (int64_t k = first; k < end;) {
      const int64_t group = k / w.group_size, stop = min(end, (group + 1) * w.group_size);
      const float x = scale(n, group);
      for (; k < stop; ++k) *to++ = x;
    }
    for (int64_t k = max(first, end); k < first + count; ++k) *to++ = 0;
  }
};

template <typename S>
struct Row {
  const S* values;
  const uint8_t* bits;
};

constexpr int64_t kChunkSteps = 16;  // 512 columns

// Expands `count` steps of a row from `step` on. Calls body(index of the step, its vectors) for each of them.
template <typename Unit, typename S, typename Body>
inline void expand_chunk(const Rows& rows, Row<S>& row, int64_t n, int64_t step, int64_t count, const Body& body) {
  Vec x[kStepVecs<Unit>];
  if constexpr (!kQuantised<S>) {
    for (int64_t s = 0; s < count; ++s) {
      expand_step(x, row.values, rows.bits_at(row.bits, step + s), NoScale(), Unit());
      body(s, x);
    }
  } else if (rows.whole_groups()) {
    const int64_t every = rows.group_steps();
    Vec scale = broadcast(rows.scale(n, step / every));
    for (int64_t s = 0; s < count; ++s) {
      if ((step + s) % every == 0) scale = broadcast(rows.scale(n, (step + s) / every));
      expand_step(x, row.values, rows.bits_at(row.bits, step + s), GroupScale{scale}, Unit());
      body(s, x);
    }
  } else {
    float scales[kChunkSteps * kStepColumns];
    rows.column_scales(scales, n, step * kStepColumns, count * kStepColumns);
    for (int64_t s = 0; s < count; ++s) {
      expand_step(x, row.values, rows.bits_at(row.bits, step + s), ColumnScales{scales + s * kStepColumns}, Unit());
      body(s, x);
    }
  }
}

// --- decompression --------------------------------------------------------------------------------------------------

constexpr int64_t kJobBytes = 512 << 10;   // the most output of a job; not small, because a job's reads start slowly
constexpr int64_t kLeastBytes = 32 << 10;  // the least output of a job, if there would otherwise be too few jobs
constexpr int64_t kAheadBytes = 2 << 10;   // values are prefetched this many bytes ahead

template <typename T>
inline void decompress_row(const Rows& rows, int64_t n, T* to, T* scratch) {
  const T* p = rows.values(n, scratch);
  const uint8_t* bits = rows.bits(n);
  for (int64_t s = 0; s < rows.whole; ++s) {
    const uint32_t part = rows.bits_at(bits, s);
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kAheadBytes);
    expand_raw(to + s * kStepColumns, p, part);
    p += count_bits(part);
  }
  if (rows.whole < rows.steps) {
    T last[kStepColumns];
    expand_raw(last, p, rows.bits_at(bits, rows.whole));
    const int64_t done = rows.whole * kStepColumns;
    std::memcpy(to + done, last, static_cast<size_t>(rows.w.k - done) * sizeof(T));
  }
}

// Calls body(row, scratch of the worker) for every row, on all threads.
template <typename S, typename Body>
inline void for_each_row(const Rows& rows, int64_t row_bytes, const Parallel& parallel, const Body& body) {
  const int64_t n = rows.w.n, even = ceil_div(n, 4 * parallel.workers), row = max(row_bytes, 1);
  const int64_t block = max(1, min(kJobBytes / row, max(kLeastBytes / row, even)));
  PerWorker<Buffer<S>> scratch(parallel.workers, rows.w.k + kPast);
  for_each_job(parallel, ceil_div(n, block), [&](int64_t job, int worker) {
    for (int64_t i = job * block, end = min(n, i + block); i < end; ++i) body(i, scratch[worker]);
  });
}

template <typename T>
inline void decompress_raw(const BitmapDecompressArgs& a, const Parallel& parallel) {
  const Rows rows(a.weight);
  const int64_t row_bytes = a.weight.k * static_cast<int64_t>(sizeof(T));
  for_each_row<T>(rows, row_bytes, parallel, [&](int64_t n, T* scratch) {
    decompress_row(rows, n, static_cast<T*>(a.out) + n * a.out_row, scratch);
  });
}

template <typename T>
inline void decompress_scaled(const BitmapDecompressArgs& a, const Parallel& parallel) {
  const Rows rows(a.weight);
  const auto put = [](T* to, const Vec* x) {
    for (int v = 0; v < kStepVecs<FloatUnit>; ++v) store(to + v * Vec::width, x[v]);
  };
  for_each_row<int8_t>(rows, a.weight.k * static_cast<int64_t>(sizeof(T)), parallel, [&](int64_t n, int8_t* scratch) {
    Row<int8_t> row{rows.values(n, scratch), rows.bits(n)};
    T* to = static_cast<T*>(a.out) + n * a.out_row;
    for (int64_t step = 0; step < rows.steps; step += kChunkSteps) {
      expand_chunk<FloatUnit>(rows, row, n, step, min(kChunkSteps, rows.steps - step), [&](int64_t s, const Vec* x) {
        const int64_t first = (step + s) * kStepColumns;
        if (step + s < rows.whole) return put(to + first, x);
        T last[kStepColumns];
        put(last, x);
        std::memcpy(to + first, last, static_cast<size_t>(a.weight.k - first) * sizeof(T));
      });
    }
  });
}

// --- the product ----------------------------------------------------------------------------------------------------

constexpr int kFusedRows = Vec::width == 16 ? 4 : 2;  // rows of x; the sums of more rows would not fit in the registers
constexpr int kFold = 4;                              // rows of the weight whose sums are folded together
constexpr int64_t kTileRows = 16;
constexpr int kTileLeft = Vec::width == 16 ? 6 : 4;   // rows of x whose sums are in registers
constexpr int kTileRight = Vec::width == 16 ? 4 : 2;  // rows of the weight whose sums are in registers
constexpr int64_t kMostRows = 252;                    // the most rows of x in a job; their sums take up to 252 KiB

template <typename S, typename Unit>
struct BitmapGemm {
  using U = typename Unit::Type;
  static constexpr int kUnits = kStepUnits<Unit>, kVectors = kStepVecs<Unit>;
  static constexpr int64_t kChunkUnits = kChunkSteps * kUnits;

  const BitmapGemmArgs& a;
  const Rows rows;
  Buffer<U> units;  // x, padded with zeros: [chunk][row][units of the chunk]

  explicit BitmapGemm(const BitmapGemmArgs& args) : a(args), rows(args.weight), units(a.m * rows.steps * kUnits) {}

  int64_t chunk_steps(int64_t step) const { return min(kChunkSteps, rows.steps - step); }
  U* block(int64_t step, int64_t row) { return units + (step * a.m + row * chunk_steps(step)) * kUnits; }

  // --- activations ---

  template <typename X>
  static void order_step(float* to, const X* x, FloatUnit) {
    if constexpr (kEvenOdd<S, Unit>) {
      read_row_in_steps(to, x, kStepColumns);
    } else {
      convert_row(to, x, kStepColumns);
    }
  }

#if HEADSTART_TIER_BF16_DOT
  template <typename X>
  static void order_step(uint32_t* to, const X* x, PairUnit) {
    std::memcpy(to, x, kStepColumns * sizeof(X));
  }
#endif

  template <typename X>
  void prepare_row(int64_t row) {
    const X* x = static_cast<const X*>(a.x) + row * a.x_row;
    for (int64_t step = 0; step < rows.steps; ++step) {
      U* to = block(step / kChunkSteps * kChunkSteps, row) + step % kChunkSteps * kUnits;
      if (step < rows.whole) {
        order_step(to, x + step * kStepColumns, Unit());
      } else {
        X last[kStepColumns];
        std::memset(last, 0, sizeof last);
        std::memcpy(last, x + step * kStepColumns, static_cast<size_t>(a.weight.k % kStepColumns) * sizeof(X));
        order_step(to, last, Unit());
      }
    }
  }

  template <typename X>
  void write(int64_t row, int64_t n, const float* sums, int64_t count) const {
    X* to = static_cast<X*>(a.out) + row * a.weight.n + n;
    const X* bias = static_cast<const X*>(a.bias);
    for (int64_t i = 0; i < count; ++i) from_float(bias == nullptr ? sums[i] : sums[i] + to_float(bias[n + i]), to + i);
  }

  // out[row][n + i] = the sum of the lanes of sums[i], plus bias.
  void finish(int64_t row, int64_t n, const Vec sums[kFold]) const {
    if (n >= a.weight.n) return;
    float folded[kFold];
    store_sums(folded, sums);
    const int64_t count = min(kFold, a.weight.n - n);
    switch (a.dtype) {
      case Dtype::kFloat32:
        return write<float>(row, n, folded, count);
      case Dtype::kFloat16:
        return write<Float16>(row, n, folded, count);
      case Dtype::kBFloat16:
        return write<BFloat16>(row, n, folded, count);
    }
  }

  // --- few rows ---

  // Multiplies rows n to n + 3 of the weight with all m rows of x. The weight's last row stands in for rows past it.
  template <int m>
  void fused(int64_t n, S* scratch) {
    const S* p[kFold];
    const uint8_t* mask[kFold];
    int64_t id[kFold];
    for (int r = 0; r < kFold; ++r) {
      id[r] = min(n + r, a.weight.n - 1);
      p[r] = rows.values(id[r], scratch + r * (a.weight.k + kPast));
      mask[r] = rows.bits(id[r]);
    }
    // The hardware prefetcher does not see streams in four short rows side by side. So prefetch the same place of the
    // next four rows.
    const int64_t ahead = a.weight.row_offsets[min(n + kFold, a.weight.n)] - a.weight.row_offsets[n];
    const int64_t ahead_bytes = a.weight.value_bits == 4 ? ahead / 2 : ahead * static_cast<int64_t>(sizeof(S));
    Vec total[m][kFold], sum[m][kFold], scale[kFold];
    for (int r = 0; r < kFold; ++r) {
      for (int i = 0; i < m; ++i) total[i][r] = broadcast(0.0f);
    }
    int64_t stride = 0;
    const auto add = [&](int r, uint32_t bits, const U* x) __attribute__((always_inline)) {
      Vec w[kVectors];
      if constexpr (kQuantised<S>) {
        expand_step(w, p[r], bits, GroupScale{scale[r]}, Unit());
      } else {
        expand_step(w, p[r], bits, NoScale(), Unit());
      }
#pragma GCC unroll 4
      for (int i = 0; i < m; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          sum[i][r] = Unit::dot(Unit::load_units(x + i * stride + v * Vec::width), w[v], sum[i][r]);
        }
      }
    };
    const U* x = units;
    int64_t group = 0, next = 0;
    const auto scale_step = [&](int64_t step) __attribute__((always_inline)) {
      if (!kQuantised<S> || step != next) return;
      for (int r = 0; r < kFold; ++r) scale[r] = broadcast(rows.scale(id[r], group));
      ++group;
      next += rows.group_steps();
    };
    for (int64_t first = 0; first < rows.steps; first += kChunkSteps) {
      const int64_t count = chunk_steps(first), whole = min(count, rows.whole - first);
      stride = count * kUnits;
#pragma GCC unroll 4
      for (int r = 0; r < kFold; ++r) {
        __builtin_prefetch(mask[r] + kFold * rows.bytes + first * sizeof(uint32_t), 0, 2);
#pragma GCC unroll 4
        for (int i = 0; i < m; ++i) sum[i][r] = broadcast(0.0f);
      }
      for (int64_t s = 0; s < whole; ++s, x += kUnits) {
        scale_step(first + s);
#pragma GCC unroll 4
        for (int r = 0; r < kFold; ++r) {
          uint32_t bits;
          std::memcpy(&bits, mask[r] + (first + s) * sizeof bits, sizeof bits);
          __builtin_prefetch(reinterpret_cast<const char*>(p[r]) + ahead_bytes, 0, 2);
          add(r, bits, x);
        }
      }
      if (whole < count) {
        scale_step(rows.whole);
#pragma GCC unroll 4
        for (int r = 0; r < kFold; ++r) add(r, rows.bits_at(mask[r], rows.whole), x);
        x += kUnits;
      }
      x += (m - 1) * stride;
#pragma GCC unroll 4
      for (int r = 0; r < kFold; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < m; ++i) total[i][r] = total[i][r] + sum[i][r];
      }
    }
    for (int i = 0; i < m; ++i) finish(i, n, total[i]);
  }

  template <int m>
  void fused_all(const Parallel& parallel) {
    const int64_t job_rows = round_up(max(1, min(64, a.weight.n / (8 * parallel.workers))), kFold);
    PerWorker<Buffer<S>> scratch(parallel.workers, kFold * (a.weight.k + kPast));
    for_each_job(parallel, ceil_div(a.weight.n, job_rows), [&](int64_t job, int worker) {
      const int64_t end = min(a.weight.n, (job + 1) * job_rows);
      for (int64_t n = job * job_rows; n < end; n += kFold) fused<m>(n, scratch[worker]);
    });
  }

  // --- many rows ---

  struct Tile {
    Tile(int64_t k, int64_t m)
        : weights(kTileRows * kChunkUnits), sums(m * kTileRows * Vec::width), scratch(kTileRows * (k + kPast)) {}
    Buffer<U> weights;   // [row of the weight][unit]
    Buffer<float> sums;  // [row of x][row of the weight][lane]
    Buffer<S> scratch;
    Row<S> row[kTileRows];
  };

  // sums += x · weights for `left` rows of x. The lanes are not added up.
  template <int left>
  static void multiply(float* sums, const U* x, const U* weights, int64_t depth) {
    Vec sum[left][kTileRight];
#pragma GCC unroll 8
    for (int i = 0; i < left; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kTileRight; ++r) sum[i][r] = broadcast(0.0f);
    }
    add_products<Unit>(
        sum, depth, Vec::width, [&](int i, int64_t u) { return Unit::load_units(x + i * depth + u); },
        [&](int r, int64_t u) { return Unit::load_units(weights + r * kChunkUnits + u); });
#pragma GCC unroll 8
    for (int i = 0; i < left; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kTileRight; ++r) {
        float* to = sums + (i * kTileRows + r) * Vec::width;
        store(to, load(to) + sum[i][r]);
      }
    }
  }

  static void multiply_rows(int64_t left, float* sums, const U* x, const U* weights, int64_t depth) {
    switch (left) {
      case 6:
        return multiply<6>(sums, x, weights, depth);
      case 5:
        return multiply<5>(sums, x, weights, depth);
      case 4:
        return multiply<4>(sums, x, weights, depth);
      case 3:
        return multiply<3>(sums, x, weights, depth);
      case 2:
        return multiply<2>(sums, x, weights, depth);
      default:
        return multiply<1>(sums, x, weights, depth);
    }
  }

  void run_tile(Tile& tile, int64_t n, int64_t first_row, int64_t m) {
    const int64_t count = min(kTileRows, a.weight.n - n), right = round_up(count, kTileRight);
    for (int64_t r = 0; r < right; ++r) {
      const int64_t id = min(n + r, a.weight.n - 1);
      tile.row[r] = {rows.values(id, tile.scratch + r * (a.weight.k + kPast)), rows.bits(id)};
    }
    zero(tile.sums, m * kTileRows * Vec::width);
    for (int64_t step = 0; step < rows.steps; step += kChunkSteps) {
      const int64_t steps = chunk_steps(step), depth = steps * kUnits;
      for (int64_t r = 0; r < right; ++r) {
        U* to = tile.weights + r * kChunkUnits;
        expand_chunk<Unit>(rows, tile.row[r], min(n + r, a.weight.n - 1), step, steps, [&](int64_t s, const Vec* x) {
          for (int v = 0; v < kVectors; ++v) store_units(to + s * kUnits + v * Vec::width, x[v]);
        });
      }
      // Make groups of rows of nearly the same size: 7 rows are 4 and 3.
      for (int64_t i = 0, groups = ceil_div(m, kTileLeft), left; i < m; i += left, --groups) {
        left = ceil_div(m - i, groups);
        const U* x = block(step, first_row + i);
        for (int64_t r = 0; r < right; r += kTileRight) {
          float* sums = tile.sums + (i * kTileRows + r) * Vec::width;
          multiply_rows(left, sums, x, tile.weights + r * kChunkUnits, depth);
        }
      }
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t r = 0; r < count; r += kFold) {
        Vec sums[kFold];
        for (int j = 0; j < kFold; ++j) sums[j] = load(tile.sums + (i * kTileRows + r + j) * Vec::width);
        finish(first_row + i, n + r, sums);
      }
    }
  }

  void tile_all(const Parallel& parallel) {
    // If the weight has few rows, split the rows of x too.
    const int64_t tiles = ceil_div(a.weight.n, kTileRows), wanted = ceil_div(4 * parallel.workers, tiles);
    const int64_t part = min(kMostRows, max(4 * kTileLeft, round_up(ceil_div(a.m, wanted), kTileLeft)));
    const int64_t parts = ceil_div(a.m, part);
    PerWorker<Tile> scratch(parallel.workers, a.weight.k, min(part, a.m));
    for_each_job(parallel, tiles * parts, [&](int64_t job, int worker) {
      const int64_t row = job % parts * part;
      run_tile(scratch[worker], job / parts * kTileRows, row, min(part, a.m - row));
    });
  }

  template <typename X>
  void prepare(const Parallel& parallel) {
    if (a.m <= kFusedRows) {
      for (int64_t row = 0; row < a.m; ++row) prepare_row<X>(row);
    } else {
      for_each_job(parallel, a.m, [&](int64_t row, int) { prepare_row<X>(row); });
    }
  }

  void run(const Parallel& parallel) {
    if (a.m > kFusedRows || (kQuantised<S> && !rows.whole_groups())) return tile_all(parallel);
    switch (a.m) {
      case 1:
        return fused_all<1>(parallel);
      case 2:
        return fused_all<2>(parallel);
      default:
        if constexpr (kFusedRows == 4) return a.m == 3 ? fused_all<3>(parallel) : fused_all<4>(parallel);
    }
  }
};

template <typename S, typename X>
inline void multiply(const BitmapGemmArgs& a, const Parallel& parallel) {
  BitmapGemm<S, typename UnitOf<X>::Type> gemm(a);
  gemm.template prepare<X>(parallel);
  gemm.run(parallel);
}

// --- compression ----------------------------------------------------------------------------------------------------

// Returns which of 32 elements have any bit set, one bit per element.
template <typename T>
inline uint32_t nonzero(const T* p) {
#if HEADSTART_TIER_AVX512
  if constexpr (sizeof(T) == 1) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_test_epi8_mask(x, x);
  } else if constexpr (sizeof(T) == 2) {
    const __m512i x = _mm512_loadu_si512(p);
    return _mm512_test_epi16_mask(x, x);
  } else {
    const __m512i x = _mm512_loadu_si512(p), y = _mm512_loadu_si512(p + 16);
    return _mm512_test_epi32_mask(x, x) | static_cast<uint32_t>(_mm512_test_epi32_mask(y, y)) << 16;
  }
#else
  uint32_t bits = 0;
  for (int i = 0; i < kStepColumns; ++i) bits |= static_cast<uint32_t>(p[i] != 0) << i;
  return bits;
#endif
}

template <typename T>
inline void mask_rows(const BitmapCompressArgs& a, const Parallel& parallel) {
  const int64_t bytes = ceil_div(a.k, 8), block = max(1, kJobBytes / max(1, a.k));
  for_each_job(parallel, ceil_div(a.n, block), [&](int64_t job, int) {
    for (int64_t n = job * block, end = min(a.n, n + block); n < end; ++n) {
      const T* w = static_cast<const T*>(a.w) + n * a.w_row;
      uint8_t* to = a.bitmask + n * bytes;
      int64_t sum = 0;
      for (int64_t k = 0; k < a.k; k += kStepColumns) {
        T last[kStepColumns] = {};
        const int64_t left = a.k - k;
        if (left < kStepColumns) std::memcpy(last, w + k, static_cast<size_t>(left) * sizeof(T));
        const uint32_t bits = nonzero(left < kStepColumns ? last : w + k);
        std::memcpy(to + k / 8, &bits, left < kStepColumns ? static_cast<size_t>(ceil_div(left, 8)) : sizeof bits);
        sum += count_bits(bits);
      }
      a.row_offsets[n + 1] = sum;
    }
  });
  a.row_offsets[0] = 0;
  for (int64_t n = 0; n < a.n; ++n) a.row_offsets[n + 1] += a.row_offsets[n];
}

#if HEADSTART_TIER_AVX512

// Writes the non-zero elements of 16 elements and returns their number. The rest of the 16 elements of `to` may be
// overwritten.
template <typename T>
inline int gather(T* to, const T* p) {
  __m512i x;
  if constexpr (sizeof(T) == 1) {
    x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else if constexpr (sizeof(T) == 2) {
    x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  } else {
    x = _mm512_loadu_si512(p);
  }
  const __mmask16 bits = _mm512_test_epi32_mask(x, x);
  x = _mm512_maskz_compress_epi32(bits, x);
  if constexpr (sizeof(T) == 1) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
  } else if constexpr (sizeof(T) == 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(x));
  } else {
    _mm512_storeu_si512(to, x);
  }
  return count_bits(bits);
}

#endif

template <typename T>
inline void gather_rows(const BitmapCompressArgs& a, const Parallel& parallel) {
  const int64_t block = max(1, kJobBytes / max(1, a.k));
  for_each_job(parallel, ceil_div(a.n, block), [&](int64_t job, int) {
    for (int64_t n = job * block, last = min(a.n, n + block); n < last; ++n) {
      const T* w = static_cast<const T*>(a.w) + n * a.w_row;
      T *to = static_cast<T*>(a.values) + a.row_offsets[n], *end = static_cast<T*>(a.values) + a.row_offsets[n + 1];
#if HEADSTART_TIER_AVX512
      // gather() writes 16 elements, so at least 16 values of this row must still be missing. Then at least 16 of the
      // row's elements are left to read.
      for (; end - to >= 16; w += 16) to += gather(to, w);
#endif
      for (; to < end; ++w) {  // without a branch that depends on the value
        *to = *w;
        to += *w != 0;
      }
    }
  });
}

}  // namespace

namespace HEADSTART_TIER {

void bitmap_mask(const BitmapCompressArgs& a, const Parallel& parallel) {
  switch (a.value_bytes) {
    case 1:
      return mask_rows<uint8_t>(a, parallel);
    case 2:
      return mask_rows<uint16_t>(a, parallel);
    default:
      return mask_rows<uint32_t>(a, parallel);
  }
}

void bitmap_gather(const BitmapCompressArgs& a, const Parallel& parallel) {
  switch (a.value_bytes) {
    case 1:
      return gather_rows<uint8_t>(a, parallel);
    case 2:
      return gather_rows<uint16_t>(a, parallel);
    default:
      return gather_rows<uint32_t>(a, parallel);
  }
}

void bitmap_decompress(const BitmapDecompressArgs& a, const Parallel& parallel) {
  if (a.weight.scales == nullptr) {
    switch (a.weight.value_bits) {
      case 8:
        return decompress_raw<uint8_t>(a, parallel);
      case 16:
        return decompress_raw<uint16_t>(a, parallel);
      default:
        return decompress_raw<uint32_t>(a, parallel);
    }
  }
  switch (a.weight.scale_dtype) {
    case Dtype::kFloat32:
      return decompress_scaled<float>(a, parallel);
    case Dtype::kFloat16:
      return decompress_scaled<Float16>(a, parallel);
    case Dtype::kBFloat16:
      return decompress_scaled<BFloat16>(a, parallel);
  }
}

void bitmap_gemm(const BitmapGemmArgs& a, const Parallel& parallel) {
  const bool quantised = a.weight.scales != nullptr;
  switch (a.dtype) {
    case Dtype::kFloat32:
      return quantised ? multiply<int8_t, float>(a, parallel) : multiply<float, float>(a, parallel);
    case Dtype::kFloat16:
      return quantised ? multiply<int8_t, Float16>(a, parallel) : multiply<Float16, Float16>(a, parallel);
    case Dtype::kBFloat16:
      return quantised ? multiply<int8_t, BFloat16>(a, parallel) : multiply<BFloat16, BFloat16>(a, parallel);
  }
}

}  // namespace HEADSTART_TIER
}  // namespace headstart

// Products of a few rows of floats with rows of T (keys, centroids or values) that are read in place. For so few rows
// of floats, packing the rows of T (tile.h) would cost more than it saves.
//
// Values are read in steps of two registers. A step of bf16 is one load; one instruction each turns its even and its
// odd values into a register of floats. The floats that are combined with them, queries and outputs, are stored in the
// same order: step by step, the even ones first.
#pragma once

#include "tile.h"

namespace headstart {
namespace {

constexpr int kStep = 2 * Vec::width;
constexpr int kRowsInPlace = Vec::width == 16 ? 4 : 2;  // 4 × 4 sums fill AVX-512's registers; 2 × 4 fill the others'

template <typename T>
inline void load_step(Vec x[2], const T* p) {
  x[0] = load(p);
  x[1] = load(p + Vec::width);
}

template <typename T>
inline void store_step(T* p, Vec first, Vec second) {
  store(p, first);
  store(p + Vec::width, second);
}

#if HEADSTART_TIER_AVX512 || HEADSTART_TIER_AVX2

inline void load_step(Vec x[2], const BFloat16* p) {
#if HEADSTART_TIER_AVX512
  const __m512i both = _mm512_loadu_si512(p);
  x[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
  x[1] = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
#else
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  x[0] = {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))};
  x[1] = {_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
#endif
}

inline void store_step(BFloat16* p, Vec even, Vec odd) {
  BFloat16 lanes[2][Vec::width];
  store(lanes[0], even);
  store(lanes[1], odd);
  for (int i = 0; i < Vec::width; ++i) {
    p[2 * i] = lanes[0][i];
    p[2 * i + 1] = lanes[1][i];
  }
}

#endif

// Loads the first n < kStep values and fills the rest with zeros.
template <typename T>
inline void load_first_of_step(Vec x[2], const T* p, int64_t n) {
  T lanes[kStep];
  std::memset(lanes, 0, sizeof lanes);
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  load_step(x, lanes);
}

template <typename T>
inline void load_step_of(Vec x[2], const T* row, int64_t d, int64_t dim) {
  d + kStep <= dim ? load_step(x, row + d) : load_first_of_step(x, row + d, dim - d);
}

// Converts a row of `dim` values to floats in the order of steps. Zeros fill the last step.
template <typename T>
inline void read_row_in_steps(float* to, const T* from, int64_t dim) {
  for (int64_t d = 0; d < dim; d += kStep) {
    Vec x[2];
    load_step_of(x, from, d, dim);
    store(to + d, x[0]);
    store(to + d + Vec::width, x[1]);
  }
}

// The reverse of read_row_in_steps: writes a row of `dim` values, each times `factor`.
template <typename T>
inline void write_row_of_steps(T* to, const float* from, int64_t dim, Vec factor) {
  for (int64_t d = 0; d < dim; d += kStep) {
    T lanes[kStep];
    const bool whole = d + kStep <= dim;
    store_step(whole ? to + d : lanes, load(from + d) * factor, load(from + d + Vec::width) * factor);
    if (!whole) std::memcpy(to + d, lanes, static_cast<size_t>(dim - d) * sizeof(T));
  }
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls body(first, Count<n>) for `rows` rows, n rows at a time.
template <typename Body>
inline void few_at_a_time(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + kRowsInPlace <= rows; r += kRowsInPlace) body(r, Count<kRowsInPlace>());
  if (rows - r == 3) body(r, Count<3>());
  if (rows - r == 2) body(r, Count<2>());
  if (rows - r == 1) body(r, Count<1>());
}

// always_inline: GCC treats a function that only prefetches as free of effects, and drops the calls that it does not
// inline.
template <typename T>
inline __attribute__((always_inline)) void prefetch_row(const T* row, int64_t dim) {
  const auto* bytes = reinterpret_cast<const char*>(row);
  for (int64_t line = 0; line < dim * static_cast<int64_t>(sizeof(T)); line += 64) __builtin_prefetch(bytes + line);
}

template <int n, typename T, typename RowAt, typename Fetch>
inline void dot_few_rows(const float* query, int64_t query_row, int64_t dim, const RowAt& row_at, int64_t count,
                         float* out, int64_t out_row, const Fetch& fetch) {
  for (int64_t j = 0; j < count; j += 4) {
    const T* row[4];
    for (int i = 0; i < 4; ++i) {
      row[i] = row_at(min(j + i, count - 1));
      fetch(j + i);
    }
    Vec sum[n][4];
    for (int r = 0; r < n; ++r) {
      for (int i = 0; i < 4; ++i) sum[r][i] = broadcast(0.0f);
    }
    for (int64_t d = 0; d < dim; d += kStep) {
      Vec x[4][2];
      for (int i = 0; i < 4; ++i) load_step_of(x[i], row[i], d, dim);
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < n; ++r) {
          const Vec y = load(query + r * query_row + d + half * Vec::width);
          for (int i = 0; i < 4; ++i) sum[r][i] = fma(y, x[i][half], sum[r][i]);
        }
      }
    }
    for (int r = 0; r < n; ++r) store_sums(out + r * out_row + j, sum[r]);
  }
}

// out[r][j] = query row r · row j. Every row is read once for every few queries. Writes up to 3 values more than
// `count` in each row of out. The hardware prefetcher does not see a stream when four rows are read side by side. So
// fetch(j) is called with row j, and should prefetch the data that is needed some rows later.
template <typename T, typename RowAt, typename Fetch>
inline void dot_rows(int64_t queries, const float* query, int64_t query_row, int64_t dim, const RowAt& row_at,
                     int64_t count, float* out, int64_t out_row, const Fetch& fetch) {
  few_at_a_time(queries, [&](int64_t r, auto n) {
    dot_few_rows<decltype(n)::value, T>(query + r * query_row, query_row, dim, row_at, count, out + r * out_row,
                                        out_row, fetch);
  });
}

template <int n, int steps, typename T>
inline void add_few_rows(float* to, int64_t to_row, int64_t d, int64_t dim, const T* const* rows, int64_t count,
                         const float* weight, int64_t weight_row, const float* rescale) {
  Vec sum[n][2 * steps];
  for (int r = 0; r < n; ++r) {
    for (int i = 0; i < 2 * steps; ++i) {
      sum[r][i] = load(to + r * to_row + d + i * Vec::width) * broadcast(rescale[r]);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    if (rows[j] == nullptr) continue;
    Vec x[2 * steps];
    for (int s = 0; s < steps; ++s) load_step_of(x + 2 * s, rows[j], d + s * kStep, dim);
    for (int r = 0; r < n; ++r) {
      const Vec w = broadcast(weight[r * weight_row + j]);
      for (int i = 0; i < 2 * steps; ++i) sum[r][i] = fma(w, x[i], sum[r][i]);
    }
  }
  for (int r = 0; r < n; ++r) {
    for (int i = 0; i < 2 * steps; ++i) store(to + r * to_row + d + i * Vec::width, sum[r][i]);
  }
}

// to[r] = to[r] · rescale[r] + sum_j weight[r][j] · row j. `to` is in the order of steps. A null row takes no part.
template <typename T>
inline void add_rows(int64_t queries, float* to, int64_t to_row, int64_t dim, const T* const* rows, int64_t count,
                     const float* weight, int64_t weight_row, const float* rescale) {
  few_at_a_time(queries, [&](int64_t r, auto n) {
    constexpr int few = decltype(n)::value;
    int64_t d = 0;
    for (; d + 2 * kStep <= dim; d += 2 * kStep) {
      add_few_rows<few, 2>(to + r * to_row, to_row, d, dim, rows, count, weight + r * weight_row, weight_row,
                           rescale + r);
    }
    for (; d < dim; d += kStep) {
      add_few_rows<few, 1>(to + r * to_row, to_row, d, dim, rows, count, weight + r * weight_row, weight_row,
                           rescale + r);
    }
  });
}

}  // namespace
}  // namespace headstart

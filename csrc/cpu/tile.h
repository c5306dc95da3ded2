// Tiles of keys and values, and the one small matrix kernel that works on them.
//
//   key tile    [D / u][64]     unit (d, j) = the u values of key j from dim u*d      scores  = Q · tile
//   value tile  [64 / u][Dp]    unit (t, d) = value d of the u keys from u*t          output += P · tile
//
// u is 1 for float units and 2 for bf16 pairs. Dp is D rounded up to whole registers. In both products the left side is
// row-major in units, and each of its units is broadcast over a register of right-hand columns. So one kernel serves
// both, and it reads the right side in memory order:
//
//   C[6 rows][4 registers] stays in registers (24 accumulators). A unit of depth takes 4 loads of B, 6 broadcasts of A
//   and 24 multiply-adds. On AVX-512 this leaves a few registers free and keeps both multiply ports busy. AVX2 and SSE
//   have 16 registers and use 6 × 2.
#pragma once

#include <new>

#include "vec.h"

namespace headstart {
namespace {

constexpr int kTile = 64;  // the keys of a tile and the query rows of a job
constexpr int kRows = 6;
constexpr int kVecs = Vec::width == 16 ? 4 : 2;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// A 64-byte aligned, uninitialised array of a plain type. Allocate it outside parallel regions, because it may throw.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(::operator new(static_cast<size_t>(size + 64) * sizeof(T), std::align_val_t(64))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return static_cast<T*>(data_); }

 private:
  void* data_;
};

// One T per worker, all constructed from the same arguments.
template <typename T>
class PerWorker {
 public:
  template <typename... Args>
  explicit PerWorker(int workers, Args... args) : all_(new T*[static_cast<size_t>(workers)]), made_(0) {
    for (; made_ < workers; ++made_) all_[made_] = new T(args...);
  }
  ~PerWorker() {
    while (made_ > 0) delete all_[--made_];
    delete[] all_;
  }
  PerWorker(const PerWorker&) = delete;
  PerWorker& operator=(const PerWorker&) = delete;
  T& operator[](int worker) { return *all_[worker]; }

 private:
  T** all_;
  int made_;
};

// Runs body(job, worker) for every job in [0, jobs). A worker that is free takes the next job. So jobs of different
// length keep all cores busy, provided that the long ones come first.
template <typename Body>
void for_each_job(const Parallel& parallel, int64_t jobs, const Body& body) {
  struct Context {
    const Body* body;
    int64_t jobs;
    int64_t next;
  } context{&body, jobs, 0};
  if (jobs == 0) return;
  parallel.run(
      static_cast<int>(min(parallel.workers, jobs)),
      [](void* opaque, int worker) {
        Context& c = *static_cast<Context*>(opaque);
        for (;;) {
          const int64_t job = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED);
          if (job >= c.jobs) return;
          (*c.body)(job, worker);
        }
      },
      &context);
}

// --- packing -----------------------------------------------------------------------------------------------------

// Converts one row of `dim` values to floats, padded with zeros to whole registers.
template <typename T>
inline void convert_row(float* to, const T* from, int64_t dim) {
  int64_t d = 0;
  for (; d + Vec::width <= dim; d += Vec::width) store(to + d, load(from + d));
  if (d < dim) store(to + d, load_first(from + d, static_cast<int>(dim - d)));
}

inline void zero(float* to, int64_t n) { std::memset(to, 0, static_cast<size_t>(n) * sizeof(float)); }

// Transposes [4][4] units.
template <typename Unit>
inline void transpose4(Unit* to, int64_t stride, const Unit* const from[4]) {
#if HEADSTART_TIER_AVX2 || HEADSTART_TIER_AVX512
  __m128 r0 = _mm_loadu_ps(reinterpret_cast<const float*>(from[0]));
  __m128 r1 = _mm_loadu_ps(reinterpret_cast<const float*>(from[1]));
  __m128 r2 = _mm_loadu_ps(reinterpret_cast<const float*>(from[2]));
  __m128 r3 = _mm_loadu_ps(reinterpret_cast<const float*>(from[3]));
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  _mm_storeu_ps(reinterpret_cast<float*>(to), r0);
  _mm_storeu_ps(reinterpret_cast<float*>(to + stride), r1);
  _mm_storeu_ps(reinterpret_cast<float*>(to + 2 * stride), r2);
  _mm_storeu_ps(reinterpret_cast<float*>(to + 3 * stride), r3);
#else
  for (int d = 0; d < 4; ++d)
    for (int j = 0; j < 4; ++j) to[d * stride + j] = from[j][d];
#endif
}

// Packs a key tile from 64 row pointers. A null pointer gives a row of zeros. dim is a multiple of 8.
template <typename T>
inline void pack_keys(float* tile, const T* const rows[kTile], int64_t dim, FloatUnit) {
  float converted[4][256];
  for (int j = 0; j < kTile; j += 4) {
    const float* from[4];
    for (int i = 0; i < 4; ++i) {
      if (rows[j + i] == nullptr) {
        zero(converted[i], dim);
      } else {
        convert_row(converted[i], rows[j + i], dim);
      }
    }
    for (int64_t d = 0; d < dim; d += 4) {
      for (int i = 0; i < 4; ++i) from[i] = converted[i] + d;
      transpose4(tile + d * kTile + j, kTile, from);
    }
  }
}

// Packs a value tile from 64 row pointers. A null pointer gives a row of zeros.
template <typename T>
inline void pack_values(float* tile, const T* const rows[kTile], int64_t dim, int64_t padded_dim, FloatUnit) {
  for (int j = 0; j < kTile; ++j) {
    float* to = tile + j * padded_dim;
    if (rows[j] == nullptr) {
      zero(to, padded_dim);
    } else {
      convert_row(to, rows[j], dim);
    }
  }
}

template <typename T>
inline void pack_queries(float* to, const T* const* rows, int64_t count, int64_t dim, FloatUnit) {
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] == nullptr) {
      zero(to + i * dim, dim);
    } else {
      for (int64_t d = 0; d < dim; d += Vec::width) {
        const int n = static_cast<int>(min(Vec::width, dim - d));
        if (n == Vec::width) {
          store(to + i * dim + d, load(rows[i] + d));
        } else {
          store_first(to + i * dim + d, load_first(rows[i] + d, n), n);
        }
      }
    }
  }
}

#if HEADSTART_TIER_BF16_DOT

inline void pack_keys(uint32_t* tile, const BFloat16* const rows[kTile], int64_t dim, PairUnit) {
  static const uint32_t zeros[128] = {};
  for (int j = 0; j < kTile; j += 4) {
    for (int64_t d = 0; d < dim / 2; d += 4) {
      const uint32_t* from[4];
      for (int i = 0; i < 4; ++i) {
        from[i] = (rows[j + i] == nullptr ? zeros : reinterpret_cast<const uint32_t*>(rows[j + i])) + d;
      }
      transpose4(tile + d * kTile + j, kTile, from);
    }
  }
}

inline void pack_values(uint32_t* tile, const BFloat16* const rows[kTile], int64_t dim, int64_t padded_dim, PairUnit) {
  static const BFloat16 zeros[256] = {};
  for (int t = 0; t < kTile / 2; ++t) {
    const BFloat16* even = rows[2 * t] == nullptr ? zeros : rows[2 * t];
    const BFloat16* odd = rows[2 * t + 1] == nullptr ? zeros : rows[2 * t + 1];
    uint32_t* to = tile + t * padded_dim;
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16) {
      const __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + d)));
      const __m512i hi = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + d)));
      _mm512_storeu_si512(to + d, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
    }
    for (; d < padded_dim; ++d) {
      to[d] = d < dim ? even[d].bits | static_cast<uint32_t>(odd[d].bits) << 16 : 0;
    }
  }
}

inline void pack_queries(uint32_t* to, const BFloat16* const* rows, int64_t count, int64_t dim, PairUnit) {
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] == nullptr) {
      std::memset(to + i * dim / 2, 0, static_cast<size_t>(dim) * sizeof(BFloat16));
    } else {
      std::memcpy(to + i * dim / 2, rows[i], static_cast<size_t>(dim) * sizeof(BFloat16));
    }
  }
}

#endif

// --- the matrix kernel -------------------------------------------------------------------------------------------

// sum[i][j] += left(i, u) · right(j, u) for u = 0, step, ... below depth. This is the innermost loop of every product.
// The functions left and right load one register each. All `rows` × `vecs` sums stay in registers.
template <typename Unit, int rows, int vecs, typename Left, typename Right>
inline __attribute__((always_inline)) void add_products(Vec (&sum)[rows][vecs], int64_t depth, int64_t step,
                                                        const Left& left, const Right& right) {
  for (int64_t u = 0; u < depth; u += step) {
    Vec b[vecs];
#pragma GCC unroll 4
    for (int j = 0; j < vecs; ++j) b[j] = right(j, u);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vec a = left(i, u);
#pragma GCC unroll 4
      for (int j = 0; j < vecs; ++j) sum[i][j] = Unit::dot(a, b[j], sum[i][j]);
    }
  }
}

enum class Start { kZero, kAdd, kScaled };  // C = AB, C += AB, C = diag(factor) C + AB

template <typename Unit, Start start, int rows, int vecs>
inline __attribute__((always_inline)) void multiply(const typename Unit::Type* a, int64_t lda,
                                                    const typename Unit::Type* b, int64_t ldb, int64_t depth, float* c,
                                                    int64_t ldc, const float* factor) {
  Vec sum[rows][vecs];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vecs; ++j) {
      if (start == Start::kZero) {
        sum[i][j] = broadcast(0.0f);
      } else {
        sum[i][j] = load(c + i * ldc + j * Vec::width);
        if (start == Start::kScaled) sum[i][j] = sum[i][j] * broadcast(factor[i]);
      }
    }
  }
  add_products<Unit>(
      sum, depth, 1, [&](int i, int64_t k) { return Unit::broadcast_unit(a + i * lda + k); },
      [&](int j, int64_t k) { return Unit::load_units(b + k * ldb + j * Vec::width); });
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vecs; ++j) store(c + i * ldc + j * Vec::width, sum[i][j]);
  }
}

template <typename Unit, Start start, int vecs>
inline void multiply_rows(int64_t rows, const typename Unit::Type* a, int64_t lda, const typename Unit::Type* b,
                          int64_t ldb, int64_t depth, float* c, int64_t ldc, const float* factor) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    multiply<Unit, start, kRows, vecs>(a + i * lda, lda, b, ldb, depth, c + i * ldc, ldc, factor + i);
  }
  a += i * lda;
  c += i * ldc;
  factor += i;
  switch (rows - i) {
    case 5:
      return multiply<Unit, start, 5, vecs>(a, lda, b, ldb, depth, c, ldc, factor);
    case 4:
      return multiply<Unit, start, 4, vecs>(a, lda, b, ldb, depth, c, ldc, factor);
    case 3:
      return multiply<Unit, start, 3, vecs>(a, lda, b, ldb, depth, c, ldc, factor);
    case 2:
      return multiply<Unit, start, 2, vecs>(a, lda, b, ldb, depth, c, ldc, factor);
    case 1:
      return multiply<Unit, start, 1, vecs>(a, lda, b, ldb, depth, c, ldc, factor);
    default:
      return;
  }
}

// Computes C[rows][columns] from A[rows][depth] and B[depth][columns]. depth counts units. columns is a multiple of the
// register width.
template <typename Unit, Start start>
inline void matmul(int64_t rows, int64_t columns, int64_t depth, const typename Unit::Type* a, int64_t lda,
                   const typename Unit::Type* b, int64_t ldb, float* c, int64_t ldc, const float* factor = nullptr) {
  int64_t j = 0;
  for (; j + kVecs * Vec::width <= columns; j += kVecs * Vec::width) {
    multiply_rows<Unit, start, kVecs>(rows, a, lda, b + j, ldb, depth, c + j, ldc, factor);
  }
  switch ((columns - j) / Vec::width) {
    case 3:
      return multiply_rows<Unit, start, 3>(rows, a, lda, b + j, ldb, depth, c + j, ldc, factor);
    case 2:
      return multiply_rows<Unit, start, 2>(rows, a, lda, b + j, ldb, depth, c + j, ldc, factor);
    case 1:
      return multiply_rows<Unit, start, 1>(rows, a, lda, b + j, ldb, depth, c + j, ldc, factor);
    default:
      return;
  }
}

// The unit for a dtype: bf16 pairs if this tier multiplies them, otherwise floats.
template <typename T>
struct UnitOf {
  using Type = FloatUnit;
};
#if HEADSTART_TIER_BF16_DOT
template <>
struct UnitOf<BFloat16> {
  using Type = PairUnit;
};
#endif

template <typename T>
inline const T* row_of(const Tensor4& x, int64_t b, int64_t h, int64_t n) {
  return static_cast<const T*>(x.data) + b * x.batch + h * x.head + n * x.token;
}

}  // namespace
}  // namespace headstart

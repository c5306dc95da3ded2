// A tile of scores, rows of A · rows of B, computed by a block of threads. All index builders multiply with it.
//
//            B: kColumns rows of 128 bytes a stage            a warp owns 32 × 64 scores
//               ┌────────┬────────┐                           ┌──16──┐  in registers: 2 × 8 accumulators of
//               │ warp   │ warp   │                           │ mma  │  mma.m16n8k16, 64 floats a lane
//   A: kRows    ├────────┼────────┤  A and B: kStages of      ├──────┤
//   rows of     │ 0      │ 1      │  cp.async in flight,      │      │ × 8
//   128 bytes   │ 2      │ 3      │  swizzled (layouts/mma.h) └──────┘
//               └────────┴────────┘
//
// A stage is 128 bytes deep: 64 16-bit or 32 float32 elements of one token. float16 and bfloat16 multiply on tensor
// cores. float32 multiplies with FMA, so it keeps float32's accuracy. The same lanes hold the same scores. A lane reads
// 4 rows of A and 16 of B in 16-byte pieces, which a warp's lanes share by broadcast.
#pragma once

#include <type_traits>

#include "device.h"

namespace headstart {
namespace cuda {

// The rows of an operand are tokens of one head. In depth step s, row r is token first + r · step + s · turn. Tokens
// outside [begin, begin + count) count as zero and are never read.
template <typename T>
struct TileRows {
  const T* data;  // token 0
  int64_t token_stride;
  uint32_t first, step;
  int turn;
  uint32_t begin, count;
  bool vectors;  // rows can be read 16 bytes at a time
};

// The rows of an operand, listed one by one. A null row counts as zero.
template <typename T>
struct GatheredRows {
  const T* const* rows;
  bool vectors;
};

template <typename T, int kWarpRows, int kWarpColumns, int kStages>
class ScoreTile {
 public:
  static constexpr int kThreads = 32 * kWarpRows * kWarpColumns;
  static constexpr int kRows = 32 * kWarpRows, kColumns = 64 * kWarpColumns;
  static constexpr int kSharedBytes = kStages * (kRows + kColumns) * mma::kRowBytes;

  // score[m][n][2 half + i] is the score of row(m, half) and column(n, i).
  float score[2][8][4];

  static __device__ __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) / 32 / kWarpColumns; }
  static __device__ __forceinline__ int warp_column() { return static_cast<int>(threadIdx.x) / 32 % kWarpColumns; }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int row(int m, int half) {
    return warp_row() * 32 + m * mma::kRows + mma::c_row(lane(), 2 * half);
  }
  static __device__ __forceinline__ int column(int n, int i) {
    return warp_column() * 64 + n * mma::kColumns + mma::c_column(lane(), i);
  }

  // Computes all scores of the tile, over `steps` tokens of `head_dim` elements. On return the shared memory is free
  // again.
  template <typename RowsOfA, typename RowsOfB>
  __device__ __forceinline__ void multiply(unsigned char* shared, const RowsOfA& a, const RowsOfB& b, int steps,
                                           int head_dim) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[m][n][i] = 0.0f;
      }
    }
    const int chunks = steps * ((head_dim + kChunk - 1) / kChunk);
    Place load{0, 0}, use{0, 0};
    int load_stage = 0, use_stage = 0;
    const auto load_next = [&](int chunk) {
      if (chunk < chunks) {
        unsigned char* stage = shared + load_stage * kStageBytes;
        load_rows<kRows>(stage, a, load, head_dim);
        load_rows<kColumns>(stage + kRows * mma::kRowBytes, b, load, head_dim);
        load.advance(head_dim);
        load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
      }
      copy_commit();  // commit empty groups too, so that the number of groups tells the stage
    };
    for (int chunk = 0; chunk < kStages - 1; ++chunk) load_next(chunk);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_wait<kStages - 2>();
      __syncthreads();
      load_next(chunk + kStages - 1);  // loads into the stage that all threads left before the barrier
      accumulate(shared + use_stage * kStageBytes, min(head_dim - use.dim, kChunk));
      use.advance(head_dim);
      use_stage = use_stage + 1 == kStages ? 0 : use_stage + 1;
    }
    copy_wait<0>();
    __syncthreads();
  }

 private:
  static constexpr bool kTensorCores = !std::is_same_v<T, float>;
  static constexpr int kChunk = mma::kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kUnit = mma::kUnitBytes / static_cast<int>(sizeof(T));
  static constexpr int kStageBytes = (kRows + kColumns) * mma::kRowBytes;

  struct Place {
    int step, dim;
    __device__ __forceinline__ void advance(int head_dim) {
      dim += kChunk;
      if (dim >= head_dim) {
        dim = 0;
        ++step;
      }
    }
  };

  template <int kCount>
  static __device__ __forceinline__ void load_rows(unsigned char* to, const TileRows<T>& given, Place at,
                                                   int head_dim) {
    const TileRows<T> rows = given;  // a copy, because `given` may lie in shared memory
    constexpr int kRowsAtOnce = kThreads / mma::kUnitsPerRow;
    const int unit = static_cast<int>(threadIdx.x) % mma::kUnitsPerRow;
    const int first = static_cast<int>(threadIdx.x) / mma::kUnitsPerRow;
    const int dim = at.dim + unit * kUnit;
    // An mma is 16 deep. If head_dim is 8 mod 16, one unit of zeros follows. Units further on are never read.
    if (dim >= (kTensorCores ? (head_dim + 15) / 16 * 16 : head_dim)) return;
    uint32_t token = rows.first + first * rows.step + at.step * rows.turn;
    const T* from = rows.data + static_cast<int64_t>(token) * rows.token_stride + dim;
    const int64_t from_step = static_cast<int64_t>(kRowsAtOnce * rows.step) * rows.token_stride;
#pragma unroll 4
    for (int r = 0; r < kCount; r += kRowsAtOnce) {
      const bool valid = token - rows.begin < rows.count && dim < head_dim;
      load_unit(to + mma::unit_offset(first + r, unit), from, valid, rows.vectors);
      token += kRowsAtOnce * rows.step;
      from += from_step;
    }
  }

  template <int kCount>
  static __device__ __forceinline__ void load_rows(unsigned char* to, const GatheredRows<T>& given, Place at,
                                                   int head_dim) {
    constexpr int kRowsAtOnce = kThreads / mma::kUnitsPerRow;
    const int unit = static_cast<int>(threadIdx.x) % mma::kUnitsPerRow;
    const int dim = at.dim + unit * kUnit;
    if (dim >= (kTensorCores ? (head_dim + 15) / 16 * 16 : head_dim)) return;
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x) / mma::kUnitsPerRow; r < kCount; r += kRowsAtOnce) {
      const T* row = given.rows[r];
      const bool valid = row != nullptr && dim < head_dim;
      load_unit(to + mma::unit_offset(r, unit), row + dim, valid, given.vectors);
    }
  }

  static __device__ __forceinline__ void load_unit(unsigned char* to, const T* from, bool valid, bool vectors) {
    if (vectors) {
      copy_async(to, from, valid);
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) reinterpret_cast<T*>(to)[i] = valid ? from[i] : T{};
    }
  }

  __device__ __forceinline__ void accumulate(const unsigned char* stage, int depth) {
    const unsigned char* a = stage + warp_row() * 32 * mma::kRowBytes;
    const unsigned char* b = stage + (kRows + warp_column() * 64) * mma::kRowBytes;
    if constexpr (kTensorCores) {
#pragma unroll 1
      for (int unit = 0; unit * kUnit < depth; unit += 2) {
        uint32_t left[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int r = m * mma::kRows + mma::a_load_row(lane());
          load_matrices(left[m], a + mma::unit_offset(r, unit + mma::a_load_unit(lane())));
        }
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          uint32_t right[4];
          const int r = n * mma::kColumns + mma::b_load_row(lane());
          load_matrices(right, b + mma::unit_offset(r, unit + mma::b_load_unit(lane())));
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply_add<T>(score[m][n], left[m], right[0], right[1]);
            multiply_add<T>(score[m][n + 1], left[m], right[2], right[3]);
          }
        }
      }
    } else {
      for (int unit = 0; unit * kUnit < depth; ++unit) {
        float4 left[2][2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int r = m * mma::kRows + mma::c_row(lane(), 2 * half);
            left[m][half] = *reinterpret_cast<const float4*>(a + mma::unit_offset(r, unit));
          }
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int r = n * mma::kColumns + mma::c_column(lane(), i);
            const float4 right = *reinterpret_cast<const float4*>(b + mma::unit_offset(r, unit));
#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                float& sum = score[m][n][2 * half + i];
                sum = fmaf(left[m][half].x, right.x, sum);
                sum = fmaf(left[m][half].y, right.y, sum);
                sum = fmaf(left[m][half].z, right.z, sum);
                sum = fmaf(left[m][half].w, right.w, sum);
              }
            }
          }
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace headstart

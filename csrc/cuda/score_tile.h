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
//
// On Hopper, GroupTile computes 16-bit tiles with wgmma (layouts/wgmma.h). Both operands come from the same stages:
//
//            B: kColumns rows of 128 bytes a stage            a warp owns 16 × 128 scores
//               ┌─────────────────┐                           ┌────┬────┬── ─
//   A: kRows    │ warps 0 to 3    │  four warps: 64 × 128     │ 16 accumulators of 16 × 8, 64 floats a lane
//               ├─────────────────┤                           └────┴────┴── ─
//               │ warps 4 to 7    │
//               └─────────────────┘
//
// In both tiles, a lane holds 4 slices of 16 scores. A slice lies in one row, in one run of 64 columns; the 4 lanes of
// a quad hold the run. A loop over tiles calls begin once and then next for each tile. While it works on the scores of
// one tile, the first stages of the next tile arrive.
#pragma once

#include <type_traits>

#include "device.h"
#include "wgmma.h"

namespace headstart {
namespace cuda {

// The rows of an operand are tokens of one head. In depth step s of tile t, row r is token first + t · tile_step +
// r · step + s · turn. Tokens outside [begin, begin + count) count as zero and are never read.
template <typename T>
struct TileRows {
  const T* data;  // token 0
  int64_t token_stride;
  uint32_t first, step;
  int turn;
  uint32_t begin, count;
  bool vectors;  // rows can be read 16 bytes at a time
  uint32_t tile_step = 0;
};

// The rows of an operand, listed one by one: one list for all tiles, or a ring of kRing lists, one a tile. A null row
// counts as zero.
template <typename T>
struct GatheredRows {
  static constexpr int kRing = 4;
  const T* const* rows;
  bool vectors;
  bool ring = false;
};

// What is multiplied: `tiles` tiles, each over `steps` tokens of `head_dim` elements.
struct TileDepth {
  int tiles, steps, head_dim;
};

// Streams both operands of one tile after another through shared memory. If head_dim is no multiple of a stage's
// depth, zeros follow: up to the next multiple of kDepth elements.
template <typename T, int kThreads, int kRows, int kColumns, int kStages, int kDepth>
class TileStages {
 public:
  static constexpr int kStageBytes = (kRows + kColumns) * mma::kRowBytes, kSharedBytes = kStages * kStageBytes;
  static constexpr int kAhead = kStages - 1;  // the chunks that are loaded ahead
  static_assert(kAhead + 2 <= GatheredRows<T>::kRing,
                "the tiles loaded ahead, one in use, and one that a slow warp uses");

  // Starts the first copies. The shared memory must be free.
  template <typename RowsOfA, typename RowsOfB>
  __device__ __forceinline__ void begin(unsigned char* shared, const RowsOfA& a, const RowsOfB& b, TileDepth depth) {
    load_ = {0, 0, 0};
    stage_ = 0;
    for (int stage = 0; stage < kAhead; ++stage) load_next(shared + stage * kStageBytes, a, b, depth);
  }

  // Calls use(stage, the number of its elements of depth, load) for every chunk of the next tile. `use` calls load() to
  // start the copies of a later chunk.
  template <typename RowsOfA, typename RowsOfB, typename Use>
  __device__ __forceinline__ void next(unsigned char* shared, const RowsOfA& a, const RowsOfB& b, TileDepth depth,
                                       const Use& use) {
    const int chunks = depth.steps * ((depth.head_dim + kChunk - 1) / kChunk);
    for (int chunk = 0, dim = 0; chunk < chunks; ++chunk) {
      copy_wait<kAhead - 1>();
      fence_async_proxy();  // wgmma reads through it
      __syncthreads();
      use(shared + stage_ * kStageBytes, min(depth.head_dim - dim, kChunk), [&] {
        // into the stage that all threads left before the barrier
        load_next(shared + (stage_ == 0 ? kStages - 1 : stage_ - 1) * kStageBytes, a, b, depth);
      });
      dim = dim + kChunk < depth.head_dim ? dim + kChunk : 0;
      stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
    }
  }

 private:
  static constexpr int kChunk = mma::kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kUnit = mma::kUnitBytes / static_cast<int>(sizeof(T));

  struct Place {
    int tile, step, dim;
  };

  template <typename RowsOfA, typename RowsOfB>
  __device__ __forceinline__ void load_next(unsigned char* stage, const RowsOfA& a, const RowsOfB& b, TileDepth depth) {
    if (load_.tile < depth.tiles) {
      load_rows<kRows>(stage, a, load_, depth.head_dim);
      load_rows<kColumns>(stage + kRows * mma::kRowBytes, b, load_, depth.head_dim);
      load_.dim += kChunk;
      if (load_.dim >= depth.head_dim) {
        load_.dim = 0;
        if (++load_.step == depth.steps) {
          load_.step = 0;
          ++load_.tile;
        }
      }
    }
    copy_commit();  // commit empty groups too, so that the number of groups tells the stage
  }

  static constexpr int kRowsAtOnce = kThreads / mma::kUnitsPerRow;
  static_assert(kRowsAtOnce % 8 == 0, "a thread's rows are swizzled alike");

  template <int kCount>
  static __device__ __forceinline__ void load_rows(unsigned char* to, const TileRows<T>& given, Place at,
                                                   int head_dim) {
    const TileRows<T> rows = given;  // a copy, because `given` may lie in shared memory
    const int unit = static_cast<int>(threadIdx.x) % mma::kUnitsPerRow;
    const int first = static_cast<int>(threadIdx.x) / mma::kUnitsPerRow;
    const int dim = at.dim + unit * kUnit;
    if (dim >= (head_dim + kDepth - 1) / kDepth * kDepth) return;  // never read
    const uint32_t step = kRowsAtOnce * rows.step, count = dim < head_dim ? rows.count : 0;
    uint32_t token = rows.first + at.tile * rows.tile_step + first * rows.step + at.step * rows.turn;
    const T* from = rows.data + static_cast<int64_t>(token) * rows.token_stride + dim;
    const int64_t from_step = static_cast<int64_t>(step) * rows.token_stride;
    token -= rows.begin;
    to += mma::unit_offset(first, unit);
    if (rows.vectors) {
#pragma unroll
      for (int r = 0; r < kCount; r += kRowsAtOnce, token += step, from += from_step) {
        copy_async(to + r * mma::kRowBytes, from, token < count);
      }
    } else {
#pragma unroll 1
      for (int r = 0; r < kCount; r += kRowsAtOnce, token += step, from += from_step) {
        copy_elements(to + r * mma::kRowBytes, from, token < count);
      }
    }
  }

  template <int kCount>
  static __device__ __forceinline__ void load_rows(unsigned char* to, const GatheredRows<T>& given, Place at,
                                                   int head_dim) {
    const int unit = static_cast<int>(threadIdx.x) % mma::kUnitsPerRow;
    const int first = static_cast<int>(threadIdx.x) / mma::kUnitsPerRow;
    const int dim = at.dim + unit * kUnit;
    if (dim >= (head_dim + kDepth - 1) / kDepth * kDepth) return;
    const T* const* rows = given.rows + first + (given.ring ? at.tile % GatheredRows<T>::kRing * kCount : 0);
    to += mma::unit_offset(first, unit);
    if (given.vectors) {
#pragma unroll
      for (int r = 0; r < kCount; r += kRowsAtOnce) {
        copy_async(to + r * mma::kRowBytes, rows[r] + dim, rows[r] != nullptr && dim < head_dim);
      }
    } else {
#pragma unroll 1
      for (int r = 0; r < kCount; r += kRowsAtOnce) {
        copy_elements(to + r * mma::kRowBytes, rows[r] + dim, rows[r] != nullptr && dim < head_dim);
      }
    }
  }

  // A unit that need not be aligned.
  static __device__ __forceinline__ void copy_elements(unsigned char* to, const T* from, bool valid) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) reinterpret_cast<T*>(to)[i] = valid ? from[i] : T{};
  }

  Place load_;  // of the chunk that is loaded next
  int stage_;   // of the chunk that is used next
};

template <typename T, int kWarpRows, int kWarpColumns, int kStages>
class ScoreTile {
 public:
  static constexpr bool kWarpGroups = false;
  static constexpr int kThreads = 32 * kWarpRows * kWarpColumns;
  static constexpr int kRows = 32 * kWarpRows, kColumns = 64 * kWarpColumns;
  static constexpr bool kTensorCores = !std::is_same_v<T, float>;
  using Stages = TileStages<T, kThreads, kRows, kColumns, kStages, kTensorCores ? mma::kDepth : 4>;
  static constexpr int kSharedBytes = Stages::kSharedBytes;

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

  // Slice r of 4: at(r, n, i) is the score of slice_row(r) and column 64 · slice_run(r) + run_column(n, i).
  static __device__ __forceinline__ int slice_row(int r) { return row(r / 2, r % 2); }
  static __device__ __forceinline__ int slice_run(int) { return warp_column(); }
  __device__ __forceinline__ float& at(int r, int n, int i) { return score[r / 2][n][r % 2 * 2 + i]; }

  template <typename RowsOfA, typename RowsOfB>
  __device__ __forceinline__ void begin(unsigned char* shared, const RowsOfA& a, const RowsOfB& b, TileDepth depth) {
    stages_.begin(shared, a, b, depth);
  }

  // Computes all scores of the next tile.
  template <typename RowsOfA, typename RowsOfB>
  __device__ __forceinline__ void next(unsigned char* shared, const RowsOfA& a, const RowsOfB& b, TileDepth depth) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[m][n][i] = 0.0f;
      }
    }
    stages_.next(shared, a, b, depth, [&](const unsigned char* stage, int deep, const auto& load) {
      load();
      accumulate(stage, deep);
    });
  }

  // Computes all scores of a single tile. On return the shared memory is free again.
  template <typename RowsOfA, typename RowsOfB>
  __device__ __forceinline__ void multiply(unsigned char* shared, const RowsOfA& a, const RowsOfB& b, int steps,
                                           int head_dim) {
    begin(shared, a, b, {1, steps, head_dim});
    next(shared, a, b, {1, steps, head_dim});
    __syncthreads();
  }

 private:
  static constexpr int kUnit = mma::kUnitBytes / static_cast<int>(sizeof(T));

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

  Stages stages_;
};

// The column of a score in its slice's run of 64.
__device__ __forceinline__ int run_column(int n, int i) {
  return n * mma::kColumns + mma::c_column(static_cast<int>(threadIdx.x % 32), i);
}

template <typename T, int kGroupRows, int kGroupColumns, int kStages>
class GroupTile {
 public:
  static constexpr bool kWarpGroups = true;
  static constexpr int kThreads = 128 * kGroupRows * kGroupColumns;
  static constexpr int kRows = 64 * kGroupRows, kColumns = 128 * kGroupColumns;
  using Stages = TileStages<T, kThreads, kRows, kColumns, kStages, 64>;
  static constexpr int kSharedBytes = Stages::kSharedBytes;

  // Slice r of 4: at(r, n, i) is the score of slice_row(r) and column 64 · slice_run(r) + run_column(n, i).
  static __device__ __forceinline__ int slice_row(int r) {
    const uint32_t thread = thread_id(), row = thread / 128 / kGroupColumns * 64 + thread / 32 % 4 * 16;
    return static_cast<int>(row) + mma::c_row(static_cast<int>(thread % 32), r % 2 * 2);
  }
  static __device__ __forceinline__ int slice_run(int r) {
    return static_cast<int>(thread_id() / 128 % kGroupColumns) * 2 + r / 2;
  }
  __device__ __forceinline__ float& at(int r, int n, int i) { return sum_[r / 2 * 8 + n][r % 2 * 2 + i]; }

  template <typename RowsOfA, typename RowsOfB>
  __device__ __forceinline__ void begin(unsigned char* shared, const RowsOfA& a, const RowsOfB& b, TileDepth depth) {
    stages_.begin(shared, a, b, depth);
  }

  // Computes all scores of the next tile.
  template <typename RowsOfA, typename RowsOfB>
  __device__ __forceinline__ void next(unsigned char* shared, const RowsOfA& a, const RowsOfB& b, TileDepth depth) {
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_[n][i] = 0.0f;
    }
    stages_.next(shared, a, b, depth, [&](const unsigned char* stage, int, const auto& load) {
      const uint32_t group = threadIdx.x / 128;
      const unsigned char* left = stage + group / kGroupColumns * 64 * mma::kRowBytes;
      const unsigned char* right = stage + (kRows + group % kGroupColumns * 128) * mma::kRowBytes;
      group_fence();
#pragma unroll
      for (int k = 0; k < mma::kRowBytes; k += 32) {       // 16 elements of depth
        group_multiply_add<T>(sum_, left + k, right + k);  // always all of them: a branch would keep them waiting
      }
      group_commit();
      load();
      group_wait(sum_);
    });
  }

 private:
  float sum_[16][4];
  Stages stages_;
};

}  // namespace cuda
}  // namespace headstart

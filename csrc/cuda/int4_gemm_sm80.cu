// int4_gemm on tensor cores from Ampere on: mma.sync, weights dequantised between shared memory and the multiplier.
//
//   a block:  columns (panels of 16) × rows of x × parts of K             a warp: kPanels × kRowTiles accumulators of
//                                                                         mma.m16n8k16, twice: the group's sum, the part's
//             x, rows                       few rows   32 columns, 8 or 16 rows, all four parts of K: 2 × 4 warps,
//            ┌────────┐                                which join in shared memory
//     W      │ warp 0 │  kStages stages of  many rows  128 columns, 32 or 64 rows, 4 warps; a part of K, if there are
//     panels ├────────┤  cp.async in flight            few blocks, whose sums int4_gemm.cu adds; else all, one after
//            │ warp 1 │                                the other, the sum of the parts so far in shared memory
//            └────────┘
//   a stage:  kSlabs slabs of 32 k: words (256 bytes a panel and slab, as they lie), scales and zeros of the groups that
//             begin there, x in rows of 128 bytes, swizzled (layouts/mma.h)
//
// Words go through shared memory because cp.async keeps them in flight without registers: with four stages and few rows,
// 24 KiB of weights a block, 48 KiB a multiprocessor, where the memory of an H100 wants 17 KiB each (3.35 TB/s · 0.65 µs /
// 132). Straight into registers the same would take 48 of a lane's. A warp reads its 256 bytes of a slab back in one
// access without bank conflicts. All warps of a part read the same fragments of x; none dequantises what another does.
//
// Every sum runs over k in the same order whatever the tile: groups within a part, the parts in order. So a row's result does
// not depend on how many rows there are.
//
// Floor: K · N / 2 bytes, scales and zeros, at the memory's rate; x is read once a block from L2: at 8 rows as many bytes as
// the weights of its 32 columns. Instructions a slab and panel (512 weights) beside 2 mma a row tile: 18 (float16) or 22
// (bfloat16) to dequantise, 1 to read the words, 1 ldmatrix a row tile.

#include "int4_weight.h"
#include "kernels.h"

namespace headstart {
namespace cuda {
namespace {

constexpr uint32_t kWarp = 0xFFFFFFFFu;

// What a launch adds to the arguments.
struct Plan {
  float* parts;   // [kParts][m][n], or null: blocks add all parts
  int64_t slabs;  // of K
  int part_slabs, group_slabs;
  int64_t groups, row_tiles;
  int scale_bytes;                 // of one
  bool weight_vectors, x_vectors;  // can be copied 16 bytes at a time
};

template <typename T, int kRowTiles, int kPanels, int kColumnWarps, int kTeams, int kSlabs, int kStages>
class Block {
 public:
  static constexpr int kThreads = 32 * kColumnWarps * kTeams;
  static constexpr int kRows = mma::kColumns * kRowTiles, kColumnPanels = kPanels * kColumnWarps;
  static constexpr int kSums = kPanels * kRowTiles * 4;  // of a lane

 private:
  static constexpr bool kTensorCores = !std::is_same_v<T, float>;
  static constexpr int kUnit = mma::kUnitBytes / static_cast<int>(sizeof(T));  // elements of x
  static constexpr int kXTiles = kSlabs * int4::kSlab * static_cast<int>(sizeof(T)) / mma::kRowBytes;
  static constexpr int kSlabBytes = int4::kWordsPerSlab * 4, kSlabUnits = kSlabBytes / mma::kUnitBytes;
  static constexpr int kScaleBytes = int4::kPanel * 4;  // room for float32
  static constexpr int kScaleUnits = kScaleBytes / mma::kUnitBytes;
  static constexpr int kPanelSlabs = kTeams * kColumnPanels * kSlabs;
  static constexpr int kScalesAt = kPanelSlabs * kSlabBytes;
  static constexpr int kZerosAt = kScalesAt + kPanelSlabs * kScaleBytes;
  static constexpr int kXAt = kZerosAt + kPanelSlabs * int4::kPanel;
  static constexpr int kXTileBytes = kRows * mma::kRowBytes;
  static constexpr int kStageBytes = kXAt + kTeams * kXTiles * kXTileBytes;
  static_assert(kXTiles * mma::kRowBytes == kSlabs * int4::kSlab * static_cast<int>(sizeof(T)),
                "whole rows of 128 bytes");
  static_assert(kPartStep % kSlabs == 0 && (kTeams == 1 || kTeams == kParts), "a stage lies in one part");
  static_assert(kTeams * kColumnWarps * kSums * 32 * 4 <= kStages * kStageBytes || kTeams == 1, "sums fit the stages");

 public:
  // Behind the stages, the sum of the parts so far, where one team walks them all.
  static constexpr int kSharedBytes = kStages * kStageBytes + (kTeams == 1 ? kThreads * kSums * 4 : 0);

  __device__ __forceinline__ Block(const Int4GemmArgs& args, const Plan& plan) : args_(args), plan_(plan) {
    const bool split = kTeams == 1 && plan.parts != nullptr;
    int64_t job = blockIdx.x;
    part_ = split ? static_cast<int>(job % kParts) : 0;
    job = split ? job / kParts : job;
    first_row_ = job % plan.row_tiles * kRows;
    first_panel_ = job / plan.row_tiles * kColumnPanels;
  }

  __device__ __forceinline__ void run() {
    const bool split = kTeams == 1 && plan_.parts != nullptr;
    const int slabs = static_cast<int>(plan_.slabs), share = kTeams > 1 || split ? plan_.part_slabs : slabs;
    const int begin = (kTeams > 1 ? team() : part_) * share;
    const int end = min(begin + share, slabs), steps = (share + kSlabs - 1) / kSlabs;
    zero(sum_);
    zero(total_);
    for (int step = 0; step < kStages - 1; ++step) load(step, steps, share);
    bool wide = false;
    int group_end = 0, part_end = begin + plan_.part_slabs;  // slabs
    for (int step = 0; step < steps; ++step) {
      copy_wait<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1, steps, share);  // into the stage that everyone left before the barrier
      const unsigned char* stage = stages() + step % kStages * kStageBytes;
      const int first = begin + step * kSlabs;
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        const int slab = first + s;
        if (slab >= end) break;
        if (slab >= group_end) {
          group_end = (slab / plan_.group_slabs + 1) * plan_.group_slabs;
          wide = begin_group(stage, s);
        }
        if (wide) {
          multiply<true>(stage, s);
        } else {
          multiply<false>(stage, s);
        }
        if (slab + 1 == group_end || slab + 1 == part_end || slab + 1 == end) end_group();
        if (kTeams == 1 && slab + 1 == part_end && slab + 1 < end) {
          keep_part(part_end > plan_.part_slabs + begin);
          part_end += plan_.part_slabs;
        }
      }
    }
    copy_wait<0>();
    if constexpr (kTeams > 1) {
      join_teams();
      if (team() > 0) return;
    } else if (part_end > begin + plan_.part_slabs) {
      const float* kept = kept_sums();
#pragma unroll
      for (int i = 0; i < kSums; ++i) total(i) = kept[i * kThreads] + total(i);
    }
    write();
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int team() { return static_cast<int>(threadIdx.x) / (32 * kColumnWarps); }
  static __device__ __forceinline__ int column_warp() { return static_cast<int>(threadIdx.x) / 32 % kColumnWarps; }
  static __device__ __forceinline__ unsigned char* stages() { return shared_memory(); }
  static __device__ __forceinline__ float* kept_sums() {
    return reinterpret_cast<float*>(stages() + kStages * kStageBytes) + threadIdx.x;
  }
  // Of the warp's panel p and slab s of a stage.
  static __device__ __forceinline__ int panel_slab(int p, int s) {
    return ((team() * kColumnWarps + column_warp()) * kPanels + p) * kSlabs + s;
  }
  __device__ __forceinline__ float& total(int i) { return total_[i / (kRowTiles * 4)][i / 4 % kRowTiles][i % 4]; }

  static __device__ __forceinline__ void zero(float (&sums)[kPanels][kRowTiles][4]) {
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[p][r][i] = 0.0f;
      }
    }
  }

  // --- loading ---

  // `count` elements, zeros behind them, as 16 bytes of shared memory.
  template <typename Element>
  static __device__ __forceinline__ void load_unit(unsigned char* to, const Element* from, int count, bool vectors) {
    constexpr int kCount = mma::kUnitBytes / static_cast<int>(sizeof(Element));
    if (vectors) {
      copy_async(to, from, count > 0);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) reinterpret_cast<Element*>(to)[i] = i < count ? from[i] : Element{};
    }
  }

  __device__ __forceinline__ void load(int step, int steps, int share) {
    if (step < steps) {
      unsigned char* stage = stages() + step % kStages * kStageBytes;
      const int share_begin = kTeams > 1 ? 0 : part_ * share;
      const int slabs = static_cast<int>(plan_.slabs);
      const int64_t panels = int4::panels(args_.n);
      const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
      for (int i = thread; i < kPanelSlabs * kSlabUnits; i += kThreads) {
        const int unit = i % kSlabUnits, s = i / kSlabUnits % kSlabs, p = i / (kSlabUnits * kSlabs) % kColumnPanels;
        const int t = i / (kSlabUnits * kSlabs * kColumnPanels), begin = share_begin + t * share;
        const int slab = begin + step * kSlabs + s;
        const int64_t panel = first_panel_ + p;
        const bool valid = panel < panels && slab < min(begin + share, slabs);
        const int64_t at = int4::slab_word(valid ? panel : 0, valid ? slab : 0, args_.k) + unit * 4;
        load_unit(stage + i * mma::kUnitBytes, args_.packed + at, valid ? 4 : 0, plan_.weight_vectors);
      }
#pragma unroll
      for (int i = thread; i < kPanelSlabs * (kScaleUnits + 1); i += kThreads) {
        const int unit = i % (kScaleUnits + 1), at = i / (kScaleUnits + 1);
        const int s = at % kSlabs, p = at / kSlabs % kColumnPanels, t = at / (kSlabs * kColumnPanels);
        const int begin = share_begin + t * share, slab = begin + step * kSlabs + s;
        const int64_t panel = first_panel_ + p;
        const int group = slab / plan_.group_slabs;
        const bool begins = slab == begin || slab == group * plan_.group_slabs;
        if (!begins || slab >= min(begin + share, slabs)) continue;
        const int64_t row = panel < panels ? panel * plan_.groups + group : 0;  // of 16 columns
        if (unit == kScaleUnits) {
          if (args_.zeros != nullptr) {
            load_unit(stage + kZerosAt + at * int4::kPanel, args_.zeros + row * int4::kPanel,
                      panel < panels ? int4::kPanel : 0, plan_.weight_vectors);
          }
        } else if (unit < plan_.scale_bytes) {  // 16 scales of as many bytes are as many units
          load_unit(
              stage + kScalesAt + at * kScaleBytes + unit * mma::kUnitBytes,
              static_cast<const uint16_t*>(args_.scales) + row * (int4::kPanel * plan_.scale_bytes / 2) + unit * 8,
              panel < panels ? 8 : 0, plan_.weight_vectors);
        }
      }
#pragma unroll
      for (int i = thread; i < kTeams * kXTiles * kRows * mma::kUnitsPerRow; i += kThreads) {
        const int unit = i % mma::kUnitsPerRow, r = i / mma::kUnitsPerRow % kRows;
        const int tile = i / (mma::kUnitsPerRow * kRows), t = tile / kXTiles;
        const int64_t k = (share_begin + static_cast<int64_t>(t) * share + step * kSlabs) * int4::kSlab +
                          (tile % kXTiles * mma::kUnitsPerRow + unit) * kUnit;
        const int64_t row = first_row_ + r, left = row < args_.m ? args_.k - k : 0;
        const int count = left <= 0 ? 0 : left < kUnit ? static_cast<int>(left) : kUnit;
        load_unit(stage + kXAt + tile * kXTileBytes + mma::unit_offset(r, unit),
                  static_cast<const T*>(args_.x) + (count > 0 ? row * args_.x_row + k : 0), count, plan_.x_vectors);
      }
    }
    copy_commit();  // possibly empty, so that the count of groups tells the stage
  }

  // --- multiplying ---

  // Takes up the scales and zeros that lie at slab s; whether a zero point of the warp is out of the ordinary.
  __device__ __forceinline__ bool begin_group(const unsigned char* stage, int s) {
    bool wide = false;
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      const unsigned char* scales = stage + kScalesAt + panel_slab(p, s) * kScaleBytes;
      const unsigned char* zeros = stage + kZerosAt + panel_slab(p, s) * int4::kPanel;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = lane() / 4 * 2 + c;
        scale_[p][c] = load_scale(scales, column, args_.scale_dtype);
        codes_[p][c].set(args_.zeros == nullptr ? kSymmetricZero : zeros[column]);
        wide |= codes_[p][c].wide();
      }
    }
    return std::is_same_v<T, BFloat16> && __ballot_sync(kWarp, wide) != 0;
  }

  template <bool kWide>
  __device__ __forceinline__ void multiply(const unsigned char* stage, int s) {
    const unsigned char* x = stage + kXAt + team() * kXTiles * kXTileBytes;
    if constexpr (kTensorCores) {
      uint32_t left[kPanels][2][4];
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        const uint2 words = *reinterpret_cast<const uint2*>(stage + panel_slab(p, s) * kSlabBytes +
                                                            (lane() % 4 * int4::kPanel + lane() / 4 * 2) * 4);
        uint32_t even[4], odd[4];
        codes_[p][0].template pairs<kWide>(even, words.x);
        codes_[p][1].template pairs<kWide>(odd, words.y);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          left[p][half][0] = even[2 * half];
          left[p][half][1] = odd[2 * half];
          left[p][half][2] = even[2 * half + 1];
          left[p][half][3] = odd[2 * half + 1];
        }
      }
      const unsigned char* tile = x + s / 2 * kXTileBytes;
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        uint32_t right[4];  // the four 8 × 8 matrices of 8 rows and 32 k: pair i of each lane's words
        load_matrices(right, tile + mma::unit_offset(r * mma::kColumns + lane() % 8, s % 2 * 4 + lane() / 8));
#pragma unroll
        for (int p = 0; p < kPanels; ++p) {
          multiply_add<T>(sum_[p][r], left[p][0], right[0], right[1]);
          multiply_add<T>(sum_[p][r], left[p][1], right[2], right[3]);
        }
      }
    } else {
      // The same sums in the same lanes, by multiply-adds: 4 k at a time, which 2 words of a column have in one pair.
#pragma unroll 1
      for (int unit = 0; unit < mma::kUnitsPerRow; ++unit) {
        float weights[kPanels][2][4];
#pragma unroll
        for (int p = 0; p < kPanels; ++p) {
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            const uint2 words = *reinterpret_cast<const uint2*>(
                stage + panel_slab(p, s) * kSlabBytes + ((unit % 2 * 2 + t) * int4::kPanel + lane() / 4 * 2) * 4);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              weights[p][0][2 * t + half] = codes_[p][0].code(words.x, unit / 2, half);
              weights[p][1][2 * t + half] = codes_[p][1].code(words.y, unit / 2, half);
            }
          }
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = r * mma::kColumns + mma::c_column(lane(), i);
            const float4 right = *reinterpret_cast<const float4*>(x + s * kXTileBytes + mma::unit_offset(row, unit));
#pragma unroll
            for (int p = 0; p < kPanels; ++p) {
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                float& sum = sum_[p][r][2 * c + i];
                sum = fmaf(weights[p][c][0], right.x, sum);
                sum = fmaf(weights[p][c][1], right.y, sum);
                sum = fmaf(weights[p][c][2], right.z, sum);
                sum = fmaf(weights[p][c][3], right.w, sum);
              }
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void end_group() {
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) total_[p][r][i] = fmaf(scale_[p][i / 2], sum_[p][r][i], total_[p][r][i]);
      }
    }
    zero(sum_);
  }

  // --- joining ---

  __device__ __forceinline__ void keep_part(bool add) {
    float* kept = kept_sums();
#pragma unroll
    for (int i = 0; i < kSums; ++i) kept[i * kThreads] = add ? kept[i * kThreads] + total(i) : total(i);
    zero(total_);
  }

  __device__ __forceinline__ void join_teams() {
    float* sums = reinterpret_cast<float*>(stages());
    __syncthreads();  // the last stage is read
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i * kThreads + threadIdx.x] = total(i);
    __syncthreads();
    if (team() > 0) return;
    for (int t = 1; t < kTeams; ++t) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) total(i) += sums[i * kThreads + t * 32 * kColumnWarps + threadIdx.x];
    }
  }

  __device__ __forceinline__ void write() {
    float* parts = kTeams == 1 && plan_.parts != nullptr ? plan_.parts + part_ * args_.m * args_.n : nullptr;
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t panel = first_panel_ + column_warp() * kPanels + p;
        const int64_t column = panel * int4::kPanel + lane() / 4 * 2 + c;
        if (column >= args_.n) continue;
        const float bias =
            parts == nullptr && args_.bias != nullptr ? to_float(static_cast<const T*>(args_.bias)[column]) : 0.0f;
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int64_t row = first_row_ + r * mma::kColumns + mma::c_column(lane(), i);
            if (row >= args_.m) continue;
            const int64_t at = row * args_.n + column;
            const float value = total_[p][r][2 * c + i];
            if (parts != nullptr) {
              parts[at] = value;
            } else {
              static_cast<T*>(args_.out)[at] = from_float<T>(value + bias);
            }
          }
        }
      }
    }
  }

  const Int4GemmArgs& args_;
  const Plan& plan_;
  int part_;
  int64_t first_row_, first_panel_;
  float sum_[kPanels][kRowTiles][4];    // of the group so far
  float total_[kPanels][kRowTiles][4];  // of the part; 2c + i: column 2g + c of the panel, row 2t + i of the tile
  float scale_[kPanels][2];
  Codes<T> codes_[kPanels][2];
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2) int4_gemm_kernel(const Int4GemmArgs args, const Plan plan) {
  Shape(args, plan).run();
}

template <typename T, int kRowTiles>
using Few = Block<T, kRowTiles, 1, 2, kParts, kPartStep, std::is_same_v<T, float> ? 2 : 4>;
template <typename T, int kRowTiles>
using Many = Block<T, kRowTiles, 2, 4, 1, 2, 3>;

constexpr int64_t kFewRows = 16;
constexpr int64_t kManyColumns = int4::kPanel * Many<float, 4>::kColumnPanels;

int64_t many_rows(int64_t m) { return m <= Many<float, 4>::kRows ? Many<float, 4>::kRows : Many<float, 8>::kRows; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % mma::kUnitBytes == 0; }

template <typename Shape>
const char* launch_shape(const Int4GemmArgs& args, Plan plan, CUstream_st* stream) {
  plan.row_tiles = ceil_div(args.m, Shape::kRows);
  const int64_t blocks = plan.row_tiles * ceil_div(int4::panels(args.n), Shape::kColumnPanels);
  return launch(int4_gemm_kernel<Shape>, plan.parts != nullptr ? blocks * kParts : blocks, Shape::kThreads,
                Shape::kSharedBytes, stream, args, plan);
}

template <typename T>
const char* run(const Int4GemmArgs& args, const Plan& plan, CUstream_st* stream) {
  if (args.m <= Few<T, 1>::kRows) return launch_shape<Few<T, 1>>(args, plan, stream);
  if (args.m <= kFewRows) return launch_shape<Few<T, 2>>(args, plan, stream);
  if (many_rows(args.m) == Many<T, 4>::kRows) return launch_shape<Many<T, 4>>(args, plan, stream);
  return launch_shape<Many<T, 8>>(args, plan, stream);
}

}  // namespace

bool int4_gemm_sm80_splits(const Int4GemmArgs& args) {
  if (args.m <= kFewRows) return false;
  return ceil_div(args.m, many_rows(args.m)) * ceil_div(args.n, kManyColumns) < 2 * multiprocessors();
}

const char* int4_gemm_sm80(const Int4GemmArgs& args, float* parts, CUstream_st* stream) {
  Plan plan{};
  plan.parts = parts;
  plan.slabs = int4::slabs(args.k);
  plan.part_slabs = static_cast<int>(part_slabs(args.k));
  plan.group_slabs = static_cast<int>(args.group_size < 0 ? plan.slabs : args.group_size / int4::kSlab);
  plan.groups = ceil_div(plan.slabs, plan.group_slabs);
  plan.scale_bytes = static_cast<int>(scale_bytes(args.scale_dtype));
  plan.weight_vectors = aligned(args.packed) && aligned(args.scales) && aligned(args.zeros);
  const int64_t unit = mma::kUnitBytes / (args.dtype == Dtype::kFloat32 ? 4 : 2);
  plan.x_vectors = aligned(args.x) && args.k % unit == 0 && (args.m == 1 || args.x_row % unit == 0);
  switch (args.dtype) {
    case Dtype::kFloat32:
      return run<float>(args, plan, stream);
    case Dtype::kFloat16:
      return run<Float16>(args, plan, stream);
    default:
      return run<BFloat16>(args, plan, stream);
  }
}

}  // namespace cuda
}  // namespace headstart

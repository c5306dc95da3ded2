// A thread block of int4_gemm: its stages, its multiplication and the order of its sums. The kernels of
// int4_gemm_sm80.cu (mma.sync, multiply-adds) and int4_gemm_sm90.cu (wgmma) share it. int4_gemm_sm80.cu has a drawing.
#pragma once

#include "int4_weight.h"
#include "kernels.h"
#include "wgmma.h"

namespace headstart {
namespace cuda {

// The data that a launch adds to the arguments.
struct Int4Plan {
  float* parts;   // [kParts][m][n], or null if blocks add all parts
  int64_t slabs;  // the slabs of K
  int part_slabs, group_slabs;
  int64_t groups, row_tiles;
  int scale_bytes;                 // the bytes of one scale
  bool weight_vectors, x_vectors;  // whether the weight and x can be copied 16 bytes at a time
};

template <typename T, int kRowTiles, int kPanels, int kColumnWarps, int kTeams, int kSlabs, int kStages,
          bool kWarpGroups = false>
class Int4Block {
 public:
  static constexpr int kThreads = 32 * kColumnWarps * kTeams;
  static constexpr int kRows = mma::kColumns * kRowTiles, kColumnPanels = kPanels * kColumnWarps;
  static constexpr int kSums = kPanels * kRowTiles * 4;  // the sums of a lane

 private:
  using Bits = std::conditional_t<std::is_same_v<T, float>, uint32_t, uint16_t>;  // the bits of an element of x
  static constexpr bool kTensorCores = !std::is_same_v<T, float>;
  static constexpr int kUnrolledSlabs = kSums > 32 && !kWarpGroups ? 1 : kSlabs;  // limited by the registers
  static constexpr int kUnit = mma::kUnitBytes / static_cast<int>(sizeof(T));     // elements of x in a unit
  static constexpr int kXTiles = kSlabs * int4::kSlab * static_cast<int>(sizeof(T)) / mma::kRowBytes;
  static constexpr int kSlabBytes = int4::kWordsPerSlab * 4, kSlabUnits = kSlabBytes / mma::kUnitBytes;
  static constexpr int kScaleBytes = int4::kPanel * 4;  // enough for float32
  static constexpr int kScaleUnits = kScaleBytes / mma::kUnitBytes;
  static constexpr int kPanelSlabs = kTeams * kColumnPanels * kSlabs;
  static constexpr int kXTileBytes = kRows * mma::kRowBytes;
  static constexpr int kWordsAt = kTeams * kXTiles * kXTileBytes;
  static constexpr int kScalesAt = kWordsAt + kPanelSlabs * kSlabBytes;
  static constexpr int kZerosAt = kScalesAt + kPanelSlabs * kScaleBytes;
  static constexpr int kAlignment = (kWarpGroups ? 8 : 1) * mma::kRowBytes;  // wgmma swizzles by address
  static constexpr int kStageBytes = (kZerosAt + kPanelSlabs * int4::kPanel + kAlignment - 1) / kAlignment * kAlignment;
  static constexpr int kWordUnits = kPanelSlabs * kSlabUnits / kThreads;  // units of words per thread and stage
  static constexpr int kXUnits = kTeams * kXTiles * kRows * mma::kUnitsPerRow / kThreads;
  static_assert(kWordUnits * kThreads == kPanelSlabs * kSlabUnits && kPanelSlabs * (kScaleUnits + 1) <= kThreads,
                "every thread has its units");
  static_assert(kXTiles * mma::kRowBytes == kSlabs * int4::kSlab * static_cast<int>(sizeof(T)),
                "whole rows of 128 bytes");
  static_assert(kPartStep % kSlabs == 0 && (kTeams == 1 || kTeams == kParts), "a stage lies in one part");
  static_assert(kTeams * kColumnWarps * kSums * 32 * 4 <= kStages * kStageBytes || kTeams == 1, "sums fit the stages");

 public:
  // If one team goes through all parts, the sums of the parts so far follow the stages.
  static constexpr int kSharedBytes = kStages * kStageBytes + (kTeams == 1 ? kThreads * kSums * 4 : 0);

  __device__ __forceinline__ Int4Block(const Int4GemmArgs& args, const Int4Plan& plan) : args_(args), plan_(plan) {}

  __device__ __forceinline__ void run() {
    const bool split = kTeams == 1 && plan_.parts != nullptr;
    const int part = job().part;
    const int slabs = static_cast<int>(plan_.slabs), share = kTeams > 1 || split ? plan_.part_slabs : slabs;
    const int begin = (kTeams > 1 ? team() : part) * share;
    const int end = min(begin + share, slabs), steps = (share + kSlabs - 1) / kSlabs;
    zero(sum_);
    zero(total_);
    find_sources(share);
    for (int step = 0; step < kStages - 1; ++step) load(step, steps, share, step * kStageBytes);
    int at = 0, free_at = (kStages - 1) * kStageBytes;  // the stage to multiply, and the stage before it
    bool wide = false;
    int group_end = begin / plan_.group_slabs * plan_.group_slabs, part_end = begin + plan_.part_slabs;  // slabs
    for (int step = 0; step < steps; ++step) {
      copy_wait<kStages - 2>();
      if constexpr (kWarpGroups) fence_async_proxy();
      __syncthreads();
      load(step + kStages - 1, steps, share, free_at);  // all threads left this stage before the barrier
      const unsigned char* stage = stages() + at;
      const int first = begin + step * kSlabs;
#pragma unroll(kUnrolledSlabs)
      for (int s = 0; s < kSlabs; ++s) {
        const int slab = first + s;
        if (slab >= end) break;
        if (slab >= group_end) {
          group_end += plan_.group_slabs;
          wide = begin_group(stage, s);
        }
        uint32_t left[kPanels][2][4];
        if constexpr (kTensorCores) {
          if (wide) {
            dequantize<true>(left, stage, s);
          } else {
            dequantize<false>(left, stage, s);
          }
        }
        multiply(left, stage, s);
        if (slab + 1 == group_end || slab + 1 == part_end || slab + 1 == end) end_group();
        if (kTeams == 1 && slab + 1 == part_end && slab + 1 < end) {
          keep_part(part_end > plan_.part_slabs + begin);
          part_end += plan_.part_slabs;
        }
      }
      finish_products();  // after the next barrier, the stage is overwritten
      free_at = at;
      at = at + kStageBytes < kStages * kStageBytes ? at + kStageBytes : 0;
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
  struct Job {
    int part;
    int64_t first_row, first_panel;
  };

  // The block's job. It is computed again at the end and not kept, because registers are scarce while tiles multiply.
  __device__ __forceinline__ Job job() const {
    const bool split = kTeams == 1 && plan_.parts != nullptr;
    int64_t at = block_id();
    const int part = split ? static_cast<int>(at % kParts) : 0;
    if (split) at /= kParts;
    return {part, at % plan_.row_tiles * kRows, at / plan_.row_tiles * kColumnPanels};
  }

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int team() { return static_cast<int>(threadIdx.x) / (32 * kColumnWarps); }
  static __device__ __forceinline__ int column_warp() { return static_cast<int>(threadIdx.x) / 32 % kColumnWarps; }
  static __device__ __forceinline__ unsigned char* stages() { return shared_memory(); }
  static __device__ __forceinline__ float* kept_sums() {
    return reinterpret_cast<float*>(stages() + kStages * kStageBytes) + threadIdx.x;
  }
  // The index in a stage of the warp's panel p and slab s.
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

  // The address from which a thread reads one of its 16-byte units for the first stage, and the amount of data from
  // there on. Nothing past that amount is read; a unit past it is zero.
  struct Source {
    const unsigned char* from;
    int left;  // the number of slabs (words) or elements (x)
  };

  // The unit of scales or zero points that a thread copies when a group begins.
  struct GroupSource {
    const unsigned char* from;  // the unit of the current group
    int begin;                  // the group's first slab, counted from the first stage on
    int slab, left;             // the unit's slab in a stage; the end of the slabs for which it is copied
    int step;                   // the bytes from group to group
  };

  // Writes `count` elements and zeros after them, 16 bytes in all, to shared memory.
  template <typename Element, bool kVectors>
  static __device__ __forceinline__ void load_unit(SharedAddress to, const unsigned char* from, int count) {
    constexpr int kBytes = static_cast<int>(sizeof(Element));
    if constexpr (kVectors) {
      copy_async(to, from, count > 0);
    } else {
#pragma unroll 1
      for (int i = 0; i < mma::kUnitBytes / kBytes; ++i) {
        store_shared<kBytes>(to + i * kBytes, i < count ? reinterpret_cast<const Element*>(from)[i] : Element{});
      }
    }
  }

  __device__ __forceinline__ void find_sources(int share) {
    const Job here = job();
    const int first = kTeams > 1 ? 0 : here.part * share, slabs = static_cast<int>(plan_.slabs);
    const int64_t panels = int4::panels(args_.n);
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int j = 0; j < kWordUnits; ++j) {
      const int i = thread + j * kThreads, s = i / kSlabUnits % kSlabs;
      const int64_t panel = here.first_panel + i / (kSlabUnits * kSlabs) % kColumnPanels;
      const int begin = first + i / (kSlabUnits * kSlabs * kColumnPanels) * share;
      words_[j].from = reinterpret_cast<const unsigned char*>(
          args_.packed + int4::slab_word(panel, begin + s, args_.k) + i % kSlabUnits * 4);
      words_[j].left = panel < panels ? min(share, slabs - begin) - s : 0;
      words_[j].from = opaque(words_[j].from);
    }
    const int line = thread / mma::kUnitsPerRow, tile = line / kRows;  // the thread's first unit of x
    const int64_t row = here.first_row + line % kRows;
    const int64_t k = (first + static_cast<int64_t>(tile / kXTiles) * share) * int4::kSlab +
                      (tile % kXTiles * mma::kUnitsPerRow + thread % mma::kUnitsPerRow) * kUnit;
    x_.from = reinterpret_cast<const unsigned char*>(static_cast<const T*>(args_.x) + row * args_.x_row + k);
    x_.left = static_cast<int>(args_.k - k);
    x_.from = opaque(x_.from);
    x_rows_ = static_cast<int>(args_.m - row < kRows ? args_.m - row : kRows);
    const int unit = thread % (kScaleUnits + 1), at = thread / (kScaleUnits + 1);
    const int64_t panel = here.first_panel + at / kSlabs % kColumnPanels;
    const int begin = first + at / (kSlabs * kColumnPanels) * share;
    const bool zeros = unit == kScaleUnits;
    const bool wanted = at < kPanelSlabs && (zeros ? args_.zeros != nullptr : unit < plan_.scale_bytes);
    const int group = begin / plan_.group_slabs;
    group_.slab = at % kSlabs;
    group_.left = wanted && panel < panels ? min(share, slabs - begin) : 0;
    group_.begin = group * plan_.group_slabs - begin;
    group_.step = int4::kPanel * (zeros ? 1 : plan_.scale_bytes);  // 16 scales of b bytes are b units
    group_.from = (zeros ? args_.zeros : static_cast<const unsigned char*>(args_.scales) + unit * mma::kUnitBytes) +
                  (panel * plan_.groups + group) * group_.step;
    group_.from = opaque(group_.from);
    const SharedAddress stage = shared_address(stages());
    words_to_ = stage + kWordsAt + thread * mma::kUnitBytes;
    x_to_ = stage + mma::unit_offset(line, thread % mma::kUnitsPerRow);  // line by line, tile by tile, team by team
    group_to_ = stage + (zeros ? kZerosAt + at * int4::kPanel : kScalesAt + at * kScaleBytes + unit * mma::kUnitBytes);
  }

  // Copies the data of a step to the stage at byte `at`, counted from the first stage on.
  __device__ __forceinline__ void load(int step, int steps, int share, int at) {
    if (step < steps) {
      const int slabs = step * kSlabs;
      if (plan_.weight_vectors) {
        load_weight<true>(slabs, at);
      } else {
        load_weight<false>(slabs, at);
      }
      if (plan_.x_vectors) {
        load_x<true>(slabs, share, at);
      } else {
        load_x<false>(slabs, share, at);
      }
    }
    copy_commit();  // commit empty groups too, so that the number of groups tells the stage
  }

  template <bool kVectors>
  __device__ __forceinline__ void load_weight(int slabs, int at) {
#pragma unroll
    for (int j = 0; j < kWordUnits; ++j) {
      load_unit<uint32_t, kVectors>(words_to_ + at + j * kThreads * mma::kUnitBytes,
                                    words_[j].from + static_cast<int64_t>(slabs) * kSlabBytes,
                                    slabs < words_[j].left ? 4 : 0);
    }
    const int slab = slabs + group_.slab;
    if (slab >= group_.left) return;
    for (; slab > 0 && group_.begin < slab; group_.begin += plan_.group_slabs) group_.from += group_.step;
    if (slab == 0 || slab == group_.begin) {
      load_unit<uint8_t, kVectors>(group_to_ + at, group_.from, mma::kUnitBytes);
    }
  }

  template <bool kVectors>
  __device__ __forceinline__ void load_x(int slabs, int share, int at) const {
#pragma unroll
    for (int j = 0; j < kXUnits; ++j) {
      // A thread's units are whole rows of units apart. The compiler knows these rows, tiles and teams.
      constexpr int kLines = kThreads / mma::kUnitsPerRow;
      static_assert(kLines % mma::kColumns == 0, "they are swizzled alike");
      const int rows = j * kLines % kRows, tiles = j * kLines / kRows, teams = tiles / kXTiles;
      const int depth = slabs * int4::kSlab + teams * share * int4::kSlab + tiles % kXTiles * mma::kUnitsPerRow * kUnit;
      const int64_t ahead = rows * args_.x_row + depth;
      load_unit<Bits, kVectors>(x_to_ + at + j * kLines * mma::kRowBytes, x_.from + ahead * static_cast<int>(sizeof(T)),
                                rows < x_rows_ ? min(x_.left - depth, kUnit) : 0);
    }
  }

  // --- multiplying ---

  // Reads the scales and zeros at slab s. Returns whether some zero point of the warp must be subtracted in two steps
  // (Codes<BFloat16>).
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
    return std::is_same_v<T, BFloat16> && __ballot_sync(kWholeWarp, wide) != 0;
  }

  // Turns words into A's fragments of two mma, of 16 k each.
  template <bool kWide>
  __device__ __forceinline__ void dequantize(uint32_t (&left)[kPanels][2][4], const unsigned char* stage, int s) const {
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      const uint2 words = *reinterpret_cast<const uint2*>(stage + kWordsAt + panel_slab(p, s) * kSlabBytes +
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
  }

  __device__ __forceinline__ void multiply(const uint32_t (&left)[kPanels][2][4], const unsigned char* stage, int s) {
    const unsigned char* x = stage + team() * kXTiles * kXTileBytes;
    if constexpr (kWarpGroups) {
      static_assert(kPanels == 1 && kColumnWarps % 4 == 0 && kTeams == 1, "a panel a warp, four to a group");
      const unsigned char* tile = x + s / 2 * kXTileBytes + s % 2 * mma::kRowBytes / 2;
      group_fence();
      group_multiply_add<T>(sum_[0], left[0][0], tile);
      group_multiply_add<T>(sum_[0], left[0][1], tile + mma::kRowBytes / 4);
      group_commit();
    } else if constexpr (kTensorCores) {
      const unsigned char* tile = x + s / 2 * kXTileBytes;
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        uint32_t right[4];  // the four 8 × 8 matrices of 8 rows and 32 k; matrix i belongs to pair i of a lane's words
        load_matrices(right, tile + mma::unit_offset(r * mma::kColumns + lane() % 8, s % 2 * 4 + lane() / 8));
#pragma unroll
        for (int p = 0; p < kPanels; ++p) {
          multiply_add<T>(sum_[p][r], left[p][0], right[0], right[1]);
          multiply_add<T>(sum_[p][r], left[p][1], right[2], right[3]);
        }
      }
    } else {
      // The same sums in the same lanes, by multiply-adds. 4 k at a time: one pair of 2 words of a column holds them.
#pragma unroll 1
      for (int unit = 0; unit < mma::kUnitsPerRow; ++unit) {
        float weights[kPanels][2][4];
#pragma unroll
        for (int p = 0; p < kPanels; ++p) {
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            const uint2 words =
                *reinterpret_cast<const uint2*>(stage + kWordsAt + panel_slab(p, s) * kSlabBytes +
                                                ((unit % 2 * 2 + t) * int4::kPanel + lane() / 4 * 2) * 4);
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

  __device__ __forceinline__ void finish_products() {
    if constexpr (kWarpGroups) group_wait(sum_[0]);
  }

  __device__ __forceinline__ void end_group() {
    finish_products();
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

  // --- merging ---

  __device__ __forceinline__ void keep_part(bool add) {
    float* kept = kept_sums();
#pragma unroll
    for (int i = 0; i < kSums; ++i) kept[i * kThreads] = add ? kept[i * kThreads] + total(i) : total(i);
    zero(total_);
  }

  __device__ __forceinline__ void join_teams() {
    float* sums = reinterpret_cast<float*>(stages());
    __syncthreads();  // all threads have read the last stage
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
    const Job here = job();
    float* parts = kTeams == 1 && plan_.parts != nullptr ? plan_.parts + here.part * args_.m * args_.n : nullptr;
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t panel = here.first_panel + column_warp() * kPanels + p;
        const int64_t column = panel * int4::kPanel + lane() / 4 * 2 + c;
        if (column >= args_.n) continue;
        const float bias =
            parts == nullptr && args_.bias != nullptr ? to_float(static_cast<const T*>(args_.bias)[column]) : 0.0f;
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int64_t row = here.first_row + r * mma::kColumns + mma::c_column(lane(), i);
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
  const Int4Plan& plan_;
  Source words_[kWordUnits], x_;  // x_ is the source of the thread's first unit of x
  int x_rows_;                    // the number of rows from this unit's row on
  GroupSource group_;
  SharedAddress words_to_, x_to_, group_to_;  // the targets of the thread's first units in the first stage
  float sum_[kPanels][kRowTiles][4];          // the sums of the group so far
  float total_[kPanels][kRowTiles][4];        // sums of the part; 2c + i: column 2g + c of the panel, row 2t + i of x
  float scale_[kPanels][2];
  Codes<T> codes_[kPanels][2];
};

// --- host ---

inline int64_t blocks_of(int64_t size, int64_t step) { return (size + step - 1) / step; }

inline Int4Plan int4_plan(const Int4GemmArgs& args, float* parts) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % mma::kUnitBytes == 0; };
  const int64_t unit = mma::kUnitBytes / (args.dtype == Dtype::kFloat32 ? 4 : 2);
  Int4Plan plan{};
  plan.parts = parts;
  plan.slabs = int4::slabs(args.k);
  plan.part_slabs = static_cast<int>(part_slabs(args.k));
  plan.group_slabs = static_cast<int>(args.group_size < 0 ? plan.slabs : args.group_size / int4::kSlab);
  plan.groups = blocks_of(plan.slabs, plan.group_slabs);
  plan.scale_bytes = args.scale_dtype == Dtype::kFloat32 ? 4 : 2;
  plan.weight_vectors = aligned(args.packed) && aligned(args.scales) && aligned(args.zeros);
  plan.x_vectors = aligned(args.x) && args.k % unit == 0 && (args.m == 1 || args.x_row % unit == 0);
  return plan;
}

template <typename Shape>
int64_t int4_blocks(const Int4GemmArgs& args) {
  return blocks_of(args.m, Shape::kRows) * blocks_of(int4::panels(args.n), Shape::kColumnPanels);
}

template <typename Shape>
const char* launch_int4(void (*kernel)(const Int4GemmArgs, const Int4Plan), const Int4GemmArgs& args, float* parts,
                        CUstream_st* stream) {
  Int4Plan plan = int4_plan(args, parts);
  plan.row_tiles = blocks_of(args.m, Shape::kRows);
  return launch(kernel, int4_blocks<Shape>(args) * (parts != nullptr ? kParts : 1), Shape::kThreads,
                Shape::kSharedBytes, stream, args, plan);
}

// The kernels. `..._splits` returns whether there are too few blocks to fill the device. If so, the kernels write the
// sums of the parts to `parts` [kParts][m][n]. Otherwise `parts` is null, and they write the output.
constexpr int64_t kFewRows = 16;
bool int4_gemv_runs(const Int4GemmArgs& args);
const char* int4_gemv(const Int4GemmArgs& args, CUstream_st* stream);
bool int4_gemm_sm80_splits(const Int4GemmArgs& args);
const char* int4_gemm_sm80(const Int4GemmArgs& args, float* parts, CUstream_st* stream);
bool int4_gemm_sm90_runs(const Int4GemmArgs& args);  // whether this kernel runs on the current device
bool int4_gemm_sm90_splits(const Int4GemmArgs& args);
const char* int4_gemm_sm90(const Int4GemmArgs& args, float* parts, CUstream_st* stream);

}  // namespace cuda
}  // namespace headstart

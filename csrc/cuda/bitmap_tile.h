// The code that the bitmap kernels share. A warp goes through a tile of 16 rows of a bitmap weight, 512 bytes of every
// row at a time. It turns mask bits and packed values into 16 bytes of weights per lane.
//
//   a block: 8 warps = tiles of 16 rows × segments of K       a chunk of a warp's tile: 16 rows × 512 bytes of weights
//
//          segment 0   segment 1                                            lane 0    lane 1         lane 31
//         ┌───────────┬───────────┐                                        ┌─────────┬─────────┬─ ─ ┬─────────┐
//   tile  │  warp 0   │  warp 1   │   a warp counts the bits        row 0  │ unit: 16 bytes of weights,       │
//         ├───────────┼───────────┤   of its segment; then each     row 1  │ 8 columns of 16 bits   │         │
//         │  warp 2   │  warp 3   │   knows where it begins         ...    └─────────┴─────────┴─ ─ ┴─────────┘
//         └───────────┴───────────┘
//
//   masks    Lane 2 r + h reads half h of row r's mask words of the chunk, one chunk ahead. It adds the number of their
//            bits to the row's position so far, and writes (word, position of its first value) to shared memory.
//   window   For a row, every lane reads its unit's bits and position from there. It loads the 32-bit words that hold
//            its values: 2 or 3 of 5 words at 50 % and 16 bits. Neighbouring lanes read neighbouring words.
//   expand   The window, shifted to its first value, is a queue in registers. layouts/bitmap_unit.h moves its values to
//            their columns. Quantised values are moved as bytes. A magic number then turns them into floats.
//
// The loads of the windows of kBatch rows are in flight at a time. A value is read as part of a window only if its bit
// is set and it is one of the weight's `stored` values. Bits of values past those are removed from the masks. So
// damaged offsets cannot read other memory. The first and the last aligned word may have bytes outside of the values:
// in the rows that may reach them, every word is looked at, and these are read byte by byte.
//
// Floor, in bytes per weight at density d: d · value bits / 8 + 1/8, and the bytes that the weight's user moves. If K
// is divided into segments, the mask is read twice, the second time from a cache.
#pragma once

#include <type_traits>

#include "../layouts/bitmap_unit.h"
#include "device.h"

namespace headstart {
namespace cuda {

constexpr int kBitmapWarps = 8, kBitmapThreads = 32 * kBitmapWarps;
constexpr int kTileRows = 16;
constexpr int kUnitBytes = 16, kRowBytes = 32 * kUnitBytes;

// The data that a launch adds to the arguments.
struct BitmapPlan {
  int segments;        // the segments of K: 1, 2, 4 or 8
  int segment_chunks;  // the chunks of a segment
  int chunks;          // the chunks of K
  int mask_access;     // bytes of a row of the mask that can be read at a time: 16, 8, 4 or 1
  bool unit_scales;    // whether the columns of every unit are in one group
  int64_t groups;      // the groups of scales in a row
  uintptr_t values_begin, values_end;
};

// The lowest `count` set bits of word.
inline __device__ uint32_t lowest_bits(uint32_t word, int count) {
  uint32_t kept = 0;
  for (; count > 0 && word != 0; --count) {
    kept |= word & (0u - word);
    word &= word - 1;
  }
  return kept;
}

// Out: the type of the weights. Without scales it is uint8_t, uint16_t or uint32_t, or in a product Float16, BFloat16
// or float. kStored: the bits of a value in memory; 4 or 8 with scales. kUnitScales: every unit's columns are known to
// have one scale.
template <typename Out, int kStored, bool kScaled, bool kUnitScales = false>
class BitmapTile {
 public:
  static constexpr int kUnit = kUnitBytes / static_cast<int>(sizeof(Out));  // the columns of a lane
  static constexpr int kColumns = 32 * kUnit;                               // the columns of a chunk

 private:
  static constexpr int kBatch = 4;                               // rows whose windows are loaded at a time
  static constexpr int kWords = kUnit, kLaneWords = kWords / 2;  // mask words of a row and of a lane in a chunk
  static constexpr int kValuesPerWord = 32 / kStored;
  static constexpr int kQueue = kUnit * kStored > 32 ? kUnit * kStored / 32 : 1;  // the words that a unit's values fill
  static constexpr int kWindow = kStored == 32 ? kQueue : kQueue + 1;             // the words that they may touch
  static constexpr int kMoved = kScaled ? 8 : kStored;                            // the bits of a value that is moved
  static constexpr int kSteps = kUnit * kMoved / 32;
  static constexpr int kRecordBytes = kTileRows * kWords * 8, kRowsBytes = kTileRows * 8;

 public:
  static constexpr int kWarpBytes = kRecordBytes + kRowsBytes;
  static constexpr int kBlockBytes = kBitmapThreads * 2 + kBitmapWarps * kWarpBytes;  // counts, then each warp's data

  __device__ __forceinline__ BitmapTile(const BitmapWeight& weight, const BitmapPlan& plan, int64_t group)
      : weight_(weight), plan_(plan) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    segment_ = warp % plan.segments;
    first_row_ = (group * (kBitmapWarps / plan.segments) + warp / plan.segments) * kTileRows;
    begin_ = segment_ * plan.segment_chunks;
    end_ = min(begin_ + plan.segment_chunks, plan.chunks);
  }

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ int64_t first_row() const { return first_row_; }
  __device__ __forceinline__ int segment() const { return segment_; }

  // For every chunk, calls chunk_begin(column of the lane's unit), then each(row of the tile, unit) for rows 0 to 15,
  // then chunk_end(first column). With kUnrolled, the row is a constant.
  template <bool kUnrolled, typename Begin, typename Each, typename End>
  __device__ __forceinline__ void walk(const Begin& chunk_begin, const Each& each, const End& chunk_end) {
    find_rows();
    uint32_t words[kLaneWords];
    load_masks(words, begin_);
    for (int chunk = begin_; chunk < end_; ++chunk) {
      place(words);
      load_masks(words, chunk + 1);
      const int64_t first_column = static_cast<int64_t>(chunk) * kColumns, column = first_column + lane() * kUnit;
      chunk_begin(column);
      find_group(column);
      // One set of windows for all rows: a load that does not happen keeps the old value of its register.
      Window windows[kBatch] = {};
#pragma unroll(kUnrolled ? kTileRows / kBatch : 1)
      for (int first = 0; first < kTileRows; first += kBatch) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) fetch(windows[i], first + i);
        if (row_edges(first) != 0) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) fetch_edge(windows[i], first + i);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) each(first + i, expand(windows[i], first + i, column));
      }
      __syncwarp();
      chunk_end(first_column);
    }
  }

 private:
  struct Window {
    uint32_t words[kWindow];  // a word without values may hold anything
    uint32_t bits;            // the bits of the unit's columns
    uint32_t shift;           // the number of bits before the unit's first value in the first word
    uint32_t scale;
  };

  static __device__ __forceinline__ unsigned char* own() {
    return shared_memory() + kBitmapThreads * 2 + static_cast<int>(threadIdx.x) / 32 * kWarpBytes;
  }
  static __device__ __forceinline__ uint2* records() { return reinterpret_cast<uint2*>(own()); }
  // For each row, the address of the aligned word with its first value, and kEdge.
  static __device__ __forceinline__ const uint32_t** row_words() {
    return reinterpret_cast<const uint32_t**>(own() + kRecordBytes);
  }
  static constexpr uintptr_t kEdge = 1;  // the row may reach a word that has bytes outside of the values
  static __device__ __forceinline__ int* counts(int warp) {
    return reinterpret_cast<int*>(shared_memory()) + warp * kTileRows;
  }

  // --- the positions of values ---

  // Loads the mask words of the lane's half of its row. Bits past the last column become 0.
  __device__ __forceinline__ void load_masks(uint32_t (&words)[kLaneWords], int chunk) const {
    const int64_t row = first_row_ + lane() / 2;
    const int64_t first = static_cast<int64_t>(chunk) * kColumns + lane() % 2 * kLaneWords * 32;
    const int64_t row_bytes = (weight_.k + 7) / 8;
    const bool inside = row < weight_.n && chunk < end_;
    const uint8_t* from = weight_.bitmask + row * row_bytes + first / 8;
    if (kLaneWords >= 4 && plan_.mask_access == 16) {
#pragma unroll
      for (int i = 0; i < kLaneWords; i += 4) {
        uint4 four = {0, 0, 0, 0};
        if (inside && first + i * 32 < weight_.k) four = __ldg(reinterpret_cast<const uint4*>(from + i * 4));
        words[i] = four.x;
        words[(i + 1) % kLaneWords] = four.y;
        words[(i + 2) % kLaneWords] = four.z;
        words[(i + 3) % kLaneWords] = four.w;
      }
    } else if (plan_.mask_access >= 8) {
#pragma unroll
      for (int i = 0; i < kLaneWords; i += 2) {
        uint2 two = {0, 0};
        if (inside && first + i * 32 < weight_.k) two = __ldg(reinterpret_cast<const uint2*>(from + i * 4));
        words[i] = two.x;
        words[i + 1] = two.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kLaneWords; ++i) {
        words[i] = 0;
        if (!inside) continue;
        if (plan_.mask_access == 4) {
          if (first + i * 32 < weight_.k) words[i] = __ldg(reinterpret_cast<const uint32_t*>(from + i * 4));
        } else {
#pragma unroll 1
          for (int byte = 0; byte < 4 && first + i * 32 + byte * 8 < weight_.k; ++byte) {
            words[i] |= static_cast<uint32_t>(__ldg(from + i * 4 + byte)) << 8 * byte;
          }
        }
      }
    }
    if (first + kLaneWords * 32 > weight_.k) {
#pragma unroll
      for (int i = 0; i < kLaneWords; ++i) {
        const int64_t left = weight_.k - first - i * 32;
        if (left < 32) words[i] = left > 0 ? words[i] & ((1u << left) - 1) : 0;
      }
    }
  }

  static __device__ __forceinline__ int bits_of(const uint32_t (&words)[kLaneWords]) {
    int bits = 0;
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) bits += __popc(words[i]);
    return bits;
  }

  // Finds the position of the segment's first value in the lane's row. Positions count from the start of the aligned
  // word that holds the row's first value.
  __device__ __forceinline__ void find_rows() {
    position_ = 0;
    if (plan_.segments > 1) {
      int bits = 0;
      for (int chunk = begin_; chunk < end_; ++chunk) {
        uint32_t words[kLaneWords];
        load_masks(words, chunk);
        bits += bits_of(words);
      }
      bits += __shfl_xor_sync(kWholeWarp, bits, 1);
      const int warp = static_cast<int>(threadIdx.x) / 32;
      if (lane() % 2 == 0) counts(warp)[lane() / 2] = bits;
      __syncthreads();
      for (int s = 1; s <= segment_; ++s) position_ += counts(warp - s)[lane() / 2];
    }
    const int64_t row = first_row_ + lane() / 2;
    const int64_t start = row < weight_.n ? __ldg(weight_.row_offsets + row) : 0;
    const int64_t left = start < 0 ? 0 : weight_.stored - start;
    const uint64_t first = static_cast<uint64_t>(start), bytes = kStored == 4 ? first / 2 : first * (kStored / 8);
    const auto address = reinterpret_cast<uintptr_t>(weight_.values) + bytes;
    int lead = static_cast<int>(address % 4) * 8 / kStored;
    if (kStored == 4) lead += static_cast<int>(start & 1);
    position_ += lead;
    constexpr int64_t kMost = INT32_MAX - 8;
    limit_ = lead + static_cast<int>(left < 0 ? 0 : left < kMost ? left : kMost);
    const uintptr_t word = address & ~uintptr_t{3};
    const bool edge = word < plan_.values_begin || (plan_.values_end % 4 != 0 && left < weight_.k + kValuesPerWord);
    if (lane() % 2 == 0) row_words()[lane() / 2] = reinterpret_cast<const uint32_t*>(word | (edge ? kEdge : 0));
  }

  // Writes the chunk's records to shared memory.
  __device__ __forceinline__ void place(const uint32_t (&words)[kLaneWords]) {
    const int bits = bits_of(words), other = __shfl_xor_sync(kWholeWarp, bits, 1);
    int at = position_ + (lane() % 2 == 0 ? 0 : other);
    position_ += bits + other;
    uint2* to = records() + lane() * kLaneWords;
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
      uint32_t word = words[i];
      const int count = __popc(word);
      if (at + count > limit_) word = lowest_bits(word, limit_ - at);
      to[i] = {word, static_cast<uint32_t>(at)};
      at += count;
    }
    __syncwarp();
  }

  // --- the lane's unit ---

  __device__ __forceinline__ void fetch(Window& window, int row) const {
    const uint32_t bit = lane() * kUnit, shift = bit % 32;
    const uint2 record = records()[row * kWords + bit / 32];
    const uint32_t lower = record.x & ((1u << shift) - 1);
    const uint32_t at = record.y + __popc(lower);
    window.bits = record.x >> shift & (0xFFFFFFFFu >> (32 - kUnit));
    window.shift = at % kValuesPerWord * kStored;
    const auto word = reinterpret_cast<uintptr_t>(row_words()[row]);
    const uint32_t* from = reinterpret_cast<const uint32_t*>(word & ~kEdge) + at / kValuesPerWord;
    const uint32_t end = window.bits == 0 || (word & kEdge) != 0 ? 0 : window.shift + __popc(window.bits) * kStored;
#pragma unroll
    for (int i = 0; i < kWindow; ++i) load_if(end > 32 * i, window.words[i], from + i);
    if constexpr (kScaled) {
      window.scale = window.bits != 0 && one_scale() ? scale_bits(row, group_) : 0;
    }
  }

  // Whether rows [first, first + kBatch) have kEdge.
  __device__ __forceinline__ uintptr_t row_edges(int first) const {
    uintptr_t edges = 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) edges |= reinterpret_cast<uintptr_t>(row_words()[first + i]) & kEdge;
    return edges;
  }

  // Loads the words of a window whose row has kEdge.
  __device__ __forceinline__ void fetch_edge(Window& window, int row) const {
    const auto word = reinterpret_cast<uintptr_t>(row_words()[row]);
    if ((word & kEdge) == 0) return;
    const uint32_t bit = lane() * kUnit;
    const uint2 record = records()[row * kWords + bit / 32];
    const uint32_t at = record.y + __popc(record.x & ((1u << bit % 32) - 1));
    const uint32_t* from = reinterpret_cast<const uint32_t*>(word & ~kEdge) + at / kValuesPerWord;
    const uint32_t end = window.bits == 0 ? 0 : window.shift + __popc(window.bits) * kStored;
#pragma unroll
    for (int i = 0; i < kWindow; ++i) {
      if (end > 32 * i) window.words[i] = edge_word(from + i);
    }
  }

  // The bytes of an aligned word that belong to the values, and zeros.
  __device__ __forceinline__ uint32_t edge_word(const uint32_t* at) const {
    uint32_t word = 0;
#pragma unroll 1
    for (int byte = 0; byte < 4; ++byte) {
      const uintptr_t address = reinterpret_cast<uintptr_t>(at) + byte;
      if (address < plan_.values_begin || address >= plan_.values_end) continue;
      word |= static_cast<uint32_t>(__ldg(reinterpret_cast<const uint8_t*>(address))) << 8 * byte;
    }
    return word;
  }

  __device__ __forceinline__ uint4 expand(const Window& window, int row, int64_t column) const {
    uint32_t queue[kQueue < 2 && kScaled ? 2 : kQueue];
#pragma unroll
    for (int i = 0; i < kQueue; ++i) {
      queue[i] = kStored == 32
                     ? window.words[i]
                     : __funnelshift_r(window.words[i], window.words[i + 1 < kWindow ? i + 1 : i], window.shift);
    }
    if constexpr (kStored == 4) {
      const uint32_t even = queue[0] & 0x0F0F0F0Fu, odd = queue[0] >> 4 & 0x0F0F0F0Fu;
      queue[0] = permute_bytes(even, odd, 0x5140);
      queue[1] = permute_bytes(even, odd, 0x7362);
    }
    uint32_t moved[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t spread = bitmap::spread<kMoved>(window.bits, step);
      moved[step] = permute_bytes(queue[0], 0, bitmap::selector<kMoved>(spread));
      const uint32_t used = kMoved * __popc(spread);
#pragma unroll
      for (int i = 0; i < kSteps - 1 - step; ++i) queue[i] = __funnelshift_rc(queue[i], queue[i + 1], used);
    }
    if constexpr (kScaled) {
      return dequantized(moved, window, row, weight_.k - column);
    } else {
      static_assert(kSteps == 4, "a unit");
      return {moved[0], moved[1], moved[2], moved[3]};
    }
  }

  // --- quantised values ---

  // Finds the group of the unit's first column, and the column's place in the group.
  __device__ __forceinline__ void find_group(int64_t column) {
    if constexpr (kScaled) {
      group_ = weight_.group_size >= weight_.k ? 0 : column / weight_.group_size;
      in_group_ = static_cast<int>(column - group_ * weight_.group_size);
    }
  }

  __device__ __forceinline__ bool one_scale() const { return kUnitScales || plan_.unit_scales; }

  // The bits of a scale as they are in memory. They are not converted here, because a conversion would wait for the
  // load to end.
  __device__ __forceinline__ uint32_t scale_bits(int row, int64_t group) const {
    const int64_t at = (first_row_ + row) * plan_.groups + group;
    return weight_.scale_dtype == Dtype::kFloat32 ? __ldg(static_cast<const uint32_t*>(weight_.scales) + at)
                                                  : __ldg(static_cast<const uint16_t*>(weight_.scales) + at);
  }

  __device__ __forceinline__ float scale_of(uint32_t bits) const {
    return weight_.scale_dtype == Dtype::kFloat32   ? __uint_as_float(bits)
           : weight_.scale_dtype == Dtype::kFloat16 ? to_float(Float16{static_cast<uint16_t>(bits)})
                                                    : to_float(BFloat16{static_cast<uint16_t>(bits)});
  }

  // `left` is the number of columns from the unit's first column on. A byte of `moved` holds a signed code (int4: in
  // its lower half), or 0 if the column's bit is not set.
  __device__ __forceinline__ uint4 dequantized(const uint32_t (&moved)[kSteps], const Window& window, int row,
                                               int64_t left) const {
    constexpr uint32_t kSign = kStored == 8 ? 0x80 : 8, kMagic = 0x4B000000u;  // 2^23
    constexpr float kOffset = static_cast<float>((1 << 23) + kSign);
    float weights[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const uint32_t word = moved[i / 4] ^ kSign * 0x01010101u;
      weights[i] = __uint_as_float(permute_bytes(word, kMagic, 0x7440 + i % 4)) - kOffset;
    }
    if (one_scale()) {
      const float scale = scale_of(window.scale);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) weights[i] *= scale;
    } else if (window.bits != 0) {
      // For groups that do not consist of whole units. One column at a time: this code is small, not fast.
      int64_t group = group_;
      int in_group = in_group_;
#pragma unroll 1
      for (int c = 0; c < kUnit && c < left; ++c) {
        const float scale = scale_of(scale_bits(row, group));
#pragma unroll
        for (int i = 0; i < kUnit; ++i) weights[i] *= i == c ? scale : 1.0f;
        if (++in_group == weight_.group_size) {
          in_group = 0;
          ++group;
        }
      }
    }
    uint32_t unit[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Out) == 4) {
        unit[i] = __float_as_uint(weights[i]);
      } else {
        unit[i] = pair_from_floats<Out>(weights[2 * i], weights[2 * i + 1]);
      }
    }
    return {unit[0], unit[1], unit[2], unit[3]};
  }

  const BitmapWeight& weight_;
  const BitmapPlan& plan_;
  int64_t first_row_;
  int segment_, begin_, end_;  // the segment has the chunks [begin_, end_)
  int position_, limit_;       // the positions of the next value of the lane's row and of the end of all values
  int64_t group_ = 0;
  int in_group_ = 0;
};

// --- host ---

// Chooses enough segments to fill the device with warps. Segments cost a second read of the mask, but too few warps
// cost more.
template <typename Tile>
BitmapPlan bitmap_plan(const BitmapWeight& weight) {
  constexpr int kWarpsPerProcessor = 16;
  const int64_t tiles = (weight.n + kTileRows - 1) / kTileRows;
  BitmapPlan plan{};
  plan.chunks = static_cast<int>((weight.k + Tile::kColumns - 1) / Tile::kColumns);
  plan.groups = (weight.k + weight.group_size - 1) / weight.group_size;
  plan.unit_scales = plan.groups == 1 || weight.group_size % Tile::kUnit == 0;
  plan.segments = 1;
  while (plan.segments < kBitmapWarps && plan.segments < plan.chunks &&
         tiles * plan.segments < kWarpsPerProcessor * multiprocessors()) {
    plan.segments *= 2;
  }
  plan.segment_chunks = (plan.chunks + plan.segments - 1) / plan.segments;
  const int64_t at = reinterpret_cast<uintptr_t>(weight.bitmask) | (weight.k + 7) / 8;
  plan.values_begin = reinterpret_cast<uintptr_t>(weight.values);
  plan.values_end = plan.values_begin + (weight.stored * weight.value_bits + 7) / 8;
  plan.mask_access = at % 16 == 0 ? 16 : at % 8 == 0 ? 8 : at % 4 == 0 ? 4 : 1;
  return plan;
}

// The number of groups of tiles. A thread block handles a group of kBitmapWarps / segments tiles of rows.
inline int64_t bitmap_groups(const BitmapWeight& weight, const BitmapPlan& plan) {
  const int64_t rows = kTileRows * (kBitmapWarps / plan.segments);
  return (weight.n + rows - 1) / rows;
}

}  // namespace cuda
}  // namespace headstart

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
//   stage    The values of a row in a chunk are contiguous. The warp copies them to shared memory in aligned pieces of
//            16 bytes, for 8 or 16 rows at a time: 17 pieces a row at 50 % and 16 bits. The copies need no registers.
//   window   For a row, every lane reads its unit's bits and position, and then all 32-bit words that may hold its
//            values: 5 words for 16 bits, of which 2 or 3 are used at 50 %.
//   expand   The window, shifted to its first value, is a queue in registers. layouts/bitmap_unit.h moves its values to
//            their columns. Quantised values are moved as bytes. A magic number then turns them into floats.
//
// A value is read only if its bit is set and it is one of the weight's `stored` values. Bits of values past those are
// removed from the masks. So damaged offsets cannot read other memory. Pieces that reach over an end of the values are
// copied byte by byte, and only as far as the values go.
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
// have one scale. kStaged: the rows whose values are in shared memory at a time, 8 or 16.
template <typename Out, int kStored, bool kScaled, bool kUnitScales = false, int kStaged = kTileRows>
class BitmapTile {
 public:
  static constexpr int kUnit = kUnitBytes / static_cast<int>(sizeof(Out));  // the columns of a lane
  static constexpr int kColumns = 32 * kUnit;                               // the columns of a chunk

 private:
  static constexpr int kHalf = kTileRows / 2;                    // the rows that are copied as a group
  static constexpr int kBatch = 4;                               // rows whose windows are read at a time
  static constexpr int kWords = kUnit, kLaneWords = kWords / 2;  // mask words of a row and of a lane in a chunk
  static constexpr int kValuesPerWord = 32 / kStored;
  static constexpr int kQueue = kUnit * kStored > 32 ? kUnit * kStored / 32 : 1;  // the words that a unit's values fill
  static constexpr int kWindow = kStored == 32 ? kQueue : kQueue + 1;             // the words that they may touch
  static constexpr int kMoved = kScaled ? 8 : kStored;                            // the bits of a value that is moved
  static constexpr int kSteps = kUnit * kMoved / 32;
  static constexpr int kPiece = 16, kPieceValues = 8 * kPiece / kStored;
  static constexpr int kSlotBytes = kColumns * kStored / 8 + kPiece;  // a row's values of a chunk, anywhere in a piece
  static constexpr int kRecordBytes = kTileRows * kWords * 8, kRowsBytes = kTileRows * 16;
  static constexpr int kCopyLanes = kSlotBytes > 10 * kPiece ? 16 : 8;
  static constexpr int kPastSlots = 2 * kPiece;  // the last window may be read past its slot
  static_assert(kStaged == kHalf || kStaged == kTileRows, "copies are waited for by halves");

  struct Pieces {
    const unsigned char* from;
    int count;
  };

 public:
  static constexpr int kWarpBytes = kRecordBytes + kRowsBytes + kStaged * kSlotBytes + kPastSlots;
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
      stage(0);
      if (kStaged == kTileRows) stage(kHalf);
#pragma unroll(kUnrolled ? 2 : 1)
      for (int half = 0; half < kTileRows; half += kHalf) {
        if (kStaged == kHalf && half > 0) {
          __syncwarp();  // all lanes must have read the first half
          stage(half);
        }
        uint32_t scales[kHalf];
#pragma unroll
        for (int i = 0; i < kHalf; ++i) scales[i] = scale_ahead(half + i, column);
        if (kStaged == kTileRows && half == 0) {
          copy_wait<1>();
        } else {
          copy_wait<0>();
        }
        __syncwarp();
#pragma unroll
        for (int first = 0; first < kHalf; first += kBatch) {
          Window windows[kBatch];
#pragma unroll
          for (int i = 0; i < kBatch; ++i) fetch(windows[i], half + first + i, scales[first + i]);
#pragma unroll
          for (int i = 0; i < kBatch; ++i) each(half + first + i, expand(windows[i], half + first + i, column));
        }
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
  static __device__ __forceinline__ Pieces* pieces() { return reinterpret_cast<Pieces*>(own() + kRecordBytes); }
  static __device__ __forceinline__ unsigned char* slot(int row) {
    return own() + kRecordBytes + kRowsBytes + row % kStaged * kSlotBytes;
  }
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
  // piece that holds the row's first value.
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
    int lead = static_cast<int>(address % kPiece) * 8 / kStored;
    if (kStored == 4) lead += static_cast<int>(start & 1);
    position_ += lead;
    constexpr int64_t kMost = INT32_MAX - 8;
    limit_ = lead + static_cast<int>(left < 0 ? 0 : left < kMost ? left : kMost);
    row_values_ = address - address % kPiece;
  }

  // Writes the chunk's records to shared memory. Their positions count from the first piece of the chunk.
  __device__ __forceinline__ void place(const uint32_t (&words)[kLaneWords]) {
    const int bits = bits_of(words), other = __shfl_xor_sync(kWholeWarp, bits, 1);
    const int start = position_ - position_ % kPieceValues, limit = limit_ - start;
    int at = position_ - start + (lane() % 2 == 0 ? 0 : other);
    const int first = position_ - start, end = min(first + bits + other, limit);
    const int count = end > first ? (end + kPieceValues - 1) / kPieceValues : 0;
    const uintptr_t from = row_values_ + static_cast<int64_t>(start) / kPieceValues * kPiece;
    if (lane() % 2 == 0) pieces()[lane() / 2] = {reinterpret_cast<const unsigned char*>(from), count};
    const bool outside = count > 0 && (from < values_begin() || from + count * kPiece > values_end());
    inside_ = __ballot_sync(kWholeWarp, outside) == 0;
    position_ += bits + other;
    const auto record = [&](uint32_t word) {
      const int before = at;
      at += __popc(word);
      if (at > limit) word = lowest_bits(word, limit - before);
      return uint2{word, static_cast<uint32_t>(before)};
    };
    uint4* to = reinterpret_cast<uint4*>(records() + lane() * kLaneWords);
#pragma unroll
    for (int i = 0; i < kLaneWords; i += 2) {
      const uint2 left = record(words[i]), right = record(words[i + 1]);
      to[i / 2] = {left.x, left.y, right.x, right.y};
    }
    __syncwarp();
  }

  __device__ __forceinline__ uintptr_t values_begin() const { return reinterpret_cast<uintptr_t>(weight_.values); }
  __device__ __forceinline__ uintptr_t values_end() const {
    return values_begin() + (kStored == 4 ? (weight_.stored + 1) / 2 : weight_.stored * (kStored / 8));
  }

  // Starts to copy the values of kHalf rows. kCopyLanes lanes copy a row.
  __device__ __forceinline__ void stage(int first_row) const {
    if (inside_) {
      const int piece = lane() % kCopyLanes;
#pragma unroll
      for (int i = 0; i < kHalf; i += 32 / kCopyLanes) {
        const int row = first_row + i + lane() / kCopyLanes;
        const Pieces from = pieces()[row];
#pragma unroll
        for (int step = 0; step < kSlotBytes / kPiece; step += kCopyLanes) {
          const int at = (piece + step) * kPiece;
          if (piece + step < from.count) copy_async(slot(row) + at, from.from + at, true);
        }
      }
    } else {
#pragma unroll 1
      for (int row = first_row; row < first_row + kHalf; ++row) {
        const Pieces from = pieces()[row];
#pragma unroll 1
        for (int byte = lane(); byte < from.count * kPiece; byte += 32) {
          const auto at = reinterpret_cast<uintptr_t>(from.from) + byte;
          if (at >= values_begin() && at < values_end()) slot(row)[byte] = __ldg(from.from + byte);
        }
      }
    }
    copy_commit();
  }

  // --- the lane's unit ---

  __device__ __forceinline__ void fetch(Window& window, int row, uint32_t scale) const {
    const uint32_t bit = lane() * kUnit, shift = bit % 32;
    const uint2 record = records()[row * kWords + bit / 32];
    const uint32_t lower = record.x & ((1u << shift) - 1);
    const uint32_t at = record.y + __popc(lower);
    window.bits = record.x >> shift & (0xFFFFFFFFu >> (32 - kUnit));
    window.shift = at % kValuesPerWord * kStored;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(slot(row)) + at / kValuesPerWord;
#pragma unroll
    for (int i = 0; i < kWindow; ++i) window.words[i] = from[i];
    window.scale = scale;
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

  // The scale of the lane's unit, loaded before it is needed. 0 if columns of the unit have different scales.
  __device__ __forceinline__ uint32_t scale_ahead(int row, int64_t column) const {
    if constexpr (kScaled) {
      if (one_scale() && first_row_ + row < weight_.n && column < weight_.k) return scale_bits(row, group_);
    }
    return 0;
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
  bool inside_ = true;         // whether all bytes of the chunk's pieces are bytes of values
  uintptr_t row_values_ = 0;   // the aligned piece that holds the first value of the lane's row
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

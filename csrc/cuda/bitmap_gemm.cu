// bitmap_gemm: outᵀ = W · xᵀ. W is expanded in registers (drawing in bitmap_tile.h), never in memory.
//
//   one row of x       The lanes' units are the operands of mma.m16n8k16. In A, rows 0 to 7 hold the units of a row of
//   (16 bits)          W, and rows 8 to 15 hold the units of the next row of W. Each row of A has the 32 columns of a
//                      lane group. B holds the same columns of x, those of one lane group in each of its 8 columns:
//
//                              W row r:  lanes 0-3 │ k 0..31              x: lanes 0-3  4-7       28-31
//                      A                 lanes 4-7 │ k 32..63       B          k 0..31 k 32..63 ... k 224..255
//                              W row r+1:  ...     │
//
//                      The result for a row of W is the diagonal of C: group g's weights times group g's x. Seven
//                      eighths of the multiplications are not used. Tensor cores have time for them: they take 1.6
//                      cycles of an H100's multiprocessor, and memory takes 20 cycles for 256 columns. In return, a
//                      conversion and a multiply-add per weight, 16 instructions in addition to the 60 that expand,
//                      become one instruction.
//   more rows          A warp writes its 16 rows to shared memory as a swizzled tile, and then multiplies the tile.
//   (to 32 a block)    Lane (g, t) reads unit 4 w + t of rows g and g + 8, which are A of two mma. It reads the same
//                      columns of row g of x directly from L1 and L2; they are B of both mma. This permutes k, which
//                      does not change a sum. No tensor core keeps all bits of float32, so float32 uses multiply-adds
//                      on the same tile with the same sums in the same lanes.
//
// A warp sums one segment of K, and the block adds the segments in order. So the order of a result's sums depends only
// on the kernel, the device and N.
//
// Floor: d · 2 + 1/8 bytes per weight of 16 bits, which is 1.125 bytes at 50 % and 1.78 times less than a dense weight.
// This is 20 cycles of an H100's multiprocessor for a row of 256 columns (3.35 TB/s, 132 multiprocessors, 1.755 GHz).
// In 20 cycles, a multiprocessor issues 80 instructions and makes 20 passes through L1. These are needed for a row of
// 256 columns:
//
//   one row of x        60 to 65 instructions, about 12 passes
//   2 to 8 rows of x    about 65 instructions, 20 passes, 8 of them for the tile
//   16 rows of x        24 passes; the additional ones are for x
//
// From kBitmapDenseRows (torch/cuda.cpp) rows on, it is faster to decompress for torch's GEMM, which takes 90 cycles.

#include "bitmap_tile.h"
#include "kernels.h"

namespace headstart {
namespace cuda {
namespace {

struct GemmPlan : BitmapPlan {
  bool x_vectors;  // whether x can be read 16 bytes at a time
  int64_t groups_of_tiles;
};

// Loads 16 bytes of x, of which only `columns` elements exist. The rest is 0.
template <bool kVectors, typename T>
__device__ __forceinline__ uint4 load_x(const T* from, int64_t columns) {
  uint4 unit = {0, 0, 0, 0};
  if constexpr (kVectors) {
    load_if(columns > 0, unit, reinterpret_cast<const uint4*>(from));
  } else {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
    uint32_t* words[4] = {&unit.x, &unit.y, &unit.z, &unit.w};
#pragma unroll
    for (int i = 0; i < 4 * kPerWord; ++i) {
      if (i >= columns) break;
      if constexpr (kPerWord == 1) {
        *words[i] = __float_as_uint(from[i]);
      } else {
        *words[i / 2] |= static_cast<uint32_t>(from[i].bits) << i % 2 * 16;
      }
    }
  }
  return unit;
}

// Adds the sums of the segments, which `sums(warp)` returns as [kTileRows][rows], and writes the block's outputs for
// `rows` rows of x.
template <typename T, typename Sums>
__device__ __forceinline__ void join(const BitmapGemmArgs& args, const GemmPlan& plan, int64_t group,
                                     int64_t first_x_row, int rows, const Sums& sums) {
  __syncthreads();
  const int tiles = kBitmapWarps / plan.segments, columns = tiles * kTileRows;
  const int64_t first = group * columns;
  for (int i = static_cast<int>(threadIdx.x); i < columns * rows; i += kBitmapThreads) {
    const int64_t column = first + i % columns, row = first_x_row + i / columns;
    if (column >= args.weight.n || row >= args.m) continue;
    const int tile = i % columns / kTileRows, at = i % kTileRows * rows + i / columns;
    float total = 0.0f;
    for (int s = 0; s < plan.segments; ++s) total += sums(tile * plan.segments + s)[at];
    if (args.bias != nullptr) total += to_float(static_cast<const T*>(args.bias)[column]);
    static_cast<T*>(args.out)[row * args.weight.n + column] = from_float<T>(total);
  }
}

// --- one row ---

template <typename T, typename Tile>
__global__ void __launch_bounds__(kBitmapThreads, 2)
    bitmap_gemv_kernel(const BitmapGemmArgs args, const GemmPlan plan) {
  const int64_t group = block_id();
  Tile tile(args.weight, plan, group);
  const int g = Tile::lane() / 4, t = Tile::lane() % 4;
  float sums[kTileRows];  // sums of the diagonal, in the lanes that hold it; they have no meaning in other lanes
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) sums[r] = 0.0f;
  uint4 x = {0, 0, 0, 0}, even = x;
  const auto begin = [&](int64_t column) {
    const T* from = static_cast<const T*>(args.x) + column;
    x = plan.x_vectors ? load_x<true>(from, args.weight.k - column) : load_x<false>(from, args.weight.k - column);
  };
  const auto multiply = [&](int row, const uint4& unit) {
    if (row % 2 == 0) {
      even = unit;
      return;
    }
    const uint32_t first[4] = {even.x, unit.x, even.y, unit.y}, second[4] = {even.z, unit.z, even.w, unit.w};
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    multiply_add<T>(c, first, x.x, x.y);
    multiply_add<T>(c, second, x.z, x.w);
    sums[row - 1] += g % 2 == 0 ? c[0] : c[1];
    sums[row] += g % 2 == 0 ? c[2] : c[3];
  };
  tile.template walk<true>(begin, multiply, [](int64_t) {});
  const auto own = [](int warp) {
    return reinterpret_cast<float*>(shared_memory() + kBitmapThreads * 2 + warp * Tile::kWarpBytes);
  };
#pragma unroll
  for (int row = 0; row < kTileRows; ++row) {
    float sum = g / 2 == t ? sums[row] : 0.0f;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
    if (Tile::lane() == 0) own(static_cast<int>(threadIdx.x) / 32)[row] = sum;
  }
  join<T>(args, plan, group, 0, 1, own);
}

// --- more rows ---

template <typename T, typename Tile, int kRowTiles>
__global__ void __launch_bounds__(kBitmapThreads, 2)
    bitmap_gemm_kernel(const BitmapGemmArgs args, const GemmPlan plan) {
  constexpr int kRows = kRowTiles * mma::kColumns, kTileBytes = kTileRows * kRowBytes;
  static_assert(kRows * kTileRows * 4 <= kTileBytes, "sums fit a tile");
  const int64_t block = block_id(), group = block % plan.groups_of_tiles,
                first_x = block / plan.groups_of_tiles * kRows;
  Tile tile(args.weight, plan, group);
  float sums[kRowTiles][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[r][i] = 0.0f;
  }
  const auto own = [](int warp) { return shared_memory() + Tile::kBlockBytes + warp * kTileBytes; };
  unsigned char* weights = own(static_cast<int>(threadIdx.x) / 32);
  const int g = Tile::lane() / 4, t = Tile::lane() % 4;
  const int64_t left_rows = args.m - first_x;
  const int rows = static_cast<int>(left_rows < kRows ? left_rows : kRows);
  const T* x = static_cast<const T*>(args.x) + first_x * args.x_row;
  const auto at = [&](int row, int unit) {
    return reinterpret_cast<uint4*>(weights + row * kRowBytes + bitmap::tile_unit(row, unit) * kUnitBytes);
  };
  const auto keep = [&](int row, const uint4& unit) { *at(row, Tile::lane()) = unit; };
  const auto multiply = [&](int64_t first_column) {
    if constexpr (std::is_same_v<T, float>) {
      for (int unit = 0; unit < 32; ++unit) {
        const int64_t column = first_column + unit * Tile::kUnit;
        const uint4 left[2] = {*at(g, unit), *at(g + 8, unit)};
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          if (r * mma::kColumns >= rows) break;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = r * mma::kColumns + 2 * t + i % 2;
            const int64_t columns = row < rows ? args.weight.k - column : 0;
            const T* from = x + row * args.x_row + column;
            const uint4 w = left[i / 2],
                        right = plan.x_vectors ? load_x<true>(from, columns) : load_x<false>(from, columns);
            float& sum = sums[r][i];
            sum = fmaf(__uint_as_float(w.x), __uint_as_float(right.x), sum);
            sum = fmaf(__uint_as_float(w.y), __uint_as_float(right.y), sum);
            sum = fmaf(__uint_as_float(w.z), __uint_as_float(right.z), sum);
            sum = fmaf(__uint_as_float(w.w), __uint_as_float(right.w), sum);
          }
        }
      }
    } else {
      // Load x for several words at a time, so that there is one wait for all of them.
      constexpr int kWords = kRowTiles == 1 ? Tile::kUnit : 2;
#pragma unroll 1
      for (int begin = 0; begin < Tile::kUnit; begin += kWords) {
        uint4 right[kWords][kRowTiles];
        const auto load = [&](auto vectors) {
#pragma unroll
          for (int i = 0; i < kWords * kRowTiles; ++i) {
            const int row = i % kRowTiles * mma::kColumns + g, word = begin + i / kRowTiles;
            const int64_t column = first_column + (4 * word + t) * Tile::kUnit;
            right[i / kRowTiles][i % kRowTiles] = load_x<decltype(vectors)::value>(
                x + row * args.x_row + column, row < rows ? args.weight.k - column : 0);
          }
        };
        if (plan.x_vectors) {
          load(std::true_type{});
        } else {
          load(std::false_type{});
        }
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          const int unit = 4 * (begin + i) + t;
          const uint4 low = *at(g, unit), high = *at(g + 8, unit);
          const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            if (r * mma::kColumns >= rows) break;
            multiply_add<T>(sums[r], first, right[i][r].x, right[i][r].y);
            multiply_add<T>(sums[r], second, right[i][r].z, right[i][r].w);
          }
        }
      }
    }
    __syncwarp();  // all lanes must have read the tile before it is written again
  };
  tile.template walk<false>([](int64_t) {}, keep, multiply);
  float* parts = reinterpret_cast<float*>(weights);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      parts[mma::c_row(Tile::lane(), i) * kRows + r * mma::kColumns + mma::c_column(Tile::lane(), i)] = sums[r][i];
    }
  }
  join<T>(args, plan, group, first_x, kRows, [&](int warp) { return reinterpret_cast<const float*>(own(warp)); });
}

// --- host ---

template <typename T, typename Tile, int kRowTiles>
const char* start_rows(const BitmapGemmArgs& args, GemmPlan plan, CUstream_st* stream) {
  constexpr int kRows = kRowTiles * mma::kColumns;
  const int64_t row_tiles = (args.m + kRows - 1) / kRows;
  return launch(bitmap_gemm_kernel<T, Tile, kRowTiles>, plan.groups_of_tiles * row_tiles, kBitmapThreads,
                Tile::kBlockBytes + kBitmapWarps * kTileRows * kRowBytes, stream, args, plan);
}

template <typename T, int kStored, bool kScaled>
const char* start(const BitmapGemmArgs& args, CUstream_st* stream) {
  using Tile = BitmapTile<T, kStored, kScaled>;
  constexpr int kUnit = Tile::kUnit;
  GemmPlan plan{bitmap_plan<Tile>(args.weight), false, 0};
  plan.x_vectors = reinterpret_cast<uintptr_t>(args.x) % kUnitBytes == 0 && args.weight.k % kUnit == 0 &&
                   (args.m == 1 || args.x_row % kUnit == 0);
  plan.groups_of_tiles = bitmap_groups(args.weight, plan);
  if constexpr (std::is_same_v<T, float>) {
    return args.m <= mma::kColumns ? start_rows<T, Tile, 1>(args, plan, stream)
                                   : start_rows<T, Tile, 2>(args, plan, stream);
  } else {
    using OneRow = BitmapTile<T, kStored, kScaled, true>;
    if (args.m == 1 && (!kScaled || plan.unit_scales)) {
      return launch(bitmap_gemv_kernel<T, OneRow>, plan.groups_of_tiles, kBitmapThreads, OneRow::kBlockBytes, stream,
                    args, plan);
    }
    return args.m <= mma::kColumns ? start_rows<T, Tile, 1>(args, plan, stream)
                                   : start_rows<T, Tile, 4>(args, plan, stream);
  }
}

template <typename T>
const char* run(const BitmapGemmArgs& args, CUstream_st* stream) {
  if (args.weight.scales == nullptr) return start<T, 8 * sizeof(T), false>(args, stream);
  return args.weight.value_bits == 8 ? start<T, 8, true>(args, stream) : start<T, 4, true>(args, stream);
}

}  // namespace

const char* bitmap_gemm(const BitmapGemmArgs& args, CUstream_st* stream) {
  if (args.m == 0 || args.weight.n == 0) return nullptr;
  switch (args.dtype) {
    case Dtype::kFloat32:
      return run<float>(args, stream);
    case Dtype::kFloat16:
      return run<Float16>(args, stream);
    default:
      return run<BFloat16>(args, stream);
  }
}

}  // namespace cuda
}  // namespace headstart

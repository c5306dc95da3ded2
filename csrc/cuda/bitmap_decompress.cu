// bitmap_decompress: each lane writes its unit of every row directly to memory. A warp writes 512 contiguous bytes.
//
// bitmap_tile.h has a drawing of the tiles. Nothing is kept between rows, so a warp loads the windows of four rows at a
// time.
//
// Floor, in bytes per weight at the memory bandwidth and 50 % density: raw 16 bits read 1 + 1/8 and write 2, together
// 3.125; int8 to 16 bits moves 2.625; int4 to 16 bits moves 2.375. For a row of 256 columns, the floor of raw 16 bits
// is 55 cycles of an H100's multiprocessor. In that time, the row needs these passes through L1: 5 to 8 for the
// windows, 1 for the records and 4 for the output.
//
// If the rows of the output are not aligned to 16 bytes, they are written one element at a time.

#include "bitmap_tile.h"
#include "kernels.h"

namespace headstart {
namespace cuda {
namespace {

template <typename Out, typename Tile>
__global__ void __launch_bounds__(kBitmapThreads, 3)
    bitmap_decompress_kernel(const BitmapDecompressArgs args, const BitmapPlan plan, const bool vectors) {
  Tile tile(args.weight, plan, block_id());
  const int64_t rows_there = args.weight.n - tile.first_row();
  const int rows = static_cast<int>(rows_there < kTileRows ? rows_there : kTileRows);
  Out* to = nullptr;  // the unit of the next row
  int columns = 0;    // the columns of the unit that exist
  const auto begin = [&](int64_t column) {
    const int64_t left = args.weight.k - column;
    columns = static_cast<int>(left < 0 ? 0 : left < Tile::kUnit ? left : Tile::kUnit);
    to = static_cast<Out*>(args.out) + tile.first_row() * args.out_row + column;
  };
  const auto write = [&](int row, const uint4& unit) {
    if (row < rows && columns > 0) {
      if (vectors && columns == Tile::kUnit) {
        *reinterpret_cast<uint4*>(to) = unit;
      } else {
        const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
        constexpr int kBits = 8 * static_cast<int>(sizeof(Out));
#pragma unroll
        for (int i = 0; i < Tile::kUnit; ++i) {
          if (i < columns) to[i] = static_cast<Out>(words[i * kBits / 32] >> i * kBits % 32);
        }
      }
    }
    to += args.out_row;
  };
  tile.template walk<false>(begin, write, [](int64_t) {});
}

template <typename Out, typename Tile>
const char* start(const BitmapDecompressArgs& args, CUstream_st* stream) {
  const BitmapPlan plan = bitmap_plan<Tile>(args.weight);
  const bool vectors = reinterpret_cast<uintptr_t>(args.out) % kUnitBytes == 0 &&
                       (args.weight.n == 1 || args.out_row * sizeof(Out) % kUnitBytes == 0);
  return launch(bitmap_decompress_kernel<Out, Tile>, bitmap_groups(args.weight, plan), kBitmapThreads,
                Tile::kBlockBytes, stream, args, plan, vectors);
}

template <typename Out>
const char* start_raw(const BitmapDecompressArgs& args, CUstream_st* stream) {
  return start<Out, BitmapTile<Out, 8 * sizeof(Out), false>>(args, stream);
}

template <typename Scale, typename Out>
const char* start_scaled(const BitmapDecompressArgs& args, CUstream_st* stream) {
  return args.weight.value_bits == 8 ? start<Out, BitmapTile<Scale, 8, true>>(args, stream)
                                     : start<Out, BitmapTile<Scale, 4, true>>(args, stream);
}

}  // namespace

const char* bitmap_decompress(const BitmapDecompressArgs& args, CUstream_st* stream) {
  if (args.weight.n == 0 || args.weight.k == 0) return nullptr;
  if (args.weight.scales == nullptr) {
    switch (args.weight.value_bits) {
      case 32:
        return start_raw<uint32_t>(args, stream);
      case 16:
        return start_raw<uint16_t>(args, stream);
      default:
        return start_raw<uint8_t>(args, stream);
    }
  }
  switch (args.weight.scale_dtype) {
    case Dtype::kFloat32:
      return start_scaled<float, uint32_t>(args, stream);
    case Dtype::kFloat16:
      return start_scaled<Float16, uint16_t>(args, stream);
    default:
      return start_scaled<BFloat16, uint16_t>(args, stream);
  }
}

}  // namespace cuda
}  // namespace headstart

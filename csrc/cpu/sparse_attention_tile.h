// The code that prefill and decode share: reading the index, and the running softmax of a tile.
#pragma once

#include "tile.h"

namespace headstart {
namespace {

constexpr int32_t kNowhere = INT32_MAX;  // the position of a column that takes no part

struct Iota {
  int32_t value[kTile];
  constexpr Iota() : value() {
    for (int i = 0; i < kTile; ++i) value[i] = i;
  }
};
constexpr Iota kIota;

// --- reading the index -------------------------------------------------------------------------------------------

struct Row {
  const int32_t* blocks;
  int64_t block_count;
  const int32_t* columns;
  int64_t column_count;
};

Row read_row(const IndexArgs& index, int64_t b, int64_t h, int64_t r) {
  Row row{};
  row.block_count = index.block_count[b * index.count_batch + h * index.count_head + r];
  row.blocks = index.block_index + b * index.index_batch + h * index.index_head + r * index.block_capacity;
  if (index.column_count != nullptr) {
    const int64_t c = index.shared_columns ? 0 : r;
    row.column_count = index.column_count[b * index.column_count_batch + h * index.column_count_head + c];
    row.columns =
        index.column_index + b * index.column_index_batch + h * index.column_index_head + c * index.column_capacity;
  }
  return row;
}

// The number of a row's blocks that come before `block`.
int64_t blocks_before(const Row& row, int64_t block) {
  int64_t lo = 0, hi = row.block_count;
  while (lo < hi) {
    const int64_t middle = (lo + hi) / 2;
    if (row.blocks[middle] < block) {
      lo = middle + 1;
    } else {
      hi = middle;
    }
  }
  return lo;
}

// Walks through the tiles of 64 keys that a row's blocks cover and that its queries may see.
struct TileWalk {
  TileWalk(const Row& row, int block_k, int64_t first_key, int64_t end_key)
      : row(row),
        tiles_per_block(block_k / kTile),
        first_tile(first_key / kTile),
        end_tile(ceil_div(end_key, kTile)),
        at(blocks_before(row, first_key / block_k) * tiles_per_block) {}

  // The next tile, or -1.
  int64_t next() {
    for (; at < row.block_count * tiles_per_block; ++at) {
      const int64_t tile = row.blocks[at / tiles_per_block] * tiles_per_block + at % tiles_per_block;
      if (tile >= end_tile) return -1;
      if (tile >= first_tile) {
        ++at;
        return tile;
      }
    }
    return -1;
  }

  const Row& row;
  int64_t tiles_per_block, first_tile, end_tile, at;
};

// A range of keys. visible_keys returns the keys that some query of [first_query, end_query) may see.
struct Range {
  int64_t first_key, end_key;
};

Range visible_keys(const SparseAttentionArgs& a, int64_t b, int64_t first_query, int64_t end_query) {
  const int64_t offset = a.nk - a.nq, start = a.kv_start == nullptr ? 0 : a.kv_start[b];
  return {max(max(start, 0), offset + first_query - a.window + 1), a.causal ? offset + end_query : a.nk};
}

// The first key in the window of the query at `position`, counted from `origin`. The result is at least -kTile: a lower
// value would make no difference.
int32_t window_start(const SparseAttentionArgs& a, int64_t position, int64_t origin) {
  return static_cast<int32_t>(max(position - a.window + 1 - origin, -kTile));
}

int64_t common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t r = a % b;
    a = b;
    b = r;
  }
  return a;
}

// --- running softmax ----------------------------------------------------------------------------------------------

// The running softmax of up to kTile rows.
struct Softmax {
  alignas(64) float maximum[kTile], base[kTile], rescale[kTile];
  alignas(64) float sum[kTile][Vec::width];  // one sum per lane; total() adds them up once, at the end

  void start(int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) maximum[i] = kNegInf;
    zero(sum[0], rows * Vec::width);
  }

  float total(int64_t i) const { return reduce_add(load(sum[i])); }
};

// Turns scores [rows][64] into weights relative to the running maximum. The weights replace the scores; with pair units
// they are written to as_bf16 instead. If `position` is null, no key is masked. Otherwise `position` has the 64 keys'
// positions. The rows are `cycle` queries of each head: with c = i mod cycle, row i sees the positions max(lo,
// window_lo + c) to hi + c * hi_step.
template <typename Unit>
inline void softmax_tile(Softmax& state, float* scores, BFloat16* as_bf16, int64_t rows, float scale,
                         const int32_t* position, int32_t lo, int32_t window_lo, int32_t hi, int32_t hi_step,
                         int64_t cycle) {
  constexpr int n = kTile / Vec::width;
  alignas(64) float top[kTile];
  for (int64_t i = 0; i < rows; ++i) {
    float* s = scores + i * kTile;
    const Vec factor = broadcast(scale);
    Vec most = broadcast(kNegInf);
    if (position == nullptr) {
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) most = max(most, load(s + j * Vec::width) * factor);
    } else {
      const auto query = static_cast<int32_t>(i % cycle);
      const int32_t first = window_lo + query > lo ? window_lo + query : lo, last = hi + query * hi_step;
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) {
        const Vec x = keep_between(load(s + j * Vec::width) * factor, position + j * Vec::width, first, last);
        store(s + j * Vec::width, x);
        most = max(most, x);
      }
    }
    top[i] = reduce_max(most);
  }
  for (int64_t i = rows; i < round_up(rows, Vec::width); ++i) top[i] = state.maximum[i] = kNegInf;
  for (int64_t i = 0; i < rows; i += Vec::width) {
    // The base of a row that has seen no key yet is 0, not -inf. So all its weights are exp2(-inf - 0) = 0.
    const Vec before = load(state.maximum + i), now = max(before, load(top + i));
    const Vec base = finite_or_zero(now);
    store(state.rescale + i, exp2(before - base));
    store(state.base + i, base);
    store(state.maximum + i, now);
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* s = scores + i * kTile;
    Vec factor = broadcast(position == nullptr ? scale : 1.0f);
    if (position == nullptr && !(__builtin_fabsf(state.base[i]) < 0x1p20f)) {
      // The fused multiply-add below does not round the product, but the maximum was taken of rounded products. At
      // logits this large the difference could reach the exponent. So round the products first, as for the maximum.
      for (int j = 0; j < n; ++j) store(s + j * Vec::width, load(s + j * Vec::width) * factor);
      factor = broadcast(1.0f);
    }
    const Vec shift = broadcast(-state.base[i]);
    Vec total = load(state.sum[i]) * broadcast(state.rescale[i]);
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) {
      const Vec x = exp2(fma(load(s + j * Vec::width), factor, shift));
      total = total + x;
      if (Unit::values == 2) {
        store(as_bf16 + i * kTile + j * Vec::width, x);
      } else {
        store(s + j * Vec::width, x);
      }
    }
    store(state.sum[i], total);
  }
}

}  // namespace
}  // namespace headstart

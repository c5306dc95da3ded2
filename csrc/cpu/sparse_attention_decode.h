// `FewRows`: decode, and every other call whose query rows are too few to repay packing the keys.
//
// Keys and values are read in place, once for all heads that share them. The keys are split into parts so that even one
// row uses every core. The parts are merged in a fixed order, so the result does not depend on the number of threads.
// Floor: the bytes of the attended keys and values at the machine's read bandwidth.
#pragma once

#include "in_place.h"
#include "sparse_attention_tile.h"

namespace headstart {
namespace {

constexpr int64_t kFewRows = 16;    // the largest number of query rows that share keys
constexpr int64_t kSplitTiles = 8;  // tiles of a part, which are 512 keys
constexpr int64_t kKeysAhead = 8;   // keys are prefetched this many keys ahead; values while their tile's keys are read

template <typename T>
struct FewRows {
  const SparseAttentionArgs& a;
  int64_t group, index_group, run, rows, padded_dim;

  // The rows of a job are the queries of `run` neighbouring heads, which read the same keys through the same list.
  explicit FewRows(const SparseAttentionArgs& args)
      : a(args),
        group(a.heads_q / a.heads_kv),
        index_group(a.heads_q / a.index.heads),
        run(common_divisor(group, index_group)),
        rows(run * a.nq),
        padded_dim(round_up(a.head_dim, kStep)) {}

  struct Part {
    int32_t run_at;
    int32_t tiles;
    int64_t first_tile;  // index in the list of all tiles
  };

  struct Scratch {
    explicit Scratch(int64_t padded_dim) : query(kFewRows * padded_dim), scores(kFewRows * kTile) {}
    Buffer<float> query, scores;
    struct Keys {  // the keys and values of a tile
      const T* k_rows[kTile];
      const T* v_rows[kTile];
      int32_t position[kTile];
    };
    Keys keys[2];  // the tile that is attended, and the next one
    Softmax softmax;
  };

  // The running maximum, the sum and the unnormalised output of a part, per row.
  struct State {
    float* maximum;
    float* sum;
    float* output;
  };

  int64_t batch_of(int64_t run_at) const { return run_at / (a.heads_q / run); }
  int64_t head_of(int64_t run_at) const { return run_at % (a.heads_q / run) * run; }
  Row row(int64_t run_at) const { return read_row(a.index, batch_of(run_at), head_of(run_at) / index_group, 0); }

  static bool covered(const Row& list, int32_t block) {
    const int64_t at = blocks_before(list, block);
    return at < list.block_count && list.blocks[at] == block;
  }

  // Sets the pointers to the 64 keys of a tile. tile >= 0 is a tile of neighbouring keys. tile < 0 stands for the
  // (-1 - tile)-th 64 columns of the list.
  void find_keys(typename Scratch::Keys& keys, int64_t b, int64_t kv_head, const Row& list, int32_t tile) const {
    for (int j = 0; j < kTile; ++j) {
      int64_t n;
      if (tile >= 0) {
        n = int64_t{tile} * kTile + j;
        if (n >= a.nk) n = kNowhere;
      } else {
        const int64_t c = (-1 - int64_t{tile}) * kTile + j;
        n = c < list.column_count ? list.columns[c] : kNowhere;
        if (n != kNowhere && covered(list, static_cast<int32_t>(n / a.block_k))) n = kNowhere;
      }
      keys.position[j] = static_cast<int32_t>(n);
      keys.k_rows[j] = row_of<T>(a.k, b, kv_head, n == kNowhere ? 0 : n);  // key 0 instead: its score is masked
      keys.v_rows[j] = n == kNowhere ? nullptr : row_of<T>(a.v, b, kv_head, n);
    }
  }

  void attend_part(Scratch& w, const Part& part, const int32_t* tiles, State state) const {
    const int64_t b = batch_of(part.run_at), h = head_of(part.run_at), kv_head = h / group;
    const Row list = row(part.run_at);
    const float scale = a.scale * kLog2E;
    const auto lo = static_cast<int32_t>(visible_keys(a, b, 0, a.nq).first_key);
    for (int64_t r = 0; r < rows; ++r) {
      read_row_in_steps(w.query + r * padded_dim, row_of<T>(a.q, b, h + r / a.nq, r % a.nq), a.head_dim);
    }
    w.softmax.start(rows);
    zero(state.output, rows * padded_dim);
    const int64_t last = a.causal ? a.nk - a.nq : a.nk - 1;
    find_keys(w.keys[0], b, kv_head, list, tiles[part.first_tile]);
    for (int64_t t = 0; t < part.tiles; ++t) {
      const auto &keys = w.keys[t % 2], &next = w.keys[1 - t % 2];
      const bool more = t + 1 < part.tiles;
      if (more) find_keys(w.keys[1 - t % 2], b, kv_head, list, tiles[part.first_tile + t + 1]);
      const auto fetch = [&](int64_t j) __attribute__((always_inline)) {
        if (j + kKeysAhead < kTile) {
          prefetch_row(keys.k_rows[j + kKeysAhead], a.head_dim);
        } else if (more) {
          prefetch_row(next.k_rows[j + kKeysAhead - kTile], a.head_dim);
        }
        prefetch_row(keys.v_rows[j], a.head_dim);
      };
      dot_rows<T>(
          rows, w.query, padded_dim, a.head_dim, [&](int64_t j) { return keys.k_rows[j]; }, kTile, w.scores, kTile,
          fetch);
      softmax_tile<FloatUnit>(w.softmax, w.scores, nullptr, rows, scale, keys.position, lo,
                              window_start(a, a.nk - a.nq, 0), static_cast<int32_t>(last), a.causal ? 1 : 0, a.nq);
      add_rows(rows, state.output, padded_dim, a.head_dim, keys.v_rows, kTile, w.scores, kTile, w.softmax.rescale);
    }
    for (int64_t r = 0; r < rows; ++r) {
      state.maximum[r] = w.softmax.maximum[r];
      state.sum[r] = w.softmax.total(r);
    }
  }

  // Merges a run's parts, in order, and writes its rows.
  void join(int64_t run_at, int64_t parts, State state) const {
    const int64_t b = batch_of(run_at), h = head_of(run_at);
    for (int64_t r = 0; r < rows; ++r) {
      float top = kNegInf;
      for (int64_t p = 0; p < parts; ++p) top = state.maximum[p * rows + r] > top ? state.maximum[p * rows + r] : top;
      const int64_t at = (b * a.heads_q + h + r / a.nq) * a.nq + r % a.nq;
      float total = 0.0f;
      float* sum = state.output + r * padded_dim;  // the first part's output becomes the sum
      for (int64_t p = 0; p < parts; ++p) {
        const float weight = top == kNegInf ? 0.0f : exp2(state.maximum[p * rows + r] - top);
        total += weight * state.sum[p * rows + r];
        const float* from = state.output + (p * rows + r) * padded_dim;
        for (int64_t d = 0; d < padded_dim; d += Vec::width) {
          const Vec x = load(from + d) * broadcast(weight);
          store(sum + d, p == 0 ? x : load(sum + d) + x);
        }
      }
      const bool empty = parts == 0 || total == 0.0f;
      T* out = static_cast<T*>(a.out) + at * a.head_dim;
      if (empty) {
        std::memset(out, 0, static_cast<size_t>(a.head_dim) * sizeof(T));
      } else {
        write_row_of_steps(out, sum, a.head_dim, broadcast(1.0f / total));
      }
      a.lse[at] = empty ? kNegInf : top * kLn2 + __builtin_logf(total);
    }
  }

  void run_all(const Parallel& parallel) const {
    const int64_t runs = a.batch * (a.heads_q / run);
    Buffer<int64_t> first_part(runs + 1);
    int64_t tile_count = 0, part_count = 0;
    for (int64_t i = 0; i < runs; ++i) {
      first_part[i] = part_count;
      const int64_t n = list_tiles(i, nullptr);
      tile_count += n;
      part_count += ceil_div(n, kSplitTiles);
    }
    first_part[runs] = part_count;

    Buffer<int32_t> tiles(tile_count);
    Buffer<Part> parts(part_count);
    Buffer<float> maximum(part_count * rows), sum(part_count * rows), output(part_count * rows * padded_dim);
    PerWorker<Scratch> scratch(parallel.workers, padded_dim);
    int64_t at = 0;
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t n = list_tiles(i, tiles + at);
      for (int64_t t = 0; t < n; t += kSplitTiles) {
        parts[first_part[i] + t / kSplitTiles] = {static_cast<int32_t>(i),
                                                  static_cast<int32_t>(min(kSplitTiles, n - t)), at + t};
      }
      at += n;
    }
    const auto state = [&](int64_t part) {
      return State{maximum + part * rows, sum + part * rows, output + part * rows * padded_dim};
    };
    for_each_job(parallel, part_count,
                 [&](int64_t i, int worker) { attend_part(scratch[worker], parts[i], tiles, state(i)); });
    for_each_job(parallel, runs,
                 [&](int64_t i, int) { join(i, first_part[i + 1] - first_part[i], state(first_part[i])); });
  }

  // Lists the tiles that a run attends, in the form that `find_keys` reads. Returns their number.
  int64_t list_tiles(int64_t run_at, int32_t* tiles) const {
    const Row list = row(run_at);
    const Range range = visible_keys(a, batch_of(run_at), 0, a.nq);
    TileWalk walk(list, a.block_k, range.first_key, range.end_key);
    int64_t n = 0;
    for (int64_t tile; (tile = walk.next()) >= 0; ++n) {
      if (tiles != nullptr) tiles[n] = static_cast<int32_t>(tile);
    }
    for (int64_t c = 0; c * kTile < list.column_count && list.columns[c * kTile] < range.end_key; ++c) {
      if (list.columns[min((c + 1) * kTile, list.column_count) - 1] < range.first_key) continue;
      if (tiles != nullptr) tiles[n] = static_cast<int32_t>(-1 - c);
      ++n;
    }
    return n;
  }
};

}  // namespace
}  // namespace headstart

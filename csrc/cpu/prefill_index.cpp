// The index builders of sparse prefill on the CPU. `reference/prefill_index.py` defines what each of them computes.
//
//   vertical_slash_index   per head: last_q × Nk scores, softmax, sums down columns and along diagonals, two top-k
//   block_topk_index       per head: means of 64 tokens, (Nk / 64)² scores, top-k
//   adaptive_block_index   per head and rows: (Nk / stride)² scores of depth stride · D, softmax, mass per block, cut;
//                          with samples, also exact scores of some queries of every row
//
// All three multiply with the tiles of tile.h. adaptive_block_index is the most expensive. It packs the keys once per
// KV head in tiles of 64 groups. The `stride` tokens of a group, in reverse order, are the tile's depth:
//
//     query group (stride · D units, as the tokens lie in memory)
//       [ q0 q1 ... q7 ]  ·  [ k7 ]      antidiagonal of the stride × stride tile,
//                            [ k6 ]      64 key groups side by side
//                            [ .. ]
//                            [ k0 ]
//
// Floor: 1 / (2 · stride) of dense attention's multiply-adds, plus one exp2 per pair of groups. `samples` queries in a
// row of block_q add samples / (2 · block_q) of the multiply-adds, and one exp2 for each of their scores. The sampled
// scores are not stored. Each tile of 64 keys keeps only its maximum and its sum, and the tiles are merged when the row
// is done.

#include <algorithm>

#include "tile.h"

namespace headstart {
namespace {

int64_t start_of(const PrefillIndexArgs& a, int64_t b) { return a.kv_start == nullptr ? 0 : max(a.kv_start[b], 0); }

// The positions of a row of queries, the key blocks that the row may see, and the blocks that it must take (forced).
struct RowBlocks {
  int64_t first_position, last_position;  // the positions of the row's first and last query
  int64_t begin, end;                     // the visible blocks are [begin, end)
  int64_t sink_end, window_begin;         // the forced blocks are [begin, sink_end) and [window_begin, end)

  RowBlocks(const PrefillIndexArgs& a, int64_t b, int64_t row) {
    const int64_t start = start_of(a, b);
    first_position = a.nk - a.nq + row * a.block_q;
    last_position = min(first_position + a.block_q, a.nk) - 1;
    begin = start / a.block_k;
    end = last_position < start ? begin : last_position / a.block_k + 1;
    sink_end = min(end, a.sink > 0 ? ceil_div(start + a.sink, a.block_k) : begin);
    window_begin = a.local > 0 ? max(begin, max(0, first_position - a.local + 1) / a.block_k) : end;
  }

  bool forced(int64_t block) const { return block < sink_end || block >= window_begin; }
};

int32_t* index_row(const PrefillIndexArgs& a, int64_t at) { return a.block_index + at * a.block_capacity; }

// Writes the chosen ids in ascending order. Unused entries become 0.
template <typename Chosen>
void write_row(const PrefillIndexArgs& a, int64_t at, int64_t begin, int64_t end, const Chosen& chosen) {
  int32_t* to = index_row(a, at);
  int64_t n = 0;
  for (int64_t block = begin; block < end; ++block) {
    if (chosen(block)) to[n++] = static_cast<int32_t>(block);
  }
  a.block_count[at] = static_cast<int32_t>(n);
  std::memset(to + n, 0, static_cast<size_t>(a.block_capacity - n) * sizeof(int32_t));
}

// Moves the `count` best of ids[0, n) to the front. A higher score is better; of equal scores, the lower id is better.
// The lambda's type is local, so every tier has its own instantiation of the std:: algorithm (vec.h).
void best_first(int32_t* ids, int64_t n, int64_t count, const float* score) {
  const auto better = [score](int32_t x, int32_t y) { return score[x] > score[y] || (score[x] == score[y] && x < y); };
  if (count < n) std::nth_element(ids, ids + count, ids + n, better);
}

void sort_by_score(int32_t* ids, int64_t n, const float* score) {
  std::sort(ids, ids + n,
            [score](int32_t x, int32_t y) { return score[x] > score[y] || (score[x] == score[y] && x < y); });
}

constexpr float kForced = __builtin_inff();

// --- vertical-slash ----------------------------------------------------------------------------------------------

template <typename T>
struct VerticalSlash {
  using Unit = typename UnitOf<T>::Type;
  using U = typename Unit::Type;
  const VerticalSlashArgs& a;
  int64_t last_q, padded_nk, bands, rows;

  explicit VerticalSlash(const VerticalSlashArgs& args)
      : a(args),
        last_q(min(a.last_q, a.nq)),
        padded_nk(round_up(a.nk, kTile)),
        bands(a.nk / a.block_k + 2 + a.block_q / a.block_k),
        rows(ceil_div(a.nq, a.block_q)) {}

  struct Scratch {
    Scratch(int64_t dim, int64_t last_q, int64_t padded_nk, int64_t bands)
        : query(last_q * dim),
          tile(dim * kTile),
          scores(last_q * padded_nk),
          column(padded_nk),
          diagonal(padded_nk + last_q),
          band(bands),
          ids(padded_nk),
          kept(bands) {}
    Buffer<U> query, tile;
    Buffer<float> scores, column, diagonal, band;
    Buffer<int32_t> ids;
    Buffer<uint8_t> kept;
  };

  void score(Scratch& w, int64_t b, int64_t h) const {
    const int64_t depth = a.head_dim / Unit::values;
    for (int64_t i = 0; i < last_q; ++i) {
      const T* row = row_of<T>(a.q, b, h, a.nq - last_q + i);
      pack_queries(w.query + i * depth, &row, 1, a.head_dim, Unit());
    }
    for (int64_t first = 0; first < a.nk; first += kTile) {
      const T* k_rows[kTile];
      for (int j = 0; j < kTile; ++j) {
        k_rows[j] = first + j < a.nk ? row_of<T>(a.k, b, h / (a.heads_q / a.heads_kv), first + j) : nullptr;
      }
      pack_keys(w.tile, k_rows, a.head_dim, Unit());
      matmul<Unit, Start::kZero>(last_q, kTile, depth, w.query, depth, w.tile, kTile, w.scores + first, padded_nk);
    }
  }

  // Adds the softmax of every row to the column sums and to the diagonal sums. Key j of query i is added to
  // diagonal[j + last_q - 1 - i], so both arrays are accessed in memory order.
  void sum_up(Scratch& w, int64_t b) const {
    const int64_t start = start_of(a, b);
    zero(w.column, padded_nk);
    zero(w.diagonal, padded_nk + last_q);
    const float scale = a.scale * kLog2E;
    for (int64_t i = 0; i < last_q; ++i) {
      float* s = w.scores + i * padded_nk;
      const int64_t end = a.nk - last_q + i + 1;
      if (start >= end) continue;
      const int64_t padded_end = round_up(end, Vec::width);
      for (int64_t j = 0; j < padded_end; j += Vec::width) store(s + j, load(s + j) * broadcast(scale));
      for (int64_t j = 0; j < start; ++j) s[j] = kNegInf;
      for (int64_t j = end; j < padded_nk; ++j) s[j] = kNegInf;
      Vec top = broadcast(kNegInf);
      for (int64_t j = 0; j < padded_end; j += Vec::width) top = max(top, load(s + j));
      const Vec shift = broadcast(reduce_max(top));
      Vec total = broadcast(0.0f);
      for (int64_t j = 0; j < padded_end; j += Vec::width) {
        const Vec x = exp2(load(s + j) - shift);
        store(s + j, x);
        total = total + x;
      }
      const Vec inverse = broadcast(1.0f / reduce_add(total));
      float* diagonal = w.diagonal + last_q - 1 - i;
      for (int64_t j = 0; j < padded_end; j += Vec::width) {
        const Vec x = load(s + j) * inverse;
        store(w.column + j, load(w.column + j) + x);
        store(diagonal + j, load(diagonal + j) + x);
      }
    }
  }

  void choose_columns(Scratch& w, int64_t b, int64_t h) const {
    const int64_t start = start_of(a, b), n = max(0, a.nk - start);
    for (int64_t j = start; j < min(a.nk, start + a.sink); ++j) w.column[j] = kForced;
    for (int64_t j = 0; j < n; ++j) w.ids[j] = static_cast<int32_t>(start + j);
    const int64_t count = min(a.column_capacity, n);
    best_first(w.ids, n, count, w.column);
    std::sort(w.ids + 0, w.ids + count, [](int32_t x, int32_t y) { return x < y; });
    int32_t* to = a.column_index + (b * a.heads_q + h) * a.column_capacity;
    std::memcpy(to, w.ids, static_cast<size_t>(count) * sizeof(int32_t));
    std::memset(to + count, 0, static_cast<size_t>(a.column_capacity - count) * sizeof(int32_t));
    a.column_count[b * a.heads_q + h] = static_cast<int32_t>(count);
  }

  void choose_bands(Scratch& w) const {
    const int64_t width = max(a.block_q, a.block_k), spread = width / a.block_k;
    const int64_t edge = a.block_q >= a.block_k ? a.block_k - 1 - (a.nk - a.nq + a.block_q - 1) % a.block_k : 0;
    zero(w.band, bands);
    for (int64_t offset = 0; offset < a.nk; ++offset) {
      // Key j is offset = nk - last_q + i - j positions before query i. Its sum is diagonal[nk - 1 - offset].
      const float mass = w.diagonal[a.nk - 1 - offset];
      const int64_t band = (offset + edge) / a.block_k, within = (offset + edge) % a.block_k;
      for (int64_t step = 0; step <= spread; ++step) {
        const int64_t share = step == 0 ? a.block_k - within : step == spread ? within : a.block_k;
        w.band[band + step] += mass * (static_cast<float>(share) / static_cast<float>(width));
      }
    }
    if (a.local > 0) {
      for (int64_t t = 0; t <= (a.local - 1 + edge) / a.block_k && t < bands; ++t) w.band[t] = kForced;
    }
    for (int64_t t = 0; t < bands; ++t) w.ids[t] = static_cast<int32_t>(t);
    const int64_t count = min(a.block_capacity, bands);
    best_first(w.ids, bands, count, w.band);
    std::memset(w.kept, 0, static_cast<size_t>(bands));
    for (int64_t i = 0; i < count; ++i) w.kept[w.ids[i]] = 1;
  }

  void run_all(const Parallel& parallel) const {
    PerWorker<Scratch> scratch(parallel.workers, a.head_dim, last_q, padded_nk, max(bands, padded_nk));
    for_each_job(parallel, a.batch * a.heads_q, [&](int64_t at, int worker) {
      Scratch& w = scratch[worker];
      const int64_t b = at / a.heads_q, h = at % a.heads_q;
      score(w, b, h);
      sum_up(w, b);
      choose_columns(w, b, h);
      choose_bands(w);
      for (int64_t r = 0; r < rows; ++r) {
        const RowBlocks row(a, b, r);
        const int64_t anchor = row.last_position / a.block_k;
        write_row(a, at * rows + r, row.begin, row.end, [&](int64_t block) { return w.kept[anchor - block] != 0; });
      }
    });
  }
};

// --- block top-k -------------------------------------------------------------------------------------------------

template <typename T>
struct BlockTopK {
  const PrefillIndexArgs& a;
  int64_t rows, blocks, padded_dim, padded_blocks;

  explicit BlockTopK(const PrefillIndexArgs& args)
      : a(args),
        rows(ceil_div(a.nq, a.block_q)),
        blocks(ceil_div(a.nk, a.block_k)),
        padded_dim(round_up(a.head_dim, Vec::width)),
        padded_blocks(round_up(blocks, kTile)) {}

  struct Scratch {
    Scratch(int64_t dim, int64_t padded_blocks)
        : tile(dim * kTile), scores(kTile * padded_blocks), ids(padded_blocks), kept(padded_blocks) {}
    Buffer<float> tile, scores;
    Buffer<int32_t> ids;
    Buffer<uint8_t> kept;
  };

  // Writes the mean of tokens [first, end) of one head.
  void mean(float* to, const Tensor4& x, int64_t b, int64_t h, int64_t first, int64_t end) const {
    zero(to, padded_dim);
    float row[256 + Vec::width];
    for (int64_t n = first; n < end; ++n) {
      convert_row(row, row_of<T>(x, b, h, n), a.head_dim);
      for (int64_t d = 0; d < padded_dim; d += Vec::width) store(to + d, load(to + d) + load(row + d));
    }
    const Vec inverse = broadcast(1.0f / static_cast<float>(max(1, end - first)));
    for (int64_t d = 0; d < padded_dim; d += Vec::width) store(to + d, load(to + d) * inverse);
  }

  void run_all(const Parallel& parallel) const {
    Buffer<float> q_means(a.batch * a.heads_q * rows * padded_dim), k_means(a.batch * a.heads_kv * blocks * padded_dim);
    for_each_job(parallel, a.batch * a.heads_q, [&](int64_t at, int) {
      const int64_t b = at / a.heads_q, offset = a.nk - a.nq;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t first = max(r * a.block_q, start_of(a, b) - offset), end = min((r + 1) * a.block_q, a.nq);
        mean(q_means + (at * rows + r) * padded_dim, a.q, b, at % a.heads_q, first, end);
      }
    });
    for_each_job(parallel, a.batch * a.heads_kv, [&](int64_t at, int) {
      const int64_t b = at / a.heads_kv;
      for (int64_t t = 0; t < blocks; ++t) {
        const int64_t first = max(t * a.block_k, start_of(a, b)), end = min((t + 1) * a.block_k, a.nk);
        mean(k_means + (at * blocks + t) * padded_dim, a.k, b, at % a.heads_kv, first, end);
      }
    });
    PerWorker<Scratch> scratch(parallel.workers, a.head_dim, padded_blocks);
    const int64_t chunks = ceil_div(rows, kTile);
    for_each_job(parallel, a.batch * a.heads_q * chunks, [&](int64_t job, int worker) {
      const int64_t at = job / chunks, first_row = job % chunks * kTile;
      choose(scratch[worker], at, first_row, q_means + (at * rows + first_row) * padded_dim,
             k_means + (at / a.heads_q * a.heads_kv + at % a.heads_q / (a.heads_q / a.heads_kv)) * blocks * padded_dim);
    });
  }

  void choose(Scratch& w, int64_t at, int64_t first_row, const float* q_mean, const float* k_mean) const {
    const int64_t count = min(kTile, rows - first_row);
    for (int64_t first = 0; first < blocks; first += kTile) {
      const float* k_rows[kTile];
      for (int j = 0; j < kTile; ++j) k_rows[j] = first + j < blocks ? k_mean + (first + j) * padded_dim : nullptr;
      pack_keys(w.tile, k_rows, a.head_dim, FloatUnit());
      matmul<FloatUnit, Start::kZero>(count, kTile, a.head_dim, q_mean, padded_dim, w.tile, kTile, w.scores + first,
                                      padded_blocks);
    }
    for (int64_t i = 0; i < count; ++i) {
      const RowBlocks row(a, at / a.heads_q, first_row + i);
      float* score = w.scores + i * padded_blocks;
      const int64_t n = row.end - row.begin;
      for (int64_t j = 0; j < n; ++j) {
        w.ids[j] = static_cast<int32_t>(row.begin + j);
        if (row.forced(row.begin + j)) score[row.begin + j] = kForced;
      }
      const int64_t kept = min(a.block_capacity, n);
      best_first(w.ids, n, kept, score);
      std::memset(w.kept, 0, static_cast<size_t>(blocks));
      for (int64_t j = 0; j < kept; ++j) w.kept[w.ids[j]] = 1;
      write_row(a, at * rows + first_row + i, row.begin, row.end, [&](int64_t block) { return w.kept[block] != 0; });
    }
  }
};

// --- adaptive ----------------------------------------------------------------------------------------------------

template <typename T>
struct Adaptive {
  using Unit = typename UnitOf<T>::Type;
  using U = typename Unit::Type;
  const AdaptiveArgs& a;
  int64_t rows, blocks, stride, depth, key_groups, key_tiles, tile_units, groups_per_row, rows_per_job, score_width;
  int64_t sample_tiles,
      sample_units;  // tiles of 64 single keys for the sampled queries (0 without samples); their size

  explicit Adaptive(const AdaptiveArgs& args)
      : a(args),
        rows(ceil_div(a.nq, a.block_q)),
        blocks(ceil_div(a.nk, a.block_k)),
        stride(a.stride),
        depth(stride * a.head_dim / Unit::values),
        key_groups(ceil_div(a.nk, stride)),
        key_tiles(ceil_div(key_groups, kTile)),
        tile_units(depth * kTile),
        groups_per_row(a.block_q / stride),
        rows_per_job(max(1, 48 / groups_per_row)),
        score_width(key_tiles * kTile),
        sample_tiles(a.samples == 0 ? 0 : ceil_div(a.nk, kTile)),
        sample_units(a.head_dim / Unit::values * kTile) {}

  struct Scratch {
    explicit Scratch(const Adaptive& builder)
        : query(builder.rows_per_job * builder.groups_per_row * builder.depth),
          scores(builder.rows_per_job * builder.groups_per_row * builder.score_width),
          mass(builder.blocks),
          key(builder.blocks),
          sample_query(builder.samples_per_job() * builder.a.head_dim / Unit::values),
          sample_scores(builder.samples_per_job() * kTile),
          top(builder.samples_per_job() * builder.sample_tiles),
          sum(builder.samples_per_job() * builder.sample_tiles),
          ids(builder.blocks),
          kept(builder.blocks) {}
    Buffer<U> query;
    Buffer<float> scores, mass, key;
    Buffer<U> sample_query;
    Buffer<float> sample_scores, top, sum;  // scores of one tile; top and sum of every tile of every sampled query
    Buffer<int32_t> ids;
    Buffer<uint8_t> kept;
  };

  int64_t samples_per_job() const { return rows_per_job * a.samples; }

  // The query of sample `i` of a row. The samples are spread evenly, and the last one is the row's last query.
  int64_t sampled_query(int64_t row, int64_t i) const {
    return min(row * a.block_q + (i + 1) * a.block_q / a.samples, a.nq) - 1;
  }

  // Packs a tile of 64 key groups. Its depth runs over the group's tokens from the last to the first.
  void pack_tile(U* tile, int64_t b, int64_t kv_head, int64_t first_group) const {
    const int64_t start = start_of(a, b);
    for (int64_t s = 0; s < stride; ++s) {
      const T* k_rows[kTile];
      for (int64_t j = 0; j < kTile; ++j) {
        const int64_t n = (first_group + j) * stride + stride - 1 - s;
        k_rows[j] = n >= start && n < a.nk ? row_of<T>(a.k, b, kv_head, n) : nullptr;
      }
      pack_keys(tile + s * (depth / stride) * kTile, k_rows, a.head_dim, Unit());
    }
  }

  void pack_sample_tile(U* tile, int64_t b, int64_t kv_head, int64_t at) const {
    const T* k_rows[kTile];
    for (int64_t j = 0; j < kTile; ++j) {
      k_rows[j] = at * kTile + j < a.nk ? row_of<T>(a.k, b, kv_head, at * kTile + j) : nullptr;
    }
    pack_keys(tile, k_rows, a.head_dim, Unit());
  }

  void run_all(const Parallel& parallel) const {
    // A wave is a number of KV heads, at least one, whose packed keys stay below this size.
    constexpr int64_t kWaveBytes = int64_t{256} << 20;
    const int64_t pairs = a.batch * a.heads_kv, group = a.heads_q / a.heads_kv;
    const int64_t pair_bytes = (key_tiles * tile_units + sample_tiles * sample_units) * static_cast<int64_t>(sizeof(U));
    const int64_t wave = max(1, min(pairs, kWaveBytes / pair_bytes));
    const int64_t chunks = ceil_div(rows, rows_per_job);
    Buffer<U> keys(wave * key_tiles * tile_units), sample_keys(wave * sample_tiles * sample_units);
    PerWorker<Scratch> scratch(parallel.workers, *this);
    for (int64_t first = 0; first < pairs; first += wave) {
      const int64_t count = min(wave, pairs - first);
      for_each_job(parallel, count * key_tiles, [&](int64_t at, int) {
        const int64_t pair = first + at / key_tiles;
        pack_tile(keys + at * tile_units, pair / a.heads_kv, pair % a.heads_kv, at % key_tiles * kTile);
      });
      for_each_job(parallel, count * sample_tiles, [&](int64_t at, int) {
        const int64_t pair = first + at / sample_tiles;
        pack_sample_tile(sample_keys + at * sample_units, pair / a.heads_kv, pair % a.heads_kv, at % sample_tiles);
      });
      // Later rows see more keys, so the last chunks come first.
      for_each_job(parallel, count * group * chunks, [&](int64_t job, int worker) {
        const int64_t chunk = chunks - 1 - job / (count * group), pair = job % (count * group) / group;
        const int64_t b = (first + pair) / a.heads_kv;
        const int64_t h = (first + pair) % a.heads_kv * group + job % group;
        estimate(scratch[worker], b, h, chunk * rows_per_job, keys + pair * key_tiles * tile_units,
                 sample_keys + pair * sample_tiles * sample_units);
      });
    }
  }

  // The key groups [first, end) that a query group sees.
  struct GroupRange {
    int64_t first, end;
  };

  GroupRange visible_groups(int64_t b, int64_t query_group) const {
    const int64_t last = min((query_group + 1) * stride, a.nq) - 1 + a.nk - a.nq, start = start_of(a, b);
    if (last < start) return {0, 0};
    return {start / stride, last / stride + 1};
  }

  void estimate(Scratch& w, int64_t b, int64_t h, int64_t first_row, const U* keys, const U* sample_keys) const {
    const int64_t first_group = first_row * groups_per_row;
    const int64_t groups = min(rows_per_job * groups_per_row, ceil_div(a.nq, stride) - first_group);
    for (int64_t n = 0; n < groups * stride; ++n) {
      const int64_t token = first_group * stride + n;
      const T* row = token < a.nq ? row_of<T>(a.q, b, h, token) : nullptr;
      pack_queries(w.query + n * (depth / stride), &row, 1, a.head_dim, Unit());
    }
    const int64_t tiles = ceil_div(visible_groups(b, first_group + groups - 1).end, kTile);
    // Go through the depth in steps of one token, so that a step's part of the tile stays in L1 for all rows.
    const int64_t step = depth / stride;
    for (int64_t t = 0; t < tiles; ++t) {
      const U* tile = keys + t * tile_units;
      float* to = w.scores + t * kTile;
      matmul<Unit, Start::kZero>(groups, kTile, step, w.query, depth, tile, kTile, to, score_width);
      for (int64_t s = 1; s < stride; ++s) {
        matmul<Unit, Start::kAdd>(groups, kTile, step, w.query + s * step, depth, tile + s * step * kTile, kTile, to,
                                  score_width);
      }
    }
    const int64_t job_rows = min(rows_per_job, rows - first_row);
    if (a.samples > 0) score_samples(w, b, h, first_row, job_rows, sample_keys);
    for (int64_t r = 0; r < job_rows; ++r) {
      zero(w.mass, blocks);
      for (int64_t g = r * groups_per_row; g < min(groups, (r + 1) * groups_per_row); ++g) {
        add_mass(w, w.scores + g * score_width, visible_groups(b, first_group + g));
      }
      for (int64_t i = 0; i < a.samples; ++i) add_sample(w, b, r * a.samples + i, sampled_query(first_row + r, i));
      choose(w, b, h, first_row + r);
    }
  }

  // Adds a share of a block's mass. With samples, the mass is the largest share that a query group or a sampled query
  // gives the block. Without samples, it is the sum over the query groups.
  void add(Scratch& w, int64_t block, float share) const {
    w.mass[block] = a.samples == 0 ? w.mass[block] + share : share > w.mass[block] ? share : w.mass[block];
  }

  // Computes the maximum and the sum of exp2(score - maximum) of every tile of keys, for the sampled queries of some
  // rows.
  void score_samples(Scratch& w, int64_t b, int64_t h, int64_t first_row, int64_t job_rows, const U* keys) const {
    const int64_t count = job_rows * a.samples, dim_units = a.head_dim / Unit::values, start = start_of(a, b);
    const int64_t tiles = ceil_div(sampled_query(first_row + job_rows - 1, a.samples - 1) + 1 + a.nk - a.nq, kTile);
    for (int64_t n = 0; n < count; ++n) {
      const T* row = row_of<T>(a.q, b, h, sampled_query(first_row + n / a.samples, n % a.samples));
      pack_queries(w.sample_query + n * dim_units, &row, 1, a.head_dim, Unit());
    }
    const Vec scale = broadcast(a.scale * kLog2E);
    for (int64_t t = 0; t < tiles; ++t) {
      matmul<Unit, Start::kZero>(count, kTile, dim_units, w.sample_query, dim_units, keys + t * sample_units, kTile,
                                 w.sample_scores, kTile);
      for (int64_t n = 0; n < count; ++n) {
        float* s = w.sample_scores + n * kTile;
        const int64_t position = sampled_query(first_row + n / a.samples, n % a.samples) + a.nk - a.nq;
        const int64_t first = max(start - t * kTile, 0), end = min(position + 1 - t * kTile, kTile);
        float& tile_top = w.top[n * sample_tiles + t];
        float& tile_sum = w.sum[n * sample_tiles + t];
        tile_top = kNegInf;
        tile_sum = 0.0f;
        if (first >= end) continue;
        for (int64_t j = 0; j < kTile; j += Vec::width) store(s + j, load(s + j) * scale);
        for (int64_t j = 0; j < first; ++j) s[j] = kNegInf;
        for (int64_t j = end; j < kTile; ++j) s[j] = kNegInf;
        Vec top = broadcast(kNegInf);
        for (int64_t j = 0; j < kTile; j += Vec::width) top = max(top, load(s + j));
        tile_top = reduce_max(top);
        const Vec shift = broadcast(tile_top);
        Vec sum = broadcast(0.0f);
        for (int64_t j = 0; j < kTile; j += Vec::width) sum = sum + exp2(load(s + j) - shift);
        tile_sum = reduce_add(sum);
      }
    }
  }

  // Adds the shares of one sampled query. They follow from its tiles' maxima and sums, which score_samples wrote.
  void add_sample(Scratch& w, int64_t b, int64_t n, int64_t query) const {
    const int64_t position = query + a.nk - a.nq;
    if (position < start_of(a, b)) return;
    const int64_t tiles = position / kTile + 1, per_block = a.block_k / kTile;
    const float* top = w.top + n * sample_tiles;
    float* sum = w.sum + n * sample_tiles;
    float highest = kNegInf;
    for (int64_t t = 0; t < tiles; ++t) highest = top[t] > highest ? top[t] : highest;
    float total = 0.0f;
    for (int64_t t = 0; t < tiles; ++t) {
      if (top[t] > kNegInf) sum[t] *= __builtin_exp2f(top[t] - highest);
      total += sum[t];
    }
    const float inverse = 1.0f / total;
    for (int64_t t = 0; t < tiles; t += per_block) {
      float share = 0.0f;
      for (int64_t i = t; i < min(t + per_block, tiles); ++i) share += sum[i];
      add(w, t / per_block, share * inverse);
    }
  }

  // Adds the shares that the softmax of one query group's scores gives to its key blocks.
  void add_mass(Scratch& w, float* s, GroupRange range) const {
    if (range.first >= range.end) return;
    const float scale = a.scale / static_cast<float>(stride) * kLog2E;
    const int64_t begin = range.first / Vec::width * Vec::width, end = round_up(range.end, Vec::width);
    for (int64_t j = begin; j < end; j += Vec::width) store(s + j, load(s + j) * broadcast(scale));
    for (int64_t j = begin; j < range.first; ++j) s[j] = kNegInf;
    for (int64_t j = range.end; j < end; ++j) s[j] = kNegInf;
    Vec top = broadcast(kNegInf);
    for (int64_t j = begin; j < end; j += Vec::width) top = max(top, load(s + j));
    const Vec shift = broadcast(reduce_max(top));
    Vec total = broadcast(0.0f);
    for (int64_t j = begin; j < end; j += Vec::width) {
      const Vec x = exp2(load(s + j) - shift);
      store(s + j, x);
      total = total + x;
    }
    const float inverse = 1.0f / reduce_add(total);
    const int64_t per_block = a.block_k / stride;
    for (int64_t block = range.first / per_block; block * per_block < range.end; ++block) {
      float sum = 0.0f;
      const int64_t last = min((block + 1) * per_block, range.end);
      for (int64_t j = max(block * per_block, range.first); j < last; ++j) sum += s[j];
      add(w, block, sum * inverse);
    }
  }

  void choose(Scratch& w, int64_t b, int64_t h, int64_t r) const {
    const RowBlocks row(a, b, r);
    const int64_t n = row.end - row.begin;
    float total = 0.0f;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t block = row.begin + j;
      w.ids[j] = static_cast<int32_t>(block);
      w.key[block] = row.forced(block) ? kForced : w.mass[block];
      total += w.mass[block];
    }
    sort_by_score(w.ids, n, w.key);
    const float goal = total * (a.head_threshold == nullptr ? a.threshold : a.head_threshold[h]);
    std::memset(w.kept, 0, static_cast<size_t>(blocks));
    float held = 0.0f;
    for (int64_t j = 0; j < min(n, a.block_capacity); ++j) {
      const int32_t block = w.ids[j];
      if (held >= goal && !row.forced(block)) break;
      w.kept[block] = 1;
      held += w.mass[block];
    }
    write_row(a, (b * a.heads_q + h) * rows + r, row.begin, row.end, [&](int64_t block) { return w.kept[block] != 0; });
  }
};

template <template <typename> class Builder, typename Args>
void build(const Args& a, const Parallel& parallel) {
  switch (a.dtype) {
    case Dtype::kFloat32:
      return Builder<float>(a).run_all(parallel);
    case Dtype::kFloat16:
      return Builder<Float16>(a).run_all(parallel);
    case Dtype::kBFloat16:
      return Builder<BFloat16>(a).run_all(parallel);
  }
}

}  // namespace

namespace HEADSTART_TIER {

void vertical_slash_index(const VerticalSlashArgs& a, const Parallel& parallel) { build<VerticalSlash>(a, parallel); }
void block_topk_index(const PrefillIndexArgs& a, const Parallel& parallel) { build<BlockTopK>(a, parallel); }
void adaptive_block_index(const AdaptiveArgs& a, const Parallel& parallel) { build<Adaptive>(a, parallel); }

}  // namespace HEADSTART_TIER
}  // namespace headstart

// Sparse attention on the CPU: one kernel for every index, and the merge of two results.
//
// Prefill (many query rows):                             per job: one head, 64 query rows
//
//   K, V of a KV head, packed once        key tile t      value tile t
//     ┌──┬──┬──┬─ ─┬──┐                   ┌────────┐      ┌────────┐
//     │0 │1 │2 │...│  │ 64 keys each      │ D × 64 │      │64 × D  │
//     └──┴──┴──┴─ ─┴──┘                   └────────┘      └────────┘
//   for each tile in the row's list:   S[64][64] = Q · key tile         in L1
//                                      P = exp2(S - running maximum)    in place
//                                      O[64][D] = O · rescale + P · value tile
//
// A single key is a column: columns are gathered into tiles of the same form, and those that a block of the row
// covers are masked. Jobs are taken longest first. Packing costs a few percent of one head's dense attention, and
// only tiles that some row attends are packed.
//
// Floor: 4 · D multiply-adds per attended (query, key) pair at the machine's GEMM rate, plus one exp2.
//
// Decode (few query rows, `attend_few_rows`): packing would cost more than attending, so keys and values are read in
// place, once, for all heads that share them; the keys are split so that one row uses every core, and the parts are
// merged in a fixed order, so the result does not depend on the number of threads.
// Floor: the bytes of the attended keys and values at the machine's read bandwidth.

#include "tile.h"

namespace headstart {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int32_t kNowhere = INT32_MAX;  // the position of a column that takes no part

struct Iota {
  int32_t value[kTile];
  constexpr Iota() : value() {
    for (int i = 0; i < kTile; ++i) value[i] = i;
  }
};
constexpr Iota kIota;

// --- the index, read ---------------------------------------------------------------------------------------------

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

// The tiles of 64 keys that a row's blocks cover and that its queries may see, one after another.
struct TileWalk {
  TileWalk(const Row& row, int block_k, int64_t first_key, int64_t end_key)
      : row(row), tiles_per_block(block_k / kTile), first_tile(first_key / kTile), end_tile(ceil_div(end_key, kTile)) {}

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
  int64_t tiles_per_block, first_tile, end_tile, at = 0;
};

// Position of query i, and the keys that a row of queries may see.
struct Range {
  int64_t first_key, end_key;  // of the row's last query
};

Range visible_keys(const SparseAttentionArgs& a, int64_t b, int64_t end_query) {
  const int64_t start = a.kv_start == nullptr ? 0 : max(a.kv_start[b], 0);
  return {start, a.causal ? a.nk - a.nq + end_query : a.nk};
}

int64_t common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t r = a % b;
    a = b;
    b = r;
  }
  return a;
}

// --- prefill -----------------------------------------------------------------------------------------------------

// Running softmax of up to kTile rows.
struct Softmax {
  alignas(64) float maximum[kTile], base[kTile], rescale[kTile];
  alignas(64) float sum[kTile][Vec::width];  // per lane; added up once, at the end

  void start(int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) maximum[i] = kNegInf;
    zero(sum[0], rows * Vec::width);
  }

  float total(int64_t i) const { return reduce_add(load(sum[i])); }
};

// [rows][64] scores become weights relative to the running maximum, in place, or as bf16 for pair units. `position`
// null: no key is masked. Row i sees the positions lo ... hi + i * hi_step (cut off at cycle rows, for several heads).
template <typename Unit>
inline void softmax_tile(Softmax& state, float* scores, BFloat16* as_bf16, int64_t rows, float scale,
                         const int32_t* position, int32_t lo, int32_t hi, int32_t hi_step, int64_t cycle) {
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
      const auto last = static_cast<int32_t>(hi + i % cycle * hi_step);
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) {
        const Vec x = keep_between(load(s + j * Vec::width) * factor, position + j * Vec::width, lo, last);
        store(s + j * Vec::width, x);
        most = max(most, x);
      }
    }
    top[i] = reduce_max(most);
  }
  for (int64_t i = rows; i < round_up(rows, Vec::width); ++i) top[i] = state.maximum[i] = kNegInf;
  for (int64_t i = 0; i < rows; i += Vec::width) {
    // A row that has seen nothing yet keeps weight 0 everywhere: -inf minus a finite number.
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
      // The fused multiply-add below keeps a product's rounding error, which the maximum has lost: at logits this
      // large it could reach the exponent. Round the products first, as the maximum did.
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

// What a worker needs beside the shared tiles.
template <typename Unit>
struct Scratch {
  using U = typename Unit::Type;
  Scratch(int64_t dim, int64_t padded_dim, int64_t blocks)
      : query(kTile * dim),
        scores(kTile * kTile),
        weights(kTile * kTile),
        output(kTile * padded_dim),
        keys(dim * kTile),
        values(kTile * padded_dim),
        covered(blocks) {
    std::memset(covered, 0, static_cast<size_t>(blocks));
  }
  Buffer<U> query;
  Buffer<float> scores;
  Buffer<BFloat16> weights;  // P as bf16, for pair units
  Buffer<float> output;
  Buffer<U> keys, values;  // a tile of gathered columns
  Buffer<uint8_t> covered;
  int32_t position[kTile];
  Softmax softmax;
};

template <typename T>
struct Prefill {
  using Unit = typename UnitOf<T>::Type;
  using U = typename Unit::Type;

  const SparseAttentionArgs& a;
  int64_t group, index_group, run;  // query heads per KV head, per index head, per pair of both
  int64_t padded_dim, tiles;        // tiles of 64 keys
  int64_t key_tile, value_tile;     // units of a packed tile
  int64_t query_tiles;              // jobs per head
  int64_t column_tiles;             // of a shared list, per run
  float scale;                      // with log2(e)

  explicit Prefill(const SparseAttentionArgs& args)
      : a(args),
        group(a.heads_q / a.heads_kv),
        index_group(a.heads_q / a.index.heads),
        run(common_divisor(group, index_group)),
        padded_dim(round_up(a.head_dim, Vec::width)),
        tiles(ceil_div(a.nk, kTile)),
        key_tile(a.head_dim / Unit::values * kTile),
        value_tile(kTile / Unit::values * padded_dim),
        query_tiles(ceil_div(a.nq, kTile)),
        column_tiles(
            a.index.column_count != nullptr && a.index.shared_columns ? ceil_div(a.index.column_capacity, kTile) : 0),
        scale(a.scale * kLog2E) {}

  struct Job {
    int32_t cost;
    int32_t pair;  // which (batch, KV head) of the wave
    int32_t head;  // query head within the group
    int32_t query_tile;
  };

  struct Packed {
    U* keys;
    U* values;
    U* column_keys;
    U* column_values;
    int32_t* column_position;
  };

  Row row(int64_t b, int64_t h, int64_t query_tile) const {
    return read_row(a.index, b, h / index_group, query_tile * kTile / a.block_q);
  }

  void pack(U* keys, U* values, const T* const k_rows[kTile], const T* const v_rows[kTile]) const {
    pack_keys(keys, k_rows, a.head_dim, Unit());
    pack_values(values, v_rows, a.head_dim, padded_dim, Unit());
  }

  void pack_tile(U* keys, U* values, int64_t b, int64_t kv_head, int64_t tile) const {
    const T* k_rows[kTile];
    const T* v_rows[kTile];
    for (int j = 0; j < kTile; ++j) {
      const int64_t n = tile * kTile + j;
      k_rows[j] = n < a.nk ? row_of<T>(a.k, b, kv_head, n) : nullptr;
      v_rows[j] = n < a.nk ? row_of<T>(a.v, b, kv_head, n) : nullptr;
    }
    pack(keys, values, k_rows, v_rows);
  }

  void pack_columns(U* keys, U* values, int32_t* position, int64_t b, int64_t kv_head, const int32_t* columns,
                    int64_t count) const {
    const T* k_rows[kTile];
    const T* v_rows[kTile];
    for (int j = 0; j < kTile; ++j) {
      position[j] = j < count ? columns[j] : kNowhere;
      k_rows[j] = j < count ? row_of<T>(a.k, b, kv_head, columns[j]) : nullptr;
      v_rows[j] = j < count ? row_of<T>(a.v, b, kv_head, columns[j]) : nullptr;
    }
    pack(keys, values, k_rows, v_rows);
  }

  // scores = Q · keys for the rows' visible keys; row i sees `seen` + i keys, the others' scores are left undefined.
  void multiply_keys(Scratch<Unit>& w, int64_t rows, const U* keys, int64_t seen) const {
    const int64_t depth = a.head_dim / Unit::values;
    for (int64_t i = 0, n; i < rows; i += n) {
      n = seen >= kTile ? rows : min(kRows, rows - i);
      const int64_t columns = min(kTile, round_up(seen + i + n - 1, Vec::width));
      if (columns <= 0) continue;
      matmul<Unit, Start::kZero>(n, columns, depth, w.query + i * depth, depth, keys, kTile, w.scores + i * kTile,
                                 kTile);
    }
  }

  // output = rescale · output + weights · values, over the rows' visible keys.
  template <Start start>
  void multiply_values(Scratch<Unit>& w, int64_t rows, const U* values, int64_t seen) const {
    const U* weights = Unit::values == 2 ? reinterpret_cast<const U*>(static_cast<BFloat16*>(w.weights))
                                         : reinterpret_cast<const U*>(static_cast<float*>(w.scores));
    constexpr int64_t row_units = kTile / Unit::values;
    for (int64_t i = 0, n; i < rows; i += n) {
      n = seen >= kTile ? rows : min(kRows, rows - i);
      const int64_t depth = max(0, min(row_units, ceil_div(seen + i + n - 1, Unit::values)));
      matmul<Unit, start>(n, padded_dim, depth, weights + i * row_units, row_units, values, padded_dim,
                          w.output + i * padded_dim, padded_dim, w.softmax.rescale + i);
    }
  }

  // `position` null means the 64 keys from `first`.
  void attend_tile(Scratch<Unit>& w, int64_t rows, const U* keys, const U* values, const int32_t* position,
                   int64_t first, int64_t first_query_position, int64_t first_key, bool* started) const {
    const int64_t origin = position == nullptr ? first : 0;
    const int64_t last = a.causal ? first_query_position : a.nk - 1;  // that row 0 sees
    const int64_t seen = a.causal && position == nullptr ? last - first + 1 : kTile;
    const bool masked = position != nullptr || first < first_key || first + kTile > a.nk || seen < kTile;
    const int32_t* where = masked ? (position == nullptr ? kIota.value : position) : nullptr;
    multiply_keys(w, rows, keys, seen);
    softmax_tile<Unit>(w.softmax, w.scores, w.weights, rows, scale, where, static_cast<int32_t>(first_key - origin),
                       static_cast<int32_t>(last - origin), a.causal ? 1 : 0, kTile);
    if (*started) {
      multiply_values<Start::kScaled>(w, rows, values, seen);
    } else {
      multiply_values<Start::kZero>(w, rows, values, seen);
      *started = true;
    }
  }

  void attend(Scratch<Unit>& w, const Packed& packed, int64_t pair, int64_t b, int64_t kv_head, int64_t head_in_group,
              int64_t query_tile) const {
    const int64_t h = kv_head * group + head_in_group;
    const int64_t first_query = query_tile * kTile;
    const int64_t rows = min(kTile, a.nq - first_query);
    const int64_t first_position = a.nk - a.nq + first_query;
    const Range range = visible_keys(a, b, first_query + rows);
    const Row list = row(b, h, query_tile);

    const T* q_rows[kTile];
    for (int64_t i = 0; i < rows; ++i) q_rows[i] = row_of<T>(a.q, b, h, first_query + i);
    pack_queries(w.query, q_rows, rows, a.head_dim, Unit());
    w.softmax.start(rows);
    bool started = false;

    TileWalk walk(list, a.block_k, range.first_key, range.end_key);
    for (int64_t tile; (tile = walk.next()) >= 0;) {
      const int64_t at = pair * tiles + tile;
      attend_tile(w, rows, packed.keys + at * key_tile, packed.values + at * value_tile, nullptr, tile * kTile,
                  first_position, range.first_key, &started);
    }

    if (list.column_count > 0) {
      for (int64_t i = 0; i < list.block_count; ++i) w.covered[list.blocks[i]] = 1;
      if (a.index.shared_columns) {
        attend_shared_columns(w, packed, pair * (group / run) + head_in_group / run, list, rows, first_position, range,
                              &started);
      } else {
        attend_own_columns(w, b, kv_head, list, rows, first_position, range, &started);
      }
      for (int64_t i = 0; i < list.block_count; ++i) w.covered[list.blocks[i]] = 0;
    }
    write(w, b, h, first_query, rows, started);
  }

  bool takes_part(Scratch<Unit>& w, int32_t column, const Range& range) const {
    return column >= range.first_key && column < range.end_key && !w.covered[column / a.block_k];
  }

  // One list for all rows, packed beforehand: columns that take no part in this row are masked.
  void attend_shared_columns(Scratch<Unit>& w, const Packed& packed, int64_t run_at, const Row& list, int64_t rows,
                             int64_t first_position, const Range& range, bool* started) const {
    for (int64_t c = 0; c * kTile < list.column_count; ++c) {
      const int64_t at = run_at * column_tiles + c;
      const int32_t* position = packed.column_position + at * kTile;
      if (position[0] >= range.end_key) return;
      bool any = false;
      for (int j = 0; j < kTile; ++j) {
        const bool take = position[j] != kNowhere && takes_part(w, position[j], range);
        w.position[j] = take ? position[j] : kNowhere;
        any |= take;
      }
      if (!any) continue;
      attend_tile(w, rows, packed.column_keys + at * key_tile, packed.column_values + at * value_tile, w.position, 0,
                  first_position, range.first_key, started);
    }
  }

  // A list of the row's own: those that take part are gathered into tiles here.
  void attend_own_columns(Scratch<Unit>& w, int64_t b, int64_t kv_head, const Row& list, int64_t rows,
                          int64_t first_position, const Range& range, bool* started) const {
    int32_t chosen[kTile];
    int64_t n = 0;
    for (int64_t c = 0; c <= list.column_count; ++c) {
      const bool end = c == list.column_count;
      if (!end && takes_part(w, list.columns[c], range)) chosen[n++] = list.columns[c];
      if (n == kTile || (end && n > 0)) {
        pack_columns(w.keys, w.values, w.position, b, kv_head, chosen, n);
        attend_tile(w, rows, w.keys, w.values, w.position, 0, first_position, range.first_key, started);
        n = 0;
      }
    }
  }

  void write(Scratch<Unit>& w, int64_t b, int64_t h, int64_t first_query, int64_t rows, bool started) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (b * a.heads_q + h) * a.nq + first_query + i;
      T* out = static_cast<T*>(a.out) + at * a.head_dim;
      const float maximum = w.softmax.maximum[i], sum = w.softmax.total(i);
      const bool empty = !started || sum == 0.0f;  // not by the maximum, which may have lost a NaN
      const Vec inverse = broadcast(empty ? 0.0f : 1.0f / sum);
      for (int64_t d = 0; d < a.head_dim; d += Vec::width) {
        const Vec x = empty ? broadcast(0.0f) : load(w.output + i * padded_dim + d) * inverse;
        const auto n = static_cast<int>(min(Vec::width, a.head_dim - d));
        if (n == Vec::width) {
          store(out + d, x);
        } else {
          store_first(out + d, x, n);
        }
      }
      a.lse[at] = empty ? kNegInf : maximum * kLn2 + __builtin_logf(sum);
    }
  }

  void run_all(const Parallel& parallel) const {
    // Packed keys and values of a wave of KV heads stay below this, so memory does not grow with the number of heads.
    constexpr int64_t kWaveBytes = int64_t{256} << 20;
    const int64_t runs = group / run;
    const int64_t pair_units = (tiles + runs * column_tiles) * (key_tile + value_tile);
    const int64_t pairs_total = a.batch * a.heads_kv;
    const int64_t wave = max(1, min(pairs_total, kWaveBytes / max(1, pair_units * static_cast<int64_t>(sizeof(U)))));

    Buffer<U> keys(wave * tiles * key_tile), values(wave * tiles * value_tile);
    Buffer<U> column_keys(wave * runs * column_tiles * key_tile),
        column_values(wave * runs * column_tiles * value_tile);
    Buffer<int32_t> column_position(wave * runs * column_tiles * kTile);
    const Packed packed{keys, values, column_keys, column_values, column_position};
    Buffer<uint8_t> needed(wave * tiles);
    Buffer<Job> jobs(wave * group * query_tiles), sorted(wave * group * query_tiles);
    Buffer<int64_t> starts(tiles + ceil_div(a.index.column_capacity, kTile) + 3);

    const int64_t blocks = ceil_div(a.nk, a.block_k);
    PerWorker<Scratch<Unit>> scratch(parallel.workers, a.head_dim, padded_dim, blocks);

    for (int64_t first_pair = 0; first_pair < pairs_total; first_pair += wave) {
      const int64_t pairs = min(wave, pairs_total - first_pair);
      const int64_t job_count = plan(first_pair, pairs, jobs, sorted, starts, needed);

      for_each_job(parallel, pairs * tiles, [&](int64_t at, int) {
        if (!needed[at]) return;
        const int64_t pair = first_pair + at / tiles;
        pack_tile(keys + at * key_tile, values + at * value_tile, pair / a.heads_kv, pair % a.heads_kv, at % tiles);
      });
      for_each_job(parallel, pairs * runs * column_tiles, [&](int64_t at, int) {
        const int64_t pair = first_pair + at / (runs * column_tiles);
        const int64_t c = at % column_tiles, r = at / column_tiles % runs;
        const int64_t b = pair / a.heads_kv, kv_head = pair % a.heads_kv;
        const Row list = row(b, kv_head * group + r * run, 0);
        const int64_t count = min(kTile, list.column_count - c * kTile);
        if (count <= 0) return;
        pack_columns(column_keys + at * key_tile, column_values + at * value_tile, column_position + at * kTile, b,
                     kv_head, list.columns + c * kTile, count);
      });
      for_each_job(parallel, job_count, [&](int64_t at, int worker) {
        const Job& job = sorted[at];
        const int64_t pair = first_pair + job.pair;
        attend(scratch[worker], packed, job.pair, pair / a.heads_kv, pair % a.heads_kv, job.head, job.query_tile);
      });
    }
  }

  // Lists the jobs of a wave, longest first, and marks the tiles that some row attends.
  int64_t plan(int64_t first_pair, int64_t pairs, Job* jobs, Job* sorted, int64_t* starts, uint8_t* needed) const {
    std::memset(needed, 0, static_cast<size_t>(pairs * tiles));
    const int64_t most = tiles + ceil_div(a.index.column_capacity, kTile) + 1;
    std::memset(starts, 0, static_cast<size_t>(most + 2) * sizeof(int64_t));
    int64_t n = 0;
    for (int64_t p = 0; p < pairs; ++p) {
      const int64_t b = (first_pair + p) / a.heads_kv, kv_head = (first_pair + p) % a.heads_kv;
      for (int64_t g = 0; g < group; ++g) {
        for (int64_t t = 0; t < query_tiles; ++t) {
          const Row list = row(b, kv_head * group + g, t);
          const Range range = visible_keys(a, b, min((t + 1) * kTile, a.nq));
          TileWalk walk(list, a.block_k, range.first_key, range.end_key);
          int64_t cost = ceil_div(list.column_count, kTile);
          for (int64_t tile; (tile = walk.next()) >= 0; ++cost) needed[p * tiles + tile] = 1;
          jobs[n++] = {static_cast<int32_t>(cost), static_cast<int32_t>(p), static_cast<int32_t>(g),
                       static_cast<int32_t>(t)};
          ++starts[most - cost + 1];
        }
      }
    }
    for (int64_t i = 1; i <= most; ++i) starts[i] += starts[i - 1];
    for (int64_t i = 0; i < n; ++i) sorted[starts[most - jobs[i].cost]++] = jobs[i];
    return n;
  }
};

// --- decode: few query rows --------------------------------------------------------------------------------------

constexpr int64_t kFewRows = 16;    // query rows that share keys, at most
constexpr int64_t kSplitTiles = 8;  // tiles of a part: 512 keys

template <typename T>
struct FewRows {
  const SparseAttentionArgs& a;
  int64_t group, index_group, run, rows, padded_dim;

  // Rows of a job are the queries of `run` neighbouring heads, which read the same keys through the same list.
  explicit FewRows(const SparseAttentionArgs& args)
      : a(args),
        group(a.heads_q / a.heads_kv),
        index_group(a.heads_q / a.index.heads),
        run(common_divisor(group, index_group)),
        rows(run * a.nq),
        padded_dim(round_up(a.head_dim, Vec::width)) {}

  struct Part {
    int32_t run_at;
    int32_t tiles;
    int64_t first_tile;  // in the list of all tiles
  };

  struct Scratch {
    explicit Scratch(int64_t padded_dim) : query(kFewRows * padded_dim), scores(kFewRows * kTile) {}
    Buffer<float> query, scores;
    const T* k_rows[kTile];
    const T* v_rows[kTile];
    int32_t position[kTile];
    Softmax softmax;
  };

  // A part's running maximum, sum and unnormalised output, per row.
  struct State {
    float* maximum;
    float* sum;
    float* output;
  };

  int64_t batch_of(int64_t run_at) const { return run_at / (a.heads_q / run); }
  int64_t head_of(int64_t run_at) const { return run_at % (a.heads_q / run) * run; }
  Row row(int64_t run_at) const { return read_row(a.index, batch_of(run_at), head_of(run_at) / index_group, 0); }

  static bool covered(const Row& list, int32_t block) {
    int64_t lo = 0, hi = list.block_count;
    while (lo < hi) {
      const int64_t middle = (lo + hi) / 2;
      if (list.blocks[middle] < block) {
        lo = middle + 1;
      } else {
        hi = middle;
      }
    }
    return lo < list.block_count && list.blocks[lo] == block;
  }

  // Points at the 64 keys of a tile: tile >= 0 is a tile of keys, tile < 0 the (-1 - tile)-th 64 columns of the list.
  void find_keys(Scratch& w, int64_t b, int64_t kv_head, const Row& list, int32_t tile) const {
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
      w.position[j] = static_cast<int32_t>(n);
      w.k_rows[j] = n == kNowhere ? nullptr : row_of<T>(a.k, b, kv_head, n);
      w.v_rows[j] = n == kNowhere ? nullptr : row_of<T>(a.v, b, kv_head, n);
    }
  }

  Vec load_part(const T* p, int64_t d) const {
    return d + Vec::width <= a.head_dim ? load(p + d) : load_first(p + d, static_cast<int>(a.head_dim - d));
  }

  // scores[r][j] for `n` rows: each key is read once and multiplied with all of them.
  template <int n>
  void score(Scratch& w, int64_t first_row) const {
    for (int j = 0; j < kTile; ++j) {
      Vec sum[n];
      for (int r = 0; r < n; ++r) sum[r] = broadcast(0.0f);
      if (w.k_rows[j] != nullptr) {
        for (int64_t d = 0; d < a.head_dim; d += Vec::width) {
          const Vec key = load_part(w.k_rows[j], d);
          for (int r = 0; r < n; ++r) {
            sum[r] = fma(load(w.query + (first_row + r) * padded_dim + d), key, sum[r]);
          }
        }
      }
      for (int r = 0; r < n; ++r) w.scores[(first_row + r) * kTile + j] = reduce_add(sum[r]);
    }
  }

  template <int n>
  void accumulate(Scratch& w, float* output, int64_t first_row) const {
    constexpr int vecs = 4;
    for (int64_t d = 0; d < padded_dim; d += vecs * Vec::width) {
      const auto used = static_cast<int>(min(vecs, (padded_dim - d) / Vec::width));
      Vec sum[n][vecs];
      for (int r = 0; r < n; ++r) {
        for (int i = 0; i < vecs; ++i) {
          sum[r][i] = broadcast(0.0f);
          if (i < used) {
            sum[r][i] = load(output + (first_row + r) * padded_dim + d + i * Vec::width) *
                        broadcast(w.softmax.rescale[first_row + r]);
          }
        }
      }
      for (int j = 0; j < kTile; ++j) {
        if (w.v_rows[j] == nullptr) continue;
        Vec value[vecs];
        for (int i = 0; i < vecs; ++i) {
          value[i] = i < used ? load_part(w.v_rows[j], d + i * Vec::width) : broadcast(0.0f);
        }
        for (int r = 0; r < n; ++r) {
          const Vec weight = broadcast(w.scores[(first_row + r) * kTile + j]);
          for (int i = 0; i < vecs; ++i) sum[r][i] = fma(weight, value[i], sum[r][i]);
        }
      }
      for (int r = 0; r < n; ++r) {
        for (int i = 0; i < used; ++i) {
          store(output + (first_row + r) * padded_dim + d + i * Vec::width, sum[r][i]);
        }
      }
    }
  }

  template <typename Step>
  void by_rows(const Step& step) const {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) step(r, 4);
    if (r < rows) step(r, static_cast<int>(rows - r));
  }

  void attend_part(Scratch& w, const Part& part, const int32_t* tiles, State state) const {
    const int64_t b = batch_of(part.run_at), h = head_of(part.run_at), kv_head = h / group;
    const Row list = row(part.run_at);
    const float scale = a.scale * kLog2E;
    const auto lo = static_cast<int32_t>(visible_keys(a, b, a.nq).first_key);
    for (int64_t r = 0; r < rows; ++r) {
      zero(w.query + r * padded_dim, padded_dim);
      convert_row(w.query + r * padded_dim, row_of<T>(a.q, b, h + r / a.nq, r % a.nq), a.head_dim);
    }
    w.softmax.start(rows);
    zero(state.output, rows * padded_dim);
    const int64_t last = a.causal ? a.nk - a.nq : a.nk - 1;
    for (int64_t t = 0; t < part.tiles; ++t) {
      find_keys(w, b, kv_head, list, tiles[part.first_tile + t]);
      by_rows([&](int64_t r, int n) {
        switch (n) {
          case 4:
            return score<4>(w, r);
          case 3:
            return score<3>(w, r);
          case 2:
            return score<2>(w, r);
          default:
            return score<1>(w, r);
        }
      });
      softmax_tile<FloatUnit>(w.softmax, w.scores, nullptr, rows, scale, w.position, lo, static_cast<int32_t>(last),
                              a.causal ? 1 : 0, a.nq);
      by_rows([&](int64_t r, int n) {
        switch (n) {
          case 4:
            return accumulate<4>(w, state.output, r);
          case 3:
            return accumulate<3>(w, state.output, r);
          case 2:
            return accumulate<2>(w, state.output, r);
          default:
            return accumulate<1>(w, state.output, r);
        }
      });
    }
    for (int64_t r = 0; r < rows; ++r) {
      state.maximum[r] = w.softmax.maximum[r];
      state.sum[r] = w.softmax.total(r);
    }
  }

  // Joins a run's parts, in order, and writes its rows.
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
      for (int64_t d = 0; d < a.head_dim; d += Vec::width) {
        const Vec x = empty ? broadcast(0.0f) : load(sum + d) * broadcast(1.0f / total);
        store_first(out + d, x, static_cast<int>(min(Vec::width, a.head_dim - d)));
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

  // The tiles that a run attends, as `find_keys` reads them; returns how many.
  int64_t list_tiles(int64_t run_at, int32_t* tiles) const {
    const Row list = row(run_at);
    const Range range = visible_keys(a, batch_of(run_at), a.nq);
    TileWalk walk(list, a.block_k, range.first_key, range.end_key);
    int64_t n = 0;
    for (int64_t tile; (tile = walk.next()) >= 0; ++n) {
      if (tiles != nullptr) tiles[n] = static_cast<int32_t>(tile);
    }
    for (int64_t c = 0; c * kTile < list.column_count && list.columns[c * kTile] < range.end_key; ++c, ++n) {
      if (tiles != nullptr) tiles[n] = static_cast<int32_t>(-1 - c);
    }
    return n;
  }
};

// --- merge -------------------------------------------------------------------------------------------------------

template <typename T>
void merge(const MergeAttentionArgs& a, const Parallel& parallel) {
  constexpr int64_t kRowsPerJob = 256;
  const int64_t rows = a.batch * a.heads * a.tokens;
  for_each_job(parallel, ceil_div(rows, kRowsPerJob), [&](int64_t job, int) {
    for (int64_t at = job * kRowsPerJob; at < min(rows, (job + 1) * kRowsPerJob); ++at) {
      const int64_t n = at % a.tokens, h = at / a.tokens % a.heads, b = at / a.tokens / a.heads;
      const float lse_a = a.lse_a[at] * kLog2E, lse_b = a.lse_b[at] * kLog2E;
      const float top = lse_a > lse_b ? lse_a : lse_b;
      const float base = top == kNegInf ? 0.0f : top;
      const float weight_a = exp2(lse_a - base), weight_b = exp2(lse_b - base);
      const float total = weight_a + weight_b;
      const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
      const T* from_a = row_of<T>(a.out_a, b, h, n);
      const T* from_b = row_of<T>(a.out_b, b, h, n);
      T* to = static_cast<T*>(a.out) + at * a.head_dim;
      for (int64_t d = 0; d < a.head_dim; d += Vec::width) {
        const auto count = static_cast<int>(min(Vec::width, a.head_dim - d));
        const bool whole = count == Vec::width;
        const Vec x = whole ? load(from_a + d) : load_first(from_a + d, count);
        const Vec y = whole ? load(from_b + d) : load_first(from_b + d, count);
        const Vec mixed = x * broadcast(weight_a * inverse) + y * broadcast(weight_b * inverse);
        if (whole) {
          store(to + d, mixed);
        } else {
          store_first(to + d, mixed, count);
        }
      }
      a.lse[at] = total == 0.0f ? kNegInf : base * kLn2 + __builtin_logf(total);
    }
  });
}

template <typename T>
void attend(const SparseAttentionArgs& a, const Parallel& parallel) {
  const FewRows<T> few(a);
  if (few.rows <= kFewRows) {
    few.run_all(parallel);
  } else {
    Prefill<T>(a).run_all(parallel);
  }
}

}  // namespace

namespace HEADSTART_TIER {

void sparse_attention(const SparseAttentionArgs& a, const Parallel& parallel) {
  switch (a.dtype) {
    case Dtype::kFloat32:
      return attend<float>(a, parallel);
    case Dtype::kFloat16:
      return attend<Float16>(a, parallel);
    case Dtype::kBFloat16:
      return attend<BFloat16>(a, parallel);
  }
}

void merge_attention(const MergeAttentionArgs& a, const Parallel& parallel) {
  switch (a.dtype) {
    case Dtype::kFloat32:
      return merge<float>(a, parallel);
    case Dtype::kFloat16:
      return merge<Float16>(a, parallel);
    case Dtype::kBFloat16:
      return merge<BFloat16>(a, parallel);
  }
}

}  // namespace HEADSTART_TIER
}  // namespace headstart

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
// A column is a single key. Columns are gathered into tiles of the same form. A column that lies in a block of the
// row's list is masked. Workers take the longest jobs first. Packing costs a few percent of one head's dense attention.
// Only tiles that some row attends are packed.
//
// Floor: 4 · D multiply-adds per attended (query, key) pair at the machine's GEMM rate, plus one exp2.
//
// sparse_attention_decode.h handles calls with few query rows, as in decoding.

#include "sparse_attention_decode.h"

namespace headstart {
namespace {

// --- prefill -----------------------------------------------------------------------------------------------------

// The memory of one worker, in addition to the shared tiles.
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
  int64_t group, index_group, run;  // query heads per KV head, per index head, and per pair of both
  int64_t padded_dim, tiles;        // tiles of 64 keys
  int64_t key_tile, value_tile;     // units of a packed tile
  int64_t query_tiles;              // jobs per head
  int64_t column_tiles;             // tiles of a shared column list, per run
  float scale;                      // a.scale · log2(e)

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
    int32_t pair;  // the (batch, KV head) pair, counted within the wave
    int32_t head;  // the query head, counted within the group
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

  // scores = Q · keys for the rows' visible keys. Row i sees the first `seen` + i keys. Other scores stay undefined.
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

  // output = rescale · output + weights · values, summed over the rows' visible keys.
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

  // Attends one tile and updates softmax and output. If `position` is null, the tile holds the 64 keys from `first` on.
  void attend_tile(Scratch<Unit>& w, int64_t rows, const U* keys, const U* values, const int32_t* position,
                   int64_t first, int64_t first_query_position, int64_t first_key, bool* started) const {
    const int64_t origin = position == nullptr ? first : 0;
    const int64_t last = a.causal ? first_query_position : a.nk - 1;  // the last key that row 0 sees
    const int64_t seen = a.causal && position == nullptr ? last - first + 1 : kTile;
    const int64_t last_window = first_query_position + rows - a.window;  // the start of the last row's window
    const bool masked =
        position != nullptr || first < max(first_key, last_window) || first + kTile > a.nk || seen < kTile;
    const int32_t* where = masked ? (position == nullptr ? kIota.value : position) : nullptr;
    multiply_keys(w, rows, keys, seen);
    softmax_tile<Unit>(w.softmax, w.scores, w.weights, rows, scale, where, static_cast<int32_t>(first_key - origin),
                       window_start(a, first_query_position, origin), static_cast<int32_t>(last - origin),
                       a.causal ? 1 : 0, kTile);
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
    const Range range = visible_keys(a, b, first_query, first_query + rows);
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

  // For one column list that all rows share and that is packed beforehand. Columns that take no part in this row are
  // masked.
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

  // For a column list of this row alone. The columns that take part are gathered into tiles here.
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
      const bool empty = !started || sum == 0.0f;  // the maximum cannot tell: it may have lost a NaN
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
    // A wave is a number of KV heads whose packed keys and values stay below this size. So memory does not grow with
    // the number of heads. A wave has at least one head.
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

  // Lists the jobs of a wave, longest first, and marks the tiles that some row attends. Returns the number of jobs.
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
          const Range range = visible_keys(a, b, t * kTile, min((t + 1) * kTile, a.nq));
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

// --- merge -------------------------------------------------------------------------------------------------------

template <typename T>
void merge(const MergeAttentionArgs& a, const Parallel& parallel) {
  constexpr int64_t kRowsPerJob = 256;
  const int64_t rows = a.batch * a.heads * a.tokens;
  for_each_job(parallel, ceil_div(rows, kRowsPerJob), [&](int64_t job, int) {
    for (int64_t at = job * kRowsPerJob; at < min(rows, (job + 1) * kRowsPerJob); ++at) {
      const int64_t n = at % a.tokens, h = at / a.tokens % a.heads, b = at / a.tokens / a.heads;
      const auto lse_of = [&](const Rows3& x) { return x.data[b * x.batch + h * x.head + n * x.token] * kLog2E; };
      const float lse_a = lse_of(a.lse_a), lse_b = lse_of(a.lse_b);
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

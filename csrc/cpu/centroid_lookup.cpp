// Centroid lookup on the CPU: finds the runs of a fixed context's keys that each block of queries attends.
// `reference/centroid_lookup.py` defines what it computes.
//
// A selection is the list of keys that one block of queries attends, for one KV head. The query rows of a KV head
// (batch, block, head of the group, query of the block) are processed in strips. A strip is a number of whole
// selections that share the centroids. At most 256 rows are processed at a time.
//
//              256 clusters     256 clusters       C
//            +---------------+---------------+-- .. --+
//     rows   |  scale · q·c  |  scale · q·c  |        |   1  logits, and every chunk's maximum and sum of n exp(logit)
//            |   max, sum    |   max, sum    |        |   2  a row's total: its chunks merged in order
//            +---------------+---------------+-- .. --+
//               best score      best score                3  the best score above the threshold of a selection's rows
//            ..****....****......**......****...          4  the kept clusters' keys, as ascending positions
//
// (n is the number of keys of a cluster.) With parents, steps 1 to 3 first run over the parents. Then they run over the
// children of the kept parents, one selection after another. Centroids of other children are not read.
//
// Logits are in log2 units, so a sum takes one exp2 per pair, and the comparison with the threshold takes none.
//
// Few rows (decode) read the centroids in place, once for all rows of the KV head. More rows multiply with the packed
// tiles of tile.h.
//
// If there are enough strips to keep every core busy, a strip is one job and stays on its core. Otherwise a chunk of
// clusters is a job. The chunks are the same in both cases, so the result does not depend on the number of threads.
//
// Floor of decode: the bytes of the centroids at the machine's read bandwidth. Floor of a block: rows · C · D
// multiply-adds.

#include <algorithm>
#include <utility>

#include "in_place.h"

namespace headstart {
namespace {

constexpr int64_t kChunk = 256;    // the clusters of a job
constexpr int64_t kMaxRows = 256;  // the most query rows of a job; they share the packing of a tile of centroids
constexpr int64_t kFewRows = 16;   // up to this many rows, packing costs more than it saves
constexpr int64_t kAhead = 16;     // a centroid is prefetched this many centroids before it is read
constexpr float kPosInf = __builtin_inff();

// to[0, n) = first, first + 1, ... May write up to 15 entries more if `room`, the number of entries of `to`, allows it.
inline void write_run(int32_t* to, int64_t first, int64_t n, int64_t room) {
  constexpr int64_t kStep = 16;
  const auto start = static_cast<uint32_t>(first);
  if (round_up(n, kStep) <= room) {
    for (int64_t i = 0; i < n; i += kStep) {
      for (int64_t j = 0; j < kStep; ++j) to[i + j] = static_cast<int32_t>(start + static_cast<uint32_t>(i + j));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<int32_t>(start + static_cast<uint32_t>(i));
  }
}

// Calls body(j) for every j in [0, count) with best[j] > -inf, in ascending order.
template <typename Body>
inline void each_kept(const float* best, int64_t count, const Body& body) {
  const Vec floor = broadcast(kNegInf);
  for (int64_t j = 0; j < count; j += Vec::width) {
    for (uint32_t lanes = lanes_above(load(best + j), floor); lanes != 0; lanes &= lanes - 1) {
      body(j + __builtin_ctz(lanes));
    }
  }
}

template <typename T>
struct CentroidLookup {
  using Unit = typename UnitOf<T>::Type;
  using U = typename Unit::Type;
  const CentroidLookupArgs& a;
  int64_t group, block, blocks, selections;      // group, blocks and selections are numbers per KV head
  int64_t strip_selections, strip_rows, strips;  // the most selections and rows of a strip; the strips of a KV head
  int64_t pass_rows, padded_dim, padded_count, chunks, list_width;

  explicit CentroidLookup(const CentroidLookupArgs& args)
      : a(args),
        group(a.heads_q / a.heads_kv),
        block(min(a.block_q, a.nq)),
        blocks(ceil_div(a.nq, block)),
        selections(a.batch * blocks),
        strip_selections(min(selections, max(1, kMaxRows / (group * block)))),
        strip_rows(strip_selections * group * block),
        strips(ceil_div(selections, strip_selections)),
        pass_rows(min(kMaxRows, strip_rows)),
        padded_dim(round_up(a.head_dim, kStep)),
        padded_count(round_up(max(a.clusters.count, a.parents.count), kChunk)),
        chunks(round_up(padded_count / kChunk, Vec::width)),
        list_width(a.parents.count == 0 ? 0 : padded_count + 16) {}

  struct Scratch {
    explicit Scratch(const CentroidLookup& l)
        : query(l.pass_rows * l.a.head_dim / Unit::values),
          few_query(kFewRows * l.padded_dim),
          tile(l.a.head_dim / Unit::values * kTile),
          weight(kChunk),
          size(kChunk),
          kept(l.padded_count) {}
    Buffer<U> query;
    Buffer<float> few_query;
    Buffer<U> tile;
    Buffer<float> weight;
    Buffer<int32_t> size, kept;
  };

  // Rows that are scored against one list of clusters. Logits lie chunk after chunk, [chunk][rows of the pass][256].
  struct Part {
    int64_t head, first_selection, selections, first_row, rows;  // selections and rows are counted within the KV head
    const int32_t* ids;                                          // null means all clusters
    int64_t count;                                               // the length of the list
    float* logits;
    float* top;  // top and sum are [rows][chunks]
    float* sum;
    float* total;  // total and limit are [rows]
    float* limit;
    float* best;  // [selections][padded_count]
  };

  // The intermediate results of a number of strips.
  struct Batch {
    Batch(const CentroidLookup& l, int64_t n)
        : logits(n * l.pass_rows * l.padded_count),
          top(n * l.pass_rows * l.chunks),
          sum(n * l.pass_rows * l.chunks),
          total(n * l.pass_rows),
          limit(n * l.pass_rows),
          best(n * l.strip_selections * l.padded_count),
          ids(n * l.strip_selections * l.list_width),
          by_strip(n),
          by_selection(n * l.strip_selections) {}
    Buffer<float> logits, top, sum, total, limit, best;
    Buffer<int32_t> ids;
    Buffer<Part> by_strip, by_selection;
  };

  // The threads of a job, and the scratch memory of all workers. The job's first thread uses scratch[first_worker].
  struct Place {
    const Parallel& parallel;
    PerWorker<Scratch>& scratch;
    int first_worker;
  };

  // --- rows ----------------------------------------------------------------------------------------------------------

  // The first row of a selection, counted among the rows of its KV head.
  int64_t row_of_selection(int64_t selection) const {
    return group * (selection / blocks * a.nq + selection % blocks * block);
  }

  // Walks through the query rows of a KV head, starting at `row`.
  struct RowWalk {
    const CentroidLookup& l;
    int64_t b, block, g, i, length;

    RowWalk(const CentroidLookup& lookup, int64_t row) : l(lookup) {
      const int64_t batch_rows = l.group * l.a.nq, block_rows = l.group * l.block;
      b = row / batch_rows;
      block = row % batch_rows / block_rows;
      length = queries();
      g = row % batch_rows % block_rows / length;
      i = row % batch_rows % block_rows % length;
    }
    int64_t queries() const { return min(l.block, l.a.nq - block * l.block); }
    int64_t token() const { return block * l.block + i; }
    void next() {
      if (++i < length) return;
      i = 0;
      if (++g < l.group) return;
      g = 0;
      if (++block == l.blocks) {
        block = 0;
        ++b;
      }
      length = queries();
    }
  };

  const T* query_of(const RowWalk& row, int64_t kv_head) const {
    return row_of<T>(a.q, row.b, kv_head * group + row.g, row.token());
  }

  // --- 1: logits -----------------------------------------------------------------------------------------------------

  const T* centroids_of(const CentroidLevel& level, int64_t head) const {
    return static_cast<const T*>(level.centroids.data) + head * level.centroids.head;
  }

  // Reads the sizes, in keys, of a chunk's clusters. Zeros fill the last tile.
  void read_sizes(Scratch& w, const CentroidLevel& level, const Part& part, int64_t first, int64_t count) const {
    const int32_t* keys = a.clusters.run_offsets + part.head * (a.clusters.count + 1);
    const int32_t* offsets = level.run_offsets + part.head * (level.count + 1);
    if (&level == &a.parents) {
      for (int64_t j = 0; j < count; ++j) w.size[j] = keys[offsets[first + j + 1]] - keys[offsets[first + j]];
    } else if (part.ids == nullptr) {
      for (int64_t j = 0; j < count; ++j) w.size[j] = keys[first + j + 1] - keys[first + j];
    } else {
      for (int64_t j = 0; j < count; ++j) w.size[j] = keys[part.ids[first + j] + 1] - keys[part.ids[first + j]];
    }
    for (int64_t j = count; j < round_up(count, kTile); ++j) w.size[j] = 0;
    for (int64_t j = 0; j < round_up(count, kTile); ++j) w.weight[j] = static_cast<float>(w.size[j]);
  }

  // Scores the next `count` of the `left` centroids that remain in the list.
  template <typename CentroidAt>
  void score_in_place(Scratch& w, const Part& part, int64_t rows, const CentroidAt& centroid_at, int64_t count,
                      int64_t left, float* logits) const {
    RowWalk row(*this, part.first_row);
    for (int64_t r = 0; r < rows; ++r, row.next()) {
      read_row_in_steps(w.few_query + r * padded_dim, query_of(row, part.head), a.head_dim);
    }
    dot_rows<T>(rows, w.few_query, padded_dim, a.head_dim, centroid_at, count, logits, kChunk,
                [&](int64_t j) __attribute__((always_inline)) {
                  prefetch_row(centroid_at(min(j + kAhead, left - 1)), a.head_dim);
                });
  }

  template <typename CentroidAt>
  void score_tiles(Scratch& w, const Part& part, int64_t first_row, int64_t rows, const CentroidAt& centroid_at,
                   int64_t count, float* logits) const {
    const int64_t depth = a.head_dim / Unit::values;
    RowWalk row(*this, part.first_row + first_row);
    for (int64_t r = 0; r < rows; ++r, row.next()) {
      const T* query = query_of(row, part.head);
      pack_queries(w.query + r * depth, &query, 1, a.head_dim, Unit());
    }
    for (int64_t first = 0; first < count; first += kTile) {
      const T* centroid[kTile];
      const int64_t used = min(kTile, count - first);
      for (int64_t j = 0; j < kTile; ++j) centroid[j] = j < used ? centroid_at(first + j) : nullptr;
      pack_keys(w.tile, centroid, a.head_dim, Unit());
      matmul<Unit, Start::kZero>(rows, round_up(used, Vec::width), depth, w.query, depth, w.tile, kTile, logits + first,
                                 kChunk);
    }
  }

  void score_chunk(Scratch& w, const CentroidLevel& level, const Part& part, int64_t first_row, int64_t chunk) const {
    const int64_t first = chunk * kChunk, count = min(kChunk, part.count - first);
    const int64_t rows = min(kMaxRows, part.rows - first_row);
    if (count <= 0 || rows <= 0) return;
    float* logits = part.logits + first * rows;
    const T* centroids = centroids_of(level, part.head);
    read_sizes(w, level, part, first, count);
    const auto multiply_with = [&](const auto& centroid_at) {
      if (part.rows <= kFewRows) {
        score_in_place(w, part, rows, centroid_at, count, part.count - first, logits);
      } else {
        score_tiles(w, part, first_row, rows, centroid_at, count, logits);
      }
    };
    if (part.ids == nullptr) {
      multiply_with([&](int64_t j) { return centroids + (first + j) * level.centroids.token; });
    } else {
      multiply_with([&](int64_t j) { return centroids + part.ids[first + j] * level.centroids.token; });
    }
    for (int64_t r = 0; r < rows; ++r) {
      sum_up(w, logits + r * kChunk, round_up(count, kTile), part.top + r * chunks + chunk,
             part.sum + r * chunks + chunk);
    }
  }

  // Computes the logits' maximum and sum for one row of a chunk. The logits of empty clusters become -inf. A NaN may be
  // lost in the maximum, but not in the sum.
  void sum_up(Scratch& w, float* x, int64_t count, float* chunk_top, float* chunk_sum) const {
    const Vec scale = broadcast(a.scale * kLog2E);
    Vec top = broadcast(kNegInf), sum = broadcast(0.0f);
    for (int64_t j = 0; j < count; j += Vec::width) {
      const Vec logit = keep_between(load(x + j) * scale, w.size + j, 1, INT32_MAX);
      store(x + j, logit);
      top = max(top, logit);
    }
    *chunk_top = reduce_max(top);
    const Vec shift = broadcast(*chunk_top == kNegInf ? 0.0f : *chunk_top);
    for (int64_t j = 0; j < count; j += Vec::width) sum = fma(load(w.weight + j), exp2(load(x + j) - shift), sum);
    *chunk_sum = reduce_add(sum);
  }

  // --- 2: totals, and the limit that a score must exceed -------------------------------------------------------------

  void join_chunks(const CentroidLevel& level, const Part& part, int64_t first_row) const {
    const int64_t rows = min(kMaxRows, part.rows - first_row), used = ceil_div(part.count, kChunk);
    RowWalk row(*this, part.first_row + first_row);
    for (int64_t r = 0; r < rows; ++r, row.next()) {
      float* tops = part.top + r * chunks;
      float* sums = part.sum + r * chunks;
      for (int64_t j = used; j < round_up(used, Vec::width); ++j) {
        tops[j] = kNegInf;
        sums[j] = 0.0f;
      }
      Vec tops_max = broadcast(kNegInf), sum = broadcast(0.0f);
      for (int64_t j = 0; j < used; j += Vec::width) tops_max = max(tops_max, load(tops + j));
      const float top = reduce_max(tops_max);
      const Vec shift = broadcast(top == kNegInf ? 0.0f : top);
      for (int64_t j = 0; j < used; j += Vec::width) sum = fma(load(sums + j), exp2(load(tops + j) - shift), sum);
      const float whole = reduce_add(sum);
      part.total[r] = top == kNegInf   ? kNegInf
                      : whole == whole ? top + __builtin_log2f(whole)
                                       : total_not_finite(part, rows, r);
      const float threshold = level.threshold[(part.head * group + row.g) * level.thresholds / a.heads_q];
      part.limit[r] = __builtin_log2f(threshold > 0.0f ? threshold : 0.0f);
    }
  }

  // The total of a row whose sum is NaN. Either a logit is NaN, and then so is the total, or a logit is infinite, and
  // then the total is infinite.
  float total_not_finite(const Part& part, int64_t rows, int64_t r) const {
    for (int64_t j = 0; j < part.count; ++j) {
      const float logit = part.logits[j / kChunk * kChunk * rows + r * kChunk + j % kChunk];
      if (logit != logit) return logit;
    }
    return kPosInf;
  }

  // --- 3: the best score of every cluster, over the rows that keep it ------------------------------------------------

  void keep_best(const Part& part, int64_t first_row, int64_t chunk) const {
    const int64_t first = chunk * kChunk, count = min(kChunk, part.count - first);
    const int64_t rows = min(kMaxRows, part.rows - first_row);
    if (count <= 0 || rows <= 0) return;
    const float* logits = part.logits + first * rows;
    for (int64_t s = 0; s < part.selections; ++s) {
      const int64_t selection = part.first_selection + s;
      const int64_t begin = max(0, row_of_selection(selection) - part.first_row - first_row);
      const int64_t end = min(rows, row_of_selection(selection + 1) - part.first_row - first_row);
      float* best = part.best + s * padded_count + first;
      // Few rows have a score above their threshold among 256 clusters. The other rows need not be read again.
      int32_t live[kMaxRows];
      int64_t live_rows = 0;
      for (int64_t r = begin; r < end; ++r) {
        live[live_rows] = static_cast<int32_t>(r);
        live_rows += part.top[r * chunks + chunk] - part.total[r] > part.limit[r] && __builtin_isfinite(part.total[r]);
      }
      constexpr int64_t kStep = 4 * Vec::width;
      for (int64_t j = 0; j < count; j += kStep) {
        Vec top[4];
        for (int i = 0; i < 4; ++i) top[i] = first_row == 0 ? broadcast(kNegInf) : load(best + j + i * Vec::width);
        for (int64_t n = 0; n < live_rows; ++n) {
          const int64_t r = live[n];
          const Vec total = broadcast(part.total[r]), limit = broadcast(part.limit[r]);
          for (int i = 0; i < 4; ++i) {
            top[i] = max(top[i], keep_above(load(logits + r * kChunk + j + i * Vec::width) - total, limit));
          }
        }
        for (int i = 0; i < 4; ++i) store(best + j + i * Vec::width, top[i]);
      }
      // A cluster with a NaN score is kept, and its score counts as the highest.
      for (int64_t r = begin; r < end; ++r) {
        if (__builtin_isfinite(part.total[r])) continue;
        for (int64_t j = 0; j < count; ++j) {
          const float score = logits[r * kChunk + j] - part.total[r];
          if (score != score) {
            best[j] = kPosInf;
          } else if (score > part.limit[r] && score > best[j]) {
            best[j] = score;
          }
        }
      }
    }
  }

  void score(const CentroidLevel& level, Part* parts, int64_t n, const Place& place) const {
    int64_t longest = 0;
    for (int64_t i = 0; i < n; ++i) longest = max(longest, parts[i].count);
    const int64_t used = ceil_div(longest, kChunk);
    for (int64_t first_row = 0; first_row < strip_rows; first_row += kMaxRows) {
      for_each_job(place.parallel, n * used, [&](int64_t job, int worker) {
        score_chunk(place.scratch[place.first_worker + worker], level, parts[job / used], first_row, job % used);
      });
      for_each_job(place.parallel, n, [&](int64_t job, int) { join_chunks(level, parts[job], first_row); });
      for_each_job(place.parallel, n * used,
                   [&](int64_t job, int) { keep_best(parts[job / used], first_row, job % used); });
    }
  }

  // --- 4: positions --------------------------------------------------------------------------------------------------

  // Lists the children of the kept parents.
  void list_children(Part& part, int32_t* ids) const {
    const int32_t* children = a.parents.run_offsets + part.head * (a.parents.count + 1);
    int64_t n = 0;
    each_kept(part.best, a.parents.count, [&](int64_t parent) {
      const int64_t first = children[parent], count = children[parent + 1] - first;
      write_run(ids + n, first, count, list_width - n);
      n += count;
    });
    part.ids = ids;
    part.count = n;
  }

  // Writes runs of positions. Runs that touch are joined into one.
  struct Runs {
    int32_t* to;
    int64_t capacity, n = 0, begin = 0, end = 0;

    void add(int64_t first, int64_t size) {
      if (first != end) {
        flush();
        begin = first;
      }
      end = first + size;
    }
    void flush() {
      write_run(to + n, begin, end - begin, capacity - n);
      n += end - begin;
    }
    int64_t finish() {
      flush();
      return n;
    }
  };

  void write_positions(Scratch& w, const Part& part) const {
    const int32_t* offsets = a.clusters.run_offsets + part.head * (a.clusters.count + 1);
    const int64_t at =
        (part.first_selection / blocks * a.heads_kv + part.head) * blocks + part.first_selection % blocks;
    int32_t* to = a.column_index + at * a.capacity;
    const auto id_of = [&](int64_t j) { return part.ids == nullptr ? j : int64_t{part.ids[j]}; };
    const auto size_of = [&](int64_t j) { return int64_t{offsets[id_of(j) + 1]} - offsets[id_of(j)]; };
    Runs runs{to, a.capacity};
    int64_t wanted = 0;
    each_kept(part.best, part.count, [&](int64_t j) {
      const int64_t size = size_of(j);
      wanted += size;
      if (wanted <= a.capacity) runs.add(offsets[id_of(j)], size);
    });
    if (wanted > a.capacity) {  // write again, but only the best clusters
      runs = {to, a.capacity};
      const auto [cut, room] = cut_of(w, part, size_of);
      each_kept(part.best, part.count, [&, cut = cut, room = room](int64_t j) {
        if (better(part.best, j, cut)) {
          runs.add(offsets[id_of(j)], size_of(j));
        } else if (j == cut) {
          runs.add(offsets[id_of(j)], room);
        }
      });
    }
    a.column_count[at] = static_cast<int32_t>(runs.finish());
  }

  static bool better(const float* best, int64_t x, int64_t y) {
    return best[x] > best[y] || (best[x] == best[y] && x < y);
  }

  // Finds the cluster that the row's capacity cuts, and returns it with the number of its keys that still fit. This is
  // a binary search over the kept clusters, best first: the clusters before the cut fit, the others do not.
  template <typename SizeOf>
  std::pair<int64_t, int64_t> cut_of(Scratch& w, const Part& part, const SizeOf& size_of) const {
    int64_t low = 0, high = 0, room = a.capacity;
    each_kept(part.best, part.count, [&](int64_t j) { w.kept[high++] = static_cast<int32_t>(j); });
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      std::nth_element(w.kept + low, w.kept + middle, w.kept + high,
                       [&](int32_t x, int32_t y) { return better(part.best, x, y); });
      int64_t size = 0;
      for (int64_t i = low; i < middle; ++i) size += size_of(w.kept[i]);
      if (size <= room) {
        room -= size;
        low = middle;
      } else {
        high = middle;
      }
    }
    return {w.kept[low], room};
  }

  // --- all steps -----------------------------------------------------------------------------------------------------

  // Runs all steps for the strips [first, first + n). Strips are counted over all heads.
  void look_up(Batch& batch, int64_t first, int64_t n, const Place& place) const {
    int64_t selected = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t head = (first + i) / strips, first_selection = (first + i) % strips * strip_selections;
      const int64_t count = min(strip_selections, selections - first_selection);
      const int64_t first_row = row_of_selection(first_selection);
      const auto part = [&](int64_t selection, int64_t of) {
        const int64_t row = row_of_selection(selection);
        const int64_t at = i * pass_rows + row - first_row;
        return Part{head,
                    selection,
                    of,
                    row,
                    row_of_selection(selection + of) - row,
                    nullptr,
                    0,
                    batch.logits + at * padded_count,
                    batch.top + at * chunks,
                    batch.sum + at * chunks,
                    batch.total + at,
                    batch.limit + at,
                    batch.best + (i * strip_selections + selection - first_selection) * padded_count};
      };
      batch.by_strip[i] = part(first_selection, count);
      batch.by_strip[i].count = a.parents.count > 0 ? a.parents.count : a.clusters.count;
      for (int64_t s = 0; s < count; ++s) {
        batch.by_selection[selected] = part(first_selection + s, 1);
        batch.by_selection[selected++].count = a.clusters.count;
      }
    }
    if (a.parents.count > 0) {
      score(a.parents, batch.by_strip, n, place);
      for_each_job(place.parallel, selected,
                   [&](int64_t job, int) { list_children(batch.by_selection[job], batch.ids + job * list_width); });
      score(a.clusters, batch.by_selection, selected, place);
    } else {
      score(a.clusters, batch.by_strip, n, place);
    }
    for_each_job(place.parallel, selected, [&](int64_t job, int worker) {
      write_positions(place.scratch[place.first_worker + worker], batch.by_selection[job]);
    });
  }

  void run_all(const Parallel& parallel) const {
    constexpr int64_t kBatchBytes = int64_t{4} << 20;  // logits of a worker; more of them would not stay in the cache
    const int64_t all = a.heads_kv * strips, workers = min(parallel.workers, all);
    PerWorker<Scratch> scratch(parallel.workers, *this);
    // A strip is a job if at most a ninth of the time is spent on waiting for the last strips.
    if (ceil_div(all, parallel.workers) * parallel.workers * 8 <= all * 9) {
      const Parallel alone{1, [](int, void (*body)(void*, int), void* context) { body(context, 0); }};
      PerWorker<Batch> batches(static_cast<int>(workers), *this, 1);
      for_each_job(parallel, all,
                   [&](int64_t strip, int worker) { look_up(batches[worker], strip, 1, {alone, scratch, worker}); });
      return;
    }
    const int64_t strip_bytes = pass_rows * padded_count * static_cast<int64_t>(sizeof(float));
    const int64_t n = min(all, max(1, kBatchBytes * parallel.workers / strip_bytes));
    Batch batch(*this, n);
    for (int64_t first = 0; first < all; first += n) {
      look_up(batch, first, min(n, all - first), {parallel, scratch, 0});
    }
  }
};

}  // namespace

namespace HEADSTART_TIER {

void centroid_lookup(const CentroidLookupArgs& a, const Parallel& parallel) {
  switch (a.dtype) {
    case Dtype::kFloat32:
      return CentroidLookup<float>(a).run_all(parallel);
    case Dtype::kFloat16:
      return CentroidLookup<Float16>(a).run_all(parallel);
    case Dtype::kBFloat16:
      return CentroidLookup<BFloat16>(a).run_all(parallel);
  }
}

}  // namespace HEADSTART_TIER
}  // namespace headstart

// sparse_attention for prompts on Hopper: wgmma, a warp that loads, and two groups of four warps that multiply.
//
// A thread block takes one job after the other from a counter: 128 queries of a head, 64 for each group of warps.
//
//   warps 8, 9      walk the block lists of both groups' rows at once, in ascending order, and copy every listed tile
//   (producers)     of 64 keys (warp 8) and its values (warp 9) once. A tile names the groups that want it. Where both
//                   rows list the same block, and blocks of 128 queries always do, its bytes move once for 128 queries.
//
//       shared:     Q [128 × D]   ring of kStages:  K [64 × D]  V [64 × D]     every tile in rows of 128 bytes, swizzled
//                                 full and empty barriers for each K and each V
//
//   warps 0 to 3,   S = Q Kᵀ of the next tile and O += P V of the last one run on the tensor cores while the other group
//   warps 4 to 7    takes exponentials. Q and P are operands A, from registers; K and V are operands B, from shared
//   (consumers)     memory, V transposed by the hardware.
//
//       registers:  Q [16 rows × D] a warp, S 32 floats, P 16 words, O D / 2 floats a thread, maximum and sum of 2 rows
//
// One thread of a producer starts its copies. The copy engine (TMA) fetches a tile by its coordinates, swizzles it, and
// raises the tile's barrier when its bytes have arrived. Rows past the end of the keys arrive as zeros.
//
// Floor: 4 · 64 · D operations for each query and listed tile at the tensor cores' rate (m64n64k16 and m64nDk16), and
// 64 exponentials. L2 sends 256 · D bytes a tile, for 128 queries if both groups want it.

#include <cuda.h>  // types only: the driver's function is found at run time

#include <cmath>

#include "kernels.h"
#include "prefill_index.h"
#include "wgmma.h"

namespace headstart {
namespace cuda {
namespace {

constexpr int kGroups = 2, kGroupThreads = 128, kGroupWarps = 4;
constexpr int kConsumers = kGroups * kGroupThreads, kThreads = kConsumers + kGroupThreads;
constexpr int kRows = 64, kKeys = 64;                           // the queries of a group, the keys of a tile
constexpr int kHalfBytes = kKeys * mma::kRowBytes, kHalf = 64;  // 64 rows of 64 elements
// Registers of a thread. The groups share 168 for each of 384 threads.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
constexpr int kEnd = INT32_MAX;
constexpr float kLn2 = 0.6931471805599453f;

// What a tile is, besides its first key. The lowest bits name the groups that want it.
constexpr int kLast = 1 << kGroups;

struct Plan {
  int64_t streams, section, tiles, jobs;
  int group, index_group;
  unsigned long long* counter;
};

// What the copy engine knows of q, k and v: [batch][head][token][dim], in boxes of 64 tokens and 64 dims.
struct Maps {
  CUtensorMap q, k, v;
};

// 128 queries of a head.
struct Job {
  int64_t batch, head, first;
  bool any;
};

// Jobs are ordered by section of KV heads, whose keys and values fit in L2, then by queries, the last ones first,
// because they see most keys, then by KV head of the section, then by query head.
__device__ __forceinline__ Job job_of(const SparseAttentionArgs& args, const Plan& plan, int64_t at) {
  if (at >= plan.jobs) return {0, 0, 0, false};
  const int64_t per_section = plan.section * plan.group * plan.tiles, section = at / per_section;
  at -= section * per_section;
  const int64_t left = plan.streams - section * plan.section;
  const int64_t lanes = (left < plan.section ? left : plan.section) * plan.group, lane = at % lanes;
  const int64_t stream = section * plan.section + lane / plan.group;
  return {stream / args.heads_kv, stream % args.heads_kv * plan.group + lane % plan.group,
          (plan.tiles - 1 - at / lanes) * (kGroups * kRows), true};
}

// The keys [0, end) that some query, and those [0, whole_end) that every query, of `count` queries from `first` on sees.
struct Sight {
  int end, whole_end;

  __device__ __forceinline__ Sight(const SparseAttentionArgs& args, int64_t first, int count) {
    const int nk = static_cast<int>(args.nk), from = static_cast<int>(first + args.nk - args.nq);
    end = args.causal ? min(from + count, nk) : nk;
    whole_end = args.causal ? from + 1 : nk;
    if (first >= args.nq) end = whole_end = 0;
  }

  __device__ __forceinline__ bool sees(int key) const { return key < end; }
  __device__ __forceinline__ bool whole(int key) const { return key + kKeys <= whole_end; }
};

// --- barriers -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void init_barrier(SharedAddress at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(SharedAddress at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

// Arrives, and lets the phase end only when the copy engine has brought so many bytes.
__device__ __forceinline__ void arrive_expecting(SharedAddress at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

// Starts the copy of a box of `map` from these coordinates on. Its bytes count at `barrier`.
__device__ __forceinline__ void copy_box(SharedAddress to, const CUtensorMap& map, int dim, int token, int head,
                                         int batch, SharedAddress barrier) {
#ifdef HEADSTART_WGMMA
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(&map), "r"(dim), "r"(token), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
#endif
}

// Whether the phase of this parity is over.
__device__ __forceinline__ bool is_over(SharedAddress at, uint32_t parity) {
  uint32_t over;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(over)
               : "r"(at), "r"(parity)
               : "memory");
  return over != 0;
}

__device__ __forceinline__ void wait(SharedAddress at, uint32_t parity) {
  while (!is_over(at, parity)) {
  }
}

// --- shared memory ------------------------------------------------------------------------------------------------

template <int kDim>
struct Ring {
  static constexpr int kHalves = kDim / kHalf, kTileBytes = kHalves * kHalfBytes, kStages = kDim > 64 ? 6 : 8;
  static constexpr int kTilesAt = kGroups * kTileBytes;  // after the queries
  static constexpr int kBarriersAt = kTilesAt + 2 * kStages * kTileBytes;
  // Barriers: one a tile that it is full, one a tile that it is empty, and both for the queries.
  static constexpr int kTiles = 2 * kStages, kQueries = kTiles, kBarriers = kTiles + 1;
  static constexpr int kNotesAt = kBarriersAt + 2 * kBarriers * 8;
  static constexpr int kSharedBytes = kNotesAt + kStages * 8 + 32;

  struct Note {
    int key, what;
  };

  __device__ __forceinline__ Ring() : base(shared_address(shared_memory())) {}
  __device__ __forceinline__ SharedAddress tile(int t) const { return base + kTilesAt + t * kTileBytes; }
  __device__ __forceinline__ SharedAddress full(int barrier) const { return base + kBarriersAt + barrier * 8; }
  __device__ __forceinline__ SharedAddress empty(int barrier) const { return full(barrier) + kBarriers * 8; }
  static __device__ __forceinline__ Note& note(int stage) {
    return reinterpret_cast<Note*>(shared_memory() + kNotesAt)[stage];
  }
  static __device__ __forceinline__ volatile int64_t& job() {
    return *reinterpret_cast<volatile int64_t*>(shared_memory() + kNotesAt + kStages * 8);
  }

  // The lane that reads is the one that arrives at the barrier afterwards.
  static __device__ __forceinline__ int64_t read_job() {
    long long at = 0;
    if (threadIdx.x % 32 == 0) at = job();
    return __shfl_sync(kWholeWarp, at, 0);
  }

  SharedAddress base;
};

// A place in the ring. K of stage s is tile 2 s, V is tile 2 s + 1.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// --- the producer -------------------------------------------------------------------------------------------------

// An ascending list of block ids. It loads one id ahead. Ids outside [0, end) are left out; past its end it reads kEnd.
class List {
 public:
  __device__ __forceinline__ List(const int32_t* ids, int count, int end) : ids_(ids), count_(count), end_(end) {
    next_ = load();
    pop();
  }

  __device__ __forceinline__ int front() const { return front_; }

  __device__ __forceinline__ void pop() {
    do {
      front_ = next_;
      next_ = load();
    } while (front_ < 0);
    if (front_ >= end_) front_ = kEnd;
  }

 private:
  __device__ __forceinline__ int load() { return at_ < count_ ? __ldg(ids_ + at_++) : kEnd; }

  const int32_t* ids_;
  int count_, end_, at_ = 0, front_ = 0, next_ = 0;
};

// kPart: whether the warp copies keys (0), and queries, too, or values (1).
template <int kDim, int kPart>
class Producer {
  using Shared = Ring<kDim>;

 public:
  __device__ __forceinline__ Producer(const SparseAttentionArgs& args, const Plan& plan, const Maps& maps)
      : args_(args), plan_(plan), maps_(maps) {}

  __device__ __forceinline__ void run() {
    for (uint32_t parity = 0;; parity ^= 1) {
      const SharedAddress full = shared_.full(Shared::kQueries);
      if constexpr (kPart == 0) {
        unsigned long long at = 0;
        if (lane() == 0) at = atomicAdd(plan_.counter, 1ull);
        at = __shfl_sync(kWholeWarp, at, 0);
        wait(shared_.empty(Shared::kQueries), parity ^ 1);
        const Job job = job_of(args_, plan_, static_cast<int64_t>(at));
        if (lane() == 0) {
          Shared::job() = static_cast<int64_t>(at);
          if (job.any) {
            arrive_expecting(full, kGroups * Shared::kTileBytes);
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
              copy_tile(shared_.base + g * Shared::kTileBytes, maps_.q, static_cast<int>(job.first) + g * kRows,
                        static_cast<int>(job.head), static_cast<int>(job.batch), full);
            }
          } else {
            arrive(full);
          }
        }
        if (!job.any) return;
        walk(job);
      } else {
        wait(full, parity);
        const Job job = job_of(args_, plan_, Shared::read_job());
        if (lane() == 0) arrive(shared_.empty(Shared::kQueries));
        if (!job.any) return;
        walk(job);
      }
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

  // The list of a group's row, empty if the group has no queries.
  __device__ __forceinline__ List list_of(const Job& job, int64_t first, int end) const {
    const IndexArgs& index = args_.index;
    const int64_t head = job.head / plan_.index_group, row = first / args_.block_q;
    int count = 0;
    if (first < args_.nq) count = index.block_count[job.batch * index.count_batch + head * index.count_head + row];
    const int capacity = static_cast<int>(index.block_capacity);
    return List(
        index.block_index + job.batch * index.index_batch + head * index.index_head + row * index.block_capacity,
        min(count, capacity), (end + args_.block_k - 1) / args_.block_k);
  }

  __device__ __forceinline__ void walk(const Job& job) {
    const int64_t second = job.first + kRows;
    const bool alike = job.first / args_.block_q == second / args_.block_q;  // both groups have one row of the index
    const Sight sight_a(args_, job.first, kRows), sight_b(args_, second, kRows);
    // If both groups have one row, the first list is for both, and the second one is empty.
    List a = list_of(job, job.first, alike ? max(sight_a.end, sight_b.end) : sight_a.end);
    List b = list_of(job, alike ? args_.nq : second, sight_b.end);
    const int kv_head = static_cast<int>(job.head) / plan_.group, batch = static_cast<int>(job.batch);
    int held = 0, held_what = 0;  // a tile waits until it is known whether it is the last one
    for (;;) {
      const int id_a = a.front(), id_b = b.front(), id = min(id_a, id_b);
      if (id == kEnd) break;
      if (id_a == id) a.pop();
      if (id_b == id) b.pop();
      for (int key = id * args_.block_k; key < (id + 1) * args_.block_k; key += kKeys) {
        const int what =
            (id_a == id && sight_a.sees(key) ? 1 : 0) | ((alike ? id_a : id_b) == id && sight_b.sees(key) ? 2 : 0);
        if (what == 0) continue;
        if (held_what != 0) push(held, held_what, kv_head, batch);
        held = key;
        held_what = what;
      }
    }
    push(held, held_what | kLast, kv_head, batch);
  }

  // Starts the copy of a tile of keys or values. The last tile of a job that lists nothing has none.
  __device__ __forceinline__ void push(int key, int what, int kv_head, int batch) {
    const int tile = 2 * turn_.stage + kPart;
    wait(shared_.empty(tile), turn_.parity ^ 1);
    if (lane() == 0) {
      if (kPart == 0) Shared::note(turn_.stage) = {key, what};
      if (what != kLast) {
        arrive_expecting(shared_.full(tile), Shared::kTileBytes);
        copy_tile(shared_.tile(tile), kPart == 0 ? maps_.k : maps_.v, key, kv_head, batch, shared_.full(tile));
      } else {
        arrive(shared_.full(tile));
      }
    }
    turn_.advance();
  }

  static __device__ __forceinline__ void copy_tile(SharedAddress to, const CUtensorMap& map, int token, int head,
                                                   int batch, SharedAddress barrier) {
#pragma unroll
    for (int half = 0; half < Shared::kHalves; ++half) {
      copy_box(to + half * kHalfBytes, map, half * kHalf, token, head, batch, barrier);
    }
  }

  const SparseAttentionArgs& args_;
  const Plan& plan_;
  const Maps& maps_;
  Shared shared_;
  Turn<Shared::kStages> turn_;
};

// --- consumers ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

template <typename T, int kDim>
class Consumer {
  using Shared = Ring<kDim>;
  static constexpr int kDepths = kDim / mma::kDepth;         // products of S
  static constexpr int kTiles = kDim / mma::kColumns;        // groups of 8 columns of O
  static constexpr int kScoreTiles = kKeys / mma::kColumns;  // and of S

 public:
  __device__ __forceinline__ Consumer(const SparseAttentionArgs& args, const Plan& plan) : args_(args), plan_(plan) {}

  __device__ __forceinline__ void run() {
    for (uint32_t parity = 0;; parity ^= 1) {
      wait(shared_.full(Shared::kQueries), parity);
      const Job job = job_of(args_, plan_, Shared::read_job());
      if (job.any) load_queries();
      release(shared_.empty(Shared::kQueries));
      if (!job.any) return;
      attend(job);
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int group() { return static_cast<int>(threadIdx.x) / kGroupThreads; }
  // The lower of a lane's two rows of the group.
  static __device__ __forceinline__ int row() {
    return static_cast<int>(threadIdx.x) % kGroupThreads / 32 * mma::kRows + lane() / 4;
  }

  __device__ __forceinline__ void release(SharedAddress barrier) const {
    __syncwarp();
    if (lane() == 0) arrive(barrier);
  }

  __device__ __forceinline__ void load_queries() {
    const SharedAddress tile = shared_.base + group() * Shared::kTileBytes;
    const int r = static_cast<int>(threadIdx.x) % kGroupThreads / 32 * mma::kRows + mma::a_load_row(lane());
#pragma unroll
    for (int d = 0; d < kDepths; ++d) {
      load_matrices(q_[d], tile + d / 4 * kHalfBytes +
                               static_cast<uint32_t>(mma::unit_offset(r, d % 4 * 2 + mma::a_load_unit(lane()))));
    }
    // A scale of 0 or less is taken into q: the scores are scaled after they are masked.
    if (args_.scale <= 0) {
#pragma unroll
      for (int d = 0; d < kDepths; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) q_[d][i] = args_.scale < 0 ? q_[d][i] ^ 0x80008000u : 0u;
      }
    }
  }

  __device__ __forceinline__ void attend(const Job& job) {
    const int64_t first = job.first + group() * kRows;
    const Sight sight(args_, first, kRows);
    const float scale = args_.scale == 0 ? 1.0f : fabsf(args_.scale) * kLog2E;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o_[t][i] = 0.0f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top_[half] = -INFINITY;
      sum_[half] = 0.0f;
    }
    int last_v = -1;  // the tile of values that waits for its product
    uint32_t last_parity = 0;
    for (bool last = false; !last; turn_.advance()) {
      const int k = 2 * turn_.stage;
      wait(shared_.full(k), turn_.parity);
      const typename Shared::Note note = Shared::note(turn_.stage);
      last = (note.what & kLast) != 0;
      if ((note.what & 1 << group()) == 0) {
        if (last_v == k + 1) {  // its place in the ring is wanted
          multiply_values(last_v, last_parity);
          last_v = -1;
        }
        release(shared_.empty(k));
        wait(shared_.full(k + 1), turn_.parity);  // before that, the barrier counts the releases of the last round
        release(shared_.empty(k + 1));
        continue;
      }
      // A branch between two products makes ptxas wait for both, so a tile with a mask goes alone.
      const bool whole = sight.whole(note.key);
      if (!whole && last_v >= 0) {
        multiply_values(last_v, last_parity);
        last_v = -1;
      }
      float s[kScoreTiles][4], shrink[2];
      if (last_v < 0) {
        group_fence();
        multiply_keys(s, k);
        group_commit();
        group_wait(s);
        release(shared_.empty(k));
        if (!whole) mask(s, note.key, first);
        soften(s, shrink, scale);
      } else {
        wait(shared_.full(last_v), last_parity);
        group_fence();
        multiply_keys(s, k);
        group_commit();
        add_values(last_v);
        group_commit();
        group_wait<1>(s);
        soften(s, shrink, scale);
        // ptxas moves the wait for the values ahead of the exponentials, unless something in between needs them.
        if (!(sum_[0] + sum_[1] < 0.0f)) release(shared_.empty(k));
        group_wait(o_);
        release(shared_.empty(last_v));
      }
      if (__any_sync(kWholeWarp, shrink[0] != 1.0f || shrink[1] != 1.0f)) {  // seldom, once the maxima are found
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) o_[t][i] *= shrink[i / 2];
        }
      }
#pragma unroll
      for (int t = 0; t < kScoreTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          p_[t / 2][t % 2 * 2 + half] = pair_from_floats<T>(s[t][2 * half], s[t][2 * half + 1]);
        }
      }
      last_v = k + 1;
      last_parity = turn_.parity;
    }
    if (last_v >= 0) multiply_values(last_v, last_parity);
    write(job, first);
  }

  // S = Q Kᵀ. The caller waits for it.
  __device__ __forceinline__ void multiply_keys(float (&s)[kScoreTiles][4], int tile) const {
    const SharedAddress k = shared_.tile(tile);
#pragma unroll
    for (int d = 0; d < kDepths; ++d) {
      group_multiply<T, false>(s, q_[d], wgmma::descriptor(k + d / 4 * kHalfBytes + d % 4 * 2 * mma::kUnitBytes),
                               d > 0);
    }
  }

  // O += P V. The caller waits for it.
  __device__ __forceinline__ void add_values(int tile) {
    const SharedAddress v = shared_.tile(tile);
#pragma unroll
    for (int d = 0; d < kKeys / mma::kDepth; ++d) {
      group_multiply<T, true>(o_, p_[d], wgmma::descriptor(v + d * mma::kDepth * mma::kRowBytes, kHalfBytes), true);
    }
  }

  __device__ __forceinline__ void multiply_values(int tile, uint32_t parity) {
    wait(shared_.full(tile), parity);
    group_fence();
    add_values(tile);
    group_commit();
    group_wait(o_);
    release(shared_.empty(tile));
  }

  // Turns scores into exponentials, and finds by how much the sums so far shrink.
  __device__ __forceinline__ void soften(float (&s)[kScoreTiles][4], float (&shrink)[2], float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float best = -INFINITY;
#pragma unroll
      for (int t = 0; t < kScoreTiles; ++t) best = fmaxf(best, fmaxf(s[t][2 * half], s[t][2 * half + 1]));
      best = fmaxf(best, __shfl_xor_sync(kWholeWarp, best, 1));
      best = fmaxf(best, __shfl_xor_sync(kWholeWarp, best, 2));
      best = fmaxf(top_[half], best * scale);
      // For a row that has seen no key yet, any finite number avoids -inf - -inf in the exponent.
      const float reference = best == -INFINITY ? 0.0f : best;
      shrink[half] = exp2_fast(top_[half] - reference);
      top_[half] = best;
      float total = 0.0f;
#pragma unroll
      for (int t = 0; t < kScoreTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[t][2 * half + i];
          x = exp2_fast(fmaf(x, scale, -reference));
          total += x;
        }
      }
      sum_[half] = fmaf(sum_[half], shrink[half], total);
    }
  }

  __device__ __forceinline__ void mask(float (&s)[kScoreTiles][4], int key, int64_t first) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Sight sight(args_, first + row() + 8 * half, 1);
      const int end = sight.end - (key + lane() % 4 * 2);  // counted from the lane's first key of the tile
#pragma unroll
      for (int t = 0; t < kScoreTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (t * mma::kColumns + i >= end) s[t][2 * half + i] = -INFINITY;
        }
      }
    }
  }

  __device__ __forceinline__ void write(const Job& job, int64_t first) {
    const int64_t rows = (job.batch * args_.heads_q + job.head) * args_.nq;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum_[half];
      total += __shfl_xor_sync(kWholeWarp, total, 1);
      total += __shfl_xor_sync(kWholeWarp, total, 2);
      const int64_t query = first + row() + 8 * half;
      const bool seen = total != 0.0f;
      const float inverse = seen ? 1.0f / total : 0.0f;
      T* to = static_cast<T*>(args_.out) + (rows + query) * kDim;
#pragma unroll
      for (int t = 0; t < kTiles; t += 2) {
        // Two lanes exchange 4 bytes, so that a lane writes 8 and four lanes write 32 bytes side by side.
        const uint32_t even = pair_from_floats<T>(o_[t][2 * half] * inverse, o_[t][2 * half + 1] * inverse);
        const uint32_t odd = pair_from_floats<T>(o_[t + 1][2 * half] * inverse, o_[t + 1][2 * half + 1] * inverse);
        const bool upper = lane() % 2 != 0;
        const uint32_t other = __shfl_xor_sync(kWholeWarp, upper ? even : odd, 1);
        const uint2 pair = upper ? uint2{other, odd} : uint2{even, other};
        if (query < args_.nq) {
          *reinterpret_cast<uint2*>(to + (t + (upper ? 1 : 0)) * mma::kColumns + lane() % 4 / 2 * 4) = pair;
        }
      }
      if (query < args_.nq && lane() % 4 == 0) {
        args_.lse[rows + query] = seen ? (top_[half] + log2f(total)) * kLn2 : -INFINITY;
      }
    }
  }

  const SparseAttentionArgs& args_;
  const Plan& plan_;
  Shared shared_;
  Turn<Shared::kStages> turn_;
  uint32_t q_[kDepths][4], p_[kKeys / mma::kDepth][4];
  float o_[kTiles][4], top_[2], sum_[2];
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_attention_group_kernel(const __grid_constant__ SparseAttentionArgs args, const __grid_constant__ Plan plan,
                                  const __grid_constant__ Maps maps) {
#ifdef HEADSTART_WGMMA
  const Ring<kDim> shared;
  if (threadIdx.x < Ring<kDim>::kBarriers) {
    init_barrier(shared.full(static_cast<int>(threadIdx.x)), 1);
    // The warp that copies values reads the job, too.
    const int readers = kGroups * kGroupWarps + (threadIdx.x == Ring<kDim>::kQueries ? 1 : 0);
    init_barrier(shared.empty(static_cast<int>(threadIdx.x)), readers);
  }
  fence_async_proxy();  // the copy engine must see them, too
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x < kConsumers + 32) {
      Producer<kDim, 0>(args, plan, maps).run();
    } else if (threadIdx.x < kConsumers + 64) {
      Producer<kDim, 1>(args, plan, maps).run();
    }
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<T, kDim>(args, plan).run();
  }
#endif
}

// --- host ---------------------------------------------------------------------------------------------------------

Plan plan_of(const SparseAttentionArgs& args, void* workspace) {
  Plan plan{};
  plan.streams = args.batch * args.heads_kv;
  plan.group = static_cast<int>(args.heads_q / args.heads_kv);
  plan.index_group = static_cast<int>(args.heads_q / args.index.heads);
  plan.tiles = ceil_div(args.nq, kGroups * kRows);
  plan.jobs = plan.streams * plan.group * plan.tiles;
  const int64_t stream_bytes = 2 * args.nk * args.head_dim * 2, fit = l2_bytes() / 2 / stream_bytes;
  plan.section = fit < 1 ? 1 : fit < plan.streams ? fit : plan.streams;
  plan.counter = static_cast<unsigned long long*>(workspace);
  return plan;
}

// Describes a tensor to the copy engine. Returns null, or a text that says what failed.
const char* describe(CUtensorMap& map, const Tensor4& x, int64_t batch, int64_t heads, int64_t tokens,
                     const SparseAttentionArgs& args) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<Encode>(found);
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(args.head_dim), static_cast<cuuint64_t>(tokens),
                              static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  // The stride of a dimension of size 1 is never used and may have any value, which the driver would reject.
  const auto bytes = [](int64_t stride, int64_t size) { return static_cast<cuuint64_t>(size == 1 ? 16 : 2 * stride); };
  const cuuint64_t strides[] = {bytes(x.token, tokens), bytes(x.head, heads), bytes(x.batch, batch)};
  const cuuint32_t box[] = {kHalf, kKeys, 1, 1}, steps[] = {1, 1, 1, 1};
  const CUresult error =
      encode(&map, args.dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
             4, const_cast<void*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? nullptr : "the driver rejects the strides of q, k or v";
}

template <typename T, int kDim>
const char* run(const SparseAttentionArgs& args, const Plan& plan, const Maps& maps, CUstream_st* stream) {
  const int64_t blocks = plan.jobs < multiprocessors() ? plan.jobs : multiprocessors();
  return launch(sparse_attention_group_kernel<T, kDim>, blocks, kThreads, Ring<kDim>::kSharedBytes, stream, args, plan,
                maps);
}

}  // namespace

bool sparse_attention_sm90_runs(const SparseAttentionArgs& args) {
  const auto aligned = [&](const Tensor4& x, int64_t heads, int64_t tokens) {
    const auto expanded = [](int64_t stride, int64_t size) { return size > 1 && stride <= 0; };
    return reads_vectors(x, args.batch, heads, tokens, args.dtype) && !expanded(x.batch, args.batch) &&
           !expanded(x.head, heads) && !expanded(x.token, tokens);
  };
  return args.dtype != Dtype::kFloat32 && (args.head_dim == 64 || args.head_dim == 128) && args.block_q % kRows == 0 &&
         args.block_k % kKeys == 0 && args.index.column_count == nullptr && args.kv_start == nullptr &&
         args.window >= args.nk && args.nk <= INT32_MAX / 2 && aligned(args.q, args.heads_q, args.nq) &&
         aligned(args.k, args.heads_kv, args.nk) && aligned(args.v, args.heads_kv, args.nk) && has_warp_groups();
}

int64_t sparse_attention_sm90_workspace(const SparseAttentionArgs&) { return sizeof(unsigned long long); }

const char* sparse_attention_sm90(const SparseAttentionArgs& args, void* workspace, CUstream_st* stream) {
  const Plan plan = plan_of(args, workspace);
  Maps maps;
  const char* error = describe(maps.q, args.q, args.batch, args.heads_q, args.nq, args);
  if (error == nullptr) error = describe(maps.k, args.k, args.batch, args.heads_kv, args.nk, args);
  if (error == nullptr) error = describe(maps.v, args.v, args.batch, args.heads_kv, args.nk, args);
  if (error == nullptr) error = zero(plan.counter, sizeof *plan.counter, stream);
  if (error != nullptr) return error;
  if (args.dtype == Dtype::kFloat16) {
    return args.head_dim == 64 ? run<Float16, 64>(args, plan, maps, stream)
                               : run<Float16, 128>(args, plan, maps, stream);
  }
  return args.head_dim == 64 ? run<BFloat16, 64>(args, plan, maps, stream)
                             : run<BFloat16, 128>(args, plan, maps, stream);
}

}  // namespace cuda
}  // namespace headstart

// The code that the three index builders on CUDA share: the geometry of a row of queries, operands, workspaces and
// jobs. Centroid lookup uses the operands and workspaces, too.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "score_tile.h"
#include "select.h"

namespace headstart {
namespace cuda {

constexpr float kLog2E = 1.4426950408889634f;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The first key of a sequence that is not padding, at most nk.
__device__ __forceinline__ int64_t start_of(const PrefillIndexArgs& args, int64_t batch) {
  if (args.kv_start == nullptr) return 0;
  const int64_t start = args.kv_start[batch];
  return start < 0 ? 0 : start < args.nk ? start : args.nk;
}

// The key blocks [begin, end) that a row of queries may see. It must take the blocks [begin, sink_end) and
// [window_begin, end) (forced).
struct RowBlocks {
  int64_t last_position;  // the position of the row's last query
  int begin, end, sink_end, window_begin;

  __device__ __forceinline__ RowBlocks(const PrefillIndexArgs& args, int64_t batch, int64_t row) {
    const int64_t start = start_of(args, batch), first_position = args.nk - args.nq + row * args.block_q;
    last_position = first_position + args.block_q < args.nk ? first_position + args.block_q - 1 : args.nk - 1;
    begin = static_cast<int>(start / args.block_k);
    end = last_position < start ? begin : static_cast<int>(last_position / args.block_k + 1);
    const int64_t sink = args.sink < args.nk ? args.sink : args.nk;
    sink_end = sink > 0 ? static_cast<int>(ceil_div(start + sink, args.block_k)) : begin;
    const int64_t window = first_position - args.local + 1;
    window_begin = args.local > 0 ? static_cast<int>((window > 0 ? window : 0) / args.block_k) : end;
  }

  __device__ __forceinline__ bool forced(int block) const { return block < sink_end || block >= window_begin; }
};

__device__ __forceinline__ int64_t kv_head_of(const PrefillIndexArgs& args, int64_t head) {
  return head / (args.heads_q / args.heads_kv);
}

template <typename T>
__device__ __forceinline__ const T* tokens_of(const Tensor4& x, int64_t batch, int64_t head) {
  return static_cast<const T*>(x.data) + batch * x.batch + head * x.head;
}

// --- host ---------------------------------------------------------------------------------------------------------

// Whether every row of x can be read 16 bytes at a time. The stride of a dimension of size 1 is never used, so it may
// have any value.
inline bool reads_vectors(const Tensor4& x, int64_t batch, int64_t heads, int64_t tokens, Dtype dtype) {
  const int64_t unit = dtype == Dtype::kFloat32 ? 4 : 8;
  const auto even = [unit](int64_t stride, int64_t size) { return size == 1 || stride % unit == 0; };
  return reinterpret_cast<uintptr_t>(x.data) % mma::kUnitBytes == 0 && even(x.batch, batch) && even(x.head, heads) &&
         even(x.token, tokens);
}

inline bool reads_query_vectors(const PrefillIndexArgs& a) {
  return reads_vectors(a.q, a.batch, a.heads_q, a.nq, a.dtype);
}
inline bool reads_key_vectors(const PrefillIndexArgs& a) {
  return reads_vectors(a.k, a.batch, a.heads_kv, a.nk, a.dtype);
}

// Cuts a workspace into arrays. With a null workspace, only counts the bytes.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<unsigned char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    constexpr int64_t kAlign = 256;
    unsigned char* at = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlign);
    return reinterpret_cast<T*>(at);
  }

  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* base_;
  int64_t bytes_ = 0;
};

// The number of thread blocks that stay and fetch jobs: as many as can run at once. Each has its own scratch memory.
inline int64_t resident_blocks(int64_t jobs) {
  constexpr int64_t kPerMultiprocessor = 2;
  const int64_t room = kPerMultiprocessor * multiprocessors();
  return jobs < room ? jobs : room;
}

// The next job of the calling block, the same for all its threads. `slot` is 8 bytes of shared memory.
__device__ __forceinline__ int64_t next_job(unsigned long long* counter, unsigned long long* slot) {
  __syncthreads();  // all threads have finished the last job and have read its number
  if (threadIdx.x == 0) *slot = atomicAdd(counter, 1ull);
  __syncthreads();
  return static_cast<int64_t>(*slot);
}

// Calls run(T{}), where T is the type of the elements.
template <typename Run>
const char* by_dtype(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run(float{});
    case Dtype::kFloat16:
      return run(Float16{});
    default:
      return run(BFloat16{});
  }
}

}  // namespace cuda
}  // namespace headstart

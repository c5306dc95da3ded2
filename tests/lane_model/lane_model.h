// A CUDA kernel on a CPU, lane by lane: the names of CUDA and of csrc/cuda/device.h that the kernels use.
//
// Every thread of a block is a coroutine on a stack of its own. It runs until it meets the others: at __syncthreads
// with its block, at a shuffle, ballot, ldmatrix or mma with the 32 lanes of its warp, whose registers are then
// exchanged as the PTX ISA says. Warps run in ascending or descending order, one as far as it gets before the next
// starts, and so do its lanes; so a forgotten barrier shows as a wrong result in one of the two orders. An asynchronous copy arrives when its
// thread waits for it, no sooner. Shared memory starts as NaN, and writes behind its end are found.
//
// Not modelled: time, bank conflicts, the order of memory between warps that do not meet, rounding of tensor cores
// (sums here are float32, one product after the other).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <type_traits>
#include <vector>

#include "../../csrc/arguments.h"
#include "../../csrc/layouts/mma.h"
#include "../../csrc/layouts/wgmma.h"

struct CUstream_st;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  uint32_t x;
};
inline Index threadIdx, blockIdx;
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace lane_model {

constexpr int kLanes = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 << 10;

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

// A product of four warps, which are not multiplied before they are waited for.
struct Product {
  float* c;
  uint32_t a[4];
  uint64_t b;
  bool shared;    // whether A lies in shared memory, too
  uint64_t left;  // its descriptor
};

enum class State { kReady, kWarp, kBlock, kDone };

struct Thread {
  ucontext_t context;
  jmp_buf jump;
  bool started;
  State state;
  std::deque<std::vector<Copy>> groups;  // of asynchronous copies; the last one is open
  std::vector<Product> products;
  bool half;           // whether they are of float16
  bool fenced, shown;  // since registers were last multiplied; since copies last arrived
};

struct Warp {
  const char* instruction;
  void* slots[kLanes];
  int arrived;
};

inline std::vector<Thread> threads(kMaxThreads);
inline std::vector<char> stacks(kMaxThreads* kStackBytes);
inline Warp warps[kMaxThreads / kLanes];
inline jmp_buf scheduler;
inline volatile int current;
inline std::vector<unsigned char> shared;
inline std::function<void()> body;
inline const char* failure;
inline bool descending;
inline bool warp_groups;                  // whether the device has wgmma
inline std::vector<const void*> outside;  // bytes that no load may touch

inline void leave() {
  if (_setjmp(threads[current].jump) == 0) _longjmp(scheduler, 1);
}

[[noreturn]] inline void fail(const char* message) {
  failure = message;
  _longjmp(scheduler, 1);
}

inline void read(const void* from, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(from);
  if (first % bytes != 0) fail("a load is not aligned to its size");
  for (const void* byte : outside) {
    if (reinterpret_cast<uintptr_t>(byte) - first < bytes) fail("a load reaches outside its tensor");
  }
}

inline void entry() {
  body();
  threads[current].state = State::kDone;
  _longjmp(scheduler, 1);
}

inline void resume(int t) {
  current = t;
  threadIdx.x = static_cast<uint32_t>(t);
  if (_setjmp(scheduler) != 0) return;
  Thread& thread = threads[t];
  if (thread.started) _longjmp(thread.jump, 1);
  thread.started = true;
  setcontext(&thread.context);
}

// All lanes of the warp bring a slot; the last to come computes with all of them.
template <typename Slot, typename Compute>
void meet(const char* instruction, Slot& slot, const Compute& compute) {
  Warp& warp = warps[current / kLanes];
  if (warp.arrived > 0 && warp.instruction != instruction) fail("lanes of a warp meet at different instructions");
  warp.instruction = instruction;
  warp.slots[current % kLanes] = &slot;
  if (++warp.arrived < kLanes) {
    threads[current].state = State::kWarp;
    leave();
    return;
  }
  warp.arrived = 0;
  Slot* slots[kLanes];
  for (int i = 0; i < kLanes; ++i) slots[i] = static_cast<Slot*>(warp.slots[i]);
  compute(slots);
  const int first = current / kLanes * kLanes;
  for (int i = first; i < first + kLanes; ++i) threads[i].state = State::kReady;
}

inline void run_block(int count) {
  for (int t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks.data() + t * kStackBytes;
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, entry, 0);
    thread.started = false;
    thread.state = State::kReady;
    thread.groups.assign(1, {});
    thread.products.clear();
    thread.fenced = thread.shown = false;
    warps[t / kLanes].arrived = 0;
  }
  for (;;) {
    bool ran = false, again = false, done = true;
    for (int i = 0; i < count; ++i) {
      const int t = descending ? count - 1 - i : i;
      if (threads[t].state == State::kReady) {
        resume(t);
        if (failure != nullptr) return;
        ran = again = true;
      }
      done &= threads[t].state == State::kDone;
      if (i % kLanes == kLanes - 1 && again) {  // the whole warp, until it waits for others
        i -= kLanes;
        again = false;
        done = false;
      }
    }
    if (done) return;
    if (ran) continue;
    for (int t = 0; t < count; ++t) {
      if (threads[t].state == State::kWarp) {
        failure = "lanes of a warp wait for others that never come";
        return;
      }
      if (threads[t].state == State::kBlock) threads[t].state = State::kReady;
    }
  }
}

template <typename T>
void shuffle(const char* name, T& x, int offset) {
  meet(name, x, [&](T** all) {
    T from[kLanes];
    for (int i = 0; i < kLanes; ++i) from[i] = *all[i];
    for (int i = 0; i < kLanes; ++i) {
      const int other = name[0] == 'x' ? i ^ offset : name[0] == 'u' ? i - offset : i + offset;
      *all[i] = from[other >= 0 && other < kLanes ? other : i];
    }
  });
}

inline uint32_t reduce(const char* name, uint32_t x, uint32_t (*join)(uint32_t, uint32_t)) {
  meet(name, x, [&](uint32_t** all) {
    uint32_t total = *all[0];
    for (int i = 1; i < kLanes; ++i) total = join(total, *all[i]);
    for (int i = 0; i < kLanes; ++i) *all[i] = total;
  });
  return x;
}

}  // namespace lane_model

// --- CUDA's names ---------------------------------------------------------------------------------------------------

inline void __syncthreads() {
  lane_model::threads[lane_model::current].state = lane_model::State::kBlock;
  lane_model::leave();
}
inline void __syncwarp() {
  int nothing = 0;
  lane_model::meet("syncwarp", nothing, [](int**) {});
}
template <typename T>
T __shfl_xor_sync(uint32_t, T x, int mask) {
  lane_model::shuffle("xor", x, mask);
  return x;
}
template <typename T>
T __shfl_down_sync(uint32_t, T x, int offset) {
  lane_model::shuffle("down", x, offset);
  return x;
}
template <typename T>
T __shfl_up_sync(uint32_t, T x, int offset) {
  lane_model::shuffle("up", x, offset);
  return x;
}
template <typename T>
T __shfl_sync(uint32_t, T x, int lane) {
  struct Slot {
    T x;
    int from;
    T result;
  } slot{x, lane % 32, x};
  lane_model::meet("shfl", slot, [](Slot** all) {
    for (int i = 0; i < 32; ++i) all[i]->result = all[all[i]->from]->x;
  });
  return slot.result;
}
inline uint32_t __ballot_sync(uint32_t, bool vote) {
  return lane_model::reduce("ballot", vote ? 1u << threadIdx.x % 32 : 0, [](uint32_t a, uint32_t b) { return a | b; });
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t x) {
  return lane_model::reduce("add", x, [](uint32_t a, uint32_t b) { return a + b; });
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t x) {
  return lane_model::reduce("max", x, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
template <typename T>
T atomicAdd(T* at, T x) {
  const T old = *at;
  *at += x;
  return old;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> (shift & 31));
}
inline uint32_t __funnelshift_rc(uint32_t low, uint32_t high, uint32_t shift) {
  return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}
template <typename T>
T __ldg(const T* at) {
  lane_model::read(at, sizeof(T));
  return *at;
}
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
// The host compiler does not fuse a product and a sum: x86-64 has no such instruction without options.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float2uint_rn(float x) { return static_cast<uint32_t>(std::llrint(x)); }
using std::min;

// --- csrc/cuda/device.h -----------------------------------------------------------------------------------------------

namespace headstart {
namespace cuda {

inline float exp2_or_zero(float x) {
  const float result = std::exp2(x);
  return result < std::ldexp(1.0f, -126) ? 0.0f : result;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return x.bits >> 15 != 0 ? -size : size;
}

template <typename T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    const double size = std::fabs(static_cast<double>(x));
    const bool half = std::is_same_v<T, Float16>;
    const int digits = half ? 10 : 7, top = half ? 15 : 127;
    const auto bits = [&](uint32_t number) {
      return T{static_cast<uint16_t>(number | (std::signbit(x) ? 0x8000 : 0))};
    };
    if (std::isnan(x)) return bits(0x7FFF);
    const int exponent = size == 0 ? 1 - top : std::max(std::ilogb(size), 1 - top);
    const double steps = std::nearbyint(std::ldexp(size, digits - exponent));  // to even; 2^digits and more: normal
    if (std::isinf(size) || std::ldexp(steps, exponent - digits) >= std::ldexp(1.0, top + 1)) {
      return bits((2 * top + 1) << digits);
    }
    return bits(static_cast<uint32_t>(steps) + ((exponent + top - 1) << digits));
  }
}

// a · b + c of two neighbours in a register.
template <typename T>
uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int half = 0; half < 2; ++half) {
    const auto value = [&](uint32_t x) { return to_float(T{static_cast<uint16_t>(x >> 16 * half)}); };
    result |= static_cast<uint32_t>(from_float<T>(std::fma(value(a), value(b), value(c))).bits) << 16 * half;
  }
  return result;
}

template <typename T>
uint32_t pair_from_floats(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline void load_if(bool wanted, uint32_t& to, const uint32_t* from) {
  to = wanted ? __ldg(from) : 0xA5A5A5A5u;  // in place of what happens to be there
}
inline void load_if(bool wanted, uint4& to, const uint4* from) {
  if (wanted) to = __ldg(from);
}

inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> 4 * i & 15;
    if (pick > 7) lane_model::fail("prmt: a sign is spread, which no kernel asks for");
    result |= ((pick < 4 ? a : b) >> 8 * (pick % 4) & 255) << 8 * i;
  }
  return result;
}

inline uint32_t block_id() { return blockIdx.x; }
inline uint32_t thread_id() { return threadIdx.x; }

inline unsigned char* shared_memory() { return lane_model::shared.data(); }

using SharedAddress = unsigned char*;
inline SharedAddress shared_address(void* at) { return static_cast<unsigned char*>(at); }
template <int kBytes>
void store_shared(SharedAddress at, uint32_t x) {
  std::memcpy(at, &x, kBytes);
}
template <typename T>
T* opaque(T* at) {
  return at;
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  struct Slot {
    uint32_t* to;
    const void* row;
  } slot{to, row};
  lane_model::meet("ldmatrix", slot, [](Slot** all) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto* from = static_cast<const unsigned char*>(all[matrix * 8 + lane / 4]->row);
        if (reinterpret_cast<uintptr_t>(from) % 16 != 0) lane_model::fail("ldmatrix: a row is not aligned to 16 bytes");
        std::memcpy(all[lane]->to + matrix, from + lane % 4 * 4, 4);
      }
    }
  });
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Slot {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } slot{c, a, {b0, b1}};
  lane_model::meet("mma", slot, [](Slot** all) {
    const auto half_of = [](uint32_t word, int half) { return to_float(T{static_cast<uint16_t>(word >> 16 * half)}); };
    float left[mma::kRows][mma::kDepth], right[mma::kDepth][mma::kColumns];
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < 4; ++r) {
          left[mma::a_row(lane, r)][mma::a_depth(lane, r, half)] = half_of(all[lane]->a[r], half);
        }
        for (int r = 0; r < 2; ++r) {
          right[mma::b_depth(lane, r, half)][mma::b_column(lane)] = half_of(all[lane]->b[r], half);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        float& sum = all[lane]->c[i];
        const int row = mma::c_row(lane, i), column = mma::c_column(lane, i);
        for (int d = 0; d < mma::kDepth; ++d) sum += left[row][d] * right[d][column];
      }
    }
  });
}

inline void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    lane_model::fail("cp.async: an address is not aligned to 16 bytes");
  }
  if (valid) lane_model::read(global, 16);
  lane_model::threads[lane_model::current].groups.back().push_back({shared, global, valid});
}
inline void copy_commit() { lane_model::threads[lane_model::current].groups.emplace_back(); }
template <int kPending>
void copy_wait() {
  auto& groups = lane_model::threads[lane_model::current].groups;
  lane_model::threads[lane_model::current].shown = false;
  for (; groups.size() > kPending + 1; groups.pop_front()) {
    for (const lane_model::Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
  }
}

inline void fence_async_proxy() { lane_model::threads[lane_model::current].shown = true; }
inline void group_fence() { lane_model::threads[lane_model::current].fenced = true; }
inline void group_commit() { lane_model::threads[lane_model::current].fenced = false; }

template <typename T, int kTiles>
void group_multiply_add(float (&c)[kTiles][4], const uint32_t (&a)[4], const void* tile) {
  auto& thread = lane_model::threads[lane_model::current];
  if (!thread.fenced) lane_model::fail("wgmma: registers were written without a fence");
  const auto address = static_cast<uint32_t>(static_cast<const unsigned char*>(tile) - lane_model::shared.data());
  thread.products.push_back({&c[0][0], {a[0], a[1], a[2], a[3]}, wgmma::descriptor(address), false, 0});
  thread.half = std::is_same_v<T, Float16>;
}

template <typename T, int kTiles>
void group_multiply_add(float (&c)[kTiles][4], const void* left, const void* right) {
  group_multiply_add<T>(c, {0, 0, 0, 0}, right);
  lane_model::Product& product = lane_model::threads[lane_model::current].products.back();
  const auto address = static_cast<uint32_t>(static_cast<const unsigned char*>(left) - lane_model::shared.data());
  product.shared = true;
  product.left = wgmma::descriptor(address);
}

// An element of the operand that a descriptor names, found as the hardware finds it: by the descriptor's fields, with
// the swizzle taken from the address itself.
inline uint16_t group_element(uint64_t descriptor, int row, int depth) {
  const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3FFF) << 4; };
  const uint32_t at =
      field(0) + static_cast<uint32_t>(row / 8) * field(32) + static_cast<uint32_t>(row % 8 * 128 + depth * 2);
  uint16_t bits;
  std::memcpy(&bits, lane_model::shared.data() + (at ^ (at >> 7 & 7) << 4), sizeof bits);
  return bits;
}

// Each warp multiplies its own 16 rows.
template <int kTiles>
void group_wait(float (&c)[kTiles][4]) {
  auto& thread = lane_model::threads[lane_model::current];
  for (lane_model::Product& product : thread.products) {
    lane_model::meet("wgmma", product, [&](lane_model::Product** all) {
      const int first = lane_model::current / lane_model::kLanes * lane_model::kLanes;
      const auto value = [&](uint16_t bits) {
        return thread.half ? to_float(Float16{bits}) : to_float(BFloat16{bits});
      };
      float left[mma::kRows][mma::kDepth];
      for (int lane = 0; lane < 32; ++lane) {
        if (!lane_model::threads[first + lane].shown) lane_model::fail("wgmma: copies were not shown to tensor cores");
        if (all[lane]->b != product.b || all[lane]->left != product.left)
          lane_model::fail("wgmma: lanes name different tiles");
        for (int r = 0; r < 4; ++r) {
          for (int half = 0; half < 2; ++half) {
            const auto bits = static_cast<uint16_t>(all[lane]->a[r] >> 16 * half);
            left[mma::a_row(lane, r)][mma::a_depth(lane, r, half)] = value(bits);
          }
        }
      }
      const uint64_t b = product.b;
      for (const uint64_t descriptor : {b, product.shared ? product.left : b}) {
        if (descriptor >> 62 != wgmma::kSwizzle128 || (descriptor >> 49 & 7) != 0)
          lane_model::fail("wgmma: another swizzle or base offset");
      }
      for (int row = 0; product.shared && row < mma::kRows; ++row) {
        const int of_group = first / lane_model::kLanes % wgmma::kWarps * mma::kRows + row;
        for (int d = 0; d < mma::kDepth; ++d) left[row][d] = value(group_element(product.left, of_group, d));
      }
      for (int column = 0; column < kTiles * mma::kColumns; ++column) {
        float right[mma::kDepth];
        for (int d = 0; d < mma::kDepth; ++d) right[d] = value(group_element(b, column, d));
        for (int row = 0; row < mma::kRows; ++row) {
          const int lane = row % 8 * 4 + column % 8 / 2;
          float& sum = all[lane]->c[column / 8 * 4 + row / 8 * 2 + column % 2];
          for (int d = 0; d < mma::kDepth; ++d) sum += left[row][d] * right[d];
        }
      }
    });
  }
  thread.products.clear();
}

inline bool has_warp_groups() { return lane_model::warp_groups; }

template <typename... Args>
const char* launch(void (*kernel)(Args...), int64_t blocks, int threads, int shared_bytes, CUstream_st*,
                   const std::common_type_t<Args>&... args) {
  constexpr size_t kGuard = 1024;
  lane_model::failure = nullptr;
  lane_model::body = [&] { kernel(args...); };
  for (int64_t block = 0; block < blocks; ++block) {
    lane_model::shared.assign(static_cast<size_t>(shared_bytes) + kGuard, 0xFF);
    blockIdx.x = static_cast<uint32_t>(lane_model::descending ? blocks - 1 - block : block);
    lane_model::run_block(threads);
    if (lane_model::failure != nullptr) return lane_model::failure;
    for (size_t i = static_cast<size_t>(shared_bytes); i < lane_model::shared.size(); ++i) {
      if (lane_model::shared[i] != 0xFF) return "a write behind the end of shared memory";
    }
  }
  return nullptr;
}

inline const char* zero(void* at, int64_t bytes, CUstream_st*) {
  std::memset(at, 0, static_cast<size_t>(bytes));
  return nullptr;
}

inline int multiprocessors() { return 1; }

}  // namespace cuda
}  // namespace headstart

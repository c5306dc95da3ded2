// Hopper's instructions for four warps together (layouts/wgmma.h). They exist only for sm_90a. For other architectures
// these functions are empty, and kernels that call them must not be launched.
#pragma once

#include "../layouts/wgmma.h"
#include "device.h"

#ifndef HEADSTART_LANE_MODEL

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HEADSTART_WGMMA
#endif

namespace headstart {
namespace cuda {

// Lets the tensor cores see this thread's writes to shared memory. Call it before the barrier.
__device__ __forceinline__ void fence_async_proxy() {
#ifdef HEADSTART_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// A group of four warps gives registers back, or takes more, until each of its threads has kRegisters.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#ifdef HEADSTART_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#ifdef HEADSTART_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Call it before a product if its registers were written since the last product.
__device__ __forceinline__ void group_fence() {
#ifdef HEADSTART_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void group_commit() {
#ifdef HEADSTART_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most `kPending` committed groups of products are unfinished. The sums `c` of finished products are
// valid only after this call.
template <int kPending = 0, int kTiles>
__device__ __forceinline__ void group_wait(float (&c)[kTiles][4]) {
#ifdef HEADSTART_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[tile][i])::"memory");
  }
}

// c = a · b for 16 elements of depth, or c += a · b if `add`. `b` is a descriptor (layouts/wgmma.h). Four whole warps
// call it. c is valid only after group_wait.
#define HEADSTART_SUMS(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])

template <typename T, bool kTransposed = false>
__device__ __forceinline__ void group_multiply(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
#ifdef HEADSTART_WGMMA
#define HEADSTART_MULTIPLY(type)                                                                       \
  asm volatile(                                                                                        \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                      \
      " "                                                                                              \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                        \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "              \
      "{%32, %33, %34, %35}, %36, add, 1, 1, %38;\n}"                                                  \
      : HEADSTART_SUMS(0), HEADSTART_SUMS(1), HEADSTART_SUMS(2), HEADSTART_SUMS(3), HEADSTART_SUMS(4), \
        HEADSTART_SUMS(5), HEADSTART_SUMS(6), HEADSTART_SUMS(7)                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposed ? 1 : 0))
  if constexpr (std::is_same_v<T, Float16>) {
    HEADSTART_MULTIPLY("f16");
  } else {
    HEADSTART_MULTIPLY("bf16");
  }
#undef HEADSTART_MULTIPLY
#endif
}

template <typename T, bool kTransposed = false>
__device__ __forceinline__ void group_multiply(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool add) {
#ifdef HEADSTART_WGMMA
#define HEADSTART_MULTIPLY(type)                                                                            \
  asm volatile(                                                                                             \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"                                                      \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                          \
      " "                                                                                                   \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                    \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                    \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                   \
      "{%64, %65, %66, %67}, %68, add, 1, 1, %70;\n}"                                                       \
      : HEADSTART_SUMS(0), HEADSTART_SUMS(1), HEADSTART_SUMS(2), HEADSTART_SUMS(3), HEADSTART_SUMS(4),      \
        HEADSTART_SUMS(5), HEADSTART_SUMS(6), HEADSTART_SUMS(7), HEADSTART_SUMS(8), HEADSTART_SUMS(9),      \
        HEADSTART_SUMS(10), HEADSTART_SUMS(11), HEADSTART_SUMS(12), HEADSTART_SUMS(13), HEADSTART_SUMS(14), \
        HEADSTART_SUMS(15)                                                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposed ? 1 : 0))
  if constexpr (std::is_same_v<T, Float16>) {
    HEADSTART_MULTIPLY("f16");
  } else {
    HEADSTART_MULTIPLY("bf16");
  }
#undef HEADSTART_MULTIPLY
#endif
}

// The same for A [64][16] in shared memory, which lies there as B does.
template <typename T>
__device__ __forceinline__ void group_multiply_add(float (&c)[16][4], const void* left, const void* right) {
  [[maybe_unused]] const uint64_t a = wgmma::descriptor(shared_address(left));
  [[maybe_unused]] const uint64_t b = wgmma::descriptor(shared_address(right));
#ifdef HEADSTART_WGMMA
#define HEADSTART_MULTIPLY(type)                                                                            \
  asm volatile(                                                                                             \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                                      \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                          \
      " "                                                                                                   \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                    \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                    \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                   \
      "%64, %65, add, 1, 1, 0, 0;\n}"                                                                       \
      : HEADSTART_SUMS(0), HEADSTART_SUMS(1), HEADSTART_SUMS(2), HEADSTART_SUMS(3), HEADSTART_SUMS(4),      \
        HEADSTART_SUMS(5), HEADSTART_SUMS(6), HEADSTART_SUMS(7), HEADSTART_SUMS(8), HEADSTART_SUMS(9),      \
        HEADSTART_SUMS(10), HEADSTART_SUMS(11), HEADSTART_SUMS(12), HEADSTART_SUMS(13), HEADSTART_SUMS(14), \
        HEADSTART_SUMS(15)                                                                                  \
      : "l"(a), "l"(b), "r"(1))
  if constexpr (std::is_same_v<T, Float16>) {
    HEADSTART_MULTIPLY("f16");
  } else {
    HEADSTART_MULTIPLY("bf16");
  }
#undef HEADSTART_MULTIPLY
#endif
}

#undef HEADSTART_SUMS

// c += a · b for 16 elements of depth of `tile` in shared memory.
template <typename T, int kTiles>
__device__ __forceinline__ void group_multiply_add(float (&c)[kTiles][4], const uint32_t (&a)[4], const void* tile) {
  group_multiply<T>(c, a, wgmma::descriptor(shared_address(tile)), true);
}

}  // namespace cuda
}  // namespace headstart

#endif

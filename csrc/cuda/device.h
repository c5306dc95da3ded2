// PTX instructions that CUDA C++ does not offer, for tensor cores and asynchronous copies.
//
// With HEADSTART_LANE_MODEL, these names and the names of CUDA that kernels use come from
// tests/lane_model/lane_model.h, which runs a kernel on a CPU, lane by lane.
#pragma once

#include <cmath>
#include <cstdint>

#include "../arguments.h"
#include "../layouts/mma.h"

#ifdef HEADSTART_LANE_MODEL
#include "lane_model.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "launch.h"

namespace headstart {
namespace cuda {

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes;
}

// blockIdx.x. The compiler assumes that each call may return a different number, so it does not keep values derived
// from it in registers.
__device__ __forceinline__ uint32_t block_id() {
  uint32_t id;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(id));
  return id;
}

// threadIdx.x, in the same way.
__device__ __forceinline__ uint32_t thread_id() {
  uint32_t id;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
  return id;
}

// The address of a byte of shared memory, in the form that the instructions below take.
using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Stores the lowest kBytes bytes of x.
template <int kBytes>
__device__ __forceinline__ void store_shared(SharedAddress at, uint32_t x) {
  static_assert(kBytes == 1 || kBytes == 2 || kBytes == 4);
  if constexpr (kBytes == 1) {
    asm volatile("st.shared.b8 [%0], %1;" ::"r"(at), "r"(x) : "memory");
  } else if constexpr (kBytes == 2) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(static_cast<uint16_t>(x)) : "memory");
  } else {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
  }
}

// Returns the same address and hides its computation from the compiler. So the address stays in registers, and a loop
// does not compute it again.
template <typename T>
__device__ __forceinline__ T* opaque(T* at) {
  asm volatile("" : "+l"(at));
  return at;
}

// Loads four 8 × 8 matrices of 16-bit elements. layouts/mma.h defines the address that a lane gives and the elements
// that it receives.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  load_matrices(to, shared_address(row));
}

// c += a · b
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Float16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// a · b + c for the two values of a register, each rounded once.
template <typename T>
__device__ __forceinline__ uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  if constexpr (std::is_same_v<T, Float16>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  }
  return result;
}

// Loads `to` from `from` if `wanted`, otherwise leaves `to` unchanged. Nothing may write to `from` while the kernel
// runs. The load of 32 bits also tells L2 to fetch the 256 bytes around the address.
__device__ __forceinline__ void load_if(bool wanted, uint32_t& to, const uint32_t* from) {
  asm("{ .reg .pred wanted; setp.ne.b32 wanted, %2, 0; @wanted ld.global.nc.L2::256B.b32 %0, [%1]; }"
      : "+r"(to)
      : "l"(from), "r"(static_cast<int>(wanted)));
}

__device__ __forceinline__ void load_if(bool wanted, uint4& to, const uint4* from) {
  asm("{ .reg .pred wanted; setp.ne.b32 wanted, %5, 0; @wanted ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
      : "l"(from), "r"(static_cast<int>(wanted)));
}

// (x & mask) | bits in one instruction. Written with operators, it became two instructions when mask and bits were
// constants. An instruction holds only one constant, and the compiler splits the expression before it looks for a
// register.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
  return result;
}

// Nibble i of the selector chooses byte i of the result: 0 to 3 are the bytes of a, 4 to 7 the bytes of b.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// Copies 16 bytes from global to shared memory. If not `valid`, writes zeros and reads nothing.
__device__ __forceinline__ void copy_async(SharedAddress shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  copy_async(shared_address(shared), global, valid);
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 2^x, and 0 in place of numbers below 2^-126. exp2f takes four instructions to give these, too.
__device__ __forceinline__ float exp2_or_zero(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// Converts x to T, rounded to nearest.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, Float16>) {
    return {__half_as_ushort(__float2half_rn(x))};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else {
    return x;
  }
}

// Converts two neighbours and packs them in a register, the first one in its low half.
template <typename T>
__device__ __forceinline__ uint32_t pair_from_floats(float low, float high) {
  uint32_t result;
  if constexpr (std::is_same_v<T, Float16>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
}

}  // namespace cuda
}  // namespace headstart

#endif

namespace headstart {
namespace cuda {

constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;

}  // namespace cuda
}  // namespace headstart

// As much of CUDA's runtime as csrc/cuda/launch.h calls, for g++: errors as CUDA keeps them, and kernels that run on the
// spot, with one thread. Types and signatures are CUDA's.
#pragma once

#include <cstddef>
#include <cstring>

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrL2CacheSize
};

namespace cuda_runtime {

inline cudaError_t last = cudaSuccess;
inline bool kernel_failed = false;  // the device is lost: every call says so from now on
inline int started = 0;             // kernels

inline cudaError_t keep(cudaError_t error) {
  if (kernel_failed) error = cudaErrorIllegalAddress;
  if (error != cudaSuccess) last = error;
  return error;
}

}  // namespace cuda_runtime

inline cudaError_t cudaPeekAtLastError() { return cuda_runtime::last; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_runtime::last;
  cuda_runtime::last = cuda_runtime::kernel_failed ? error : cudaSuccess;
  return error;
}
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue           ? "cudaErrorInvalidValue"
         : error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
                                                  : "cudaErrorIllegalAddress";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue           ? "invalid argument"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                  : "an illegal memory access was encountered";
}

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  constexpr int kMost = 227 << 10;
  return cuda_runtime::keep(bytes > kMost ? cudaErrorInvalidValue : cudaSuccess);
}
inline cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void**, size_t, cudaStream_t) {
  const bool fits = grid.x <= 0x7FFFFFFF && grid.y <= 65535 && block.x * block.y <= 1024;
  const cudaError_t error = cuda_runtime::keep(fits ? cudaSuccess : cudaErrorInvalidConfiguration);
  cuda_runtime::started += error == cudaSuccess;
  return error;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  if (at == nullptr) return cuda_runtime::keep(cudaErrorInvalidValue);
  std::memset(at, value, bytes);
  return cuda_runtime::keep(cudaSuccess);
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cuda_runtime::keep(cudaSuccess);
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 9;
  return cuda_runtime::keep(cudaSuccess);
}

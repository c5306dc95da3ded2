// Starts kernels, reports CUDA's errors, and queries the device.
//
// CUDA keeps the last error of a thread until someone asks for it. An error that exists before a launch belongs to an
// earlier call that failed and whose error nobody asked for. It is reported as an earlier error, and the kernel is not
// started.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <type_traits>

namespace headstart {
namespace cuda {

// Describes a failure. The text stays valid until the thread's next failure. Clears CUDA's last error, so no later call
// reports it.
template <typename... Values>
const char* failure(cudaError_t error, const char* format, Values... values) {
  thread_local char text[320];
  const int said = std::snprintf(text, sizeof text, format, values...);
  std::snprintf(text + said, sizeof text - said, ": %s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
  cudaGetLastError();
  return text;
}

inline const char* earlier_failure(cudaError_t error) {
  return failure(error, "%s", "nothing was started, because an earlier CUDA call or kernel had failed");
}

// Makes a CUDA call and does not wait for its end. Returns null if it succeeds. Otherwise returns a text that says what
// failed: something before the call, or the call itself, which `format` and its values describe.
template <typename Call, typename... Values>
const char* checked(const Call& call, const char* format, Values... values) {
  const cudaError_t earlier = cudaPeekAtLastError();
  if (earlier != cudaSuccess) return earlier_failure(earlier);
  const cudaError_t error = call();
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  // The error of a kernel that ran stays even after someone asked for it. Our kernel has not run yet, so an error that
  // stays is an earlier one.
  return cudaPeekAtLastError() != cudaSuccess ? earlier_failure(error) : failure(error, format, values...);
}

template <typename... Args>
const char* launch(void (*kernel)(Args...), dim3 grid, dim3 block, int shared_bytes, CUstream_st* stream,
                   const std::common_type_t<Args>&... args) {
  constexpr int kAlwaysAllowed = 48 << 10;
  const auto function = reinterpret_cast<const void*>(kernel);
  const auto start = [&] {
    if (shared_bytes > kAlwaysAllowed) {
      const cudaError_t error =
          cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      if (error != cudaSuccess) return error;
    }
    const void* values[] = {&args...};
    return cudaLaunchKernel(function, grid, block, const_cast<void**>(values), static_cast<size_t>(shared_bytes),
                            stream);
  };
  return checked(start, "no kernel was started with %u x %u blocks of %u x %u threads and %d bytes of shared memory",
                 grid.x, grid.y, block.x, block.y, shared_bytes);
}

template <typename... Args>
const char* launch(void (*kernel)(Args...), int64_t blocks, int threads, int shared_bytes, CUstream_st* stream,
                   const std::common_type_t<Args>&... args) {
  const auto x = static_cast<unsigned>(std::min<int64_t>(blocks, UINT32_MAX));  // CUDA rejects so many blocks
  return launch(kernel, dim3(x), dim3(static_cast<unsigned>(threads)), shared_bytes, stream, args...);
}

inline const char* zero(void* at, int64_t bytes, CUstream_st* stream) {
  const auto set = [&] { return cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), stream); };
  return checked(set, "%lld bytes were not set to zero", static_cast<long long>(bytes));
}

// The number of multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// The bytes of the current device's L2 cache.
inline int64_t l2_bytes() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device);
  return bytes;
}

// Whether wgmma is available: the current device must have it, and this library must be built for sm_90a.
inline bool has_warp_groups() {
#ifdef HEADSTART_SM90A
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

}  // namespace cuda
}  // namespace headstart

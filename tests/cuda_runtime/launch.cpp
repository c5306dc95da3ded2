// csrc/cuda/launch.h for ctypes, with a runtime whose errors the test makes.
#include "../../csrc/cuda/launch.h"

namespace {

void kernel(int, const float*) {}

}  // namespace

extern "C" {

const char* launch(int64_t blocks, int threads, int shared_bytes) {
  return headstart::cuda::launch(kernel, blocks, threads, shared_bytes, nullptr, 1, nullptr);
}
const char* zero(void* at, int64_t bytes) { return headstart::cuda::zero(at, bytes, nullptr); }
int started() { return cuda_runtime::started; }
int pending() { return cudaPeekAtLastError(); }
void fail_a_call() { cuda_runtime::keep(cudaErrorInvalidValue); }
void fail_a_kernel(bool noticed) {
  cuda_runtime::kernel_failed = true;
  if (noticed) cuda_runtime::keep(cudaSuccess);
}
void reset() {
  cuda_runtime::kernel_failed = false;
  cuda_runtime::last = cudaSuccess;
}
}

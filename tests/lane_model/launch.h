// Calls a launcher of csrc/cuda/kernels.h with a workspace that starts as NaN, and finds writes outside of it.
#pragma once

#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "lane_model.h"

template <typename Args>
const char* run(const Args& args, int64_t (*bytes)(const Args&),
                const char* (*launcher)(const Args&, void*, CUstream_st*)) {
  constexpr int64_t kGuard = 256;
  const int64_t size = bytes(args);
  std::vector<unsigned char> memory(static_cast<size_t>(size + 2 * kGuard), 0xFF);
  unsigned char* workspace = memory.data() + kGuard - reinterpret_cast<uintptr_t>(memory.data()) % kGuard;
  const char* error = launcher(args, workspace, nullptr);
  for (const unsigned char* at = memory.data(); error == nullptr && at < memory.data() + memory.size(); ++at) {
    if ((at < workspace || at >= workspace + size) && *at != 0xFF) return "a write outside the workspace";
  }
  return error;
}

// Registers the CPU kernels of the tier in use (kernels.inc) as implementations of torch.ops.headstart.*.
//
// The kernels run on torch's threads. The library uses only torch's stable ABI, so one build serves every torch from
// 2.11 on. Schemas and fake kernels are defined in Python (python/headstart/ops/).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../cpu/kernels.h"
#include "bitmap.h"
#include "built_with.h"
#include "centroid_lookup.h"
#include "int4_gemm.h"
#include "prefill_index.h"
#include "sparse_attention.h"

#define HEADSTART_NAMESPACE headstart

namespace headstart {
namespace {

const Parallel& threads() {
  static thread_local Parallel parallel{};
  parallel.workers = static_cast<int>(torch::stable::get_num_threads());
  parallel.run = [](int workers, void (*body)(void*, int), void* context) {
    if (workers == 1) return body(context, 0);
    torch::stable::parallel_for(0, workers, 1, [=](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) body(context, static_cast<int>(w));
    });
  };
  return parallel;
}

// Each kernel of the tier in use as a static function of the same name.
struct TierKernels {
#define HEADSTART_KERNEL(name, Args) \
  static void name(const Args& args, const Tensor&) { kernels().name(args, threads()); }
#define HEADSTART_VBMI2_KERNEL HEADSTART_KERNEL
#include "../kernels.inc"
};

struct CpuKernels : TierKernels {
  static constexpr bool kHasDense = false, kChecksLists = true;

  // Checks that no row reads past the stored values. A row's bits are counted only if the row would read past them with
  // every bit set.
  static void check_data(const Checks& check, const BitmapWeight& w) {
    const int64_t bytes = ceil_div(w.k, 8);
    for (int64_t n = 0; n < w.n; ++n) {
      const int64_t first = w.row_offsets[n];
      if (first >= 0 && first <= w.stored - w.k) continue;
      int64_t count = 0;
      for (int64_t i = 0; i < bytes; ++i) count += __builtin_popcount(w.bitmask[n * bytes + i]);
      check.expect(first >= 0 && first <= w.stored - count, "row_offsets",
                   "rows within the " + std::to_string(w.stored) + " values",
                   "row " + std::to_string(n) + " at " + std::to_string(first) + " with " + std::to_string(count));
    }
  }
  static int64_t bitmap_mask(const BitmapCompressArgs& args, const Tensor& w) {
    TierKernels::bitmap_mask(args, w);
    return args.row_offsets[args.n];
  }
};

}  // namespace
}  // namespace headstart

STABLE_TORCH_LIBRARY_IMPL(HEADSTART_NAMESPACE, CPU, m) {
#define HEADSTART_OPERATOR(name, function) m.impl(name, TORCH_BOX(&headstart::function<headstart::CpuKernels>));
#define HEADSTART_CPU_OPERATOR HEADSTART_OPERATOR
#include "../kernels.inc"
}

extern "C" __attribute__((visibility("default"))) const char* headstart_cpu_operators() {
#define HEADSTART_OPERATOR(name, function) " " name
#define HEADSTART_CPU_OPERATOR HEADSTART_OPERATOR
  return
#include "../kernels.inc"
      ;
}

// Registers the CUDA kernels as implementations of torch.ops.headstart.*. Selects the device and its current stream and
// allocates the workspaces.
//
// The library uses only torch's stable ABI, so one build serves every torch from 2.11 on. Schemas and fake kernels are
// defined in Python (python/headstart/ops/). Compile with -DUSE_CUDA: without it, torch's shim.h does not declare
// aoti_torch_get_current_cuda_stream.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "../cuda/kernels.h"
#include "bitmap.h"
#include "built_with.h"
#include "centroid_lookup.h"
#include "int4_gemm.h"
#include "prefill_index.h"
#include "sparse_attention.h"

#define HEADSTART_NAMESPACE headstart

namespace headstart {
namespace {

CUstream_st* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<CUstream_st*>(stream);
}

void expect_launched(const char* op, const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string(op) + ": " + error);
}

// Allocates the workspace and calls launcher(args, workspace, stream) on q's device and its current stream.
template <typename Args>
void launch(const char* op, const Args& args, const Tensor& q, int64_t (*workspace_bytes)(const Args&),
            const char* (*launcher)(const Args&, void*, CUstream_st*)) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor workspace = torch::stable::new_empty(q, {workspace_bytes(args)}, ScalarType::Byte);
  expect_launched(op, launcher(args, workspace.mutable_data_ptr(), current_stream(q)));
}

// The crossovers. From this number of rows on, a product first writes the weight in 16 bits and then multiplies with
// torch. Writing the weight and reading it again moves 5 bytes a weight, but the fused kernels' products are slower.
// Both numbers are measured on an H100: bitmap_gemm took the same time both ways at 64 rows, and int4_gemm was never
// faster fused from 256 rows on. `bench/gpu/run.py --only crossovers` times both ways and prints the values to put here.
// From the crossover on, a row's result may depend on the number of rows, as torch's results do.
constexpr int64_t kInt4DenseRows = 256, kBitmapDenseRows = 64;

struct DenseRows {
  std::atomic<int64_t> int4{kInt4DenseRows}, bitmap{kBitmapDenseRows};
} dense_rows;

struct CudaKernels {
  static constexpr bool kChecksLists = false;  // a check would wait for the device
  static void sparse_attention(const SparseAttentionArgs& args, const Tensor& q) {
    if (!cuda::sparse_attention_sm90_runs(args)) {
      throw std::runtime_error("sparse_attention: these arguments do not fit the kernel for Hopper");
    }
    launch("sparse_attention", args, q, cuda::sparse_attention_sm90_workspace, cuda::sparse_attention_sm90);
  }
  static void merge_attention(const MergeAttentionArgs& args, const Tensor& out_a) {
    const torch::stable::accelerator::DeviceGuard guard(out_a.get_device_index());
    expect_launched("merge_attention", cuda::merge_attention(args, current_stream(out_a)));
  }

  static void vertical_slash_index(const VerticalSlashArgs& args, const Tensor& q) {
    launch("vertical_slash_index", args, q, cuda::vertical_slash_workspace, cuda::vertical_slash_index);
  }
  static void block_topk_index(const PrefillIndexArgs& args, const Tensor& q) {
    launch("block_topk_index", args, q, cuda::block_topk_workspace, cuda::block_topk_index);
  }
  static void adaptive_block_index(const AdaptiveArgs& args, const Tensor& q) {
    launch("adaptive_block_index", args, q, cuda::adaptive_workspace, cuda::adaptive_block_index);
  }

  static void centroid_lookup(const CentroidLookupArgs& args, const Tensor& q) {
    launch("centroid_lookup", args, q, cuda::centroid_lookup_workspace, cuda::centroid_lookup);
  }

  static constexpr bool kHasDense = true;
  static int64_t int4_dense_rows() { return dense_rows.int4; }
  static int64_t bitmap_dense_rows() { return dense_rows.bitmap; }

  static void int4_gemm(const Int4GemmArgs& args, const Tensor& x) {
    launch("int4_gemm", args, x, cuda::int4_gemm_workspace, cuda::int4_gemm);
  }
  static Tensor dequantized(Int4GemmArgs args, const Tensor& x) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    Tensor weight = torch::stable::new_empty(x, {args.n, args.k});
    args.out = weight.mutable_data_ptr();
    expect_launched("int4_gemm", cuda::int4_dequantize(args, current_stream(x)));
    return weight;
  }

  static void check_data(const Checks& check, const BitmapWeight& weight) {}  // a check would wait for the device
  static void bitmap_decompress(const BitmapDecompressArgs& args, const Tensor& like) {
    const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    expect_launched("bitmap_decompress", cuda::bitmap_decompress(args, current_stream(like)));
  }
  static void bitmap_gemm(const BitmapGemmArgs& args, const Tensor& x) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    expect_launched("bitmap_gemm", cuda::bitmap_gemm(args, current_stream(x)));
  }
};

}  // namespace
}  // namespace headstart

// Sets the crossovers, for measurements. 0 restores the built-in value.
extern "C" __attribute__((visibility("default"))) void headstart_cuda_set_dense_rows(int64_t int4, int64_t bitmap) {
  headstart::dense_rows.int4 = int4 > 0 ? int4 : headstart::kInt4DenseRows;
  headstart::dense_rows.bitmap = bitmap > 0 ? bitmap : headstart::kBitmapDenseRows;
}

STABLE_TORCH_LIBRARY_IMPL(HEADSTART_NAMESPACE, CUDA, m) {
#define HEADSTART_OPERATOR(name, function) m.impl(name, TORCH_BOX(&headstart::function<headstart::CudaKernels>));
#define HEADSTART_CUDA_OPERATOR HEADSTART_OPERATOR
#include "../kernels.inc"
}

extern "C" __attribute__((visibility("default"))) const char* headstart_cuda_operators() {
#define HEADSTART_OPERATOR(name, function) " " name
#define HEADSTART_CUDA_OPERATOR HEADSTART_OPERATOR
  return
#include "../kernels.inc"
      ;
}

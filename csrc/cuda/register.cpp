// The CUDA kernels as implementations of torch.ops.headstart.*: checks, output allocation, plain arguments, the stream.
//
// Only torch's stable ABI is used, so one build serves every torch from 2.10 on. Schemas and fake kernels are Python's
// (python/headstart/ops/). Compile with -DUSE_CUDA, which the shim asks for before it declares the stream.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../bitmap.h"
#include "../int4_gemm.h"
#include "../prefill_index.h"
#include "kernels.h"

#define HEADSTART_NAMESPACE headstart

namespace headstart {
namespace {

// A dimension of one never steps, whatever its stride says.
cuda::Strides3 strides(const Tensor& x) {
  const auto step = [&](int64_t i) { return x.size(i) == 1 ? 0 : x.stride(i); };
  return {step(0), step(1), step(2)};
}

CUstream_st* current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<CUstream_st*>(stream);
}

void expect_launched(const char* op, const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string(op) + ": the CUDA launch failed: " + error);
}

std::tuple<Tensor, Tensor> merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  const Checks check("merge_attention");
  check.floating("out_a", out_a, {"B", "H", "N", "D"});
  const int64_t batch = out_a.size(0), heads = out_a.size(1), tokens = out_a.size(2), dim = out_a.size(3);
  check.tensor("lse_a", lse_a, {ScalarType::Float}, {batch, heads, tokens}, &out_a);
  check.tensor("out_b", out_b, {out_a.scalar_type()}, {batch, heads, tokens, dim}, &out_a);
  check.tensor("lse_b", lse_b, {ScalarType::Float}, {batch, heads, tokens}, &out_a);
  check.contiguous_last("out_a", out_a);
  check.contiguous_last("out_b", out_b);
  const torch::stable::accelerator::DeviceGuard guard(out_a.get_device_index());
  Tensor out = torch::stable::new_empty(out_a, {batch, heads, tokens, dim});
  Tensor lse = torch::stable::new_empty(lse_a, {batch, heads, tokens});
  cuda::MergeArgs args{};
  args.out_a = out_a.const_data_ptr();
  args.out_b = out_b.const_data_ptr();
  args.lse_a = static_cast<const float*>(lse_a.const_data_ptr());
  args.lse_b = static_cast<const float*>(lse_b.const_data_ptr());
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.stride_out_a = strides(out_a);
  args.stride_out_b = strides(out_b);
  args.stride_lse_a = strides(lse_a);
  args.stride_lse_b = strides(lse_b);
  args.batch = batch;
  args.heads = heads;
  args.tokens = tokens;
  args.dim = dim;
  args.dtype = dtype_of(out_a);
  expect_launched("merge_attention", cuda::merge_attention(args, current_stream(out_a)));
  return {out, lse};
}

// Calls launcher(args, workspace, stream) on q's device and its current stream.
template <typename Args>
void launch(const char* op, const Args& args, const Tensor& q, int64_t (*workspace_bytes)(const Args&),
            const char* (*launcher)(const Args&, void*, CUstream_st*)) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor workspace = torch::stable::new_empty(q, {workspace_bytes(args)}, ScalarType::Byte);
  expect_launched(op, launcher(args, workspace.mutable_data_ptr(), current_stream(q)));
}

struct CudaKernels {
  static void vertical_slash_index(const VerticalSlashArgs& args, const Tensor& q) {
    launch("vertical_slash_index", args, q, cuda::vertical_slash_workspace, cuda::vertical_slash_index);
  }
  static void block_topk_index(const PrefillIndexArgs& args, const Tensor& q) {
    launch("block_topk_index", args, q, cuda::block_topk_workspace, cuda::block_topk_index);
  }
  static void adaptive_block_index(const AdaptiveArgs& args, const Tensor& q) {
    launch("adaptive_block_index", args, q, cuda::adaptive_workspace, cuda::adaptive_block_index);
  }

  // Where a GEMM of 16-bit weights, bound by its operations, gains more than writing and reading them costs (5 bytes a
  // weight). Not yet measured on a GPU. From here on a row's result may depend on the number of rows, as torch's does.
  static constexpr int64_t kDenseRows = 1024;
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

  // Writing and reading dense weights costs 5 bytes a weight, and a pass of the fused kernel over 32 rows some 1.5 in time.
  // Not yet measured on a GPU.
  static constexpr int64_t kBitmapDenseRows = 97;
  static void check_data(const Checks& check, const BitmapWeight& weight) {}  // would wait for the device
  static void bitmap_decompress(const BitmapDecompressArgs& args, const Tensor& like) {
    const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    expect_launched("bitmap_decompress", cuda::bitmap_decompress(args, current_stream(like)));
  }
  static void bitmap_gemm(const BitmapGemmArgs& args, const Tensor& x) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    expect_launched("bitmap_gemm", cuda::bitmap_gemm(args, current_stream(x)));
  }
};

// The last offset of every head is the number of its keys. Waits for the device.
int64_t most_keys(Tensor cluster_offsets) {
  const Tensor last = torch::stable::narrow(cluster_offsets, 1, cluster_offsets.size(1) - 1, 1);
  const Tensor here = dense(torch::stable::to(last, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  const auto* values = static_cast<const int32_t*>(here.const_data_ptr());
  return std::max<int64_t>(*std::max_element(values, values + here.size(0)), 0);
}

Pair centroid_lookup(const Tensor q, const Tensor centroids, const Tensor cluster_offsets, const Tensor threshold,
                     double scale, int64_t block_q, const OptionalTensor parent_centroids,
                     const OptionalTensor parent_offsets, const OptionalTensor parent_threshold,
                     const std::optional<int64_t> max_columns) {
  const Checks check("centroid_lookup");
  check.floating("q", q, {"B", "Hq", "Nq", "D"});
  const int64_t batch = q.size(0), heads_q = q.size(1), nq = q.size(2), d = q.size(3);
  check.expect(d % 8 == 0 && d >= 8 && d <= 256, "q", "a head dim that is a multiple of 8 up to 256", d);
  check.contiguous_last("q", q);
  check.tensor("centroids", centroids, {q.scalar_type()}, {"Hkv", "C", d}, &q);
  const int64_t heads = centroids.size(0), clusters = centroids.size(1);
  check.expect(heads > 0 && heads_q % heads == 0, "centroids",
               "a number of heads that divides q's " + std::to_string(heads_q), heads);
  check.expect(clusters > 0, "centroids", "at least one cluster", clusters);
  check.contiguous_last("centroids", centroids);
  check.tensor("cluster_offsets", cluster_offsets, {ScalarType::Int}, {heads, clusters + 1}, &q);
  if (parent_centroids.has_value() != parent_offsets.has_value()) {
    check.fail(parent_offsets.has_value() ? "parent_centroids" : "parent_offsets",
               "a tensor, since its partner is given", "None");
  }
  if (parent_centroids.has_value()) {
    check.tensor("parent_centroids", *parent_centroids, {q.scalar_type()}, {heads, "P", d}, &q);
    check.contiguous_last("parent_centroids", *parent_centroids);
    const int64_t parents = parent_centroids->size(1);
    check.expect(parents > 0, "parent_centroids", "at least one parent", parents);
    check.tensor("parent_offsets", *parent_offsets, {ScalarType::Int}, {heads, parents + 1}, &q);
  }
  const auto check_threshold = [&](const char* argument, const Tensor& x) {
    check.tensor(argument, x, {ScalarType::Float}, x.dim() > 0 ? std::vector<Dim>{"1, Hkv or Hq"} : std::vector<Dim>{},
                 &q);
    const int64_t size = x.dim() > 0 ? x.size(0) : 1;
    check.expect(size == 1 || size == heads || size == heads_q, argument,
                 "1, " + std::to_string(heads) + " or " + std::to_string(heads_q) + " values", size);
    return size;
  };
  cuda::CentroidLookupArgs args{};
  args.clusters.thresholds = check_threshold("threshold", threshold);
  if (parent_centroids.has_value() != parent_threshold.has_value()) {
    check.fail("parent_threshold",
               parent_threshold.has_value() ? "None, since there are no parents" : "a threshold for the parents",
               parent_threshold.has_value() ? "one" : "None");
  }
  if (parent_threshold.has_value()) args.parents.thresholds = check_threshold("parent_threshold", *parent_threshold);
  check.finite("scale", scale);
  check.expect(block_q > 0, "block_q", "a positive number", block_q);
  if (max_columns.has_value()) {
    check.expect(*max_columns >= 0, "max_columns", "no negative number", *max_columns);
  }

  const Tensor offsets = dense(cluster_offsets), thresholds = dense(threshold);
  const OptionalTensor children = dense(parent_offsets), parent_thresholds = dense(parent_threshold);
  const auto level = [](cuda::CentroidLevel& to, const Tensor& x, const Tensor& run_offsets, const Tensor& limits) {
    to.centroids = {x.const_data_ptr(), 0, x.stride(0), x.stride(1)};
    to.run_offsets = static_cast<const int32_t*>(run_offsets.const_data_ptr());
    to.threshold = static_cast<const float*>(limits.const_data_ptr());
    to.count = x.size(1);
  };
  level(args.clusters, centroids, offsets, thresholds);
  if (parent_centroids.has_value()) level(args.parents, *parent_centroids, *children, *parent_thresholds);
  args.dtype = dtype_of(q);
  args.q = view(q);
  args.batch = batch;
  args.heads_q = heads_q;
  args.heads_kv = heads;
  args.nq = nq;
  args.head_dim = d;
  args.block_q = std::max<int64_t>(1, std::min(block_q, nq));
  args.scale = static_cast<float>(scale);
  args.capacity = max_columns.has_value() ? *max_columns : most_keys(cluster_offsets);
  const int64_t rows = ceil_div(nq, args.block_q);
  Tensor count = new_ints(q, {batch, heads, rows});
  Tensor index = new_ints(q, {batch, heads, rows, args.capacity});
  args.column_count = static_cast<int32_t*>(count.mutable_data_ptr());
  args.column_index = static_cast<int32_t*>(index.mutable_data_ptr());
  if (heads_q == 0) torch::stable::zero_(count);
  launch("centroid_lookup", args, q, cuda::centroid_lookup_workspace, cuda::centroid_lookup);
  return {count, index};
}

}  // namespace
}  // namespace headstart

STABLE_TORCH_LIBRARY_IMPL(HEADSTART_NAMESPACE, CUDA, m) {
  m.impl("merge_attention", TORCH_BOX(&headstart::merge_attention));
  m.impl("vertical_slash_index", TORCH_BOX(&headstart::vertical_slash_index<headstart::CudaKernels>));
  m.impl("block_topk_index", TORCH_BOX(&headstart::block_topk_index<headstart::CudaKernels>));
  m.impl("adaptive_block_index", TORCH_BOX(&headstart::adaptive_block_index<headstart::CudaKernels>));
  m.impl("int4_gemm", TORCH_BOX(&headstart::int4_gemm<headstart::CudaKernels>));
  m.impl("bitmap_decompress", TORCH_BOX(&headstart::bitmap_decompress<headstart::CudaKernels>));
  m.impl("bitmap_decompress.out", TORCH_BOX(&headstart::bitmap_decompress_out<headstart::CudaKernels>));
  m.impl("bitmap_gemm", TORCH_BOX(&headstart::bitmap_gemm<headstart::CudaKernels>));
  m.impl("centroid_lookup", TORCH_BOX(&headstart::centroid_lookup));
}

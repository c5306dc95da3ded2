// Centroid lookup as an operator: checks, output allocation and plain arguments, the same for every device.
//
// `Kernels` has the kernel as a static function (args, q); `register.cpp` of each library gives its own.
#pragma once

#include <algorithm>
#include <string>

#include "tensors.h"

namespace headstart {

// The last offset of every head is the number of its keys. Waits for the device.
inline int64_t most_keys(Tensor cluster_offsets) {
  const Tensor last = torch::stable::narrow(cluster_offsets, 1, cluster_offsets.size(1) - 1, 1);
  const Tensor here = dense(torch::stable::to(last, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  const auto* values = static_cast<const int32_t*>(here.const_data_ptr());
  return std::max<int64_t>(*std::max_element(values, values + here.size(0)), 0);
}

template <typename Kernels>
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
  CentroidLookupArgs args{};
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
  const auto level = [](CentroidLevel& to, const Tensor& x, const Tensor& run_offsets, const Tensor& limits) {
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
  Kernels::centroid_lookup(args, q);
  return {count, index};
}

}  // namespace headstart

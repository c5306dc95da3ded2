// centroid_lookup as an operator: checks, output allocation and plain arguments, the same for every device.
//
// `Kernels` holds the kernel as a static function (args, q). cpu.cpp and cuda.cpp each define one.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "tensors.h"

namespace headstart {

// A level's centroids [Hkv, n, D] and offsets [Hkv, n + 1].
inline void check_centroids(const Checks& check, const char* centroids_name, const Tensor& centroids,
                            const char* offsets_name, const Tensor& offsets, const Dim& heads, const char* what,
                            const Tensor& q) {
  const char* count_name = what[0] == 'c' ? "C" : "P";
  check.tensor(centroids_name, centroids, {q.scalar_type()}, {heads, count_name, q.size(3)}, &q);
  const int64_t hkv = centroids.size(0), count = centroids.size(1);
  check.expect(hkv > 0 && q.size(1) % hkv == 0, centroids_name,
               "a number of heads that divides q's " + std::to_string(q.size(1)), hkv);
  check.expect(count > 0, centroids_name, "at least one " + std::string(what), count);
  check.contiguous_last(centroids_name, centroids);
  check.tensor(offsets_name, offsets, {ScalarType::Int}, {hkv, count + 1}, &q);
}

inline void check_threshold(const Checks& check, const char* argument, const Tensor& threshold, int64_t hkv,
                            const Tensor& q) {
  check.tensor(argument, threshold, {ScalarType::Float},
               threshold.dim() > 0 ? std::vector<Dim>{"1, Hkv or Hq"} : std::vector<Dim>{}, &q);
  const int64_t n = threshold.numel(), hq = q.size(1);
  check.expect(n == 1 || n == hkv || n == hq, argument,
               "1, " + std::to_string(hkv) + " or " + std::to_string(hq) + " values", n);
}

// Checks the contents of a level: the offsets of every head must start at 0 and not fall, and thresholds must not be
// nan. If `last` is not negative, the offsets must end at `last`. Call it only for tensors on the CPU, because reading
// the contents would wait for any other device.
inline void check_level_data(const Checks& check, const char* offsets_name, const char* threshold_name,
                             const CentroidLevel& level, int64_t heads, int64_t last) {
  const int32_t* offsets = level.run_offsets;
  for (int64_t h = 0; h < heads; ++h, offsets += level.count + 1) {
    int32_t falls = 0;  // an int, so that the loop becomes vector code
    for (int64_t j = 0; j < level.count; ++j) falls |= offsets[j + 1] < offsets[j] ? 1 : 0;
    if (falls == 0 && offsets[0] == 0 && (last < 0 || offsets[level.count] == last)) continue;
    std::string got;
    for (int64_t j = 0; j < std::min<int64_t>(8, level.count + 1); ++j) {
      got += (j == 0 ? "" : ", ") + std::to_string(offsets[j]);
    }
    check.fail(offsets_name, "offsets that rise from 0" + (last < 0 ? "" : " to " + std::to_string(last)),
               "[" + got + "]... in head " + std::to_string(h) + ", ending at " + std::to_string(offsets[level.count]));
  }
  for (int64_t i = 0; i < level.thresholds; ++i) {
    check.expect(!std::isnan(level.threshold[i]), threshold_name, "numbers", "nan");
  }
}

// The largest number of keys of a head, which is the head's last offset. Waits for the device.
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
  CentroidLookupArgs args{};
  args.batch = q.size(0);
  args.heads_q = q.size(1);
  args.nq = q.size(2);
  args.head_dim = q.size(3);
  check.expect(args.head_dim % 8 == 0 && args.head_dim >= 8 && args.head_dim <= 256, "q",
               "a head dim that is a multiple of 8 up to 256", args.head_dim);
  check.contiguous_last("q", q);
  check_centroids(check, "centroids", centroids, "cluster_offsets", cluster_offsets, "Hkv", "cluster", q);
  args.heads_kv = centroids.size(0);
  const bool parents = parent_centroids.has_value();
  if (parents != parent_offsets.has_value()) {
    check.fail(parents ? "parent_offsets" : "parent_centroids", "a tensor, since its partner is given", "None");
  }
  if (parents) {
    check_centroids(check, "parent_centroids", *parent_centroids, "parent_offsets", *parent_offsets, args.heads_kv,
                    "parent", q);
  }
  check_threshold(check, "threshold", threshold, args.heads_kv, q);
  if (parents != parent_threshold.has_value()) {
    check.fail("parent_threshold", parents ? "a threshold for the parents" : "None, since there are no parents",
               parents ? "None" : "one");
  }
  if (parents) check_threshold(check, "parent_threshold", *parent_threshold, args.heads_kv, q);
  check.finite("scale", scale);
  check.expect(block_q > 0, "block_q", "a positive number", block_q);
  if (max_columns.has_value()) check.expect(*max_columns >= 0, "max_columns", "no negative number", *max_columns);

  const Tensor offsets = dense(cluster_offsets), thresholds = dense(threshold);
  const OptionalTensor children = dense(parent_offsets), parent_thresholds = dense(parent_threshold);
  const auto level = [](const Tensor& x, const Tensor& run_offsets, const Tensor& limits) {
    return CentroidLevel{{x.const_data_ptr(), 0, x.stride(0), x.stride(1)},
                         static_cast<const int32_t*>(run_offsets.const_data_ptr()),
                         static_cast<const float*>(limits.const_data_ptr()),
                         x.size(1),
                         limits.numel()};
  };
  args.clusters = level(centroids, offsets, thresholds);
  if (parents) args.parents = level(*parent_centroids, *children, *parent_thresholds);
  if (q.is_cpu()) {
    check_level_data(check, "cluster_offsets", "threshold", args.clusters, args.heads_kv, -1);
    if (parents) {
      check_level_data(check, "parent_offsets", "parent_threshold", args.parents, args.heads_kv, args.clusters.count);
    }
  }
  args.dtype = dtype_of(q);
  args.q = view(q);
  args.block_q = std::max<int64_t>(1, std::min(block_q, args.nq));
  args.scale = static_cast<float>(scale);
  args.capacity = max_columns.has_value() ? *max_columns : most_keys(cluster_offsets);
  const int64_t rows = ceil_div(args.nq, args.block_q);
  Tensor count = new_ints(q, {args.batch, args.heads_kv, rows});
  Tensor index = new_ints(q, {args.batch, args.heads_kv, rows, args.capacity});
  args.column_count = static_cast<int32_t*>(count.mutable_data_ptr());
  args.column_index = static_cast<int32_t*>(index.mutable_data_ptr());
  if (q.numel() == 0) {
    torch::stable::zero_(count);
  } else {
    Kernels::centroid_lookup(args, q);
  }
  return {count, index};
}

}  // namespace headstart

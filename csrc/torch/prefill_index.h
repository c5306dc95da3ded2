// The index builders as operators: checks, output allocation and plain arguments, the same for every device.
//
// `Kernels` holds the kernels as static functions (args, q). cpu.cpp and cuda.cpp each define one.
#pragma once

#include <algorithm>
#include <cmath>

#include "tensors.h"

namespace headstart {

struct PrefillIndexBuilder {
  Checks check;
  const Tensor& q;
  OptionalTensor start;
  Tensor block_count, block_index;

  PrefillIndexBuilder(const char* op, const Tensor& q, const Tensor& k, int64_t capacity, int64_t sink, int64_t local,
                      const OptionalTensor& kv_start, int64_t block_q, int64_t block_k, PrefillIndexArgs& args)
      : check(op), q(q) {
    check.query_key(q, k, true);
    check.expect(q.size(2) > 0, "q", "at least one query", 0);
    check.expect(sink >= 0, "sink", "a number of tokens, at least 0", sink);
    check.expect(local >= 0, "local", "a number of tokens, at least 0", local);
    check.block_size("block_q", block_q);
    check.block_size("block_k", block_k);
    check.kv_start(kv_start, q);
    start = dense(kv_start);
    const int64_t nq = q.size(2), nk = k.size(2);
    args.dtype = dtype_of(q);
    args.q = view(q);
    args.k = view(k);
    args.kv_start = ints(start);
    args.batch = q.size(0);
    args.heads_q = q.size(1);
    args.heads_kv = k.size(1);
    args.nq = nq;
    args.nk = nk;
    args.head_dim = q.size(3);
    args.block_q = static_cast<int>(block_q);
    args.block_k = static_cast<int>(block_k);
    args.sink = sink;
    args.local = local;
    args.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(q.size(3))));
    args.block_capacity = std::min(capacity, ceil_div(nk, block_k));
  }

  void set_scale(const std::optional<double>& scale, PrefillIndexArgs& args) {
    if (!scale.has_value()) return;
    check.finite("scale", *scale);
    args.scale = static_cast<float>(*scale);
  }

  void positive(const char* argument, int64_t value) { check.expect(value >= 1, argument, "at least 1", value); }

  // min(cap, otherwise), or `otherwise` if there is no cap.
  int64_t capped(const char* argument, const std::optional<int64_t>& cap, int64_t otherwise) {
    if (cap.has_value()) positive(argument, *cap);
    return cap.has_value() ? std::min(*cap, otherwise) : otherwise;
  }

  void allocate(PrefillIndexArgs& args) {
    const int64_t rows = ceil_div(args.nq, args.block_q);
    block_count = new_ints(q, {args.batch, args.heads_q, rows});
    block_index = new_ints(q, {args.batch, args.heads_q, rows, args.block_capacity});
    args.block_count = static_cast<int32_t*>(block_count.mutable_data_ptr());
    args.block_index = static_cast<int32_t*>(block_index.mutable_data_ptr());
  }
};

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor> vertical_slash_index(
    const Tensor q, const Tensor k, int64_t vertical_size, int64_t slash_size, int64_t last_q, int64_t sink,
    int64_t local, const OptionalTensor kv_start, const std::optional<double> scale, int64_t block_q, int64_t block_k,
    const std::optional<int64_t> max_blocks, const std::optional<int64_t> max_columns) {
  VerticalSlashArgs args{};
  PrefillIndexBuilder build("vertical_slash_index", q, k, INT64_MAX, sink, local, kv_start, block_q, block_k, args);
  build.set_scale(scale, args);
  build.positive("vertical_size", vertical_size);
  build.positive("slash_size", slash_size);
  build.positive("last_q", last_q);
  const int64_t bands = build.capped("max_blocks", max_blocks, ceil_div(slash_size, block_k));
  args.block_capacity = std::min(bands, args.block_capacity);
  args.column_capacity = std::min(build.capped("max_columns", max_columns, vertical_size), args.nk);
  args.last_q = last_q;
  build.allocate(args);
  Tensor column_count = new_ints(q, {args.batch, args.heads_q, 1});
  Tensor column_index = new_ints(q, {args.batch, args.heads_q, 1, args.column_capacity});
  args.column_count = static_cast<int32_t*>(column_count.mutable_data_ptr());
  args.column_index = static_cast<int32_t*>(column_index.mutable_data_ptr());
  Kernels::vertical_slash_index(args, q);
  return {build.block_count, build.block_index, column_count, column_index};
}

template <typename Kernels>
Pair block_topk_index(const Tensor q, const Tensor k, int64_t top_k, int64_t sink, int64_t local,
                      const OptionalTensor kv_start, int64_t block_q, int64_t block_k) {
  PrefillIndexArgs args{};
  PrefillIndexBuilder build("block_topk_index", q, k, top_k, sink, local, kv_start, block_q, block_k, args);
  build.positive("top_k", top_k);
  build.allocate(args);
  Kernels::block_topk_index(args, q);
  return {build.block_count, build.block_index};
}

template <typename Kernels>
Pair adaptive_block_index(const Tensor q, const Tensor k, double threshold, int64_t stride, int64_t sink, int64_t local,
                          const OptionalTensor kv_start, const std::optional<double> scale, int64_t block_q,
                          int64_t block_k, const std::optional<int64_t> max_blocks, const OptionalTensor head_threshold,
                          int64_t samples) {
  AdaptiveArgs args{};
  PrefillIndexBuilder build("adaptive_block_index", q, k, INT64_MAX, sink, local, kv_start, block_q, block_k, args);
  build.set_scale(scale, args);
  build.check.expect(threshold > 0 && threshold <= 1, "threshold", "a share of the mass, above 0 and up to 1",
                     threshold);
  build.check.expect(stride == 4 || stride == 8 || stride == 16 || stride == 32, "stride", "4, 8, 16 or 32", stride);
  build.check.expect(samples >= 0 && samples <= 64, "samples", "a number of queries from 0 to 64", samples);
  args.block_capacity = build.capped("max_blocks", max_blocks, args.block_capacity);
  OptionalTensor thresholds;
  if (head_threshold.has_value()) {
    build.check.tensor("head_threshold", *head_threshold, {ScalarType::Float}, {args.heads_q}, &q);
    thresholds = dense(head_threshold);
    args.head_threshold = static_cast<const float*>(thresholds->const_data_ptr());
    // Only values on the CPU are checked: reading them on another device would wait for it.
    for (int64_t h = 0; head_threshold->is_cpu() && h < args.heads_q; ++h) {
      const float t = args.head_threshold[h];
      build.check.expect(t > 0 && t <= 1, "head_threshold", "shares of the mass, above 0 and up to 1", t);
    }
  }
  args.threshold = static_cast<float>(threshold);
  args.stride = static_cast<int>(stride);
  args.samples = samples;
  build.allocate(args);
  Kernels::adaptive_block_index(args, q);
  return {build.block_count, build.block_index};
}

}  // namespace headstart

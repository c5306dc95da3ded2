// sparse_attention and merge_attention as operators: checks, output allocation and plain arguments, for every device.
//
// `Kernels` holds the kernels as static functions (args, a tensor on the device). cpu.cpp and cuda.cpp each define one.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "tensors.h"

namespace headstart {

// Checks that the ids of a list are strictly ascending and lie in [0, limit). A repeated id would count its keys twice.
inline void check_ids(const Checks& check, const char* count_name, const char* index_name, const int32_t* count,
                      const int32_t* index, int64_t capacity, int64_t limit, const char* what) {
  if (*count < 0 || *count > capacity) {
    check.fail(count_name, "counts from 0 to " + std::to_string(capacity), *count);
  }
  int64_t last = -1;
  for (int32_t i = 0; i < *count; ++i) {
    if (index[i] <= last || index[i] >= limit) {
      const bool inside = index[i] >= 0 && index[i] < limit;
      check.fail(index_name,
                 inside ? "strictly ascending " + std::string(what)
                        : std::string(what) + " in [0, " + std::to_string(limit) + ")",
                 std::to_string(index[i]) + (inside ? " after " + std::to_string(last) : ""));
    }
    last = index[i];
  }
}

// Checks each distinct list of an index once. Batch and head may be expanded, separately for the block lists and the
// column lists.
inline void check_lists(const Checks& check, const IndexArgs& index, int64_t bi, int64_t hi, int64_t rows,
                        int64_t column_rows, int64_t blocks, int64_t nk) {
  const auto distinct = [](int64_t n, int64_t stride, int64_t other) { return stride == 0 && other == 0 ? 1 : n; };
  for (int64_t ib = 0; ib < distinct(bi, index.count_batch, index.index_batch); ++ib) {
    for (int64_t ih = 0; ih < distinct(hi, index.count_head, index.index_head); ++ih) {
      for (int64_t r = 0; r < rows; ++r) {
        check_ids(check, "block_count", "block_index",
                  index.block_count + ib * index.count_batch + ih * index.count_head + r,
                  index.block_index + ib * index.index_batch + ih * index.index_head + r * index.block_capacity,
                  index.block_capacity, blocks, "block ids");
      }
    }
  }
  if (index.column_count != nullptr) {
    for (int64_t ib = 0; ib < distinct(bi, index.column_count_batch, index.column_index_batch); ++ib) {
      for (int64_t ih = 0; ih < distinct(hi, index.column_count_head, index.column_index_head); ++ih) {
        for (int64_t r = 0; r < column_rows; ++r) {
          check_ids(check, "column_count", "column_index",
                    index.column_count + ib * index.column_count_batch + ih * index.column_count_head + r,
                    index.column_index + ib * index.column_index_batch + ih * index.column_index_head +
                        r * index.column_capacity,
                    index.column_capacity, nk, "key positions");
        }
      }
    }
  }
}

template <typename Kernels>
Pair sparse_attention(const Tensor q, const Tensor k, const Tensor v, const Tensor block_count,
                      const Tensor block_index, const OptionalTensor column_count, const OptionalTensor column_index,
                      const OptionalTensor kv_start, bool causal, const std::optional<double> scale, int64_t block_q,
                      int64_t block_k, const std::optional<int64_t> window) {
  const Checks check("sparse_attention");
  check.query_key(q, k, causal);
  const int64_t b = q.size(0), hq = q.size(1), nq = q.size(2), d = q.size(3), hkv = k.size(1), nk = k.size(2);
  check.tensor("v", v, {q.scalar_type()}, {b, hkv, nk, d}, &q);
  check.contiguous_last("v", v);
  check.block_size("block_q", block_q);
  check.block_size("block_k", block_k);
  check.tensor("block_count", block_count, {ScalarType::Int}, {"B", "Hi", "R"}, &q);
  const int64_t bi = block_count.size(0), hi = block_count.size(1), rows = block_count.size(2);
  check.tensor("block_index", block_index, {ScalarType::Int}, {bi, hi, rows, "T"}, &q);
  if (column_count.has_value() != column_index.has_value()) {
    check.fail(column_count.has_value() ? "column_index" : "column_count", "a tensor, since its partner is given",
               "None");
  }
  int64_t column_rows = 1, column_capacity = 0;
  if (column_count.has_value()) {
    check.tensor("column_count", *column_count, {ScalarType::Int}, {bi, hi, "R or 1"}, &q);
    column_rows = column_count->size(2);
    check.expect(column_rows == 1 || column_rows == rows, "column_count", "1 or " + std::to_string(rows) + " rows",
                 column_rows);
    check.tensor("column_index", *column_index, {ScalarType::Int}, {bi, hi, column_rows, "C"}, &q);
    column_capacity = column_index->size(3);
  }
  check.expect(bi == 1 || bi == b, "block_count", "a batch of " + std::to_string(b) + " or 1", bi);
  check.expect(hi > 0 && hq % hi == 0, "block_count", "a number of heads that divides q's " + std::to_string(hq), hi);
  check.expect(rows == ceil_div(nq, block_q), "block_count",
               std::to_string(ceil_div(nq, block_q)) + " query blocks (" + std::to_string(nq) + " queries, block_q " +
                   std::to_string(block_q) + ")",
               rows);
  check.kv_start(kv_start, q);
  if (scale.has_value()) check.finite("scale", *scale);
  if (window.has_value()) check.expect(*window >= 1, "window", "a number of keys, at least 1", *window);

  // Rows and entries must be contiguous; batch and head may be expanded.
  const auto rows_contiguous = [](const Tensor& x) {
    const int64_t last = x.dim() - 1;
    return x.dim() == 3 ? x.size(2) <= 1 || x.stride(2) == 1
                        : (x.size(3) <= 1 || x.stride(3) == 1) && (x.size(2) <= 1 || x.stride(2) == x.size(last));
  };
  const auto usable = [&](const Tensor& x) { return rows_contiguous(x) ? x : dense(x); };
  const Tensor counts = usable(block_count), ids = usable(block_index);
  IndexArgs index{};
  index.block_count = static_cast<const int32_t*>(counts.const_data_ptr());
  index.block_index = static_cast<const int32_t*>(ids.const_data_ptr());
  index.count_batch = bi == 1 ? 0 : counts.stride(0);
  index.count_head = hi == 1 ? 0 : counts.stride(1);
  index.index_batch = bi == 1 ? 0 : ids.stride(0);
  index.index_head = hi == 1 ? 0 : ids.stride(1);
  index.heads = hi;
  index.block_capacity = ids.size(3);
  index.shared_columns = column_rows == 1;
  index.column_capacity = column_capacity;
  OptionalTensor column_counts, columns;
  if (column_count.has_value()) {
    column_counts = usable(*column_count);
    columns = usable(*column_index);
    index.column_count = ints(column_counts);
    index.column_index = ints(columns);
    index.column_count_batch = bi == 1 ? 0 : column_counts->stride(0);
    index.column_count_head = hi == 1 ? 0 : column_counts->stride(1);
    index.column_index_batch = bi == 1 ? 0 : columns->stride(0);
    index.column_index_head = hi == 1 ? 0 : columns->stride(1);
  }
  if constexpr (Kernels::kChecksLists) check_lists(check, index, bi, hi, rows, column_rows, ceil_div(nk, block_k), nk);

  Tensor out = torch::stable::new_empty(q, {b, hq, nq, d});
  Tensor lse = torch::stable::new_empty(q, {b, hq, nq}, ScalarType::Float);
  if (b * hq * nq == 0) return {out, lse};
  const OptionalTensor start = dense(kv_start);
  const SparseAttentionArgs args{
      dtype_of(q),
      view(q),
      view(k),
      view(v),
      out.mutable_data_ptr(),
      static_cast<float*>(lse.mutable_data_ptr()),
      index,
      ints(start),
      b,
      hq,
      hkv,
      nq,
      nk,
      d,
      static_cast<int>(block_q),
      static_cast<int>(block_k),
      causal,
      static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(d)))),
      std::min(window.value_or(nk), nk),
  };
  Kernels::sparse_attention(args, q);
  return {out, lse};
}

template <typename Kernels>
Pair merge_attention(const Tensor out_a, const Tensor lse_a, const Tensor out_b, const Tensor lse_b) {
  const Checks check("merge_attention");
  check.floating("out_a", out_a, {"B", "H", "N", "D"});
  const int64_t b = out_a.size(0), h = out_a.size(1), n = out_a.size(2), d = out_a.size(3);
  check.tensor("lse_a", lse_a, {ScalarType::Float}, {b, h, n}, &out_a);
  check.tensor("out_b", out_b, {out_a.scalar_type()}, {b, h, n, d}, &out_a);
  check.tensor("lse_b", lse_b, {ScalarType::Float}, {b, h, n}, &out_a);
  check.contiguous_last("out_a", out_a);
  check.contiguous_last("out_b", out_b);
  Tensor out = torch::stable::new_empty(out_a, {b, h, n, d});
  Tensor lse = torch::stable::new_empty(lse_a, {b, h, n});
  const MergeAttentionArgs args{dtype_of(out_a),
                                view(out_a),
                                view(out_b),
                                rows(lse_a),
                                rows(lse_b),
                                out.mutable_data_ptr(),
                                static_cast<float*>(lse.mutable_data_ptr()),
                                b,
                                h,
                                n,
                                d};
  Kernels::merge_attention(args, out_a);
  return {out, lse};
}

}  // namespace headstart

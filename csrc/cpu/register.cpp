// The CPU kernels as implementations of torch.ops.headstart.*: checks, output allocation, plain arguments.
//
// Only torch's stable ABI is used, so one build serves every torch from 2.11 on. Schemas and fake kernels are Python's
// (python/headstart/ops/).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../bitmap.h"
#include "../built_with.h"
#include "../centroid_lookup.h"
#include "../int4_gemm.h"
#include "../prefill_index.h"
#include "kernels.h"

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

// Lists must be ascending and inside [0, limit): an id twice would count its keys twice.
void check_ids(const Checks& check, const char* count_name, const char* index_name, const int32_t* count,
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
  // Each distinct list once: batch and head may be expanded, in the lists of blocks and of columns independently.
  const auto distinct = [](int64_t n, int64_t stride, int64_t other) { return stride == 0 && other == 0 ? 1 : n; };
  for (int64_t ib = 0; ib < distinct(bi, index.count_batch, index.index_batch); ++ib) {
    for (int64_t ih = 0; ih < distinct(hi, index.count_head, index.index_head); ++ih) {
      for (int64_t r = 0; r < rows; ++r) {
        check_ids(check, "block_count", "block_index",
                  index.block_count + ib * index.count_batch + ih * index.count_head + r,
                  index.block_index + ib * index.index_batch + ih * index.index_head + r * index.block_capacity,
                  index.block_capacity, ceil_div(nk, block_k), "block ids");
      }
    }
  }
  if (column_count.has_value()) {
    for (int64_t ib = 0; ib < distinct(bi, index.column_count_batch, index.column_index_batch); ++ib) {
      for (int64_t ih = 0; ih < distinct(hi, index.column_count_head, index.column_index_head); ++ih) {
        for (int64_t r = 0; r < column_rows; ++r) {
          check_ids(
              check, "column_count", "column_index",
              index.column_count + ib * index.column_count_batch + ih * index.column_count_head + r,
              index.column_index + ib * index.column_index_batch + ih * index.column_index_head + r * column_capacity,
              column_capacity, nk, "key positions");
        }
      }
    }
  }

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
  kernels().sparse_attention(args, threads());
  return {out, lse};
}

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
  const Tensor left = dense(lse_a), right = dense(lse_b);
  const MergeAttentionArgs args{dtype_of(out_a),
                                view(out_a),
                                view(out_b),
                                static_cast<const float*>(left.const_data_ptr()),
                                static_cast<const float*>(right.const_data_ptr()),
                                out.mutable_data_ptr(),
                                static_cast<float*>(lse.mutable_data_ptr()),
                                b,
                                h,
                                n,
                                d};
  kernels().merge_attention(args, threads());
  return {out, lse};
}

// --- int4 weights ------------------------------------------------------------------------------------------------

Tensor int4_pack(const Tensor codes) {
  const Checks check("int4_pack");
  check.tensor("codes", codes, {ScalarType::Byte}, {"N", "K"});
  const int64_t n = codes.size(0), k = codes.size(1);
  Tensor packed = torch::stable::new_empty(
      codes, {int4::panels(n), int4::slabs(k), int4::kWordsPerColumn, int4::kPanel}, ScalarType::Int);
  if (n * k == 0) return packed;
  const Tensor rows = dense(codes);
  const Int4PackArgs args{const_cast<uint8_t*>(static_cast<const uint8_t*>(rows.const_data_ptr())),
                          static_cast<uint32_t*>(packed.mutable_data_ptr()), n, k};
  kernels().int4_pack(args, threads());
  return packed;
}

Tensor int4_unpack(const Tensor packed, int64_t n, int64_t k) {
  check_int4_packed(Checks("int4_unpack"), packed, n, k);
  Tensor codes = torch::stable::new_empty(packed, {n, k}, ScalarType::Byte);
  const Int4PackArgs args{static_cast<uint8_t*>(codes.mutable_data_ptr()),
                          const_cast<uint32_t*>(static_cast<const uint32_t*>(packed.const_data_ptr())), n, k};
  kernels().int4_unpack(args, threads());
  return codes;
}

struct CpuKernels {
  static void centroid_lookup(const CentroidLookupArgs& args, const Tensor&) {
    kernels().centroid_lookup(args, threads());
  }
  static constexpr bool kHasDense = false;
  static void int4_gemm(const Int4GemmArgs& args, const Tensor&) { kernels().int4_gemm(args, threads()); }

  // No row may reach past the values. Only those that could, with every bit set, have their bits counted.
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
  static int64_t bitmap_mask(const BitmapCompressArgs& args, const Tensor&) {
    kernels().bitmap_mask(args, threads());
    return args.row_offsets[args.n];
  }
  static void bitmap_gather(const BitmapCompressArgs& args, const Tensor&) { kernels().bitmap_gather(args, threads()); }
  static void bitmap_decompress(const BitmapDecompressArgs& args, const Tensor&) {
    kernels().bitmap_decompress(args, threads());
  }
  static void bitmap_gemm(const BitmapGemmArgs& args, const Tensor&) { kernels().bitmap_gemm(args, threads()); }
  static void vertical_slash_index(const VerticalSlashArgs& args, const Tensor&) {
    kernels().vertical_slash_index(args, threads());
  }
  static void block_topk_index(const PrefillIndexArgs& args, const Tensor&) {
    kernels().block_topk_index(args, threads());
  }
  static void adaptive_block_index(const AdaptiveArgs& args, const Tensor&) {
    kernels().adaptive_block_index(args, threads());
  }
};

}  // namespace
}  // namespace headstart

STABLE_TORCH_LIBRARY_IMPL(HEADSTART_NAMESPACE, CPU, m) {
  m.impl("sparse_attention", TORCH_BOX(&headstart::sparse_attention));
  m.impl("merge_attention", TORCH_BOX(&headstart::merge_attention));
  m.impl("vertical_slash_index", TORCH_BOX(&headstart::vertical_slash_index<headstart::CpuKernels>));
  m.impl("block_topk_index", TORCH_BOX(&headstart::block_topk_index<headstart::CpuKernels>));
  m.impl("adaptive_block_index", TORCH_BOX(&headstart::adaptive_block_index<headstart::CpuKernels>));
  m.impl("centroid_lookup", TORCH_BOX(&headstart::centroid_lookup<headstart::CpuKernels>));
  m.impl("int4_gemm", TORCH_BOX(&headstart::int4_gemm<headstart::CpuKernels>));
  m.impl("int4_pack", TORCH_BOX(&headstart::int4_pack));
  m.impl("int4_unpack", TORCH_BOX(&headstart::int4_unpack));
  m.impl("bitmap_compress", TORCH_BOX(&headstart::bitmap_compress<headstart::CpuKernels>));
  m.impl("bitmap_decompress", TORCH_BOX(&headstart::bitmap_decompress<headstart::CpuKernels>));
  m.impl("bitmap_decompress.out", TORCH_BOX(&headstart::bitmap_decompress_out<headstart::CpuKernels>));
  m.impl("bitmap_gemm", TORCH_BOX(&headstart::bitmap_gemm<headstart::CpuKernels>));
}

// The interface of the CUDA kernels: raw pointers, strides in elements, and a stream.
//
// Kernel files depend on no framework. csrc/torch/ checks the tensors and fills the arguments. A launcher returns null,
// or a text that says what failed (launch.h).
#pragma once

#include <cstdint>

#include "../arguments.h"

struct CUstream_st;

namespace headstart {
namespace cuda {

const char* merge_attention(const MergeAttentionArgs& args, CUstream_st* stream);

// Attention for prompts on Hopper: 16-bit elements, head dims 64 and 128, blocks of a multiple of 64, no columns, no
// window, no padding, and rows of q, k and v that lie 16-byte aligned. It reads the keys of a block that no query of the
// block sees; a NaN among their values reaches the result. Needs a workspace of sparse_attention_sm90_workspace bytes.
bool sparse_attention_sm90_runs(const SparseAttentionArgs& args);
int64_t sparse_attention_sm90_workspace(const SparseAttentionArgs& args);
const char* sparse_attention_sm90(const SparseAttentionArgs& args, void* workspace, CUstream_st* stream);

// Index builders need a workspace on the current device, aligned to 256 bytes. The first function of a pair returns its
// least size in bytes. The number of thread blocks depends on the device, so call both functions of a pair with the
// same current device.
int64_t vertical_slash_workspace(const VerticalSlashArgs& args);
int64_t block_topk_workspace(const PrefillIndexArgs& args);
int64_t adaptive_workspace(const AdaptiveArgs& args);
const char* vertical_slash_index(const VerticalSlashArgs& args, void* workspace, CUstream_st* stream);
const char* block_topk_index(const PrefillIndexArgs& args, void* workspace, CUstream_st* stream);
const char* adaptive_block_index(const AdaptiveArgs& args, void* workspace, CUstream_st* stream);

// The lookup needs a workspace, too. It does not write the entries of column_index past a row's count.
int64_t centroid_lookup_workspace(const CentroidLookupArgs& args);
const char* centroid_lookup(const CentroidLookupArgs& args, void* workspace, CUstream_st* stream);

// The workspace of the product depends on the device, too. A row's result does not depend on the other rows. But on
// Hopper, products of at most 16 rows and products of more rows may round differently (int4_gemm_sm90.cu).
int64_t int4_gemm_workspace(const Int4GemmArgs& args);
const char* int4_gemm(const Int4GemmArgs& args, void* workspace, CUstream_st* stream);

// Writes the weight [N, K] in args.dtype, contiguous, to args.out. Does not read x.
const char* int4_dequantize(const Int4GemmArgs& args, CUstream_st* stream);

// The way in which K is split into partial sums depends only on the device and on N.
const char* bitmap_decompress(const BitmapDecompressArgs& args, CUstream_st* stream);
const char* bitmap_gemm(const BitmapGemmArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace headstart

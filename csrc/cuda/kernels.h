// What the CUDA kernel families are, seen from outside: raw pointers, strides in elements, a stream.
//
// Kernel files know no framework; csrc/torch/ checks the tensors and fills the arguments. A launcher returns null, or
// what failed (launch.h).
#pragma once

#include <cstdint>

#include "../arguments.h"

struct CUstream_st;

namespace headstart {
namespace cuda {

const char* merge_attention(const MergeAttentionArgs& args, CUstream_st* stream);

// Index builders need a workspace, of at least that many bytes on the current device, aligned to 256. Which blocks of
// threads there are depends on the device, so both functions of a pair are called with the same one current.
int64_t vertical_slash_workspace(const VerticalSlashArgs& args);
int64_t block_topk_workspace(const PrefillIndexArgs& args);
int64_t adaptive_workspace(const AdaptiveArgs& args);
const char* vertical_slash_index(const VerticalSlashArgs& args, void* workspace, CUstream_st* stream);
const char* block_topk_index(const PrefillIndexArgs& args, void* workspace, CUstream_st* stream);
const char* adaptive_block_index(const AdaptiveArgs& args, void* workspace, CUstream_st* stream);

// The lookup needs a workspace, too. Entries of column_index past a row's count are left as they are.
int64_t centroid_lookup_workspace(const CentroidLookupArgs& args);
const char* centroid_lookup(const CentroidLookupArgs& args, void* workspace, CUstream_st* stream);

// The product's workspace depends on the device, too. A row's result does not depend on the other rows; on Hopper, as
// long as there are at most 16, or more (int4_gemm_sm90.cu).
int64_t int4_gemm_workspace(const Int4GemmArgs& args);
const char* int4_gemm(const Int4GemmArgs& args, void* workspace, CUstream_st* stream);

// The weight [N, K] in args.dtype, contiguous, to args.out; nothing of x is read.
const char* int4_dequantize(const Int4GemmArgs& args, CUstream_st* stream);

// Which sums are taken of parts of K depends on the device and on N alone.
const char* bitmap_decompress(const BitmapDecompressArgs& args, CUstream_st* stream);
const char* bitmap_gemm(const BitmapGemmArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace headstart

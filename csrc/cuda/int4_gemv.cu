// int4_gemm for up to 4 rows of x: a decode step. Weights go from memory to registers, and from there to mma.sync.
//
//   a block:  a panel of 16 columns; four warps, one part of K each       a chunk of a warp: 4 slabs of 32 k
//
//             part 0   part 1   part 2   part 3     words   8 bytes a lane and slab, kDepth chunks ahead
//            ┌────────┬────────┬────────┬────────┐  scales  and zero points of the lane's two columns, with the words
//     panel  │ warp 0 │ warp 1 │ warp 2 │ warp 3 │  x       16 bytes a lane and slab, from shared memory
//            └────────┴────────┴────────┴────────┘
//
// The 8 columns of operand B are rows of x; if there are fewer, the last row fills the columns that are left. x lies in
// shared memory in the order in which a lane needs it: for every slab and t the four pairs k = 8 i + 2 t of word t. Rows
// are 64 bytes more than a multiple of 128 bytes apart, so two rows of a slab lie in different banks.
//
// The sums and their order are those of int4_gemm_sm80.cu, bit by bit: a row's result does not depend on the batch.
//
// Floor: K · N / 2 bytes, and the scales and zeros, at the memory bandwidth. A slab of a panel is 256 bytes, for which
// an H100's multiprocessor has 20 cycles, in which it issues 80 instructions. A warp takes nearly 50 (bfloat16), of
// which 22 dequantise; the rest are loads, mma, scales, zero points and addresses. The 16 warps of a multiprocessor have 64 KiB in flight.

#include "int4_block.h"

namespace headstart {
namespace cuda {
namespace {

constexpr int kWarps = kParts, kThreads = 32 * kWarps, kSlabs = kPartStep, kDepth = 4;
constexpr int kSlabBytes = int4::kSlab * 2;                   // of x
constexpr int64_t kMostRows = 4;                              // x then has as many bytes as the weights of the panel
constexpr int64_t kMostBytes = (64 << 10) + kSlabBytes;       // of x in shared memory
constexpr int kPartBytes = int4::kPanel * mma::kColumns * 4;  // the sums of a part

static_assert(kThreads == int4::kPanel * mma::kColumns, "a thread adds the parts of one result");

// The bytes from a row of x to the next one in shared memory.
HEADSTART_HOST_DEVICE constexpr int row_bytes(int part_slabs) { return kParts * part_slabs * kSlabBytes + kSlabBytes; }

// The unit of t in a slab of x is t ^ swizzle(slab), so that a warp writes eight slabs without bank conflicts.
HEADSTART_HOST_DEVICE constexpr int swizzle(int slab) { return slab >> 1 & 3; }

// What a lane has of a chunk.
struct Chunk {
  uint2 words[kSlabs];
  uint2 scales;    // two of 16 bits in x, or two of 32
  uint32_t zeros;  // two bytes
};

template <typename T, bool kWideScales>
class Gemv {
  static constexpr int kSlabPairs = int4::kWordsPerSlab / 2, kScaleBytes = kWideScales ? 4 : 2;

 public:
  __device__ __forceinline__ Gemv(const Int4GemmArgs& args, const Int4Plan& plan) : args_(args), plan_(plan) {
    panel_ = block_id();
    const int share = plan.part_slabs, slabs = static_cast<int>(plan.slabs);
    begin_ = warp() * share;
    end_ = min(begin_ + share, slabs);
    load_slab_ = begin_;
    const int group = begin_ / plan.group_slabs, column = lane() / 4 * 2;
    load_group_end_ = (group + 1) * plan.group_slabs;
    words_ = reinterpret_cast<const uint2*>(args.packed + int4::slab_word(panel_, begin_, args.k) +
                                            lane() % 4 * int4::kPanel + column);
    const int64_t at = (panel_ * plan.groups + group) * int4::kPanel + column;
    scales_ = static_cast<const unsigned char*>(args.scales) + at * kScaleBytes;
    zeros_ = args.zeros == nullptr ? nullptr : args.zeros + at;
  }

  __device__ __forceinline__ void run() {
    Chunk ring[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) load(ring[i]);
    load_x();
    __syncthreads();
    int group_end = (begin_ / plan_.group_slabs + 1) * plan_.group_slabs;
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f}, sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int first = begin_; first < end_; first += kDepth * kSlabs) {
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        const int slab = first + i * kSlabs;
        if (slab >= end_) break;
        multiply(sum, ring[i], slab);
        const bool group_ends = slab + kSlabs >= group_end;
        if (group_ends) group_end += plan_.group_slabs;
        if (group_ends || slab + kSlabs >= end_) {
          float scale[2];
          scales_of(scale, ring[i]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            total[j] = fmaf(scale[j / 2], sum[j], total[j]);
            sum[j] = 0.0f;
          }
        }
        load(ring[i]);
      }
    }
    __syncthreads();                                           // all warps have read x
    float* parts = reinterpret_cast<float*>(shared_memory());  // [part][row][column]
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = mma::c_column(lane(), j % 2), column = lane() / 4 * 2 + j / 2;
      parts[(warp() * mma::kColumns + row) * int4::kPanel + column] = total[j];
    }
    __syncthreads();
    const int thread = static_cast<int>(threadIdx.x), row = thread / int4::kPanel;
    const int64_t column = panel_ * int4::kPanel + thread % int4::kPanel;
    if (row >= args_.m || column >= args_.n) return;
    float result = parts[thread];
#pragma unroll
    for (int part = 1; part < kParts; ++part) result += parts[part * kThreads + thread];
    const float bias = args_.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(args_.bias)[column]);
    static_cast<T*>(args_.out)[row * args_.n + column] = from_float<T>(result + bias);
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }

  // Loads the chunk that follows the last one. Words of slabs past the end are 0, and so is x there.
  __device__ __forceinline__ void load(Chunk& chunk) {
    if (load_slab_ + kSlabs <= end_) {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) chunk.words[s] = __ldg(words_ + s * kSlabPairs);
    } else {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        chunk.words[s] = {0, 0};
        if (load_slab_ + s < end_) chunk.words[s] = __ldg(words_ + s * kSlabPairs);
      }
      if (load_slab_ >= end_) return;
    }
    words_ += kSlabs * kSlabPairs;
    if constexpr (kWideScales) {
      chunk.scales = __ldg(reinterpret_cast<const uint2*>(scales_));
    } else {
      chunk.scales.x = __ldg(reinterpret_cast<const uint32_t*>(scales_));
    }
    chunk.zeros = kSymmetricZero * 0x101u;
    if (zeros_ != nullptr) chunk.zeros = __ldg(reinterpret_cast<const uint16_t*>(zeros_));
    load_slab_ += kSlabs;
    if (load_slab_ >= load_group_end_) {
      load_group_end_ += plan_.group_slabs;
      scales_ += int4::kPanel * kScaleBytes;
      if (zeros_ != nullptr) zeros_ += int4::kPanel;
    }
  }

  __device__ __forceinline__ void scales_of(float (&scale)[2], const Chunk& chunk) const {
    if constexpr (kWideScales) {
      scale[0] = __uint_as_float(chunk.scales.x);
      scale[1] = __uint_as_float(chunk.scales.y);
    } else {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const auto bits = static_cast<uint16_t>(chunk.scales.x >> 16 * c);
        scale[c] = args_.scale_dtype == Dtype::kFloat16 ? to_float(Float16{bits}) : to_float(BFloat16{bits});
      }
    }
  }

  __device__ __forceinline__ void load_x() const {
    constexpr int kUnit = mma::kUnitBytes / 2;  // the elements with one i
    const int row_units = kParts * plan_.part_slabs * int4::kSlab / kUnit,
              units = static_cast<int>(args_.m) * row_units;
    for (int at = static_cast<int>(threadIdx.x); at < units; at += kThreads) {
      const int row = at / row_units, unit = at % row_units;
      const T* x = static_cast<const T*>(args_.x) + row * args_.x_row;
      uint32_t* to = reinterpret_cast<uint32_t*>(shared_memory() + row * row_bytes(plan_.part_slabs));
      uint4 pairs = {0, 0, 0, 0};
      const int64_t k = static_cast<int64_t>(unit) * kUnit;
      uint32_t* words[4] = {&pairs.x, &pairs.y, &pairs.z, &pairs.w};
      if (plan_.x_vectors && k < args_.k) {
        pairs = *reinterpret_cast<const uint4*>(x + k);
      } else {
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
          if (k + e < args_.k) *words[e / 2] |= static_cast<uint32_t>(x[k + e].bits) << e % 2 * 16;
        }
      }
      const int slab = unit / 4, i = unit % 4;
#pragma unroll
      for (int t = 0; t < 4; ++t) to[slab * 16 + (t ^ swizzle(slab)) * 4 + i] = *words[t];
    }
  }

  __device__ __forceinline__ void multiply(float (&sum)[4], const Chunk& chunk, int slab) const {
    Codes<T> codes[2];
    codes[0].set(static_cast<int>(chunk.zeros & 255));
    codes[1].set(static_cast<int>(chunk.zeros >> 8));
    const bool wide = std::is_same_v<T, BFloat16> && __ballot_sync(kWholeWarp, codes[0].wide() || codes[1].wide()) != 0;
    if (wide) {
      multiply_slabs<true>(sum, codes, chunk, slab);
    } else {
      multiply_slabs<false>(sum, codes, chunk, slab);
    }
  }

  template <bool kWide>
  __device__ __forceinline__ void multiply_slabs(float (&sum)[4], const Codes<T> (&codes)[2], const Chunk& chunk,
                                                 int slab) const {
    const int row = min(lane() / 4, static_cast<int>(args_.m) - 1);
    const unsigned char* x = shared_memory() + row * row_bytes(plan_.part_slabs) + slab * kSlabBytes;
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      const int unit = lane() % 4 ^ swizzle(slab) ^ swizzle(s);  // a chunk begins at a multiple of kSlabs
      const uint4 right = *reinterpret_cast<const uint4*>(x + s * kSlabBytes + unit * mma::kUnitBytes);
      uint32_t even[4], odd[4];
      codes[0].template pairs<kWide>(even, chunk.words[s].x);
      codes[1].template pairs<kWide>(odd, chunk.words[s].y);
      const uint32_t low[4] = {even[0], odd[0], even[1], odd[1]}, high[4] = {even[2], odd[2], even[3], odd[3]};
      multiply_add<T>(sum, low, right.x, right.y);
      multiply_add<T>(sum, high, right.z, right.w);
    }
  }

  const Int4GemmArgs& args_;
  const Int4Plan& plan_;
  int64_t panel_;
  int begin_, end_;                 // the slabs of the warp's part
  int load_slab_, load_group_end_;  // the next slab to load, and the slab at which its group ends
  const uint2* words_;              // what the lane loads next
  const unsigned char *scales_, *zeros_;
};

template <typename T, bool kWideScales>
__global__ void __launch_bounds__(kThreads, 4) int4_gemv_kernel(const Int4GemmArgs args, const Int4Plan plan) {
  Gemv<T, kWideScales>(args, plan).run();
}

int64_t shared_bytes(const Int4GemmArgs& args) {
  const int64_t x = args.m * row_bytes(static_cast<int>(part_slabs(args.k)));
  return x < kParts * kPartBytes ? kParts * kPartBytes : x;
}

}  // namespace

bool int4_gemv_runs(const Int4GemmArgs& args) {
  const Int4Plan plan = int4_plan(args, nullptr);
  return args.m <= kMostRows && args.dtype != Dtype::kFloat32 && plan.weight_vectors &&
         shared_bytes(args) <= kMostBytes && (plan.group_slabs % kSlabs == 0 || plan.groups == 1);
}

const char* int4_gemv(const Int4GemmArgs& args, CUstream_st* stream) {
  const auto start = [&](auto kernel) {
    return launch(kernel, int4::panels(args.n), kThreads, static_cast<int>(shared_bytes(args)), stream, args,
                  int4_plan(args, nullptr));
  };
  const bool wide = args.scale_dtype == Dtype::kFloat32;
  if (args.dtype == Dtype::kFloat16) {
    return wide ? start(int4_gemv_kernel<Float16, true>) : start(int4_gemv_kernel<Float16, false>);
  }
  return wide ? start(int4_gemv_kernel<BFloat16, true>) : start(int4_gemv_kernel<BFloat16, false>);
}

}  // namespace cuda
}  // namespace headstart

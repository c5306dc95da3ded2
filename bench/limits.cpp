// What this CPU can do at best: how fast its units multiply, and how fast its memory reads and writes.
//
// Multiply loops keep everything in registers. They have 12 sums, so that no instruction waits for another, and nothing
// else. No kernel can multiply faster with the same instruction. The instructions are text, so the compiler needs no option
// for them; limits.py calls only the loops whose instructions the CPU has. All operands are zero.
//
// A move reads `reads` vectors and writes `writes` vectors past the caches, over and over: (1, 0) reads, (1, 1) copies.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Calls body(thread) in all threads at once.
template <typename Body>
void in_threads(int threads, Body body) {
  std::atomic<int> waiting{threads};
  auto one = [&](int thread) {
    --waiting;
    while (waiting > 0) std::this_thread::yield();
    body(thread);
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(one, thread);
  one(0);
  for (auto& other : others) other.join();
}

// --- multiplication ------------------------------------------------------------------------------------------------

struct Loop {
  const char* name;
  double operations;  // a round: a multiplication and an addition count as two
  void (*run)(int64_t rounds);
};

#if defined(__x86_64__)

// `step` names the sum it adds to: STEP(v, i) with v "ymm" or "zmm". Registers 14 and 15 are the operands, 12 and 13
// hold products on their way to a sum.
#define DOT(instruction, v, i) instruction " %%" v "15, %%" v "14, %%" v #i "\n"
#define MULTIPLY(instruction, v, i, j) instruction " %%" v "15, %%" v "14, %%" v #j "\n"
#define ADD(instruction, v, i, j) instruction " %%" v #j ", %%" v #i ", %%" v #i "\n"

#define FMA(v, i, j) DOT("vfmadd231ps", v, i)
#define DOT_BF16(v, i, j) DOT("vdpbf16ps", v, i)
#define DOT_INT16(v, i, j) DOT("vpdpwssd", v, i)
#define DOT_INT8(v, i, j) DOT("vpdpbusd", v, i)
#define DOT_INT16_VEX(v, i, j) DOT("%{vex%} vpdpwssd", v, i)
#define DOT_INT8_VEX(v, i, j) DOT("%{vex%} vpdpbusd", v, i)
#define MADD_INT16(v, i, j) MULTIPLY("vpmaddwd", v, i, j) ADD("vpaddd", v, i, j)
#define MADD_INT8(v, i, j) MULTIPLY("vpmaddubsw", v, i, j) ADD("vpaddw", v, i, j)  // the sum stays in 16 bits

#define TWELVE(step, v)                                                                                    \
  step(v, 0, 12) step(v, 1, 13) step(v, 2, 12) step(v, 3, 13) step(v, 4, 12) step(v, 5, 13) step(v, 6, 12) \
      step(v, 7, 13) step(v, 8, 12) step(v, 9, 13) step(v, 10, 12) step(v, 11, 13)

// The lambda is one function; zeroing comes first, because a denormal or a NaN in a register may slow the loop.
#define LOOP(step, v)                                                                                             \
  [](int64_t rounds) {                                                                                            \
    asm volatile("vzeroall\n.p2align 5\n1:\n" TWELVE(step, v) "dec %0\njnz 1b\nvzeroupper\n"                      \
                 : "+r"(rounds)                                                                                   \
                 :                                                                                                \
                 : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
                   "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                                                  \
  }

const Loop kLoops[] = {
    {"fma", 12 * 8 * 2, LOOP(FMA, "ymm")},
    {"fma 512", 12 * 16 * 2, LOOP(FMA, "zmm")},
    {"bf16 dot", 12 * 32 * 2, LOOP(DOT_BF16, "zmm")},
    {"vpmaddwd", 12 * 16 * 2, LOOP(MADD_INT16, "ymm")},
    {"vpmaddwd 512", 12 * 32 * 2, LOOP(MADD_INT16, "zmm")},
    {"vpdpwssd", 12 * 16 * 2, LOOP(DOT_INT16_VEX, "ymm")},
    {"vpdpwssd 512", 12 * 32 * 2, LOOP(DOT_INT16, "zmm")},
    {"vpmaddubsw", 12 * 32 * 2, LOOP(MADD_INT8, "ymm")},
    {"vpmaddubsw 512", 12 * 64 * 2, LOOP(MADD_INT8, "zmm")},
    {"vpdpbusd", 12 * 32 * 2, LOOP(DOT_INT8_VEX, "ymm")},
    {"vpdpbusd 512", 12 * 64 * 2, LOOP(DOT_INT8, "zmm")},
};

#else

const Loop kLoops[] = {{"none", 0, nullptr}};

#endif

// --- memory --------------------------------------------------------------------------------------------------------

typedef int64_t Vector __attribute__((vector_size(32), aligned(32)));

inline void write_past_caches(Vector* to, Vector v) {
#if defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(v));
#else
  *to = v;
#endif
}

template <int reads, int writes>
int64_t move(const Vector* from, Vector* to, int64_t steps) {
  constexpr int kSteps = 4;  // vectors of sums, so that reads do not wait for them
  Vector sums[kSteps] = {};
  for (int64_t step = 0; step + kSteps <= steps; step += kSteps) {
    for (int s = 0; s < kSteps; ++s) {
      Vector v = {};
      for (int r = 0; r < reads; ++r) v ^= from[(step + s) * reads + r];
      if (writes == 0) sums[s] ^= v;
      for (int w = 0; w < writes; ++w) write_past_caches(to + (step + s) * writes + w, v);
    }
  }
  const Vector sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

template <int reads, int writes>
double move_in_threads(const Vector* from, Vector* to, int64_t bytes, int threads) {
  const int64_t steps = bytes / (sizeof(Vector) * (reads > writes ? reads : writes)) / threads;
  std::vector<double> seconds(threads);
  std::atomic<int64_t> sink{0};  // so that reads are not optimised away
  in_threads(threads, [&](int thread) {
    const auto start = Clock::now();
    sink += move<reads, writes>(from + thread * steps * reads, to + thread * steps * writes, steps);
    seconds[thread] = seconds_since(start);
  });
  double longest = 0;
  for (const double s : seconds) longest = s > longest ? s : longest;
  return steps * threads * sizeof(Vector) * (reads + writes) / longest / 1e9;
}

}  // namespace

// The rate of the loop called `name` in all threads together, in 1e9 operations a second; 0 if there is no such loop.
extern "C" double multiply_rate(const char* name, int threads, double seconds) {
  for (const Loop& loop : kLoops) {
    if (std::strcmp(loop.name, name) != 0 || loop.run == nullptr) continue;
    std::vector<double> rates(threads);
    in_threads(threads, [&](int thread) {
      int64_t rounds = 0;
      double taken = 0;
      const auto start = Clock::now();
      while (taken < seconds) {
        loop.run(1000);
        rounds += 1000;
        taken = seconds_since(start);
      }
      rates[thread] = rounds * loop.operations / taken / 1e9;
    });
    double rate = 0;
    for (const double r : rates) rate += r;
    return rate;
  }
  return 0;
}

// GB/s read and written. `from` and `to` hold `bytes` each and are aligned to 32; 0 if the mix is not one of these.
extern "C" double move_rate(const void* from, void* to, int64_t bytes, int threads, int reads, int writes) {
  const auto* a = static_cast<const Vector*>(from);
  auto* b = static_cast<Vector*>(to);
  if (reads == 1 && writes == 0) return move_in_threads<1, 0>(a, b, bytes, threads);
  if (reads == 1 && writes == 1) return move_in_threads<1, 1>(a, b, bytes, threads);
  if (reads == 2 && writes == 1) return move_in_threads<2, 1>(a, b, bytes, threads);
  if (reads == 1 && writes == 2) return move_in_threads<1, 2>(a, b, bytes, threads);
  return 0;
}

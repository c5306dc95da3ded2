// What this CPU can do at best: how fast its units multiply, and how fast its memory reads and writes.
//
// The multiply loops are the library's own (csrc/cpu/unit_loops.h).
//
// A move reads `reads` vectors and writes `writes` vectors past the caches, over and over: (1, 0) reads, (1, 1) copies.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define HEADSTART_ALL_UNIT_LOOPS 1
#include "../csrc/cpu/unit_loops.h"

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
  for (const headstart::UnitLoop& loop : headstart::kUnitLoops) {
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

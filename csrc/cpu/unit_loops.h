// How fast the units of this CPU multiply: loops that keep everything in registers.
//
// They have 12 sums, so that no instruction waits for another, and nothing else. No kernel can multiply faster with the
// same instruction. The instructions are text, so the compiler needs no option for them; a caller runs only the loops whose
// instructions the CPU has. All operands are zero.
#pragma once

#include <chrono>
#include <cstdint>

namespace headstart {

enum class Needs { kNothing, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAvxVnni };

struct UnitLoop {
  const char *name, *unit;
  Needs needs;
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

// An assembler may be too old for the last instructions. So the library has the loops of the tiers that it is built with,
// and a file that defines HEADSTART_ALL_UNIT_LOOPS has all.
const UnitLoop kUnitLoops[] = {
    {"fma", "fp32", Needs::kAvx2, 12 * 8 * 2, LOOP(FMA, "ymm")},
    {"vpmaddwd", "int16", Needs::kAvx2, 12 * 16 * 2, LOOP(MADD_INT16, "ymm")},
    {"vpmaddubsw", "int8", Needs::kAvx2, 12 * 32 * 2, LOOP(MADD_INT8, "ymm")},
#if HEADSTART_HAS_avx512 || HEADSTART_ALL_UNIT_LOOPS
    {"fma 512", "fp32", Needs::kAvx512, 12 * 16 * 2, LOOP(FMA, "zmm")},
    {"vpmaddwd 512", "int16", Needs::kAvx512, 12 * 32 * 2, LOOP(MADD_INT16, "zmm")},
    {"vpmaddubsw 512", "int8", Needs::kAvx512, 12 * 64 * 2, LOOP(MADD_INT8, "zmm")},
    {"vpdpwssd 512", "int16", Needs::kAvx512Vnni, 12 * 32 * 2, LOOP(DOT_INT16, "zmm")},
    {"vpdpbusd 512", "int8", Needs::kAvx512Vnni, 12 * 64 * 2, LOOP(DOT_INT8, "zmm")},
#endif
#if HEADSTART_HAS_avx512_bf16 || HEADSTART_ALL_UNIT_LOOPS
    {"bf16 dot", "bf16", Needs::kAvx512Bf16, 12 * 32 * 2, LOOP(DOT_BF16, "zmm")},
#endif
#if HEADSTART_ALL_UNIT_LOOPS
    {"vpdpwssd", "int16", Needs::kAvxVnni, 12 * 16 * 2, LOOP(DOT_INT16_VEX, "ymm")},
    {"vpdpbusd", "int8", Needs::kAvxVnni, 12 * 32 * 2, LOOP(DOT_INT8_VEX, "ymm")},
#endif
};

#else

const UnitLoop kUnitLoops[] = {{"none", "none", Needs::kNothing, 0, [](int64_t) {}}};

#endif

// Operations a second of the best of several short runs, 1e9 a second. It takes about a millisecond.
inline double unit_rate(const UnitLoop& loop) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 5000;  // about 30,000 cycles
  constexpr int kRuns = 8;           // the first ones wake the unit up
  double best = 0;
  for (int i = 0; i < kRuns; ++i) {
    const auto start = Clock::now();
    loop.run(kRounds);
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    const double rate = kRounds * loop.operations / seconds / 1e9;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace headstart

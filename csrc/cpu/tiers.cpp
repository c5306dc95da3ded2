// Which kernels this CPU runs. Compiled with the baseline's flags: nothing here may need a newer CPU than the oldest.
//
// A tier needs its instructions (CPUID) and an operating system that saves its registers (XCR0). What a unit is worth
// is measured, not read from CPUID: a bf16 dot product is faster than FMA on some CPUs and slower on others.

#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"
#include "unit_loops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace headstart {

#define HEADSTART_TIER generic
#include "tier.inc"
#if HEADSTART_HAS_avx2
#define HEADSTART_TIER avx2
#include "tier.inc"
#endif
#if HEADSTART_HAS_avx512
#define HEADSTART_TIER avx512
#include "tier.inc"
#endif
#if HEADSTART_HAS_avx512_bf16
#define HEADSTART_TIER avx512_bf16
#include "tier.inc"
#endif
#if HEADSTART_HAS_avx512_vbmi2
#define HEADSTART_TIER avx512_vbmi2
#define HEADSTART_VBMI2_ALONE
#include "tier.inc"
#endif
#if HEADSTART_HAS_avx512_bf16_vbmi2
#define HEADSTART_TIER avx512_bf16_vbmi2
#define HEADSTART_VBMI2_ALONE
#include "tier.inc"
#endif
#if HEADSTART_HAS_avx512_bf16_emulated
#define HEADSTART_TIER avx512_bf16_emulated
#include "tier.inc"
#endif

namespace {

struct Tier {
  const char* name;
  bool (*supported)();
  Kernels kernels;
};

#if defined(__x86_64__)

bool bit(unsigned word, int n) { return (word >> n & 1) != 0; }

struct CpuFeatures {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, vbmi2 = false, vnni = false;

  CpuFeatures() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return;  // OSXSAVE
    const bool fma = bit(c, 12), f16c = bit(c, 29), avx = bit(c, 28);
    unsigned xcr0, upper;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(upper) : "c"(0));
    const bool ymm = (xcr0 & 0x6) == 0x6, zmm = (xcr0 & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = avx && fma && f16c && bit(b, 5) && ymm;
    avx512 = avx2 && zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
    vbmi2 = avx512 && bit(c, 6);
    vnni = avx512 && bit(c, 11);
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;
    avx512_bf16 = avx512 && bit(a, 5);
  }
};

const CpuFeatures& features() {
  static const CpuFeatures f;
  return f;
}

bool has(Needs needs) {
  switch (needs) {
    case Needs::kAvx2:
      return features().avx2;
    case Needs::kAvx512:
      return features().avx512;
    case Needs::kAvx512Vnni:
      return features().vnni;
    case Needs::kAvx512Bf16:
      return features().avx512_bf16;
    default:
      return false;
  }
}

#else

bool has(Needs) { return false; }

#endif

// The rate of a loop of unit_loops.h; 0 if this CPU or this build does not have it.
double rate_of(const char* name) {
  for (const UnitLoop& loop : kUnitLoops) {
    if (std::strcmp(loop.name, name) == 0 && has(loop.needs)) return unit_rate(loop);
  }
  return 0;
}

// Lowest first. A tier that stands here twice is one: no CPU has both rows of it. VBMI2 comes neither with AVX-512 (Ice
// Lake is the first that has it) nor with BF16 (Cooper Lake has not). The emulated tier runs the data movement of the
// bf16 and VBMI2 kernels without the instructions; it is built for tests and never chosen by itself. A build for this
// machine alone (HEADSTART_CPU_TIERS=native) lacks the rows that its CPU does not run.
const Tier kTiers[] = {
    {"generic", [] { return true; }, generic::table()},
#if HEADSTART_HAS_avx2
    {"avx2", [] { return features().avx2; }, avx2::table()},
#endif
#if HEADSTART_HAS_avx512_bf16_emulated
    {"avx512_bf16_emulated", [] { return features().avx512; }, avx512_bf16_emulated::table()},
#endif
#if HEADSTART_HAS_avx512
    {"avx512", [] { return features().avx512 && !features().vbmi2; }, avx512::table()},
#endif
#if HEADSTART_HAS_avx512_vbmi2
    {"avx512", [] { return features().avx512 && features().vbmi2; }, avx512_vbmi2::table(avx512::table())},
#endif
#if HEADSTART_HAS_avx512_bf16
    {"avx512_bf16", [] { return features().avx512_bf16 && !features().vbmi2; }, avx512_bf16::table()},
#endif
#if HEADSTART_HAS_avx512_bf16_vbmi2
    {"avx512_bf16", [] { return features().avx512_bf16 && features().vbmi2; },
     avx512_bf16_vbmi2::table(avx512_bf16::table())},
#endif
};
constexpr int kTierCount = sizeof kTiers / sizeof kTiers[0];

// The tier of that name that this CPU runs, or -1.
int find(const char* name) {
  for (int i = 0; i < kTierCount; ++i) {
    if (kTiers[i].supported() && std::strcmp(kTiers[i].name, name) == 0) return i;
  }
  return -1;
}

// Whether a bf16 dot product repays, from its rate and that of FMA. It needs no conversion of its operands, but the
// kernels convert each operand once for many products.
bool bf16_dot_pays(double fma, double dot) { return dot >= fma; }

// The tier that HEADSTART_ISA names. Otherwise the highest that the CPU has; the bf16 dot product must repay, though,
// which takes two milliseconds to find out. A name that is unknown or too high is ignored here and reported by
// `headstart doctor`.
int choose() {
  const char* wanted = std::getenv("HEADSTART_ISA");
  const int asked = wanted == nullptr ? -1 : find(wanted);
  if (asked >= 0) return asked;
  int best = 0;
  for (int i = 0; i < kTierCount; ++i) {
    if (kTiers[i].supported()) best = i;
  }
  const int without = find("avx512");
  const bool dot = std::strcmp(kTiers[best].name, "avx512_bf16") == 0;
  return dot && without >= 0 && !bf16_dot_pays(rate_of("fma 512"), rate_of("bf16 dot")) ? without : best;
}

int& current() {
  static int tier = choose();
  return tier;
}

}  // namespace

const Kernels& kernels() { return kTiers[current()].kernels; }

}  // namespace headstart

extern "C" {

__attribute__((visibility("default"))) const char* headstart_cpu_tiers() {
  static const std::string names = [] {
    std::string all;
    for (const auto& tier : headstart::kTiers) {
      if (tier.supported()) all += std::string(all.empty() ? "" : " ") + tier.name;
    }
    return all;
  }();
  return names.c_str();
}

__attribute__((visibility("default"))) const char* headstart_cpu_tier() {
  return headstart::kTiers[headstart::current()].name;
}

// Lines of a loop's name, what it multiplies and its rate on one core, in 1e9 operations a second; measured now.
__attribute__((visibility("default"))) const char* headstart_cpu_unit_rates() {
  static thread_local std::string lines;
  lines.clear();
  for (const headstart::UnitLoop& loop : headstart::kUnitLoops) {
    if (!headstart::has(loop.needs)) continue;
    lines += std::string(loop.name) + "\t" + loop.unit + "\t" + std::to_string(headstart::unit_rate(loop)) + "\n";
  }
  return lines.c_str();
}

__attribute__((visibility("default"))) int headstart_bf16_dot_pays(double fma, double dot) {
  return headstart::bf16_dot_pays(fma, dot) ? 1 : 0;
}

__attribute__((visibility("default"))) int headstart_set_cpu_tier(const char* name) {
  const int tier = headstart::find(name);
  if (tier < 0) return 1;
  headstart::current() = tier;
  return 0;
}
}

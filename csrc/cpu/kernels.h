// The interface of the CPU kernels: plain arguments, and one table of functions per tier.
//
// Kernels take raw pointers and strides (in elements) and depend on no framework. csrc/torch/ checks the tensors and
// fills the arguments. `tiers.cpp` picks the table for this CPU.
#pragma once

#include "../arguments.h"

namespace headstart {

// Runs body(context, worker) once for every worker in [0, workers), on several threads if they are available.
struct Parallel {
  int workers;
  void (*run)(int workers, void (*body)(void* context, int worker), void* context);
};

// One function pointer per kernel, with the kernel's name.
struct Kernels {
#define HEADSTART_KERNEL(name, Args) void (*name)(const Args&, const Parallel&);
#define HEADSTART_VBMI2_KERNEL HEADSTART_KERNEL
#include "../kernels.inc"
};

// The table of the tier in use (tiers.cpp).
const Kernels& kernels();

// The sources of a tier define its functions in a namespace with the tier's name.
#ifdef HEADSTART_TIER
namespace HEADSTART_TIER {
#define HEADSTART_KERNEL(name, Args) void name(const Args&, const Parallel&);
#define HEADSTART_VBMI2_KERNEL HEADSTART_KERNEL
#include "../kernels.inc"
}  // namespace HEADSTART_TIER
#endif

}  // namespace headstart

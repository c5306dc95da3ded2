// The launcher of centroid lookup, for ctypes.
#include "launch.h"

extern "C" {

void descending(bool on) { lane_model::descending = on; }
void warp_groups(bool on) { lane_model::warp_groups = on; }
const char* centroid_lookup(const headstart::CentroidLookupArgs& args) {
  return run(args, headstart::cuda::centroid_lookup_workspace, headstart::cuda::centroid_lookup);
}
}

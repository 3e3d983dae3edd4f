// What must be known of a GPU before a kernel is launched there: its limits, and whether this build has code for it.
#include "device/launch.cuh"

namespace cnk {

#ifdef CNK_HOST

Limits limits_of(const Place&) {
  const host::Architecture& gpu = host::architecture();
  return {gpu.capability, gpu.multiprocessors, gpu.shared_per_block, gpu.max_cluster};
}

std::string why_unusable(const Place&) {
  return "";
}

#else

namespace {

__global__ void probe_kernel() {}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  expect_success("limits_of", cudaDeviceGetAttribute(&value, which, device));
  return value;
}

}  // namespace

Limits limits_of(const Place& place) {
  constexpr int kPortableCluster = 8;  // what every GPU with clusters schedules
  return {attribute(cudaDevAttrComputeCapabilityMajor, place.device) * 10 +
              attribute(cudaDevAttrComputeCapabilityMinor, place.device),
          attribute(cudaDevAttrMultiProcessorCount, place.device),
          static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, place.device)),
          attribute(cudaDevAttrClusterLaunch, place.device) ? kPortableCluster : 1};
}

// Asking for a kernel's attributes loads it, and so meets every reason that a launch would: no code for this GPU, PTX
// that the driver is too old to compile, no driver. Nothing runs and nothing waits.
std::string why_unusable(const Place& place) {
  try {
    const DeviceGuard guard("probe", place.device);
    cudaFuncAttributes attributes;
    expect_success("probe", cudaFuncGetAttributes(&attributes, probe_kernel));
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

#endif

}  // namespace cnk

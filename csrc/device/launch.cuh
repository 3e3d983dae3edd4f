// Launches a kernel on the tensor's device and stream, and turns a refusal into an exception that names the op.
#pragma once
#include <stdexcept>
#include <string>

#include "../launchers.h"
#include "memory.cuh"

namespace cnk {

struct Shape {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  int cluster = 1;  // blocks per cluster
};

inline void expect_grid(const char* name, const Shape& shape) {
  if (shape.blocks > 0x7fffffff)
    throw std::runtime_error(std::string(name) + ": " + std::to_string(shape.blocks) + " blocks, over 2^31 - 1");
}

#ifdef CNK_HOST

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), Place, const Shape& shape, const A&... arguments) {
  if (shape.blocks == 0) return;
  expect_grid(name, shape);
  host::run_grid({name, static_cast<unsigned>(shape.blocks), shape.threads, shape.shared_bytes, shape.cluster},
                 [&] { kernel(arguments...); });
}

// How many clusters of such a launch the GPU holds at once, as far as threads and shared memory go; 0: it refuses them.
template <class... P>
int resident_clusters(const char*, void (*)(P...), Place, const Shape& shape) {
  const host::Architecture& gpu = host::architecture();
  if (shape.shared_bytes > gpu.shared_per_block || shape.cluster > gpu.max_cluster) return 0;
  return gpu.multiprocessors * gpu.resident(shape.threads, shape.shared_bytes) / shape.cluster;
}

#else

inline void expect_success(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

class DeviceGuard {
 public:
  DeviceGuard(const char* name, int device) {
    expect_success(name, cudaGetDevice(&before_));
    if (before_ != device) expect_success(name, cudaSetDevice(device));
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// The configuration of a launch, which points to its own attribute.
class Configured {
 public:
  template <class... P>
  Configured(const char* name, void (*kernel)(P...), const Place& place, const Shape& shape) {
    constexpr size_t kDefaultLimit = 48 * 1024;
    if (shape.shared_bytes > kDefaultLimit)
      expect_success(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                static_cast<int>(shape.shared_bytes)));
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = reinterpret_cast<cudaStream_t>(place.stream);
    config.attrs = &cluster_;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
  }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;

  cudaLaunchConfig_t config = {};

 private:
  cudaLaunchAttribute cluster_;
};

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), Place place, const Shape& shape, const A&... arguments) {
  if (shape.blocks == 0) return;
  expect_grid(name, shape);
  const DeviceGuard guard(name, place.device);
  const Configured configured(name, kernel, place, shape);
  expect_success(name, cudaLaunchKernelEx(&configured.config, kernel, static_cast<P>(arguments)...));
}

// How many clusters of such a launch the GPU holds at once; 0: it refuses them.
template <class... P>
int resident_clusters(const char* name, void (*kernel)(P...), Place place, const Shape& shape) {
  const Limits limits = limits_of(place);
  if (shape.shared_bytes > limits.shared_per_block || shape.cluster > limits.max_cluster) return 0;
  const DeviceGuard guard(name, place.device);
  const Configured configured(name, kernel, place, shape);
  int count = 0;
  if (shape.cluster == 1) {
    expect_success(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, shape.threads,
                                                                       shape.shared_bytes));
    return count * limits.multiprocessors;
  }
  expect_success(name, cudaOccupancyMaxActiveClusters(&count, kernel, &configured.config));
  return count;
}

#endif

}  // namespace cnk

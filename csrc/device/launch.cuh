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

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), Place place, const Shape& shape, const A&... arguments) {
  if (shape.blocks == 0) return;
  expect_grid(name, shape);
  const DeviceGuard guard(name, place.device);
  constexpr size_t kDefaultLimit = 48 * 1024;
  if (shape.shared_bytes > kDefaultLimit)
    expect_success(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(shape.shared_bytes)));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(place.stream);
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  expect_success(name, cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
}

#endif

}  // namespace cnk

// The GPU that the CPU execution stands for: a launch that it would refuse is refused here, too.
#pragma once
#include <cstddef>
#include <stdexcept>
#include <string>

namespace cnk::host {

struct Architecture {
  int capability;                    // 10 * major + minor
  size_t shared_per_block;           // bytes, static and dynamic together, with the opt-in
  size_t shared_per_multiprocessor;  // bytes, of which every block takes 1 KiB more than it asks for
  int max_cluster;                   // blocks per cluster that every GPU of the kind schedules; 1: it has none
  int threads_per_multiprocessor;
  int multiprocessors;

  static constexpr int kThreadsPerBlock = 1024;
  static constexpr size_t kReservedPerBlock = 1024;

  // Blocks of such a launch that one multiprocessor holds, as far as threads and shared memory go.
  int resident(int threads, size_t shared) const {
    const size_t by_shared = shared_per_multiprocessor / (shared + kReservedPerBlock);
    const size_t by_threads = static_cast<size_t>(threads_per_multiprocessor / threads);
    return static_cast<int>(by_shared < by_threads ? by_shared : by_threads);
  }
};

constexpr size_t operator""_KiB(unsigned long long n) {
  return n * 1024;
}

constexpr Architecture kArchitectures[] = {
    {80, 163_KiB, 164_KiB, 1, 2048, 108},   // A100
    {86, 99_KiB, 100_KiB, 1, 1536, 84},     // RTX 30, A10
    {89, 99_KiB, 100_KiB, 1, 1536, 128},    // RTX 40, L4
    {90, 227_KiB, 228_KiB, 8, 2048, 132},   // H100, H200
    {100, 227_KiB, 228_KiB, 8, 2048, 148},  // B200
    {120, 99_KiB, 100_KiB, 8, 1536, 170},   // RTX 50
};

inline Architecture architecture_of(int capability) {
  for (const Architecture& one : kArchitectures)
    if (one.capability == capability) return one;
  throw std::invalid_argument("no record of compute capability " + std::to_string(capability));
}

// What launches are held to: an H100 with few multiprocessors, so that small tensors make plans of several blocks.
inline Architecture& architecture() {
  static Architecture current = [] {
    Architecture one = architecture_of(90);
    one.multiprocessors = 4;
    return one;
  }();
  return current;
}

}  // namespace cnk::host

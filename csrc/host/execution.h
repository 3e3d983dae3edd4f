// Runs a CUDA kernel on a CPU: grid, clusters, blocks and warps as fibers of one OS thread, checked as they go.
//
// The device wrappers of csrc/device call into Team, which is the cluster (or the lone block) now running. Whatever a
// GPU would leave undefined ends the launch with a Fault that names the kernel, the thread and the buffer.
#pragma once
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>

#include "architecture.h"
#include "fiber.h"
#include "global_memory.h"
#include "shared_memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace cnk::host {

struct Launch {
  const char* name;
  unsigned blocks;
  int threads;
  size_t shared_bytes;
  int cluster;
};

class Team {
 public:
  Team(Fibers& fibers, const Launch& launch, unsigned first_block)
      : fibers_(fibers),
        launch_(launch),
        first_block_(first_block),
        clocks_(launch.cluster, launch.threads),
        waiting_(launch.cluster * launch.threads, nullptr),
        copies_(waiting_.size()),
        last_remote_use_(launch.cluster, std::vector<uint32_t>(waiting_.size(), 0)),
        warps_((waiting_.size() + 31) / 32),
        barriers_(launch.cluster * kBarriers) {
    for (int i = 0; i < launch.cluster; ++i) shared_.emplace_back(static_base() + kStaticBytes);
  }

  int size() const { return static_cast<int>(waiting_.size()); }
  int thread() const { return fibers_.current(); }
  int rank() const { return thread() / launch_.threads; }
  dim3 thread_index() const { return {static_cast<unsigned>(thread() % launch_.threads), 0, 0}; }
  dim3 block_index() const { return {first_block_ + rank(), 0, 0}; }
  const Launch& launch() const { return launch_; }

  std::string describe(int thread) const {
    return "thread " + std::to_string(thread % launch_.threads) + " of block " +
           std::to_string(first_block_ + thread / launch_.threads);
  }
  std::string describe_wait(int thread) const { return describe(thread) + " waits at " + waiting_[thread]; }

  [[noreturn]] void fail(const std::string& what) { fibers_.fail(what + " (" + describe(thread()) + ")"); }

  // ---- barriers

  static constexpr int kBarriers = 16;

  void sync_block(int id = 0, int count = 0) {
    const int threads = count ? count : launch_.threads;
    if (threads % 32) fail("named barrier " + std::to_string(id) + ": a count that is not whole warps");
    Barrier& barrier = barriers_[rank() * kBarriers + id];
    if (!arrive(barrier, threads, id ? "a named barrier" : "__syncthreads")) return;
    if (threads == launch_.threads)
      clocks_.synchronise_block(rank());
    else
      clocks_.synchronise(barrier.members);
    release(barrier);
  }

  void sync_cluster() {
    if (!arrive(cluster_barrier_, size(), "the cluster barrier")) return;
    clocks_.synchronise_cluster();
    release(cluster_barrier_);
  }

  // ---- warps

  // Every lane of the warp hands in a slot; the last to arrive works on all 32 of them, then all go on.
  void collective(const char* what, void* slot, void (*work)(void* const slots[32]), bool orders_memory = false) {
    Warp& warp = warps_[thread() / 32];
    if (warp.barrier.members.empty()) warp.what = what;
    if (std::strcmp(warp.what, what) != 0)
      fail(std::string("a diverged warp: ") + what + " while other lanes stand at " + warp.what);
    warp.slots[thread() % launch_.threads % 32] = slot;
    if (!arrive(warp.barrier, 32, what)) return;
    work(warp.slots);
    if (orders_memory) clocks_.synchronise(warp.barrier.members);
    release(warp.barrier);
  }

  // ---- memory

  // The same static buffer for every thread of a block: its place is fixed by the first that asks.
  size_t static_shared(const char* name, size_t bytes) {
    auto [entry, is_new] = statics_.try_emplace(name, static_top_);
    if (is_new) static_top_ += (bytes + 15) / 16 * 16;
    if (static_top_ > kStaticBytes) fail(std::string("static shared memory is over 48 KiB at ") + name);
    if (launch_.shared_bytes + static_top_ > architecture().shared_per_block)
      fail("static and dynamic shared memory together are over the limit at " + std::string(name));
    return static_base() + entry->second;
  }

  std::byte* read_shared(int block, size_t offset, size_t bytes, const char* name, long long index) {
    note_remote_use(block, name);
    judge(shared_[block].read(offset, bytes, thread(), clocks_), "reads", name, index);
    return shared_[block].data(offset);
  }

  std::byte* write_shared(int block, size_t offset, size_t bytes, const char* name, long long index) {
    note_remote_use(block, name);
    judge(shared_[block].write(offset, bytes, thread(), clocks_), "writes", name, index);
    return shared_[block].data(offset);
  }

  // `offset`: of the access in the block's shared memory, which begins at a multiple of 16 bytes.
  void check_index(const char* name, long long index, int count, size_t size, size_t offset, size_t bytes) {
    if (index < 0 || index + count > static_cast<long long>(size))
      fail("shared index out of bounds: " + place(name, index) + " of " + std::to_string(size));
    if (bytes && offset % bytes) fail("misaligned vector access: shared " + place(name, index));
  }

  void check_global(const void* pointer, size_t bytes, size_t alignment, bool is_write, const char* what) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (address % alignment) fail("misaligned vector access: " + std::to_string(alignment) + " bytes of global memory");
    using V = GlobalMemory::Verdict;
    const GlobalMemory::Finding found =
        global_memory().access(address, bytes, static_cast<int32_t>(first_block_) + rank(), is_write);
    if (found.verdict == V::fine) return;
    if (found.verdict == V::outside)
      fail(std::string("global access out of bounds: ") + what + " of " + std::to_string(bytes) +
           " bytes outside every tensor of the call");
    const std::string other =
        found.other == GlobalMemory::kSeveral ? "several other blocks" : "block " + std::to_string(found.other);
    fail(std::string("global memory race: ") + what + " of what " + other +
         (found.verdict == V::write_of_read ? " read" : " wrote") + " in the same launch");
  }

  // ---- asynchronous copies: the bytes arrive when the thread that asked for them waits, and not before

  void copy_async(size_t offset, size_t bytes, const void* source, size_t valid, const char* name, long long index) {
    if (valid) check_global(source, valid, bytes, false, "an asynchronous read");
    judge(shared_[rank()].write(offset, bytes, thread(), clocks_, true), "copies into", name, index);
    copies_[thread()].open.push_back({offset, bytes, source, valid});
  }

  void commit_copies() {
    Copies& copies = copies_[thread()];
    copies.groups.push_back(std::move(copies.open));
    copies.open.clear();
  }

  void wait_copies(size_t allowed) {
    Copies& copies = copies_[thread()];
    for (; copies.groups.size() > allowed; copies.groups.pop_front())
      for (const Copy& copy : copies.groups.front()) {
        std::byte* to = shared_[rank()].data(copy.offset);
        std::memset(to, 0, copy.bytes);
        if (copy.valid) std::memcpy(to, copy.source, copy.valid);
        shared_[rank()].land(copy.offset, copy.bytes, clocks_.now(thread()));
      }
  }

  // A block whose shared memory is still being read must not be gone: checked when a thread returns.
  void finish() {
    for (int other = 0; other < size(); ++other)
      if (!clocks_.ordered(thread(), other, last_remote_use_[rank()][other]))
        fail("a block exits while its shared memory is in use by " + describe(other));
    if (!copies_[thread()].open.empty() || !copies_[thread()].groups.empty())
      fail("a thread exits with asynchronous copies under way");
  }

 private:
  static constexpr size_t kStaticBytes = 48 * 1024;

  struct Barrier {
    std::vector<int> members;
  };
  struct Warp {
    Barrier barrier;
    const char* what = "";
    void* slots[32];
  };
  struct Copy {
    size_t offset, bytes;
    const void* source;
    size_t valid;
  };
  struct Copies {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
  };

  size_t static_base() const { return (launch_.shared_bytes + 15) / 16 * 16; }

  static std::string place(const char* name, long long index) {
    return std::string(name) + "[" + std::to_string(index) + "]";
  }

  // True for the thread that completes the barrier; the others return once it is released.
  bool arrive(Barrier& barrier, int count, const char* what) {
    barrier.members.push_back(thread());
    if (static_cast<int>(barrier.members.size()) == count) return true;
    waiting_[thread()] = what;
    fibers_.block();
    waiting_[thread()] = nullptr;
    return false;
  }

  void release(Barrier& barrier) {
    for (int member : barrier.members)
      if (member != thread()) fibers_.wake(member);
    barrier.members.clear();
  }

  void note_remote_use(int block, const char* name) {
    if (block == rank()) return;
    for (int i = block * launch_.threads; i < (block + 1) * launch_.threads; ++i)
      if (fibers_.done(i)) fail(std::string("shared memory of a block that has exited: ") + name);
    last_remote_use_[block][thread()] = clocks_.now(thread());
  }

  void judge(const SharedMemory::Finding& finding, const char* verb, const char* name, long long index) {
    using V = SharedMemory::Verdict;
    if (finding.verdict == V::fine) return;
    const std::string what = std::string(verb) + " " + place(name, index);
    if (finding.verdict == V::uninitialised) fail("uninitialised shared memory: " + what);
    const std::string other = describe(finding.other);
    if (finding.verdict == V::in_flight) fail("asynchronous copy not waited for: " + what + " of " + other);
    const char* kind = finding.verdict == V::read_after_write    ? "which was written"
                       : finding.verdict == V::write_after_write ? "which was also written"
                                                                 : "which was read";
    fail("shared memory race: " + what + ", " + kind + " with no barrier between by " + other);
  }

  Fibers& fibers_;
  Launch launch_;
  unsigned first_block_;
  Clocks clocks_;
  std::vector<SharedMemory> shared_;                    // one per block of the cluster
  std::vector<const char*> waiting_;                    // where each thread waits, for the report of a deadlock
  std::vector<Copies> copies_;                          // per thread
  std::vector<std::vector<uint32_t>> last_remote_use_;  // [block][thread]: 0 is never
  std::vector<Warp> warps_;
  std::vector<Barrier> barriers_;  // [block][id]
  Barrier cluster_barrier_;
  std::map<std::string, size_t> statics_;
  size_t static_top_ = 0;
};

inline Team*& current_team() {
  static Team* team = nullptr;
  return team;
}

inline Team& team() {
  return *current_team();
}

// What has been launched since the list was last cleared.
inline std::vector<Launch>& launches() {
  static std::vector<Launch> list;
  return list;
}

// What the architecture would refuse.
inline void expect_launchable(const Launch& launch) {
  const auto refuse = [&](const std::string& what) { throw Fault(std::string(launch.name) + ": " + what); };
  const Architecture& gpu = architecture();
  const std::string here = " on compute capability " + std::to_string(gpu.capability);
  if (launch.threads % 32) refuse("a block that is not whole warps");
  if (launch.threads < 32 || launch.threads > Architecture::kThreadsPerBlock)
    refuse(std::to_string(launch.threads) + " threads, a block has 32 to 1024");
  if (launch.shared_bytes > gpu.shared_per_block)
    refuse(std::to_string(launch.shared_bytes) + " bytes of shared memory, the limit is " +
           std::to_string(gpu.shared_per_block) + here);
  if (launch.cluster < 1 || launch.cluster > gpu.max_cluster)
    refuse("a cluster of " + std::to_string(launch.cluster) + ", the limit is " + std::to_string(gpu.max_cluster) +
           here);
  if (launch.blocks % launch.cluster) refuse("a grid that is not whole clusters");
}

// The order in which a launch's clusters run: any is right, and every launch takes another.
inline std::vector<unsigned> execution_order(unsigned clusters) {
  static unsigned launch = 0;
  std::vector<unsigned> order(clusters);
  std::iota(order.begin(), order.end(), 0u);
  uint32_t state = 2654435761u * ++launch;
  for (unsigned i = clusters; i > 1; --i) {
    state = state * 1664525u + 1013904223u;
    std::swap(order[i - 1], order[static_cast<uint64_t>(state) * i >> 32]);
  }
  return order;
}

// Blocks run one cluster after another.
inline void run_grid(const Launch& launch, const std::function<void()>& kernel) {
  static Fibers fibers;
  expect_launchable(launch);
  launches().push_back(launch);
  global_memory().begin_launch();
  for (const unsigned index : execution_order(launch.blocks / launch.cluster)) {
    Team cluster(fibers, launch, index * launch.cluster);
    current_team() = &cluster;
    const auto body = [&](int) {
      kernel();
      cluster.finish();
    };
    try {
      fibers.run(cluster.size(), body, [&](int thread) { return cluster.describe_wait(thread); });
    } catch (const Fault& fault) {
      throw Fault(std::string(launch.name) + ": " + fault.what());
    }
  }
}

}  // namespace cnk::host

#define threadIdx (cnk::host::team().thread_index())
#define blockIdx (cnk::host::team().block_index())
#define gridDim (dim3{cnk::host::team().launch().blocks})
#define blockDim (dim3{static_cast<unsigned>(cnk::host::team().launch().threads)})

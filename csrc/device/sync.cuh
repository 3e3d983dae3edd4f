// Barriers, clusters, shuffles and votes.
#pragma once
#include "types.cuh"

namespace cnk {

__device__ __forceinline__ void sync_block() {
#ifdef CNK_HOST
  host::team().sync_block();
#else
  __syncthreads();
#endif
}

// A barrier among `count` threads (whole warps) of the block; id 0 is sync_block's.
__device__ __forceinline__ void sync_named(int id, int count) {
#ifdef CNK_HOST
  host::team().sync_block(id, count);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
#endif
}

__device__ __forceinline__ void sync_warp() {
#ifdef CNK_HOST
  host::team().collective("__syncwarp", nullptr, [](void* const*) {}, true);
#else
  __syncwarp();
#endif
}

// ---- clusters

// Rank of this block in its cluster; clusters are laid out along x.
__device__ __forceinline__ int cluster_rank() {
#ifdef CNK_HOST
  return host::team().rank();
#else
  unsigned rank = 0;
#if CNK_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
#endif
}

__device__ __forceinline__ void sync_cluster() {
#ifdef CNK_HOST
  host::team().sync_cluster();
#elif CNK_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// ---- warps

#ifdef CNK_HOST

template <class T>
struct ShuffleSlot {
  T value;
  int source;
  T result;
};

template <class T>
inline T shuffle(T value, int source) {
  ShuffleSlot<T> slot{value, source, value};
  host::team().collective("a shuffle", &slot, [](void* const* slots) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* mine = static_cast<ShuffleSlot<T>*>(slots[lane]);
      mine->result = static_cast<ShuffleSlot<T>*>(slots[mine->source & 31])->value;
    }
  });
  return slot.result;
}

template <class T>
inline T shuffle_xor(T value, int mask) {
  return shuffle(value, (host::team().thread() % 32) ^ mask);
}

inline uint32_t ballot(bool predicate) {
  ShuffleSlot<uint32_t> slot{predicate, 0, 0};
  host::team().collective("a vote", &slot, [](void* const* slots) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<ShuffleSlot<uint32_t>*>(slots[lane])->value << lane;
    for (int lane = 0; lane < 32; ++lane) static_cast<ShuffleSlot<uint32_t>*>(slots[lane])->result = votes;
  });
  return slot.result;
}

#else

template <class T>
__device__ __forceinline__ T shuffle(T value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}

#endif

// Sum over the warp, in every lane. Each step adds the same two numbers in both lanes, so all lanes get the same bits.
__device__ __forceinline__ float warp_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

}  // namespace cnk

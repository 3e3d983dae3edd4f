// The launchers, as bindings.cpp calls them: addresses and sizes, no type of any framework. An address of 0 is an absent
// tensor. Every launcher runs on `place`, allocates nothing, and throws std::runtime_error with the op's name.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cnk {

enum class Dtype { float32, float16, bfloat16 };

// Where a call runs: the tensors' device and that device's current stream.
struct Place {
  int device = 0;
  uintptr_t stream = 0;
};

// A tensor of one value per channel, in the dtype of x or in float32.
struct ChannelTensor {
  uintptr_t address = 0;
  bool is_float = false;
};

// How a tensor [N, C, positions] is cut into slabs (group_norm_slab.cuh). `vectors`: every row and address of x, y, dy
// and dx is a multiple of 16 bytes. `cluster`: the splits of a slab are a thread-block cluster (sm_90).
struct GroupNormCut {
  int64_t samples = 0, channels = 0, positions = 0;
  int groups = 1, span = 1, splits = 1, threads = 32;
  bool channels_last = false, vectors = false, cluster = false;
};

struct GroupNormForward {
  Dtype dtype = Dtype::float32;
  GroupNormCut cut;
  uintptr_t x = 0, y = 0, mean = 0, rstd = 0;
  uintptr_t partial = 0;  // float32 [N, G, splits, 2]; not used by the cluster form
  ChannelTensor weight, bias, addend;
  float eps = 0;
  bool silu = false;
};

struct GroupNormBackward {
  Dtype dtype = Dtype::float32;
  GroupNormCut cut;
  uintptr_t x = 0, dy = 0, dx = 0, mean = 0, rstd = 0;
  uintptr_t partial = 0;          // float32 [N, G, splits, 2]; not used by the cluster form
  uintptr_t group_sums = 0;       // float32 [N, G, 2], where daddend is asked for
  uintptr_t channel_partial = 0;  // float32 [N, splits, 3, C], where dweight, dbias or daddend is asked for
  ChannelTensor weight, bias, addend, dweight, dbias, daddend;
  bool silu = false;
};

void group_norm_silu_fwd(const Place& place, const GroupNormForward& call);
void group_norm_silu_bwd(const Place& place, const GroupNormBackward& call);
// Bytes of shared memory per block that the cluster form of a direction takes.
size_t group_norm_silu_fwd_shared(Dtype dtype, const GroupNormCut& cut);
size_t group_norm_silu_bwd_shared(Dtype dtype, const GroupNormCut& cut);

}  // namespace cnk

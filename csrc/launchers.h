// The launchers, as bindings.cpp calls them: addresses and sizes, no type of any framework. An address of 0 is an
// absent tensor. Every launcher runs on `place`, allocates nothing, and throws std::runtime_error with the op's name.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cnk {

enum class Dtype { float32, float16, bfloat16 };

// Where a call runs: the tensors' device and that device's current stream.
struct Place {
  int device = 0;
  uintptr_t stream = 0;
};

// What a GPU allows, as its driver says.
struct Limits {
  int capability = 0;  // 10 * major + minor
  int multiprocessors = 1;
  size_t shared_per_block = 0;  // bytes of shared memory that one block may ask for
  int max_cluster = 1;          // blocks per cluster that can always be scheduled; 1: it has no clusters
};

Limits limits_of(const Place& place);
// Why no kernel of this build can run there, such as that it has no code for that GPU; empty if they can.
std::string why_unusable(const Place& place);

// A tensor of one value per channel, in the dtype of x or in float32.
struct ChannelTensor {
  uintptr_t address = 0;
  bool is_float = false;
};

// Threads of a block, at most: of the portable form, and of the cluster form of each direction.
constexpr int kGroupNormPortableThreads = 256, kGroupNormFwdThreads = 512, kGroupNormBwdThreads = 384;

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
// What the cluster form of a direction takes: bytes of shared memory per block, and how many clusters the GPU holds at
// once (0: it refuses them).
struct GroupNormFit {
  size_t shared_bytes = 0;
  int clusters = 0;
};
GroupNormFit group_norm_silu_fwd_fit(const Place& place, Dtype dtype, const GroupNormCut& cut);
GroupNormFit group_norm_silu_bwd_fit(const Place& place, Dtype dtype, const GroupNormCut& cut);

constexpr int kZeroConvGroup = 16;  // layers in one launch

// One layer: out [N, Cout, positions] = residual + scale * (weight [Cout, Cin] x [N, Cin, positions] + bias).
// x, residual, dout and dx are dense in one memory format; out has the strides given.
struct ZeroConv {
  int64_t samples = 0, in_channels = 0, out_channels = 0, positions = 0;
  bool channels_last = false;
  uintptr_t x = 0, weight = 0, bias = 0, residual = 0, out = 0;
  int64_t out_sample = 0, out_channel = 0, out_position = 0;  // strides of out in elements
  uintptr_t scale = 0;                                        // float32 [N] (stride 1) or [] (stride 0); 0: `factor`
  int64_t scale_stride = 0;
  float factor = 1;

  // The forward pass only: the sum over the input channels in `depth_splits` parts.
  uintptr_t depth_partial = 0;  // float32 [depth_splits, N, Cout, positions] in the memory format of x, where not 1
  int depth_splits = 1;

  // The backward pass only.
  uintptr_t dout = 0, dx = 0, dweight = 0, dbias = 0, dscale = 0;
  uintptr_t dweight_partial = 0;  // float32 [splits, Cout, Cin]
  int splits = 1;                 // for a scale per sample a multiple of the samples
  uintptr_t dot_partial = 0;      // float32 [N, tiles of dx], where dscale is asked for
  uintptr_t channel_sums = 0;     // float32 [N, sum_parts, Cout], where dbias or dscale is asked for
  int sum_parts = 1;
};

// How a layer is cut: tiles of the forward pass, of dx of one sample, and of dweight.
int zero_conv_fwd_tiles(Dtype dtype, const ZeroConv& layer);
int zero_conv_dx_tiles(Dtype dtype, const ZeroConv& layer);
int zero_conv_dweight_tiles(Dtype dtype, const ZeroConv& layer);

// All layers share dtype and memory format; the launch is `blocks` persistent blocks. At most kZeroConvGroup layers.
void zero_conv_add_fwd(const Place& place, Dtype dtype, const std::vector<ZeroConv>& layers, int blocks);
void zero_conv_add_bwd(const Place& place, Dtype dtype, const std::vector<ZeroConv>& layers, int blocks);

// [batch, length, heads, head_dim] with head_dim contiguous, strides in elements.
struct HeadTensor {
  uintptr_t address = 0;
  int64_t batch = 0, row = 0, head = 0;
};

// softmax(scale q k^T) v per head, for head dimensions 40, 64, 80, 128 and 160 in float16 and bfloat16.
struct Attention {
  Dtype dtype = Dtype::float16;
  int64_t batch = 0, heads = 0, q_length = 0, k_length = 0;
  int head_dim = 0;
  float scale = 1;
  HeadTensor q, k, v, out;
  uintptr_t lse = 0;  // float32 [batch, heads, q_length], natural logarithm

  // The backward pass only. dk and dv are asked for apart from each other and from dq.
  HeadTensor dout, dq, dk, dv;
  uintptr_t delta = 0;  // float32 [batch, heads, q_length]: workspace
};

void attention_fwd(const Place& place, const Attention& call);
void attention_bwd(const Place& place, const Attention& call);

}  // namespace cnk

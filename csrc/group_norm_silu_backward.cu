// group_norm_silu backward. With n = (x + addend - mean) * rstd, z = n * weight + bias and dz = dy * silu'(z),
//   dx = rstd * (weight * dz - (C2 + n * C1) / M),   C1 = sum(weight * dz * n), C2 = sum(weight * dz)  over a group of
//   M.
//
// Per channel and chunk the kernels take A = sum(dz), B = sum(dz * n) and D = sum(n). C1 and C2 follow from A and B;
// dweight, dbias and daddend are folded from A, B and D over chunks and samples in a fixed order by a small launch of
// its own, and only where one of them is asked for. The forms are those of the forward: two launches, or one cluster
// per slab that keeps x and dy in shared memory.
#include "group_norm_slab.cuh"

namespace cnk {

namespace group_norm {
namespace {

template <class T>
struct Backward {
  Cut cut;
  Global<const T> x, dy;
  Global<T> dx;
  PerChannel<T> weight, bias, addend;  // [C], [C], [N, C]
  PerChannelOut<T> dweight, dbias, daddend;
  Global<const float> mean, rstd;  // [N, G]
  Global<float> partial;           // [N, G, splits, 2]: C1 and C2 of one chunk
  Global<float> group_sums;        // [N, G, 2]: C1 and C2
  Global<float> channel_partial;   // [N, splits, 3, C]: A, B, D
  bool silu;

  explicit Backward(const GroupNormBackward& call)
      : cut(call.cut),
        x{reinterpret_cast<const T*>(call.x)},
        dy{reinterpret_cast<const T*>(call.dy)},
        dx{reinterpret_cast<T*>(call.dx)},
        weight(call.weight),
        bias(call.bias),
        addend(call.addend),
        dweight(call.dweight),
        dbias(call.dbias),
        daddend(call.daddend),
        mean{reinterpret_cast<const float*>(call.mean)},
        rstd{reinterpret_cast<const float*>(call.rstd)},
        partial{reinterpret_cast<float*>(call.partial)},
        group_sums{reinterpret_cast<float*>(call.group_sums)},
        channel_partial{reinterpret_cast<float*>(call.channel_partial)},
        silu(call.silu) {}
};

// One channel's constants, and what they make of an element.
struct Channel {
  float shift, rstd, weight, bias;

  template <class S, class T>
  __device__ __forceinline__ Channel(const Backward<T>& call, const S& slab, int in_slab) {
    const int64_t group = slab.first_group + in_slab / call.cut.group_size;
    const int64_t channel = slab.first_channel + in_slab;
    shift = call.addend.load(slab.sample * call.cut.channels + channel, 0.0f) - call.mean.load(group);
    rstd = call.rstd.load(group);
    weight = call.weight.load(channel, 1.0f);
    bias = call.bias.load(channel, 0.0f);
  }
  Channel() = default;

  __device__ __forceinline__ float normed(float x) const { return (x + shift) * rstd; }
  template <bool SILU>
  __device__ __forceinline__ float dz(float dy, float n) const {
    if constexpr (!SILU) return dy;
    const float z = fmaf(n, weight, bias), gate = sigmoid(z);
    return dy * gate * fmaf(z, 1.0f - gate, 1.0f);
  }
};

template <class S>
struct Notes {
  Shared<float> scratch;     // for fold_column
  Shared<float> channel_c1;  // per channel of the chunk: weight * B
  Shared<float> channel_c2;  // and weight * A
  Shared<float> partial;     // per group of the chunk: C1, C2
  Shared<float> sums;        // per group: C1, C2

  __device__ __forceinline__ Notes(Arena& arena, const Cut& cut)
      : scratch(arena.take<float>(scratch_size(cut), "scratch")),
        channel_c1(arena.take<float>(cut.span, "channel_c1")),
        channel_c2(arena.take<float>(cut.span, "channel_c2")),
        partial(arena.take<float>(cut.slab_groups * 2, "partial")),
        sums(arena.take<float>(cut.slab_groups * 2, "sums")) {}

  static __host__ __device__ size_t scratch_size(const Cut& cut) {
    return S::kWarpColumns ? 0 : static_cast<size_t>(cut.threads) * S::CHANNELS;
  }
  static size_t bytes(const Cut& cut) {
    return Arena::bytes<float>(scratch_size(cut)) + 2 * Arena::bytes<float>(cut.span) +
           2 * Arena::bytes<float>(cut.slab_groups * 2);
  }
};

// Pairs of vectors that a thread has in flight, beside the constants and sums of its channels.
template <class S>
constexpr int kBatch = S::CHANNELS > 4 ? 2 : 4;

template <class S>
struct Pair {
  typename S::Vector x, dy;
};

// A, B and D of every channel of the chunk, to memory where asked for; then C1 and C2 of every group.
template <bool SILU, class S, class T, class Keep>
__device__ __forceinline__ void take_sums_as(const Backward<T>& call, const S& slab, const Notes<S>& notes,
                                             const Keep& keep) {
  for (int round = 0; round < slab.rounds(); ++round) {
    const int column = slab.first_column + round * slab.column_step;
    float sums[S::CHANNELS][3] = {};
    if (slab.works(column)) {
      Channel channels[S::CHANNELS];
#pragma unroll
      for (int i = 0; i < S::CHANNELS; ++i) channels[i] = Channel(call, slab, column * S::CHANNELS + i);
      Pair<S> batch[kBatch<S>];
      slab.template walk<kBatch<S>>(
          column,
          [&](int i, int64_t at) {
            batch[i] = {call.x.template load_vec<S::kVector>(at), call.dy.template load_vec<S::kVector>(at)};
          },
          [&](int i, int64_t) {
            keep(batch[i]);
#pragma unroll
            for (int j = 0; j < S::kVector; ++j) {
              const int c = S::CHANNELS == 1 ? 0 : j;
              const float n = channels[c].normed(to_float(batch[i].x[j]));
              const float dz = channels[c].template dz<SILU>(to_float(batch[i].dy[j]), n);
              sums[c][0] += dz;
              sums[c][1] = fmaf(dz, n, sums[c][1]);
              sums[c][2] += n;
            }
          });
    }
    fold_column<3>(slab, column, sums, notes.scratch, [&](int channel, int j, float total) {
      const int64_t at = slab.first_channel + channel;
      if (j < 2) (j == 0 ? notes.channel_c2 : notes.channel_c1).store(channel, call.weight.load(at, 1.0f) * total);
      if (call.channel_partial)
        call.channel_partial.store(((slab.sample * call.cut.splits + slab.split) * 3 + j) * call.cut.channels + at,
                                   total);
    });
  }
  sync_block();
  for_each_group(call.cut, slab.span, [&](int group, int lane) {
    const int size = call.cut.group_size;
    float c1 = 0.0f, c2 = 0.0f;
    for (int c = group * size + lane; c < (group + 1) * size; c += 32) {
      c1 += notes.channel_c1.load(c);
      c2 += notes.channel_c2.load(c);
    }
    c1 = warp_sum(c1);
    c2 = warp_sum(c2);
    if (lane == 0) notes.partial.template store_vec<2>(group * 2, {{c1, c2}});
  });
}

template <class S, class T, class Keep>
__device__ __forceinline__ void take_sums(const Backward<T>& call, const S& slab, const Notes<S>& notes,
                                          const Keep& keep) {
  if (call.silu)
    take_sums_as<true>(call, slab, notes, keep);
  else
    take_sums_as<false>(call, slab, notes, keep);
}

// fetch(group, split) gives C1 and C2 of one chunk.
template <class S, class T, class Fetch>
__device__ __forceinline__ void merge_sums(const Backward<T>& call, const S& slab, const Notes<S>& notes,
                                           const Fetch& fetch) {
  for_each_group(call.cut, slab.span, [&](int group, int lane) {
    float c1 = 0.0f, c2 = 0.0f;
    for (int split = lane; split < call.cut.splits; split += 32) {
      const Vec<float, 2> chunk = fetch(group, split);
      c1 += chunk[0];
      c2 += chunk[1];
    }
    const Vec<float, 2> sums = {{warp_sum(c1), warp_sum(c2)}};
    if (lane != 0) return;
    notes.sums.template store_vec<2>(group * 2, sums);
    if (slab.split == 0 && call.group_sums) call.group_sums.template store_vec<2>((slab.first_group + group) * 2, sums);
  });
}

// dx from x and dy, which again(offset) gives a second time in walk order.
template <bool SILU, class S, class T, class Again>
__device__ __forceinline__ void apply_as(const Backward<T>& call, const S& slab, const Notes<S>& notes,
                                         const Again& again) {
  for (int round = 0; round < slab.rounds(); ++round) {
    const int column = slab.first_column + round * slab.column_step;
    if (!slab.works(column)) continue;
    Channel channels[S::CHANNELS];
    float c1[S::CHANNELS], c2[S::CHANNELS];
#pragma unroll
    for (int i = 0; i < S::CHANNELS; ++i) {
      const int in_slab = column * S::CHANNELS + i;
      channels[i] = Channel(call, slab, in_slab);
      const auto sums = notes.sums.template load_vec<2>(in_slab / call.cut.group_size * 2);
      c1[i] = sums[0] * call.cut.group_scale;
      c2[i] = sums[1] * call.cut.group_scale;
    }
    Pair<S> batch[kBatch<S>];
    slab.template walk<kBatch<S>>(
        column, [&](int i, int64_t at) { batch[i] = again(at); },
        [&](int i, int64_t at) {
          typename S::Vector out;
#pragma unroll
          for (int j = 0; j < S::kVector; ++j) {
            const int c = S::CHANNELS == 1 ? 0 : j;
            const Channel& channel = channels[c];
            const float n = channel.normed(to_float(batch[i].x[j]));
            const float dz = channel.template dz<SILU>(to_float(batch[i].dy[j]), n);
            out[j] = from_float<T>(channel.rstd * fmaf(channel.weight, dz, -fmaf(n, c1[c], c2[c])));
          }
          call.dx.template store_vec<S::kVector>(at, out);
        });
  }
}

template <class S, class T, class Again>
__device__ __forceinline__ void apply(const Backward<T>& call, const S& slab, const Notes<S>& notes,
                                      const Again& again) {
  if (call.silu)
    apply_as<true>(call, slab, notes, again);
  else
    apply_as<false>(call, slab, notes, again);
}

template <class S, class T = typename S::Element>
__global__ void __launch_bounds__(kGroupNormPortableThreads, S::kVector == 1 ? 2 : 1)
    group_norm_silu_bwd_sums_kernel(const __grid_constant__ Backward<T> call) {
  Arena arena;
  const S slab(call.cut);
  const Notes<S> notes(arena, call.cut);
  take_sums(call, slab, notes, [](const Pair<S>&) {});
  sync_block();
  for (int group = threadIdx.x; group < slab.span / call.cut.group_size; group += call.cut.threads)
    call.partial.template store_vec<2>(((slab.first_group + group) * call.cut.splits + slab.split) * 2,
                                       notes.partial.template load_vec<2>(group * 2));
}

template <class S, class T = typename S::Element>
__global__ void __launch_bounds__(kGroupNormPortableThreads, S::kVector == 1 ? 2 : 1)
    group_norm_silu_bwd_apply_kernel(const __grid_constant__ Backward<T> call) {
  Arena arena;
  const S slab(call.cut);
  const Notes<S> notes(arena, call.cut);
  merge_sums(call, slab, notes, [&](int group, int split) {
    return call.partial.template load_vec<2>(((slab.first_group + group) * call.cut.splits + split) * 2);
  });
  sync_block();
  if (!call.dx) return;
  apply(call, slab, notes, [&](int64_t at) {
    return Pair<S>{call.x.template load_vec<S::kVector>(at), call.dy.template load_vec<S::kVector>(at)};
  });
}

template <class S, class T = typename S::Element>
__global__ void __launch_bounds__(kGroupNormBwdThreads, 1)
    group_norm_silu_bwd_cluster_kernel(const __grid_constant__ Backward<T> call) {
#if CNK_HAS_CLUSTERS
  Arena arena;
  const S slab(call.cut);
  const Notes<S> notes(arena, call.cut);
  // Each thread comes back to the vectors that it stored itself: no barrier guards the tiles.
  const size_t size = S::vectors(call.cut) * call.cut.threads * S::kVector;
  const Shared<T> tile_x = arena.take<T>(size, "tile_x"), tile_dy = arena.take<T>(size, "tile_dy");
  int next = threadIdx.x * S::kVector;
  const int step = call.cut.threads * S::kVector;
  take_sums(call, slab, notes, [&](const Pair<S>& pair) {
    tile_x.template store_vec<S::kVector>(next, pair.x);
    tile_dy.template store_vec<S::kVector>(next, pair.dy);
    next += step;
  });
  sync_cluster();
  merge_sums(call, slab, notes,
             [&](int group, int split) { return notes.partial.at_rank(split).template load_vec<2>(group * 2); });
  sync_cluster();  // also: no block leaves while another reads its sums
  if (!call.dx) return;
  next = threadIdx.x * S::kVector;
  apply(call, slab, notes, [&](int64_t) {
    const Pair<S> pair = {tile_x.template load_vec<S::kVector>(next), tile_dy.template load_vec<S::kVector>(next)};
    next += step;
    return pair;
  });
#endif
}

// dweight and dbias: 32 channels per block, eight threads per channel over samples and chunks.
constexpr int kFoldThreads = 256, kFoldLanes = kFoldThreads / 32;

template <class T>
__global__ void __launch_bounds__(kFoldThreads)
    group_norm_silu_bwd_weights_kernel(const __grid_constant__ Backward<T> call) {
  CNK_STATIC_SHARED(float, lane_sums, 2 * kFoldThreads);
  const int64_t channels = call.cut.channels, channel = blockIdx.x * int64_t{32} + threadIdx.x % 32;
  const int lane = threadIdx.x / 32;
  float a = 0.0f, b = 0.0f;
  if (channel < channels)
    for (int64_t row = lane; row < call.cut.samples * call.cut.splits; row += kFoldLanes) {
      a += call.channel_partial.load(row * 3 * channels + channel);
      b += call.channel_partial.load((row * 3 + 1) * channels + channel);
    }
  lane_sums.template store_vec<2>(threadIdx.x * 2, {{a, b}});
  sync_block();
  if (lane != 0 || channel >= channels) return;
  for (int other = 1; other < kFoldLanes; ++other) {
    const auto sums = lane_sums.template load_vec<2>((threadIdx.x + other * 32) * 2);
    a += sums[0];
    b += sums[1];
  }
  call.dweight.store(channel, b);
  call.dbias.store(channel, a);
}

// daddend[n, c], the sum of dx over the positions: rstd * (weight * A - (positions * C2 + C1 * D) / M).
template <class T>
__global__ void __launch_bounds__(kFoldThreads)
    group_norm_silu_bwd_addend_kernel(const __grid_constant__ Backward<T> call) {
  const Cut& cut = call.cut;
  const unsigned blocks_per_sample = ceil_div(static_cast<unsigned>(cut.channels), unsigned{kFoldThreads});
  const int64_t sample = blockIdx.x / blocks_per_sample;
  const unsigned channel = blockIdx.x % blocks_per_sample * kFoldThreads + threadIdx.x;
  if (channel >= cut.channels) return;
  float a = 0.0f, d = 0.0f;
  for (int split = 0; split < cut.splits; ++split) {
    const int64_t row = (sample * cut.splits + split) * 3;
    a += call.channel_partial.load(row * cut.channels + channel);
    d += call.channel_partial.load((row + 2) * cut.channels + channel);
  }
  const int64_t group = sample * cut.groups + channel / cut.group_size;
  const Vec<float, 2> sums = call.group_sums.template load_vec<2>(group * 2);
  const float mean_terms = (cut.positions * sums[1] + sums[0] * d) * cut.group_scale;
  call.daddend.store(sample * cut.channels + channel,
                     call.rstd.load(group) * (call.weight.load(channel, 1.0f) * a - mean_terms));
}

template <class S>
size_t cluster_bytes(const Cut& cut) {
  return Notes<S>::bytes(cut) + 2 * Arena::bytes<typename S::Element>(S::vectors(cut) * cut.threads * S::kVector);
}

template <class S, class T = typename S::Element>
void launch_dx(const Place& place, const Backward<T>& backward, bool merge) {
  constexpr const char* kName = "group_norm_silu_bwd";
  const Cut& cut = backward.cut;
  if constexpr (S::kVector > 1) {
    if (cut.cluster) {
      launch(kName, group_norm_silu_bwd_cluster_kernel<S>, place, cut.shape(cluster_bytes<S>(cut)), backward);
      return;
    }
  }
  const Shape shape = cut.shape(Notes<S>::bytes(cut));
  launch(kName, group_norm_silu_bwd_sums_kernel<S>, place, shape, backward);
  if (merge) launch(kName, group_norm_silu_bwd_apply_kernel<S>, place, shape, backward);
}

}  // namespace
}  // namespace group_norm

void group_norm_silu_bwd(const Place& place, const GroupNormBackward& call) {
  using namespace group_norm;
  with_slab(call.dtype, call.cut, [&](auto tag) {
    using S = typename decltype(tag)::Slab;
    using T = typename S::Element;
    constexpr const char* kName = "group_norm_silu_bwd";
    const Backward<T> backward(call);
    launch_dx<S>(place, backward, call.dx || call.daddend.address);
    const int64_t channels = call.cut.channels;
    if (call.dweight.address || call.dbias.address)
      launch(kName, group_norm_silu_bwd_weights_kernel<T>, place, {ceil_div<int64_t>(channels, 32), kFoldThreads},
             backward);
    if (call.daddend.address)
      launch(kName, group_norm_silu_bwd_addend_kernel<T>, place,
             {call.cut.samples * ceil_div<int64_t>(channels, kFoldThreads), kFoldThreads}, backward);
  });
}

GroupNormFit group_norm_silu_bwd_fit(const Place& place, Dtype dtype, const GroupNormCut& cut) {
  GroupNormFit fit;
  group_norm::with_slab(dtype, cut, [&](auto tag) {
    using S = typename decltype(tag)::Slab;
    const group_norm::Cut whole(cut);
    if constexpr (S::kVector > 1)
      fit = group_norm::fit_of("group_norm_silu_bwd", group_norm::group_norm_silu_bwd_cluster_kernel<S>, place, whole,
                               group_norm::cluster_bytes<S>(whole));
  });
  return fit;
}

}  // namespace cnk

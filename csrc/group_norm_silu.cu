// group_norm_silu forward: y = silu((x + addend - mean) * rstd * weight + bias).
//
// Two forms of one algorithm. Portable: a first launch writes every chunk's mean and sum of squared deviations (M2), a
// second merges them and applies. Cluster (sm_90): the blocks of a slab are a cluster, keep what they read in shared
// memory and read each other's moments there, so that x is read once. Moments are taken around the mean of a few
// elements at a time and merged from there, so that a mean large against the deviation costs no digits; everything is
// merged in a fixed order.
#include "group_norm_slab.cuh"

namespace cnk {

namespace group_norm {
namespace {

template <class T>
struct Forward {
  Cut cut;
  Global<const T> x;
  Global<T> y;
  PerChannel<T> weight, bias, addend;  // [C], [C], [N, C]
  Global<float> mean, rstd;            // [N, G]
  Global<float> partial;               // [N, G, splits, 2]
  float eps;
  bool silu;

  explicit Forward(const GroupNormForward& call)
      : cut(call.cut),
        x{reinterpret_cast<const T*>(call.x)},
        y{reinterpret_cast<T*>(call.y)},
        weight(call.weight),
        bias(call.bias),
        addend(call.addend),
        mean{reinterpret_cast<float*>(call.mean)},
        rstd{reinterpret_cast<float*>(call.rstd)},
        partial{reinterpret_cast<float*>(call.partial)},
        eps(call.eps),
        silu(call.silu) {}

  __device__ __forceinline__ float added(int64_t sample, int64_t channel) const {
    return addend.load(sample * cut.channels + channel, 0.0f);
  }
};

// What a block knows of its slab, in shared memory.
template <class S>
struct Notes {
  Shared<float> scratch;                   // for fold_column
  Shared<float> channel_mean, channel_m2;  // of this chunk, per channel
  Shared<float> partial;                   // of this chunk, per group: mean, M2
  Shared<float> mean, rstd;                // per group

  __device__ __forceinline__ Notes(Arena& arena, const Cut& cut)
      : scratch(arena.take<float>(scratch_size(cut), "scratch")),
        channel_mean(arena.take<float>(cut.span, "channel_mean")),
        channel_m2(arena.take<float>(cut.span, "channel_m2")),
        partial(arena.take<float>(cut.slab_groups * 2, "partial")),
        mean(arena.take<float>(cut.slab_groups, "mean")),
        rstd(arena.take<float>(cut.slab_groups, "rstd")) {}

  static __host__ __device__ size_t scratch_size(const Cut& cut) {
    return S::kWarpColumns ? 0 : static_cast<size_t>(cut.threads) * S::CHANNELS * 2;
  }
  static size_t bytes(const Cut& cut) {
    return Arena::bytes<float>(scratch_size(cut)) + 2 * Arena::bytes<float>(cut.span) +
           Arena::bytes<float>(cut.slab_groups * 2) + 2 * Arena::bytes<float>(cut.slab_groups);
  }
};

struct Moments {
  float mean, m2;
};

// Moments of COUNT numbers, or of the first `valid` where not WHOLE. Float32 numbers are summed as distances from the
// first: a sum of few 16-bit numbers loses nothing.
template <class T, int COUNT, bool WHOLE, class Value>
__device__ __forceinline__ Moments moments_of(int valid, float per_valid, const Value& value) {
  const float origin = sizeof(T) == 4 ? value(0) : 0.0f;
  float sum = 0.0f, m2 = 0.0f;
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (WHOLE || i < valid) sum += value(i) - origin;
  const float mean = sum * per_valid;
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (WHOLE || i < valid) {
      const float d = value(i) - origin - mean;
      m2 = fmaf(d, d, m2);
    }
  return {origin + mean, m2};
}

// One mean and M2 of the parts first, first + step, ... of which moments(i) and count(i) tell; sum(x) adds up what the
// threads that share the work hold. The mean is corrected by what its own rounding left over.
template <class MomentsOf, class CountOf, class Sum>
__device__ __forceinline__ Moments merge_parts(int first, int parts, int step, float origin, float per_total,
                                               const MomentsOf& moments, const CountOf& count, const Sum& sum) {
  float shifted = 0.0f;
  for (int i = first; i < parts; i += step) shifted += count(i) * (moments(i).mean - origin);
  const float mean = origin + sum(shifted) * per_total;
  float left = 0.0f, m2 = 0.0f;
  for (int i = first; i < parts; i += step) {
    const Moments part = moments(i);
    const float d = part.mean - mean;
    left += count(i) * d;
    m2 += part.m2 + count(i) * d * d;
  }
  return {mean + sum(left) * per_total, sum(m2)};
}

// This thread's moments of a column. keep(vector) sees each vector once, in walk order.
template <class S, class T, class Keep>
__device__ __forceinline__ void walk_moments(const Forward<T>& call, const S& slab, int column, const Keep& keep,
                                             float (&held)[S::CHANNELS][2]) {
  constexpr int kPerVector = S::kVector / S::CHANNELS;  // elements of one channel in a vector
  constexpr int kBatch = S::kWarpColumns ? 4 : 8;       // vectors in flight, and elements of a channel per merge
  float count = 0.0f;
  slab.template for_each_batch<kBatch>(column, [&](auto whole, int64_t at, int valid) {
    constexpr bool kWhole = decltype(whole)::value;
    typename S::Vector batch[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (kWhole || i < valid) batch[i] = call.x.template load_vec<S::kVector>(at + i * slab.step);
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (kWhole || i < valid) keep(batch[i]);
    const float more = static_cast<float>(valid * kPerVector);
    const float per_more = reciprocal_approx(more), share = more * reciprocal_approx(count + more);
    const float shared_count = count * share;
#pragma unroll
    for (int c = 0; c < S::CHANNELS; ++c) {
      const Moments moments = moments_of<T, kBatch * kPerVector, kWhole>(valid * kPerVector, per_more, [&](int i) {
        return to_float(batch[i / kPerVector][S::CHANNELS == 1 ? i % kPerVector : c]);
      });
      const float d = moments.mean - held[c][0];
      held[c][0] = fmaf(d, share, held[c][0]);
      held[c][1] = fmaf(d * d, shared_count, held[c][1] + moments.m2);
    }
    count += more;
  });
}

// Mean and M2 of every channel of the chunk, then of every group.
template <class S, class T, class Keep>
__device__ __forceinline__ void take_moments(const Forward<T>& call, const S& slab, const Notes<S>& notes,
                                             const Keep& keep) {
  const float count = static_cast<float>(slab.end - slab.begin);
  const float per_count = count > 0.0f ? divide_approx(1.0f, count) : 0.0f;
  for (int round = 0; round < slab.rounds(); ++round) {
    const int column = slab.first_column + round * slab.column_step;
    float held[S::CHANNELS][2] = {};
    if (slab.works(column)) walk_moments(call, slab, column, keep, held);
    const auto finish = [&](int channel, const Moments& moments) {
      notes.channel_mean.store(channel, moments.mean + call.added(slab.sample, slab.first_channel + channel));
      notes.channel_m2.store(channel, moments.m2);
    };
    const auto lane_count = [&](int lane) { return slab.lane_count(lane); };
    if constexpr (S::kWarpColumns) {
      const Moments all = merge_parts(
          slab.lane, 32, 32, shuffle(held[0][0], 0), per_count, [&](int) { return Moments{held[0][0], held[0][1]}; },
          lane_count, warp_sum);
      if (slab.works(column) && slab.lane == 0) finish(column, all);
    } else {
      gather_column<2>(slab, column, held, notes.scratch, [&](int channel, const auto& lanes) {
        finish(channel, merge_parts(
                            0, slab.lanes, 1, lanes(0, 0), per_count,
                            [&](int lane) { return Moments{lanes(lane, 0), lanes(lane, 1)}; }, lane_count,
                            [](float x) { return x; }));
      });
    }
  }
  sync_block();
  for_each_group(call.cut, slab.span, [&](int group, int lane) {
    const int size = call.cut.group_size, first = group * size;
    const Moments all = merge_parts(
        first + lane, first + size, 32, notes.channel_mean.load(first),
        divide_approx(per_count, static_cast<float>(size)),
        [&](int c) { return Moments{notes.channel_mean.load(c), notes.channel_m2.load(c)}; },
        [&](int) { return count; }, warp_sum);
    if (lane == 0) notes.partial.template store_vec<2>(group * 2, {{all.mean, all.m2}});
  });
}

// Merges the chunks' moments: fetch(group, split) gives mean and M2 of one chunk. The first split saves the statistics.
template <class S, class T, class Fetch>
__device__ __forceinline__ void merge_moments(const Forward<T>& call, const S& slab, const Notes<S>& notes,
                                              const Fetch& fetch) {
  const Cut& cut = call.cut;
  const float size = static_cast<float>(cut.group_size);
  for_each_group(cut, slab.span, [&](int group, int lane) {
    const Moments all = merge_parts(
        lane, cut.splits, 32, fetch(group, 0)[0], cut.group_scale,
        [&](int split) {
          const Vec<float, 2> part = fetch(group, split);
          return Moments{part[0], part[1]};
        },
        [&](int split) { return static_cast<float>(cut.chunk_size(split)) * size; }, warp_sum);
    const float rstd = reciprocal_sqrt(cut.per_group(all.m2) + call.eps);
    if (lane != 0) return;
    notes.mean.store(group, all.mean);
    notes.rstd.store(group, rstd);
    if (slab.split != 0) return;
    const int64_t at = slab.first_group + group;
    call.mean.store(at, all.mean);
    call.rstd.store(at, rstd);
  });
}

// y from x, which again(offset) gives a second time in walk order.
template <bool SILU, class S, class T, class Again>
__device__ __forceinline__ void apply_as(const Forward<T>& call, const S& slab, const Notes<S>& notes,
                                         const Again& again) {
  constexpr int kBatch = 4;
  for (int round = 0; round < slab.rounds(); ++round) {
    const int column = slab.first_column + round * slab.column_step;
    if (!slab.works(column)) continue;
    float shift[S::CHANNELS], scale[S::CHANNELS], bias[S::CHANNELS];
#pragma unroll
    for (int i = 0; i < S::CHANNELS; ++i) {
      const int64_t channel = slab.channel(column, i);
      const int group = (column * S::CHANNELS + i) / call.cut.group_size;
      shift[i] = call.added(slab.sample, channel) - notes.mean.load(group);
      scale[i] = notes.rstd.load(group) * call.weight.load(channel, 1.0f);
      bias[i] = call.bias.load(channel, 0.0f);
    }
    typename S::Vector batch[kBatch];
    slab.template walk<kBatch>(
        column, [&](int i, int64_t at) { batch[i] = again(at); },
        [&](int i, int64_t at) {
          typename S::Vector out;
#pragma unroll
          for (int j = 0; j < S::kVector; ++j) {
            const int c = S::CHANNELS == 1 ? 0 : j;
            const float z = fmaf(to_float(batch[i][j]) + shift[c], scale[c], bias[c]);
            out[j] = from_float<T>(SILU ? z * sigmoid(z) : z);
          }
          call.y.template store_vec<S::kVector>(at, out);
        });
  }
}

template <class S, class T, class Again>
__device__ __forceinline__ void apply(const Forward<T>& call, const S& slab, const Notes<S>& notes,
                                      const Again& again) {
  if (call.silu)
    apply_as<true>(call, slab, notes, again);
  else
    apply_as<false>(call, slab, notes, again);
}


template <class S, class T = typename S::Element>
__global__ void __launch_bounds__(kGroupNormPortableThreads, 2)
    group_norm_silu_fwd_moments_kernel(const __grid_constant__ Forward<T> call) {
  Arena arena;
  const S slab(call.cut);
  const Notes<S> notes(arena, call.cut);
  take_moments(call, slab, notes, [](const typename S::Vector&) {});
  sync_block();
  const int64_t first = slab.first_group;
  for (int group = threadIdx.x; group < slab.span / call.cut.group_size; group += call.cut.threads)
    call.partial.template store_vec<2>(((first + group) * call.cut.splits + slab.split) * 2,
                                       notes.partial.template load_vec<2>(group * 2));
}

template <class S, class T = typename S::Element>
__global__ void __launch_bounds__(kGroupNormPortableThreads, 2)
    group_norm_silu_fwd_apply_kernel(const __grid_constant__ Forward<T> call) {
  Arena arena;
  const S slab(call.cut);
  const Notes<S> notes(arena, call.cut);
  const int64_t first = slab.first_group;
  merge_moments(call, slab, notes, [&](int group, int split) {
    return call.partial.template load_vec<2>(((first + group) * call.cut.splits + split) * 2);
  });
  sync_block();
  apply(call, slab, notes, [&](int64_t at) { return call.x.template load_vec<S::kVector>(at); });
}

template <class S, class T = typename S::Element>
__global__ void __launch_bounds__(kGroupNormFwdThreads, 1)
    group_norm_silu_fwd_cluster_kernel(const __grid_constant__ Forward<T> call) {
#if CNK_HAS_CLUSTERS
  Arena arena;
  const S slab(call.cut);
  const Notes<S> notes(arena, call.cut);
  // Each thread comes back to the vectors that it stored itself: no barrier guards the tile.
  const Shared<T> tile = arena.take<T>(S::vectors(call.cut) * call.cut.threads * S::kVector, "tile");
  int next = threadIdx.x * S::kVector;
  const int step = call.cut.threads * S::kVector;
  take_moments(call, slab, notes, [&](const typename S::Vector& vector) {
    tile.template store_vec<S::kVector>(next, vector);
    next += step;
  });
  sync_cluster();
  merge_moments(call, slab, notes,
                [&](int group, int split) { return notes.partial.at_rank(split).template load_vec<2>(group * 2); });
  sync_cluster();  // also: no block leaves while another reads its moments
  next = threadIdx.x * S::kVector;
  apply(call, slab, notes, [&](int64_t) {
    const typename S::Vector vector = tile.template load_vec<S::kVector>(next);
    next += step;
    return vector;
  });
#endif
}

template <class S>
size_t cluster_bytes(const Cut& cut) {
  return Notes<S>::bytes(cut) + Arena::bytes<typename S::Element>(S::vectors(cut) * cut.threads * S::kVector);
}

}  // namespace
}  // namespace group_norm

void group_norm_silu_fwd(const Place& place, const GroupNormForward& call) {
  using namespace group_norm;
  with_slab(call.dtype, call.cut, [&](auto tag) {
    using S = typename decltype(tag)::Slab;
    const Forward<typename S::Element> forward(call);
    const Cut& cut = forward.cut;
    if constexpr (S::kVector > 1) {
      if (cut.cluster) {
        launch("group_norm_silu_fwd", group_norm_silu_fwd_cluster_kernel<S>, place, cut.shape(cluster_bytes<S>(cut)),
               forward);
        return;
      }
    }
    const Shape shape = cut.shape(Notes<S>::bytes(cut));
    launch("group_norm_silu_fwd", group_norm_silu_fwd_moments_kernel<S>, place, shape, forward);
    launch("group_norm_silu_fwd", group_norm_silu_fwd_apply_kernel<S>, place, shape, forward);
  });
}

GroupNormFit group_norm_silu_fwd_fit(const Place& place, Dtype dtype, const GroupNormCut& cut) {
  GroupNormFit fit;
  group_norm::with_slab(dtype, cut, [&](auto tag) {
    using S = typename decltype(tag)::Slab;
    const group_norm::Cut whole(cut);
    if constexpr (S::kVector > 1)
      fit = group_norm::fit_of("group_norm_silu_fwd", group_norm::group_norm_silu_fwd_cluster_kernel<S>, place, whole,
                               group_norm::cluster_bytes<S>(whole));
  });
  return fit;
}

}  // namespace cnk

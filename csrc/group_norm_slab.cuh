// How group norm, forward and backward, cuts a tensor into blocks and threads, for both memory formats.
//
// A slab is what one block works on: one sample, `span` channels (whole groups), and a chunk of the positions. A column
// is what one thread walks down: in channels_last the channels of one 16-byte vector, of which neighbouring threads
// hold neighbours; in the contiguous format one channel, whose positions a warp shares.
#pragma once
#include "device/launch.cuh"
#include "device/math.cuh"
#include "device/sync.cuh"

namespace cnk::group_norm {

struct Cut : GroupNormCut {
  // Worked out once by the launcher: a division of 64-bit integers is a subroutine on a GPU.
  int64_t chunk;  // positions per split, a multiple of 8 so that vectors along them stay aligned
  int group_size, slab_groups, slabs;
  float group_scale, group_scale_low;  // 1 / elements of a group, and what its rounding left over

  explicit Cut(const GroupNormCut& cut)
      : GroupNormCut(cut),
        chunk(ceil_div<int64_t>(ceil_div<int64_t>(positions, splits), 8) * 8),
        group_size(static_cast<int>(channels / groups)),
        slab_groups(span / group_size),
        slabs(static_cast<int>(ceil_div<int64_t>(channels, span))),
        group_scale(static_cast<float>(1.0 / (static_cast<double>(positions) * group_size))),
        group_scale_low(static_cast<float>(1.0 / (static_cast<double>(positions) * group_size) - group_scale)) {}

  __device__ __forceinline__ int64_t chunk_size(int split) const {
    const int64_t left = positions - split * chunk;
    return left < 0 ? 0 : left < chunk ? left : chunk;
  }
  // sum / elements of a group, rounded once.
  __device__ __forceinline__ float per_group(float sum) const { return fmaf(sum, group_scale, sum * group_scale_low); }
  Shape shape(size_t shared_bytes) const {
    return {samples * slabs * splits, threads, shared_bytes, cluster ? splits : 1};
  }
};

// A parameter per channel, in the tensor's dtype or in float32, or absent.
template <class T>
struct PerChannel {
  Global<const T> narrow;
  Global<const float> wide;

  explicit PerChannel(const ChannelTensor& tensor)
      : narrow{reinterpret_cast<const T*>(tensor.is_float ? 0 : tensor.address)},
        wide{reinterpret_cast<const float*>(tensor.is_float ? tensor.address : 0)} {}

  __device__ __forceinline__ float load(int64_t i, float otherwise) const {
    return wide ? wide.load(i) : narrow ? to_float(narrow.load(i)) : otherwise;
  }
};

template <class T>
struct PerChannelOut {
  Global<T> narrow;
  Global<float> wide;

  explicit PerChannelOut(const ChannelTensor& tensor)
      : narrow{reinterpret_cast<T*>(tensor.is_float ? 0 : tensor.address)},
        wide{reinterpret_cast<float*>(tensor.is_float ? tensor.address : 0)} {}

  __device__ __forceinline__ void store(int64_t i, float value) const {
    if (wide)
      wide.store(i, value);
    else if (narrow)
      narrow.store(i, from_float<T>(value));
  }
};

template <class T, bool LAST, int VEC>
struct Slab {
  using Element = T;
  using Vector = Vec<T, VEC>;
  static constexpr int kVector = VEC;
  static constexpr int CHANNELS = LAST ? VEC : 1;  // of a column
  static constexpr bool kWarpColumns = !LAST;      // a column's threads are one warp
  static constexpr int kBatch = 4;                 // vectors a thread has in flight

  int64_t sample, first_channel, first_group, row, base, begin, end;
  int split, span, columns, column_step, first_column, lane, lanes, threads;

  __device__ explicit Slab(const Cut& cut) {
    const unsigned slab = blockIdx.x / cut.splits;
    split = static_cast<int>(blockIdx.x % cut.splits);
    sample = slab / cut.slabs;
    first_channel = static_cast<int64_t>(slab % cut.slabs) * cut.span;
    const int64_t left = cut.channels - first_channel;
    span = left < cut.span ? static_cast<int>(left) : cut.span;
    first_group = sample * cut.groups + slab % cut.slabs * cut.slab_groups;
    row = LAST ? cut.channels : cut.positions;
    base = sample * cut.channels * cut.positions + first_channel * (LAST ? 1 : cut.positions);
    begin = split * cut.chunk;
    end = begin + cut.chunk_size(split);
    threads = cut.threads;
    columns = span / CHANNELS;
    const int thread = threadIdx.x;
    if (LAST) {
      column_step = column_threads(cut);
      lanes = threads / column_step;
      first_column = thread % column_step;
      lane = thread / column_step;
    } else {
      column_step = threads / 32;
      lanes = 32;
      first_column = thread / 32;
      lane = thread % 32;
    }
  }

  __host__ __device__ static int column_threads(const Cut& cut) {
    const int columns = cut.span / CHANNELS;
    return LAST ? (columns < cut.threads ? columns : cut.threads) : cut.threads / 32;
  }

  // Vectors that one thread walks at most, over all its columns.
  static __host__ __device__ int64_t vectors(const Cut& cut) {
    const int lanes = LAST ? cut.threads / column_threads(cut) : 32;
    const int rounds = ceil_div(cut.span / CHANNELS, column_threads(cut));
    return rounds * ceil_div<int64_t>(cut.chunk, static_cast<int64_t>(lanes) * (LAST ? 1 : VEC));
  }

  // Threads beyond the last whole row of columns have nothing to do.
  __device__ __forceinline__ bool works(int column) const { return column < columns && lane < lanes; }
  __device__ __forceinline__ int rounds() const { return ceil_div(columns, column_step); }
  __device__ __forceinline__ int64_t channel(int column, int i) const { return first_channel + column * CHANNELS + i; }

  __device__ __forceinline__ int64_t offset(int column, int64_t position) const {
    return base + (LAST ? position * row + column * VEC : column * row + position);
  }

  // The first element of the chunk in a channel of the slab.
  __device__ __forceinline__ int64_t channel_offset(int channel) const {
    return base + (LAST ? begin * row + channel : channel * row + begin);
  }
  // body(position, valid) for every batch of this thread's vectors of a column: the vectors lie `stride()` positions
  // apart, and only the first `valid` of the batch are within the chunk.
  template <class Body>
  __device__ __forceinline__ void for_each_batch(const Body& body) const {
    for (int64_t p = begin + (LAST ? lane : lane * VEC); p < end; p += kBatch * stride()) {
      int valid = 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) valid += p + i * stride() < end;
      body(p, valid);
    }
  }
  __device__ __forceinline__ int stride() const { return LAST ? lanes : 32 * VEC; }

  // load(i, offset) for every vector of a batch, then use(i, offset), so that the loads are in flight together.
  template <class Load, class Use>
  __device__ __forceinline__ void walk(int column, const Load& load, const Use& use) const {
    for_each_batch([&](int64_t p, int valid) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (i < valid) load(i, offset(column, p + i * stride()));
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (i < valid) use(i, offset(column, p + i * stride()));
    });
  }

  // Positions of the chunk that fall to a lane.
  __device__ __forceinline__ float lane_count(int other) const {
    const unsigned vectors = static_cast<unsigned>((end - begin) / (LAST ? 1 : VEC));
    return static_cast<float>((vectors / lanes + (other < static_cast<int>(vectors % lanes))) * (LAST ? 1 : VEC));
  }
};

// Gives one thread per channel what the threads of its column hold: finish(channel, lane -> VALUES values) in
// channels_last, where `scratch` holds threads * CHANNELS * VALUES floats.
template <int VALUES, class S, class Finish>
__device__ __forceinline__ void gather_column(const S& slab, int column, const float (&values)[S::CHANNELS][VALUES],
                                              Shared<float> scratch, const Finish& finish) {
  const int width = slab.column_step * S::CHANNELS;
  sync_block();
  if (slab.lane < slab.lanes)
#pragma unroll
    for (int i = 0; i < S::CHANNELS; ++i)
#pragma unroll
      for (int j = 0; j < VALUES; ++j)
        scratch.store((j * slab.lanes + slab.lane) * width + slab.first_column * S::CHANNELS + i, values[i][j]);
  sync_block();
  const int first = (column - slab.first_column) * S::CHANNELS;
  for (int i = threadIdx.x; i < width && first + i < slab.span; i += slab.threads)
    finish(first + i, [&](int lane, int j) { return scratch.load((j * slab.lanes + lane) * width + i); });
}

// Adds up what the threads of a column hold, and hands every channel's sums to finish(channel, sums), called by one
// thread per channel.
template <int SUMS, class S, class Finish>
__device__ __forceinline__ void fold_column(const S& slab, int column, const float (&sums)[S::CHANNELS][SUMS],
                                            Shared<float> scratch, const Finish& finish) {
  if constexpr (S::kWarpColumns) {
    float total[SUMS];
#pragma unroll
    for (int j = 0; j < SUMS; ++j) total[j] = warp_sum(sums[0][j]);
    if (slab.works(column) && slab.lane == 0) finish(column, total);
  } else {
    gather_column<SUMS>(slab, column, sums, scratch, [&](int channel, const auto& held) {
      float total[SUMS] = {};
      for (int lane = 0; lane < slab.lanes; ++lane)
#pragma unroll
        for (int j = 0; j < SUMS; ++j) total[j] += held(lane, j);
      finish(channel, total);
    });
  }
}

// A warp per group of the slab: use(group in the slab, lane).
template <class Use>
__device__ __forceinline__ void for_each_group(const Cut& cut, int span, const Use& use) {
  const int groups = span / cut.group_size;
  for (int group = threadIdx.x / 32; group < groups; group += cut.threads / 32) use(group, threadIdx.x % 32);
}

// run(Slab<T, LAST, VEC>{}-shaped tag) for the dtype, format and vector width of a call.
template <class S>
struct Tag {
  using Slab = S;
};

template <class T, class Run>
void with_slab_of(const GroupNormCut& cut, const Run& run) {
  constexpr int kVector = 16 / sizeof(T);
  if (cut.channels_last && cut.vectors)
    run(Tag<Slab<T, true, kVector>>{});
  else if (cut.channels_last)
    run(Tag<Slab<T, true, 1>>{});
  else if (cut.vectors)
    run(Tag<Slab<T, false, kVector>>{});
  else
    run(Tag<Slab<T, false, 1>>{});
}

template <class Run>
void with_slab(Dtype dtype, const GroupNormCut& cut, const Run& run) {
  if (dtype == Dtype::float32)
    with_slab_of<float>(cut, run);
  else if (dtype == Dtype::float16)
    with_slab_of<f16>(cut, run);
  else
    with_slab_of<bf16>(cut, run);
}

}  // namespace cnk::group_norm

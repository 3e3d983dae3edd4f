// How group norm, forward and backward, cuts a tensor into blocks and threads, for both memory formats.
//
// A slab is what one block works on: one sample, `span` channels (whole groups), and a chunk of the positions. A column
// is what one thread walks down: in channels_last the channels of one 16-byte vector, of which neighbouring threads
// hold neighbours; in the contiguous format one channel, whose positions a warp shares.
#pragma once
#include <type_traits>

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

  int64_t sample, first_channel, first_group, row, base, begin, end;
  int64_t step;  // elements between the vectors that a thread walks
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
    step = LAST ? lanes * row : 32 * VEC;
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

  // body(whole, offset, valid) for every batch of this thread's vectors of a column: the vectors lie `step` elements
  // apart from `offset` on, and only the first `valid` of the last batch are within the chunk. All the others are whole,
  // which they are told at compile time.
  template <int BATCH, class Body>
  __device__ __forceinline__ void for_each_batch(int column, const Body& body) const {
    const int vectors_per_row = LAST ? lanes : 32 * VEC;  // positions from one vector to the next
    const int64_t first = begin + (LAST ? lane : lane * VEC);
    const int mine = first < end ? static_cast<int>((end - first + vectors_per_row - 1) / vectors_per_row) : 0;
    int64_t at = base + (LAST ? first * row + column * VEC : column * row + first);
    int left = mine;
#pragma unroll 1
    for (; left >= BATCH; left -= BATCH, at += BATCH * step) body(std::true_type{}, at, BATCH);
    if (left > 0) body(std::false_type{}, at, left);
  }

  // load(i, offset) for every vector of a batch, then use(i, offset), so that the loads are in flight together.
  template <int BATCH, class Load, class Use>
  __device__ __forceinline__ void walk(int column, const Load& load, const Use& use) const {
    for_each_batch<BATCH>(column, [&](auto whole, int64_t at, int valid) {
      constexpr bool kWhole = decltype(whole)::value;
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (kWhole || i < valid) load(i, at + i * step);
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (kWhole || i < valid) use(i, at + i * step);
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

// Adds up what the threads of a column hold, and hands every channel's sum j to finish(channel, j, sum), called by one
// thread per channel. One sum after the other, so that `scratch` is threads * CHANNELS floats, in channels_last alone.
template <int SUMS, class S, class Finish>
__device__ __forceinline__ void fold_column(const S& slab, int column, const float (&sums)[S::CHANNELS][SUMS],
                                            Shared<float> scratch, const Finish& finish) {
#pragma unroll
  for (int j = 0; j < SUMS; ++j) {
    if constexpr (S::kWarpColumns) {
      const float total = warp_sum(sums[0][j]);
      if (slab.works(column) && slab.lane == 0) finish(column, j, total);
    } else {
      float one[S::CHANNELS][1];
#pragma unroll
      for (int i = 0; i < S::CHANNELS; ++i) one[i][0] = sums[i][j];
      gather_column<1>(slab, column, one, scratch, [&](int channel, const auto& held) {
        float total = 0.0f;
        for (int lane = 0; lane < slab.lanes; ++lane) total += held(lane, 0);
        finish(channel, j, total);
      });
    }
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

template <class Kernel>
GroupNormFit fit_of(const char* name, Kernel kernel, const Place& place, const Cut& cut, size_t shared_bytes) {
  return {shared_bytes, resident_clusters(name, kernel, place, cut.shape(shared_bytes))};
}

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

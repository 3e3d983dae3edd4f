// zero_conv_add backward, only what is asked for, with G = dout:
//   dx = scale * weight^T G          dweight = sum over samples and positions of scale * G x^T
//   dbias = sum of scale * G         dscale = sum of G * (weight x + bias) = sum of x * (weight^T G) + sum of bias * G
// The residual's gradient is dout itself. Sums over many blocks go through float32 workspace in a fixed order:
// dweight's depth is cut into `splits`, the sums of G into `sum_parts`, and each tile of dx leaves its dot product with
// x.
#include "device/sync.cuh"
#include "zero_conv_table.cuh"

namespace cnk {

namespace product {
namespace {

constexpr const char* kName = "zero_conv_add_bwd";

// ---- dx, and the part of dscale that it gives

template <class T>
struct InputGradient : Problem<T> {
  Surface<T> dx;  // no data: not asked for
  Surface<const T> x;
  Global<float> dot;  // [batches, tiles]; null: not asked for
};

__device__ __forceinline__ float sum_over_block(float value, Shared<float> lanes) {
  value = warp_sum(value);
  sync_block();
  if (threadIdx.x % 32 == 0) lanes.store(threadIdx.x / 32, value);
  sync_block();
  float total = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += lanes.load(warp);
  return total;
}

// In channels_last the code that sm_80, 86 and 89 share has more registers, as sm_86's assembler makes it, than two
// blocks of a multiprocessor may have.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class G, Along A>
constexpr int kDxBlocks = A == Along::depth ? 1 : G::kBlocks;
#else
template <class G, Along A>
constexpr int kDxBlocks = G::kBlocks;
#endif

template <class G, Along A, Along B, class T = typename G::T>
__global__ void __launch_bounds__(G::kThreads, kDxBlocks<G, A>)
    zero_conv_add_bwd_dx_kernel(const __grid_constant__ Table<InputGradient<T>> table) {
  constexpr int kVector = 16 / sizeof(T);
  CNK_STATIC_SHARED(float, warp_dots, G::kThreads / 32);
  Arena arena;
  const Workspace<G, A, B> workspace(arena);
  for (int unit = blockIdx.x; unit < table.first[table.count]; unit += gridDim.x) {
    const int item = table.item_of(unit);
    const InputGradient<T>& layer = table.items[item];
    const int tile = unit - table.first[item], tile_row = tile / layer.column_tiles;
    const int batch = tile_row / layer.row_tiles;
    const int row0 = tile_row % layer.row_tiles * G::kRows;
    const int column0 = tile % layer.column_tiles * G::kColumns;
    const int steps = ceil_div(layer.depth, kDepth);
    typename G::Accumulators acc = {};
    accumulate<G, A, B>(acc, layer, workspace, row0, column0, batch * steps, (batch + 1) * steps);
    float dot = 0.0f;
    for_each_vector<G, A, B>(workspace, acc, [&](int in_row, int in_column, Vec<float, kVector>& values) {
      const int row = row0 + in_row, column = column0 + in_column;
      if (row >= layer.rows || column >= layer.columns) return;
      const RowOf at = layer.sample_of(batch, row);
      if (layer.dot) {
        const auto x = read_row<T, kVector>(layer.x, at.sample, at.row, column, layer.columns);
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          if (column + i < layer.columns) dot += x[i] * values[i];
      }
      if (!layer.dx.data) return;
      const float scale = layer.scale.of(at.sample);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] *= scale;
      write_row<T, kVector>(layer.dx, at.sample, at.row, column, layer.columns, values);
    });
    sync_block();  // the patches are done with
    if (layer.dot) {
      dot = sum_over_block(dot, warp_dots);
      if (threadIdx.x == 0) layer.dot.store(tile, dot);
    }
  }
}

template <class G, class T = typename G::T>
InputGradient<T> make_input_gradient(const ZeroConv& call, int64_t& units) {
  InputGradient<T> layer = {};
  set_extents<G>(layer, call, call.in_channels, call.out_channels);
  if (!call.dot_partial) merge_samples<G>(layer, call);  // a dot product is that of one sample
  const Operand<T> dout = activations<T>(call, call.dout, call.out_channels);
  const Operand<T> weight = operand<T>(call.weight, 0, call.in_channels);
  layer.a = call.channels_last ? dout : weight;
  layer.b = call.channels_last ? weight : dout;
  layer.dx = dense_surface<T>(call, call.dx, call.in_channels);
  layer.x = dense_surface<const T>(call, call.x, call.in_channels);
  layer.dot = {reinterpret_cast<float*>(call.dot_partial)};
  units = call.dx || call.dot_partial ? static_cast<int64_t>(layer.batches) * layer.row_tiles * layer.column_tiles : 0;
  return layer;
}

// ---- dweight

template <class T>
struct WeightGradient : Problem<T> {
  Global<float> partial;  // [splits, rows, columns]
  int splits;
  int ranges;  // a range of steps has one scale: one per sample, or one for all
};

template <class G, Along A, Along B, class T = typename G::T>
__global__ void __launch_bounds__(G::kThreads, G::kBlocks)
    zero_conv_add_bwd_dweight_kernel(const __grid_constant__ Table<WeightGradient<T>> table) {
  constexpr int kVector = 16 / sizeof(T);
  Arena arena;
  const Workspace<G, A, B> workspace(arena);
  for (int unit = blockIdx.x; unit < table.first[table.count]; unit += gridDim.x) {
    const int item = table.item_of(unit);
    const WeightGradient<T>& layer = table.items[item];
    const int tile = unit - table.first[item], tile_row = tile / layer.column_tiles;
    const int split = tile_row / layer.row_tiles, splits_per_range = layer.splits / layer.ranges;
    const int range = split / splits_per_range;
    const int row0 = tile_row % layer.row_tiles * G::kRows;
    const int column0 = tile % layer.column_tiles * G::kColumns;
    const int steps = ceil_div(layer.depth, kDepth) * (layer.batches / layer.ranges);
    const int per_split = ceil_div(steps, splits_per_range), begin = split % splits_per_range * per_split;
    const int end = begin + per_split < steps ? begin + per_split : steps, origin = range * steps;
    typename G::Accumulators acc = {};
    accumulate<G, A, B>(acc, layer, workspace, row0, column0, origin + begin, origin + (begin < end ? end : begin));
    const float scale = layer.scale.of(range);
    for_each_vector<G, A, B>(workspace, acc, [&](int in_row, int in_column, Vec<float, kVector>& values) {
      const int row = row0 + in_row, column = column0 + in_column;
      if (row >= layer.rows || column >= layer.columns) return;
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] *= scale;
      store_floats(layer.partial + ((static_cast<int64_t>(split) * layer.rows + row) * layer.columns + column), values, layer.columns,
                   column);
    });
    sync_block();  // the patches are done with
  }
}

template <class G, class T = typename G::T>
WeightGradient<T> make_weight_gradient(const ZeroConv& call, int64_t& units) {
  WeightGradient<T> layer = {};
  layer.a = activations<T>(call, call.dout, call.out_channels);
  layer.b = activations<T>(call, call.x, call.in_channels);
  layer.rows = extent(call.out_channels);
  layer.columns = extent(call.in_channels);
  layer.depth = extent(call.positions);
  layer.batches = static_cast<int>(call.samples);
  layer.row_tiles = tiles(layer.rows, G::kRows);
  layer.column_tiles = tiles(layer.columns, G::kColumns);
  layer.scale = scale_of(call);
  layer.partial = {reinterpret_cast<float*>(call.dweight_partial)};
  layer.splits = call.splits;
  layer.ranges = call.scale_stride ? layer.batches : 1;
  units = call.dweight ? static_cast<int64_t>(layer.splits) * layer.row_tiles * layer.column_tiles : 0;
  return layer;
}

// ---- the sums over workspace

constexpr int kSumThreads = 256;

// dweight from its splits.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    zero_conv_add_bwd_fold_kernel(Global<const float> partial, Global<T> dweight, int64_t size, int splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
  for (int split = 0; split < splits; ++split) sum += partial.load(split * size + i);
  dweight.store(i, from_float<T>(sum));
}

template <class T>
struct Sums {
  Global<const T> dout, bias;
  Global<float> sums;  // [N, parts, Cout]: of dout over one part of the positions
  Global<T> dbias;
  Global<const float> dots;  // [N, tiles]
  Global<float> dscale;      // [N] or []
  Scale scale;
  int64_t samples, channels, positions, sample_stride, channel_stride, position_stride;
  int parts, tiles;
  bool channels_last;

  explicit Sums(const ZeroConv& call)
      : dout{reinterpret_cast<const T*>(call.dout)},
        bias{reinterpret_cast<const T*>(call.bias)},
        sums{reinterpret_cast<float*>(call.channel_sums)},
        dbias{reinterpret_cast<T*>(call.dbias)},
        dots{reinterpret_cast<const float*>(call.dot_partial)},
        dscale{reinterpret_cast<float*>(call.dscale)},
        scale(scale_of(call)),
        samples(call.samples),
        channels(call.out_channels),
        positions(call.positions),
        sample_stride(call.out_channels * call.positions),
        channel_stride(call.channels_last ? 1 : call.positions),
        position_stride(call.channels_last ? call.out_channels : 1),
        parts(call.sum_parts),
        tiles(input_tiles<T>(call.channels_last, call.in_channels, call.positions)),
        channels_last(call.channels_last) {}

  __device__ __forceinline__ float channel_sum(int64_t sample, int64_t channel) const {
    float sum = 0.0f;
    for (int part = 0; part < parts; ++part) sum += sums.load((sample * parts + part) * channels + channel);
    return sum;
  }
};

// Sums of dout over part of the positions, 32 channels per block: eight threads share a channel in channels_last, a
// warp takes a channel in the contiguous format.
template <class T>
__global__ void __launch_bounds__(kSumThreads) zero_conv_add_bwd_sums_kernel(const __grid_constant__ Sums<T> call) {
  CNK_STATIC_SHARED(float, lanes, kSumThreads);
  const unsigned groups = static_cast<unsigned>(ceil_div<int64_t>(call.channels, 32));
  const unsigned row = blockIdx.x / groups, part = row % call.parts;
  const int64_t sample = row / call.parts, first = static_cast<int64_t>(blockIdx.x % groups) * 32;
  const int64_t size = ceil_div<int64_t>(call.positions, call.parts), begin = part * size;
  const int64_t end = begin + size < call.positions ? begin + size : call.positions;
  const auto sum = [&](int64_t channel, int64_t from, int step) {
    float total = 0.0f;
    if (channel < call.channels)
      for (int64_t p = from; p < end; p += step)
        total += to_float(
            call.dout.load(sample * call.sample_stride + channel * call.channel_stride + p * call.position_stride));
    return total;
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto finish = [&](int64_t channel, float total) {
    if (channel < call.channels) call.sums.store(static_cast<int64_t>(row) * call.channels + channel, total);
  };
  if (!call.channels_last) {
    for (int c = warp; c < 32; c += kSumThreads / 32) {
      const float total = warp_sum(sum(first + c, begin + lane, 32));
      if (lane == 0) finish(first + c, total);
    }
    return;
  }
  lanes.store(threadIdx.x, sum(first + lane, begin + warp, kSumThreads / 32));
  sync_block();
  if (warp != 0) return;
  float total = 0.0f;
  for (int i = 0; i < kSumThreads / 32; ++i) total += lanes.load(i * 32 + lane);
  finish(first + lane, total);
}

template <class T>
__global__ void __launch_bounds__(kSumThreads) zero_conv_add_bwd_dbias_kernel(const __grid_constant__ Sums<T> call) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (channel >= call.channels) return;
  float sum = 0.0f;
  for (int64_t sample = 0; sample < call.samples; ++sample)
    sum += call.scale.of(sample) * call.channel_sum(sample, channel);
  call.dbias.store(channel, from_float<T>(sum));
}

// One block per number of dscale: of one sample, or of all.
template <class T>
__global__ void __launch_bounds__(kSumThreads) zero_conv_add_bwd_dscale_kernel(const __grid_constant__ Sums<T> call) {
  CNK_STATIC_SHARED(float, warp_sums, kSumThreads / 32);
  const int64_t begin = blockIdx.x, end = call.scale.stride ? begin + 1 : call.samples;
  float sum = 0.0f;
  for (int64_t sample = begin; sample < end; ++sample) {
    for (int tile = threadIdx.x; tile < call.tiles; tile += kSumThreads)
      sum += call.dots.load(sample * call.tiles + tile);
    if (call.bias)
      for (int64_t c = threadIdx.x; c < call.channels; c += kSumThreads)
        sum += to_float(call.bias.load(c)) * call.channel_sum(sample, c);
  }
  sum = sum_over_block(sum, warp_sums);
  if (threadIdx.x == 0) call.dscale.store(blockIdx.x, sum);
}

template <class T>
void launch_sums(const Place& place, const ZeroConv& layer) {
  const Sums<T> sums(layer);
  const int64_t channels = layer.out_channels;
  if (layer.dweight)
    launch(kName, zero_conv_add_bwd_fold_kernel<T>, place,
           {ceil_div<int64_t>(channels * layer.in_channels, kSumThreads), kSumThreads},
           Global<const float>{reinterpret_cast<const float*>(layer.dweight_partial)},
           Global<T>{reinterpret_cast<T*>(layer.dweight)}, channels * layer.in_channels, layer.splits);
  if (layer.channel_sums)
    launch(kName, zero_conv_add_bwd_sums_kernel<T>, place,
           {layer.samples * layer.sum_parts * ceil_div<int64_t>(channels, 32), kSumThreads}, sums);
  if (layer.dbias)
    launch(kName, zero_conv_add_bwd_dbias_kernel<T>, place, {ceil_div<int64_t>(channels, kSumThreads), kSumThreads},
           sums);
  if (layer.dscale)
    launch(kName, zero_conv_add_bwd_dscale_kernel<T>, place, {layer.scale_stride ? layer.samples : 1, kSumThreads},
           sums);
}

template <class G, class Table, class Kernel>
void launch_products(const Place& place, const Table& table, Kernel kernel, size_t shared, int blocks) {
  const int units = table.first[table.count];
  launch(kName, kernel, place, {units < blocks ? units : blocks, G::kThreads, shared}, table);
}

template <class T, Along DX_A, Along DW>
void launch_backward(const Place& place, const std::vector<ZeroConv>& layers, int blocks) {
  using X = std::conditional_t<DX_A == Along::depth, ChannelColumns<T>, ChannelRows<T>>;
  using W = ChannelsBoth<T>;
  launch_products<X>(place, make_table<InputGradient<T>>(kName, layers, make_input_gradient<X>),
                     zero_conv_add_bwd_dx_kernel<X, DX_A, Along::index>, Workspace<X, DX_A, Along::index>::kBytes,
                     blocks);
  launch_products<W>(place, make_table<WeightGradient<T>>(kName, layers, make_weight_gradient<W>),
                     zero_conv_add_bwd_dweight_kernel<W, DW, DW>, Workspace<W, DW, DW>::kBytes, blocks);
  for (const ZeroConv& layer : layers) launch_sums<T>(place, layer);
}

}  // namespace
}  // namespace product

void zero_conv_add_bwd(const Place& place, Dtype dtype, const std::vector<ZeroConv>& layers, int blocks) {
  using namespace product;
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    if (layers.front().channels_last)
      launch_backward<T, Along::depth, Along::index>(place, layers, blocks);
    else
      launch_backward<T, Along::index, Along::depth>(place, layers, blocks);
  });
}

int zero_conv_dx_tiles(Dtype dtype, const ZeroConv& layer) {
  int count = 0;
  product::with_type(dtype, [&](auto element) {
    count = product::input_tiles<decltype(element)>(layer.channels_last, layer.in_channels, layer.positions);
  });
  return count;
}

int zero_conv_dweight_tiles(Dtype dtype, const ZeroConv& layer) {
  int count = 0;
  product::with_type(dtype, [&](auto element) {
    using G = product::ChannelsBoth<decltype(element)>;
    count = product::tiles(layer.out_channels, G::kRows) * product::tiles(layer.in_channels, G::kColumns);
  });
  return count;
}

}  // namespace cnk

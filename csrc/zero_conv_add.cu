// zero_conv_add forward: out = residual + scale * (conv1x1(x, weight) + bias), for one layer or for all of a
// ControlNet's in one launch of persistent blocks, each result written to its place, such as a channel slice of a
// larger tensor. Where the tiles are too few for the GPU the depth is cut into splits, whose float32 sums a second
// launch adds up in order.
#include "zero_conv_table.cuh"

namespace cnk {

namespace product {
namespace {

constexpr const char* kName = "zero_conv_add_fwd";

template <class T>
struct Layer : Problem<T> {
  Surface<T> out;
  Surface<const T> residual;
  Global<const T> bias;
  Global<float> partial;  // [splits, batches, rows, columns], where there are several
  int splits;
  bool bias_per_row;
};

// `values`, the products at (row, column) of a batch, to the output.
template <class T, int N>
__device__ __forceinline__ void finish(const Layer<T>& layer, int batch, int row, int column,
                                       Vec<float, N>& values) {
  const RowOf at = layer.sample_of(batch, row);
  const float scale = layer.scale.of(at.sample);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (layer.bias && column + i < layer.columns)
      values[i] += to_float(layer.bias.load(layer.bias_per_row ? row : column + i));
    values[i] *= scale;
  }
  if (layer.residual.data) {
    const auto base = read_row<T, N>(layer.residual, at.sample, at.row, column, layer.columns);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += base[i];
  }
  write_row<T, N>(layer.out, at.sample, at.row, column, layer.columns, values);
}

// In channels_last sm_90's code for bfloat16 has some registers more than two blocks of a multiprocessor may have.
template <class G, Along B>
constexpr int kForwardBlocks = std::is_same_v<typename G::T, bf16> && B == Along::depth ? 1 : G::kBlocks;

template <class G, Along A, Along B, class T = typename G::T>
__global__ void __launch_bounds__(G::kThreads, kForwardBlocks<G, B>)
    zero_conv_add_fwd_kernel(const __grid_constant__ Table<Layer<T>> table) {
  constexpr int kVector = 16 / sizeof(T);
  Arena arena;
  const Workspace<G, A, B> workspace(arena);
  for (int unit = blockIdx.x; unit < table.first[table.count]; unit += gridDim.x) {
    const int item = table.item_of(unit);
    const Layer<T>& layer = table.items[item];
    const int tile = unit - table.first[item], tile_row = tile / layer.column_tiles;
    const int slice = tile_row / layer.row_tiles, split = slice / layer.batches, batch = slice % layer.batches;
    const int row0 = tile_row % layer.row_tiles * G::kRows;
    const int column0 = tile % layer.column_tiles * G::kColumns;
    const int steps = ceil_div(layer.depth, kDepth), per_split = ceil_div(steps, layer.splits);
    const int begin = split * per_split < steps ? split * per_split : steps;
    const int end = begin + per_split < steps ? begin + per_split : steps;
    typename G::Accumulators acc = {};
    accumulate<G, A, B>(acc, layer, workspace, row0, column0, batch * steps + begin, batch * steps + end);
    for_each_vector<G, A, B>(workspace, acc, [&](int in_row, int in_column, Vec<float, kVector>& values) {
      const int row = row0 + in_row, column = column0 + in_column;
      if (row >= layer.rows || column >= layer.columns) return;
      if (layer.splits == 1)
        finish<T, kVector>(layer, batch, row, column, values);
      else
        store_floats(layer.partial + ((static_cast<int64_t>(slice) * layer.rows + row) * layer.columns + column), values,
                     layer.columns, column);
    });
    sync_block();  // the patches are done with
  }
}

constexpr int kFoldThreads = 256;

// The output from the splits of the depth: a thread per vector of a row.
template <class T>
__global__ void __launch_bounds__(kFoldThreads)
    zero_conv_add_fwd_fold_kernel(const __grid_constant__ Layer<T> layer, int64_t vectors) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFoldThreads + threadIdx.x;
  if (i >= vectors) return;
  const int64_t per_row = ceil_div(layer.columns, kVector);
  const int column = static_cast<int>(i % per_row) * kVector, row = static_cast<int>(i / per_row % layer.rows);
  const int batch = static_cast<int>(i / per_row / layer.rows);
  Vec<float, kVector> values = {};
  for (int split = 0; split < layer.splits; ++split) {
    const int64_t at =
        (static_cast<int64_t>(split * layer.batches + batch) * layer.rows + row) * layer.columns + column;
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      if (column + j < layer.columns) values[j] += layer.partial.load(at + j);
  }
  finish<T, kVector>(layer, batch, row, column, values);
}

template <class G, class T = typename G::T>
Layer<T> make_layer(const ZeroConv& call, int64_t& units) {
  Layer<T> layer = {};
  set_extents<G>(layer, call, call.out_channels, call.in_channels);
  merge_samples<G>(layer, call);
  const Operand<T> x = activations<T>(call, call.x, call.in_channels);
  const Operand<T> weight = operand<T>(call.weight, 0, call.in_channels);
  layer.a = call.channels_last ? x : weight;
  layer.b = call.channels_last ? weight : x;
  layer.out = surface<T>(call.out, call.out_sample, call.channels_last ? call.out_position : call.out_channel,
                         call.channels_last ? call.out_channel : call.out_position);
  layer.residual = dense_surface<const T>(call, call.residual, call.out_channels);
  layer.bias = {reinterpret_cast<const T*>(call.bias)};
  layer.bias_per_row = !call.channels_last;
  layer.partial = {reinterpret_cast<float*>(call.depth_partial)};
  layer.splits = call.depth_splits;
  units = static_cast<int64_t>(layer.splits) * layer.batches * layer.row_tiles * layer.column_tiles;
  return layer;
}

template <class G, Along A, Along B, class T = typename G::T>
void launch_forward(const Place& place, const std::vector<ZeroConv>& layers, int blocks) {
  const auto table = make_table<Layer<T>>(kName, layers, make_layer<G>);
  const int units = table.first[table.count];
  launch(kName, zero_conv_add_fwd_kernel<G, A, B>, place,
         {units < blocks ? units : blocks, G::kThreads, Workspace<G, A, B>::kBytes}, table);
  for (int i = 0; i < table.count; ++i) {
    const Layer<T>& layer = table.items[i];
    if (layer.splits == 1) continue;
    const int64_t vectors =
        static_cast<int64_t>(layer.batches) * layer.rows * ceil_div<int>(layer.columns, 16 / sizeof(T));
    launch(kName, zero_conv_add_fwd_fold_kernel<T>, place, {ceil_div<int64_t>(vectors, kFoldThreads), kFoldThreads},
           layer, vectors);
  }
}

}  // namespace
}  // namespace product

void zero_conv_add_fwd(const Place& place, Dtype dtype, const std::vector<ZeroConv>& layers, int blocks) {
  using namespace product;
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    if (layers.front().channels_last)
      launch_forward<ChannelColumns<T>, Along::depth, Along::depth>(place, layers, blocks);
    else
      launch_forward<ChannelRows<T>, Along::depth, Along::index>(place, layers, blocks);
  });
}

int zero_conv_fwd_tiles(Dtype dtype, const ZeroConv& layer) {
  using namespace product;
  int64_t units = 0;
  ZeroConv whole = layer;
  whole.depth_splits = 1;
  with_type(dtype, [&](auto element) {
    with_tiling<decltype(element)>(layer.channels_last,
                                   [&](auto tiling) { make_layer<decltype(tiling)>(whole, units); });
  });
  return static_cast<int>(units);
}

}  // namespace cnk

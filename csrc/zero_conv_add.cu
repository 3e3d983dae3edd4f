// zero_conv_add forward: out = residual + scale * (conv1x1(x, weight) + bias), for one layer or for all of a
// ControlNet's in one launch of persistent blocks, each result written to its place, such as a channel slice of a
// larger tensor.
#include "zero_conv_table.cuh"

namespace cnk {

namespace product {
namespace {

template <class T>
struct Layer : Problem<T> {
  Surface<T> out;
  Surface<const T> residual;
  Global<const T> bias;
  bool bias_per_row;
};

template <class T, Along A, Along B>
__global__ void __launch_bounds__(kThreads, 4) zero_conv_add_fwd_kernel(const __grid_constant__ Table<Layer<T>> table) {
  constexpr int kVector = 16 / sizeof(T);
  Arena arena;
  const Workspace<T, A, B> workspace(arena);
  for (int unit = blockIdx.x; unit < table.first[table.count]; unit += gridDim.x) {
    const int item = table.item_of(unit);
    const Layer<T>& layer = table.items[item];
    const int tile = unit - table.first[item], tile_row = tile / layer.column_tiles;
    const int64_t batch = tile_row / layer.row_tiles;
    const int64_t row0 = static_cast<int64_t>(tile_row % layer.row_tiles) * kTile;
    const int64_t column0 = static_cast<int64_t>(tile % layer.column_tiles) * kTile;
    const int64_t steps = ceil_div<int64_t>(layer.depth, kDepth);
    accumulate(layer, workspace, row0, column0, batch * steps, (batch + 1) * steps);
    const float scale = layer.scale.of(batch);
    for_each_vector<T>(workspace.surface, [&](int in_row, int in_column, Vec<float, kVector>& values) {
      const int64_t row = row0 + in_row, column = column0 + in_column;
      if (row >= layer.rows || column >= layer.columns) return;
      Vec<float, kVector> base = {};
      if (layer.residual.data) base = read_row<T, kVector>(layer.residual, batch, row, column, layer.columns);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (layer.bias && column + i < layer.columns)
          values[i] += to_float(layer.bias.load(layer.bias_per_row ? row : column + i));
        values[i] = base[i] + scale * values[i];
      }
      write_row<T, kVector>(layer.out, batch, row, column, layer.columns, values);
    });
  }
}

template <class T>
Layer<T> make_layer(const ZeroConv& call, int64_t& units) {
  Layer<T> layer = {};
  set_extents(layer, call, call.out_channels, call.in_channels);
  const Operand<T> x = activations<T>(call, call.x, call.in_channels);
  const Operand<T> weight = operand<T>(call.weight, 0, call.in_channels);
  layer.a = call.channels_last ? x : weight;
  layer.b = call.channels_last ? weight : x;
  layer.out = surface<T>(call.out, call.out_sample, call.channels_last ? call.out_position : call.out_channel,
                         call.channels_last ? call.out_channel : call.out_position);
  layer.residual = dense_surface<const T>(call, call.residual, call.out_channels);
  layer.bias = {reinterpret_cast<const T*>(call.bias)};
  layer.bias_per_row = !call.channels_last;
  units = static_cast<int64_t>(layer.batches) * layer.row_tiles * layer.column_tiles;
  return layer;
}

template <class T, Along A, Along B>
void launch_forward(const Place& place, const std::vector<ZeroConv>& layers, int blocks) {
  constexpr const char* kName = "zero_conv_add_fwd";
  const auto table = make_table<Layer<T>>(kName, layers, make_layer<T>);
  const int units = table.first[table.count];
  launch(kName, zero_conv_add_fwd_kernel<T, A, B>, place,
         {units < blocks ? units : blocks, kThreads, shared_bytes<T, A, B>()}, table);
}

}  // namespace
}  // namespace product

void zero_conv_add_fwd(const Place& place, Dtype dtype, const std::vector<ZeroConv>& layers, int blocks) {
  using namespace product;
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    if (layers.front().channels_last)
      launch_forward<T, Along::depth, Along::depth>(place, layers, blocks);
    else
      launch_forward<T, Along::depth, Along::index>(place, layers, blocks);
  });
}

}  // namespace cnk

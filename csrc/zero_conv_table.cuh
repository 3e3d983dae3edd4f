// From the layers of a zero_conv_add call to the matrix products of product_tile.cuh.
#pragma once
#include <stdexcept>

#include "product_tile.cuh"

namespace cnk::product {

inline Scale scale_of(const ZeroConv& layer) {
  return {{reinterpret_cast<const float*>(layer.scale)}, layer.scale_stride, layer.factor};
}

inline bool is_aligned(uintptr_t address, size_t itemsize, int64_t a, int64_t b) {
  const int64_t vector = static_cast<int64_t>(16 / itemsize);
  return address % 16 == 0 && a % vector == 0 && b % vector == 0;
}

template <class T>
Operand<T> operand(uintptr_t address, int64_t batch, int64_t line) {
  return {{reinterpret_cast<const T*>(address)}, batch, line, is_aligned(address, sizeof(T), batch, line)};
}

template <class T, class Address>
Surface<T> surface(Address address, int64_t batch, int64_t row, int64_t column) {
  return {
      {reinterpret_cast<T*>(address)}, batch, row, column, column == 1 && is_aligned(address, sizeof(T), batch, row)};
}

// A dense [N, channels, positions] tensor as the operand whose index is its positions, and the surface it is written
// to.
template <class T>
Operand<T> activations(const ZeroConv& layer, uintptr_t address, int64_t channels) {
  return operand<T>(address, channels * layer.positions, layer.channels_last ? channels : layer.positions);
}

template <class T>
Surface<T> dense_surface(const ZeroConv& layer, uintptr_t address, int64_t channels) {
  return surface<T>(address, channels * layer.positions, layer.channels_last ? channels : layer.positions, 1);
}

inline int extent(int64_t size) {
  if (size > 0x7fffffff) throw std::runtime_error("zero_conv_add: over 2^31 - 1 positions or channels");
  return static_cast<int>(size);
}

inline int tiles(int64_t extent, int tile) {
  return static_cast<int>(ceil_div<int64_t>(extent, tile));
}

// Fills `problem` for out = a * b with the positions as rows in channels_last and as columns in the contiguous format.
template <class G, class T = typename G::T>
void set_extents(Problem<T>& problem, const ZeroConv& layer, int64_t channels, int64_t depth) {
  problem.rows = extent(layer.channels_last ? layer.positions : channels);
  problem.columns = extent(layer.channels_last ? channels : layer.positions);
  problem.depth = extent(depth);
  problem.batches = static_cast<int>(layer.samples);
  problem.row_tiles = tiles(problem.rows, G::kRows);
  problem.column_tiles = tiles(problem.columns, G::kColumns);
  problem.scale = scale_of(layer);
}

// In channels_last the samples follow each other as positions do: a tile may hold rows of several.
template <class G, class T = typename G::T>
void merge_samples(Problem<T>& problem, const ZeroConv& layer) {
  if (!layer.channels_last || layer.samples * layer.positions > 0x7fffffff) return;
  problem.rows_per_sample = static_cast<unsigned>(layer.positions);
  problem.rows = extent(layer.samples * layer.positions);
  problem.batches = 1;
  problem.row_tiles = tiles(problem.rows, G::kRows);
}

// run(G{}) with how the products over positions are tiled, forward and dx.
template <class T, class Run>
auto with_tiling(bool channels_last, const Run& run) {
  return channels_last ? run(ChannelColumns<T>{}) : run(ChannelRows<T>{});
}

// Tiles of dx of one sample.
template <class T>
int input_tiles(bool channels_last, int64_t channels, int64_t positions) {
  return with_tiling<T>(channels_last, [&](auto tiling) {
    using G = decltype(tiling);
    const int64_t rows = channels_last ? positions : channels, columns = channels_last ? channels : positions;
    return tiles(rows, G::kRows) * tiles(columns, G::kColumns);
  });
}

template <class Item, class Make>
Table<Item> make_table(const char* name, const std::vector<ZeroConv>& layers, const Make& make) {
  if (layers.size() > kZeroConvGroup) throw std::runtime_error(std::string(name) + ": too many layers for one launch");
  Table<Item> table = {};
  for (const ZeroConv& layer : layers) {
    int64_t units = 0;
    table.items[table.count] = make(layer, units);
    units += table.first[table.count];
    if (units > 0x7fffffff) throw std::runtime_error(std::string(name) + ": over 2^31 - 1 tiles");
    table.first[++table.count] = static_cast<int>(units);
  }
  return table;
}

template <class Run>
void with_type(Dtype dtype, const Run& run) {
  if (dtype == Dtype::float32)
    run(float{});
  else if (dtype == Dtype::float16)
    run(f16{});
  else
    run(bf16{});
}

}  // namespace cnk::product

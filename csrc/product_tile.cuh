// Matrix products of many problems in one persistent launch: the core of zero_conv_add, forward and backward.
//
//   out[batch][row][column] = sum over depth of a(row, depth) * b(column, depth)
//
// Blocks of 128 threads walk over 64x64 tiles of all problems. 16-bit types multiply on the tensor cores; float32
// multiplies in float32, with the same tiles. Operands come through a ring of cp.async stages.
#pragma once
#include "device/fragments.cuh"
#include "device/launch.cuh"
#include "device/math.cuh"
#include "device/tiles.cuh"

namespace cnk::product {

constexpr int kTile = kZeroConvTile, kDepth = 32, kThreads = 128;

// An operand as lines of contiguous elements `line` apart: along depth or along its index, by template parameter.
template <class T>
struct Operand {
  Global<const T> data;
  int64_t batch, line;
  bool vectors;  // every line starts at a multiple of 16 bytes
};

template <class T>
struct Surface {
  Global<T> data;
  int64_t batch, row, column;
  bool vectors;  // column is 1, and every row starts at a multiple of 16 bytes
};

// One number per batch or one for all, from device memory or from the host.
struct Scale {
  Global<const float> values;
  int64_t stride;
  float factor;
  __device__ __forceinline__ float of(int64_t batch) const { return values ? values.load(batch * stride) : factor; }
};

template <class T>
struct Problem {
  Operand<T> a, b;
  int64_t rows, columns, depth;
  int batches, row_tiles, column_tiles;
  Scale scale;
};

// Tables go to the kernel by value: they need no copy to the device and survive in a CUDA graph.
template <class Item>
struct Table {
  Item items[kZeroConvGroup];
  int first[kZeroConvGroup + 1];  // work units before each item, and all of them
  int count;

  __device__ __forceinline__ int item_of(int unit) const {
    int item = 0;
    while (unit >= first[item + 1]) ++item;
    return item;
  }
};

template <class T>
constexpr int kStages = sizeof(T) == 4 ? 2 : 3;

// A stage's tile of one operand in shared memory.
template <class T, Along ALONG>
struct TileShape {
  static constexpr int kRows = ALONG == Along::depth ? kTile : kDepth;
  static constexpr int kWidth = ALONG == Along::depth ? kDepth : kTile;
  static constexpr int kLine = kWidth + 16 / sizeof(T);
  static constexpr int kSize = kRows * kLine;
};

constexpr int kSurfaceLine = kTile + 4;  // of the float tile that the epilogue reads

template <class T, Along A, Along B>
size_t shared_bytes() {
  const size_t stages =
      kStages<T> * (Arena::bytes<T>(TileShape<T, A>::kSize) + Arena::bytes<T>(TileShape<T, B>::kSize));
  return stages + Arena::bytes<float>(kTile * kSurfaceLine);
}

template <class T, Along A, Along B>
struct Workspace {
  Shared<T> a[kStages<T>], b[kStages<T>];
  Shared<float> surface;  // [kTile][kSurfaceLine]

  __device__ __forceinline__ explicit Workspace(Arena& arena) {
#pragma unroll
    for (int i = 0; i < kStages<T>; ++i) {
      a[i] = arena.take<T>(TileShape<T, A>::kSize, "a tile");
      b[i] = arena.take<T>(TileShape<T, B>::kSize, "b tile");
    }
    surface = arena.take<float>(kTile * kSurfaceLine, "surface");
  }
};

template <Along ALONG, class T>
__device__ __forceinline__ void load_operand(Shared<T> tile, const Operand<T>& operand, int64_t batch, int64_t index,
                                             int64_t indices, int64_t k, int64_t depth) {
  using S = TileShape<T, ALONG>;
  constexpr bool kAlongDepth = ALONG == Along::depth;
  const Global<const T> from =
      operand.data + (batch * operand.batch + (kAlongDepth ? index * operand.line + k : k * operand.line + index));
  load_tile<S::kRows, S::kWidth, kThreads>(tile, S::kLine, from, operand.line,
                                           kAlongDepth ? indices - index : depth - k,
                                           kAlongDepth ? depth - k : indices - index, operand.vectors);
}

// Each of the four warps owns a 32x32 quarter: acc[i][j] is the C fragment of rows 16 i.., columns 8 j.. of it.
using Accumulators = float[2][4][4];

struct Place2d {
  int row, column;
};

// Where element e of fragment (i, j) of this thread lies in the tile.
__device__ __forceinline__ Place2d place(int i, int j, int e) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  return {warp / 2 * 32 + i * 16 + lane / 4 + e / 2 * 8, warp % 2 * 32 + j * 8 + lane % 4 * 2 + e % 2};
}

template <Along A, Along B, class T>
__device__ __forceinline__ void multiply(Accumulators& acc, Shared<T> a, Shared<T> b) {
  constexpr int kLineA = TileShape<T, A>::kLine, kLineB = TileShape<T, B>::kLine;
  const Place2d quarter = {static_cast<int>(threadIdx.x) / 64 * 32, static_cast<int>(threadIdx.x) / 32 % 2 * 32};
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t left[2][4], right[4][2];
    for (int i = 0; i < 2; ++i) load_left<A>(left[i], a, kLineA, quarter.row + i * 16, k);
    for (int j = 0; j < 4; j += 2) load_right_pair<B>(right[j], right[j + 1], b, kLineB, quarter.column + j * 8, k);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) mma<T>(acc[i][j], left[i], right[j]);
  }
}

// float32, held in the same fragments. Each step is summed by itself first: a short chain of roundings, not a long one.
template <Along A, Along B>
__device__ __forceinline__ void multiply(Accumulators& acc, Shared<float> a, Shared<float> b) {
  constexpr int kLineA = TileShape<float, A>::kLine, kLineB = TileShape<float, B>::kLine;
  Accumulators step = {};
  for (int k = 0; k < kDepth; ++k) {
    float left[2][2], right[4][2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = place(i, 0, e * 2).row;
        left[i][e] = a.load(A == Along::depth ? row * kLineA + k : k * kLineA + row);
      }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = place(0, j, e).column;
        right[j][e] = b.load(B == Along::depth ? column * kLineB + k : k * kLineB + column);
      }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) step[i][j][e] = fmaf(left[i][e / 2], right[j][e % 2], step[i][j][e]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] += step[i][j][e];
}

// Sums steps [first, last) of a tile into workspace.surface. A step is kDepth of the depth of one batch, counted
// through all batches: a product over one batch takes that batch's steps, dweight's takes those of many.
template <Along A, Along B, class T>
__device__ __forceinline__ void accumulate(const Problem<T>& problem, const Workspace<T, A, B>& workspace, int64_t row,
                                           int64_t column, int64_t first, int64_t last) {
  constexpr int kRing = kStages<T>;
  const unsigned steps_per_batch = static_cast<unsigned>(ceil_div<int64_t>(problem.depth, kDepth));
  const auto load = [&](int64_t step, int stage) {
    if (step < last) {
      const int64_t batch = static_cast<unsigned>(step) / steps_per_batch;
      const int64_t k = static_cast<int64_t>(static_cast<unsigned>(step) % steps_per_batch) * kDepth;
      load_operand<A>(workspace.a[stage], problem.a, batch, row, problem.rows, k, problem.depth);
      load_operand<B>(workspace.b[stage], problem.b, batch, column, problem.columns, k, problem.depth);
    }
    commit_copies();
  };
  Accumulators acc = {};
#pragma unroll
  for (int stage = 0; stage < kRing - 1; ++stage) load(first + stage, stage);
  for (int64_t step = first; step < last; step += kRing) {
#pragma unroll
    for (int stage = 0; stage < kRing; ++stage) {
      if (step + stage >= last) break;
      wait_copies<kRing - 2>();
      sync_block();  // the stage has arrived for all, and all are done with the one that is loaded next
      load(step + stage + kRing - 1, (stage + kRing - 1) % kRing);
      multiply<A, B>(acc, workspace.a[stage], workspace.b[stage]);
    }
  }
  wait_copies<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const Place2d at = place(i, j, e);
        workspace.surface.template store_vec<2>(at.row * kSurfaceLine + at.column, {{acc[i][j][e], acc[i][j][e + 1]}});
      }
  sync_block();
}

// use(row, column, values) for every vector of 16 bytes of T of the tile, rows and columns counted in the tile.
template <class T, class Use>
__device__ __forceinline__ void for_each_vector(Shared<float> surface, const Use& use) {
  constexpr int kVector = 16 / sizeof(T), kPerRow = kTile / kVector;
  for (int i = threadIdx.x; i < kTile * kPerRow; i += kThreads) {
    const int row = i / kPerRow, column = i % kPerRow * kVector;
    Vec<float, kVector> values;
#pragma unroll
    for (int j = 0; j < kVector; j += 4) {
      const auto four = surface.template load_vec<4>(row * kSurfaceLine + column + j);
      for (int e = 0; e < 4; ++e) values[j + e] = four[e];
    }
    use(row, column, values);
  }
}

// The part of a surface's row at (row, column) that lies within `columns`: whole vectors in one access.
template <class T, int N>
__device__ __forceinline__ Vec<float, N> read_row(const Surface<const T>& surface, int64_t batch, int64_t row,
                                                  int64_t column, int64_t columns) {
  Vec<float, N> values = {};
  const int64_t at = batch * surface.batch + row * surface.row + column * surface.column;
  if (surface.vectors && column + N <= columns) {
    const auto vector = surface.data.template load_vec<N>(at);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = to_float(vector[i]);
    return values;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (column + i < columns) values[i] = to_float(surface.data.load(at + i * surface.column));
  return values;
}

template <class T, int N>
__device__ __forceinline__ void write_row(const Surface<T>& surface, int64_t batch, int64_t row, int64_t column,
                                          int64_t columns, const Vec<float, N>& values) {
  const int64_t at = batch * surface.batch + row * surface.row + column * surface.column;
  Vec<T, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) vector[i] = from_float<T>(values[i]);
  if (surface.vectors && column + N <= columns) {
    surface.data.template store_vec<N>(at, vector);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (column + i < columns) surface.data.store(at + i * surface.column, vector[i]);
}

}  // namespace cnk::product

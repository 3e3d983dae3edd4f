// Matrix products of many problems in one persistent launch: the core of zero_conv_add, forward and backward.
//
//   out[batch][row][column] = sum over depth of a(row, depth) * b(column, depth)
//
// Blocks walk over tiles of all problems. 16-bit types multiply on the tensor cores, in tiles of 128x160: the channels
// of Stable Diffusion are multiples of 160. float32 multiplies in float32, in tiles of 64x64. Operands come through a
// ring of cp.async stages.
#pragma once
#include <type_traits>

#include "device/fragments.cuh"
#include "device/launch.cuh"
#include "device/math.cuh"
#include "device/tiles.cuh"

namespace cnk::product {

constexpr int kDepth = 32, kRing = 3;

// How the warps of a block share a tile: WARPS_DOWN x WARPS_ACROSS of them, each with DOWN x ACROSS fragments of 16x8.
template <class Type, int WARPS_DOWN, int WARPS_ACROSS, int DOWN, int ACROSS, int BLOCKS>
struct Tiling {
  using T = Type;
  static constexpr int kWarpsAcross = WARPS_ACROSS, kDown = DOWN, kAcross = ACROSS;
  static constexpr int kThreads = WARPS_DOWN * WARPS_ACROSS * 32, kBlocks = BLOCKS;  // at least so many per multiprocessor
  static constexpr int kWarpRows = DOWN * 16, kWarpColumns = ACROSS * 8;
  static constexpr int kRows = WARPS_DOWN * kWarpRows, kColumns = WARPS_ACROSS * kWarpColumns;
  using Accumulators = float[DOWN][ACROSS][4];
};

// Positions are the longer side of a tile, channels the one of 160.
template <class T>
using ChannelColumns = std::conditional_t<sizeof(T) == 4, Tiling<T, 2, 2, 2, 4, 3>, Tiling<T, 4, 2, 2, 10, 2>>;
template <class T>
using ChannelRows = std::conditional_t<sizeof(T) == 4, Tiling<T, 2, 2, 2, 4, 3>, Tiling<T, 2, 4, 5, 4, 2>>;
template <class T>
using ChannelsBoth = std::conditional_t<sizeof(T) == 4, Tiling<T, 2, 2, 2, 4, 3>, Tiling<T, 5, 2, 2, 10, 1>>;

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

struct RowOf {
  int sample, row;
};

template <class T>
struct Problem {
  Operand<T> a, b;
  int rows, columns, depth;
  int batches, row_tiles, column_tiles;
  unsigned rows_per_sample;  // not 0: the rows of all samples are those of one batch
  Scale scale;

  __device__ __forceinline__ RowOf sample_of(int batch, int row) const {
    if (rows_per_sample == 0) return {batch, row};
    const unsigned merged = static_cast<unsigned>(row);
    return {static_cast<int>(merged / rows_per_sample), static_cast<int>(merged % rows_per_sample)};
  }
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

// A stage's tile of one operand in shared memory: INDICES of its index.
template <class T, Along ALONG, int INDICES>
struct TileShape {
  static constexpr int kRows = ALONG == Along::depth ? INDICES : kDepth;
  static constexpr int kWidth = ALONG == Along::depth ? kDepth : INDICES;
  static constexpr int kLine = kWidth + 16 / sizeof(T);  // an odd multiple of 16 bytes
  static constexpr int kSize = kRows * kLine;
};

template <class G, Along A, Along B>
struct Workspace {
  using T = typename G::T;
  using ShapeA = TileShape<T, A, G::kRows>;
  using ShapeB = TileShape<T, B, G::kColumns>;
  static constexpr int kStage = ShapeA::kSize + ShapeB::kSize;
  static constexpr int kPatchLine = G::kWarpColumns + 4, kPatch = 16 * kPatchLine;  // of one warp, in float32
  static constexpr size_t kBytes = Arena::bytes<T>(kRing * kStage);
  static_assert(sizeof(float) * kPatch * (G::kThreads / 32) <= kBytes, "the patches lie where the stages were");

  Shared<T> stages;

  __device__ __forceinline__ explicit Workspace(Arena& arena) : stages(arena.take<T>(kRing * kStage, "stages")) {}
  __device__ __forceinline__ Shared<T> a(int stage) const { return stages.slice(stage * kStage, ShapeA::kSize); }
  __device__ __forceinline__ Shared<T> b(int stage) const {
    return stages.slice(stage * kStage + ShapeA::kSize, ShapeB::kSize);
  }
  // The rows of one fragment of this warp, for the epilogue.
  __device__ __forceinline__ Shared<float> patch() const {
    return stages.template as<float>("patch").slice(static_cast<int>(threadIdx.x) / 32 * kPatch, kPatch);
  }
};

// What loads the tiles of one operand: whole steps of the depth by one pointer a pass, the others with zeros beyond.
template <class T, Along ALONG, int INDICES, int THREADS>
struct Loader {
  using S = TileShape<T, ALONG, INDICES>;
  using Stream = EdgeStream<S::kRows, S::kWidth, S::kLine, THREADS, T>;
  static constexpr bool kAlongDepth = ALONG == Along::depth;

  static __device__ __forceinline__ Global<const T> at(const Operand<T>& operand, int64_t batch, int64_t index,
                                                       int64_t k) {
    return operand.data + (batch * operand.batch + (kAlongDepth ? index * operand.line + k : k * operand.line + index));
  }
  static __device__ __forceinline__ Stream stream(const Operand<T>& operand, int batch, int index, int indices,
                                                  int k) {
    return Stream(at(operand, batch, index, k), operand.line, kAlongDepth ? indices - index : kDepth,
                  kAlongDepth ? kDepth : indices - index, kAlongDepth ? kDepth : kDepth * operand.line);
  }
  static __device__ __forceinline__ void load(Shared<T> tile, const Operand<T>& operand, int batch, int index,
                                              int indices, int k, int depth) {
    load_tile<S::kRows, S::kWidth, THREADS>(tile, S::kLine, at(operand, batch, index, k), operand.line,
                                            kAlongDepth ? indices - index : depth - k,
                                            kAlongDepth ? depth - k : indices - index, operand.vectors);
  }
};

struct Place2d {
  int row, column;
};

// Where this warp's part of the tile begins.
template <class G>
__device__ __forceinline__ Place2d warp_place() {
  const int warp = threadIdx.x / 32;
  return {warp / G::kWarpsAcross * G::kWarpRows, warp % G::kWarpsAcross * G::kWarpColumns};
}

// Where element e of fragment (i, j) of this thread lies in its warp's part.
__device__ __forceinline__ Place2d place(int i, int j, int e) {
  const int lane = threadIdx.x % 32;
  return {i * 16 + lane / 4 + e / 2 * 8, j * 8 + lane % 4 * 2 + e % 2};
}

template <class G, Along A, Along B, class T = typename G::T>
__device__ __forceinline__ void multiply(typename G::Accumulators& acc, Shared<T> a, Shared<T> b) {
  using W = Workspace<G, A, B>;
  const Place2d warp = warp_place<G>();
  if constexpr (sizeof(T) == 2) {
    static_assert(G::kAcross % 2 == 0, "right fragments are loaded in pairs");
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t left[G::kDown][4], right[2][2];
#pragma unroll
      for (int i = 0; i < G::kDown; ++i) load_left<A>(left[i], a, W::ShapeA::kLine, warp.row + i * 16, k);
#pragma unroll
      for (int j = 0; j < G::kAcross; j += 2) {
        load_right_pair<B>(right[0], right[1], b, W::ShapeB::kLine, warp.column + j * 8, k);
#pragma unroll
        for (int i = 0; i < G::kDown; ++i) {
          mma<T>(acc[i][j], left[i], right[0]);
          mma<T>(acc[i][j + 1], left[i], right[1]);
        }
      }
    }
  } else {  // each step is summed by itself first: a short chain of roundings, not a long one
    typename G::Accumulators step = {};
    for (int k = 0; k < kDepth; ++k) {
      float left[G::kDown][2], right[G::kAcross][2];
#pragma unroll
      for (int i = 0; i < G::kDown; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = warp.row + place(i, 0, e * 2).row;
          left[i][e] = a.load(A == Along::depth ? row * W::ShapeA::kLine + k : k * W::ShapeA::kLine + row);
        }
#pragma unroll
      for (int j = 0; j < G::kAcross; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = warp.column + place(0, j, e).column;
          right[j][e] = b.load(B == Along::depth ? column * W::ShapeB::kLine + k : k * W::ShapeB::kLine + column);
        }
#pragma unroll
      for (int i = 0; i < G::kDown; ++i)
#pragma unroll
        for (int j = 0; j < G::kAcross; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) step[i][j][e] = fmaf(left[i][e / 2], right[j][e % 2], step[i][j][e]);
    }
#pragma unroll
    for (int i = 0; i < G::kDown; ++i)
#pragma unroll
      for (int j = 0; j < G::kAcross; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] += step[i][j][e];
  }
}

// acc = sum of steps [first, last) of a tile. A step is kDepth of the depth of one batch, counted through all batches: a
// product over one batch takes that batch's steps, dweight's takes those of many. All threads are done with the stages
// when it returns.
template <class G, Along A, Along B, class T = typename G::T>
__device__ __forceinline__ void accumulate(typename G::Accumulators& acc, const Problem<T>& problem,
                                           const Workspace<G, A, B>& workspace, int row, int column, int first,
                                           int last) {
  using LoadA = Loader<T, A, G::kRows, G::kThreads>;
  using LoadB = Loader<T, B, G::kColumns, G::kThreads>;
  const int steps_per_batch = ceil_div(problem.depth, kDepth), whole_per_batch = problem.depth / kDepth;
  const bool vectors = problem.a.vectors && problem.b.vectors;
  int step = first, ahead = first;    // what is multiplied next, and what is asked for next: at most kRing - 1 later
  int stage = 0, free_stage = 0;      // where they lie
  const auto next = [](int& stage) { stage = stage + 1 == kRing ? 0 : stage + 1; };
  const auto arrive = [] {
    wait_copies<kRing - 2>();
    sync_block();  // the stage has arrived for all, and all are done with the one that is loaded next
  };
  while (step < last) {
    const int batch = ahead / steps_per_batch, in_batch = ahead % steps_per_batch, k = in_batch * kDepth;
    const int until_last = last - ahead, until_edge = whole_per_batch - in_batch;
    const int whole = vectors ? (until_edge < until_last ? until_edge : until_last) : 0;  // steps from here on
    if (whole > 0) {
      auto stream_a = LoadA::stream(problem.a, batch, row, problem.rows, k);
      auto stream_b = LoadB::stream(problem.b, batch, column, problem.columns, k);
      const auto copy = [&] {
        stream_a.copy_tile(workspace.a(free_stage));
        stream_b.copy_tile(workspace.b(free_stage));
        commit_copies();
        next(free_stage);
      };
      const int missing = kRing - 1 - (ahead - step), primed = missing < whole ? missing : whole;
#pragma unroll 1
      for (int i = 0; i < primed; ++i) copy();
#pragma unroll 1
      for (int i = primed; i < whole; ++i) {
        arrive();
        copy();
        multiply<G, A, B>(acc, workspace.a(stage), workspace.b(stage));
        next(stage);
      }
      ahead += whole;
      step += whole - primed;
    } else {
      const bool full = ahead - step == kRing - 1;
      if (full) arrive();
      if (ahead < last) {
        LoadA::load(workspace.a(free_stage), problem.a, batch, row, problem.rows, k, problem.depth);
        LoadB::load(workspace.b(free_stage), problem.b, batch, column, problem.columns, k, problem.depth);
      }
      commit_copies();
      next(free_stage);
      ++ahead;
      if (full) {
        multiply<G, A, B>(acc, workspace.a(stage), workspace.b(stage));
        next(stage);
        ++step;
      }
    }
  }
  wait_copies<0>();
  sync_block();
}

// use(row, column, values) for every vector of 16 bytes of T of the tile, rows and columns counted in the tile. A warp
// turns its fragments into rows in its patch, 16 of them at a time.
template <class G, Along A, Along B, class Use, class T = typename G::T>
__device__ __forceinline__ void for_each_vector(const Workspace<G, A, B>& workspace,
                                                const typename G::Accumulators& acc, const Use& use) {
  using W = Workspace<G, A, B>;
  constexpr int kVector = 16 / sizeof(T), kPerRow = G::kWarpColumns / kVector;
  const Shared<float> patch = workspace.patch();
  const Place2d warp = warp_place<G>();
#pragma unroll
  for (int i = 0; i < G::kDown; ++i) {
    sync_warp();
#pragma unroll
    for (int j = 0; j < G::kAcross; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const Place2d at = place(0, j, e);
        patch.template store_vec<2>(at.row * W::kPatchLine + at.column, Vec<float, 2>{{acc[i][j][e], acc[i][j][e + 1]}});
      }
    sync_warp();
#pragma unroll 1
    for (int p = threadIdx.x % 32; p < 16 * kPerRow; p += 32) {
      const int row = p / kPerRow, column = p % kPerRow * kVector;
      Vec<float, kVector> values;
#pragma unroll
      for (int j = 0; j < kVector; j += 4) {
        const auto four = patch.template load_vec<4>(row * W::kPatchLine + column + j);
#pragma unroll
        for (int e = 0; e < 4; ++e) values[j + e] = four[e];
      }
      use(warp.row + i * 16 + row, warp.column + column, values);
    }
  }
}

// The part of a surface's row at (row, column) that lies within `columns`: whole vectors in one access.
template <class T, int N>
__device__ __forceinline__ Vec<float, N> read_row(const Surface<const T>& surface, int batch, int row, int column,
                                                  int columns) {
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

// Floats at consecutive places of a row of `columns` that `column` is the first of: in vectors where rows allow it.
template <int N>
__device__ __forceinline__ void store_floats(Global<float> to, const Vec<float, N>& values, int columns,
                                             int column) {
  if (columns % 4 == 0) {  // then a vector of four lies within the row or beyond it
#pragma unroll
    for (int i = 0; i < N; i += 4)
      if (column + i < columns)
        to.template store_vec<4>(i, Vec<float, 4>{{values[i], values[i + 1], values[i + 2], values[i + 3]}});
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (column + i < columns) to.store(i, values[i]);
}

template <class T, int N>
__device__ __forceinline__ void write_row(const Surface<T>& surface, int batch, int row, int column, int columns,
                                          const Vec<float, N>& values) {
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

// What the attention kernels share: tiles of rows of heads in shared memory, products on fragments, head dimensions.
//
// A block holds rows of one side and walks over tiles of the other. Each warp has one or two fragments of 16 held rows:
// with two, what it reads of the walked tiles serves both. A head dimension D takes exactly D columns in the products
// that give D numbers, and D rounded up to 16 in those that sum over D, the rest being zeros in shared memory.
#pragma once
#include <stdexcept>
#include <type_traits>

#include "device/fragments.cuh"
#include "device/launch.cuh"
#include "device/math.cuh"
#include "device/sync.cuh"
#include "device/tiles.cuh"

namespace cnk::attention {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The compile-time shape of a kernel: head dimension, warps of a block, fragments of 16 rows of a warp, and rows of the
// tiles that it walks over.
template <class Type, int HEAD_DIM, int WARPS, int FRAGMENTS>
struct Head {
  using T = Type;
  static constexpr int D = HEAD_DIM, kFragments = FRAGMENTS;
  static constexpr int kThreads = WARPS * 32, kRowsPerWarp = FRAGMENTS * 16, kRows = WARPS * kRowsPerWarp;
  static constexpr int kDepth = (D + 15) / 16 * 16;
  static constexpr int kLine = kDepth + 8;        // an odd multiple of 16 bytes
  static constexpr int kWalk = D > 80 ? 32 : 64;  // what fits in registers beside the accumulators
};

// A tensor [batch, length, heads, D] as one kernel reads or writes it.
template <class T>
struct Rows {
  Global<T> data;
  int64_t batch, row, head;
  bool vectors;

  explicit Rows(const HeadTensor& tensor)
      : data{reinterpret_cast<T*>(tensor.address)},
        batch(tensor.batch),
        row(tensor.row),
        head(tensor.head),
        vectors(tensor.address % 16 == 0 && tensor.batch % 8 == 0 && tensor.row % 8 == 0 && tensor.head % 8 == 0) {}

  __device__ __forceinline__ Global<T> at(int64_t b, int64_t h, int64_t r) const {
    return data + (b * batch + h * head + r * row);
  }
};

template <class T>
struct Problem {
  Rows<const T> q, k, v, out, dout;
  Rows<T> write_out, dq, dk, dv;
  Global<float> lse, delta;  // [batch, heads, q_length]
  int64_t heads, q_length, k_length;
  float scale;

  explicit Problem(const Attention& call)
      : q(call.q),
        k(call.k),
        v(call.v),
        out(call.out),
        dout(call.dout),
        write_out(call.out),
        dq(call.dq),
        dk(call.dk),
        dv(call.dv),
        lse{reinterpret_cast<float*>(call.lse)},
        delta{reinterpret_cast<float*>(call.delta)},
        heads(call.heads),
        q_length(call.q_length),
        k_length(call.k_length),
        scale(call.scale) {}
};

// Which rows of which head a block works on; tiles of a head are neighbours, so that they share what they walk over in
// the L2 cache.
struct BlockOf {
  int64_t batch, head, first;
  __device__ __forceinline__ BlockOf(int64_t heads, int64_t length, int rows) {
    const unsigned tiles = static_cast<unsigned>(ceil_div<int64_t>(length, rows));
    const unsigned pair = blockIdx.x / tiles;
    first = static_cast<int64_t>(blockIdx.x % tiles) * rows;
    batch = pair / static_cast<unsigned>(heads);
    head = pair % static_cast<unsigned>(heads);
  }
};

template <class H>
__device__ __forceinline__ int first_row_of_warp() {
  return static_cast<int>(threadIdx.x) / 32 * H::kRowsPerWarp;
}

// The rows that a block holds. The padding of `tile` must be zeros already.
template <class H, class T = typename H::T>
__device__ __forceinline__ void load_held(Shared<T> tile, const Rows<const T>& rows, const BlockOf& block,
                                          int64_t length) {
  load_tile<H::kRows, H::D, H::kThreads>(tile, H::kLine, rows.at(block.batch, block.head, block.first), rows.row,
                                         length - block.first, H::D, rows.vectors);
}

template <class H, int ROWS, class T = typename H::T>
__device__ __forceinline__ void clear_padding(Shared<T> tile) {
  clear_columns<ROWS, H::D, H::kDepth, H::kThreads>(tile, H::kLine);
}

// Two tensors that a block walks over side by side, in two stages: k and v, or q and dout.
template <class H, class T = typename H::T>
class Walk {
 public:
  static constexpr int kTile = H::kWalk * H::kLine;
  static constexpr size_t kBytes = Arena::bytes<T>(4 * kTile);

  __device__ __forceinline__ Walk(Arena& arena, const char* name, const Rows<const T>& first,
                                  const Rows<const T>& second, const BlockOf& block, int64_t length)
      : tiles_(arena.take<T>(4 * kTile, name)),
        first_(first),
        second_(second),
        batch_(block.batch),
        head_(block.head),
        length_(length),
        first_stream_(first.at(batch_, head_, 0), first.row),
        second_stream_(second.at(batch_, head_, 0), second.row) {
    clear_padding<H, 4 * H::kWalk>(tiles_);
  }

  __device__ __forceinline__ int steps() const { return static_cast<int>(ceil_div<int64_t>(length_, H::kWalk)); }

  // Steps from the first whose own tile and the next are whole, and can be copied in vectors.
  __device__ __forceinline__ int whole_steps() const {
    return first_.vectors && second_.vectors ? static_cast<int>(length_ / H::kWalk) - 1 : 0;
  }

  __device__ __forceinline__ Shared<T> tile(int stage, int i) const {
    return tiles_.slice((stage * 2 + i) * kTile, kTile);
  }

  // Starts to copy tile `step`: the tiles must be asked for one after the other, and those that are not WHOLE may be
  // ragged or not there at all.
  template <bool WHOLE>
  __device__ __forceinline__ void load(int step, int stage) {
    const Shared<T> one = tile(stage, 0), two = tile(stage, 1);
    if constexpr (WHOLE) {
      first_stream_.copy_tile(one);
      second_stream_.copy_tile(two);
    } else {
      const int64_t at = static_cast<int64_t>(step) * H::kWalk;
      if (at < length_) {
        load_edge(one, first_, at);
        load_edge(two, second_, at);
      }
      first_stream_.skip_tile();
      second_stream_.skip_tile();
    }
    commit_copies();
  }

 private:
  __device__ __forceinline__ void load_edge(Shared<T> tile, const Rows<const T>& rows, int64_t at) const {
    load_tile<H::kWalk, H::D, H::kThreads>(tile, H::kLine, rows.at(batch_, head_, at), rows.row, length_ - at, H::D,
                                           rows.vectors);
  }

  Shared<T> tiles_;
  const Rows<const T>&first_, &second_;
  int64_t batch_, head_, length_;
  TileStream<H::kWalk, H::D, H::kLine, H::kThreads, T> first_stream_, second_stream_;
};

// body(whole, step, stage) for every tile of a walk, `whole` a compile-time true where this tile is whole and load() of
// the next one may be, too. The first tile must have been asked for.
template <class W, class Body>
__device__ __forceinline__ void for_each_step(const W& walk, const Body& body) {
  const int steps = walk.steps(), whole = walk.whole_steps();
  int step = 0, stage = 0;
#pragma unroll 1
  for (; step < whole; ++step, stage ^= 1) body(std::true_type{}, step, stage);
#pragma unroll 1
  for (; step < steps; ++step, stage ^= 1) body(std::false_type{}, step, stage);
  wait_copies<0>();
}

// C fragments of the rows of a warp.
template <class H, int COLUMNS>
using Accumulators = float[H::kFragments][COLUMNS / 8][4];

// c[rows of the warp][COLUMNS] += a[those rows][depth] * b[COLUMNS][depth]^T, both tiles along depth.
template <class H, int COLUMNS, class T = typename H::T>
__device__ __forceinline__ void multiply_depth(Accumulators<H, COLUMNS>& c, Shared<T> a, Shared<T> b) {
  const int row0 = first_row_of_warp<H>();
#pragma unroll
  for (int k = 0; k < H::kDepth; k += 16) {
    uint32_t left[H::kFragments][4];
#pragma unroll
    for (int m = 0; m < H::kFragments; ++m) load_left<Along::depth>(left[m], a, H::kLine, row0 + m * 16, k);
#pragma unroll
    for (int n = 0; n < COLUMNS; n += 16) {
      uint32_t right[2][2];
      load_right_pair<Along::depth>(right[0], right[1], b, H::kLine, n, k);
#pragma unroll
      for (int m = 0; m < H::kFragments; ++m) {
        mma<T>(c[m][n / 8], left[m], right[0]);
        mma<T>(c[m][n / 8 + 1], left[m], right[1]);
      }
    }
  }
}

// c[rows of the warp][D] += a[those rows][COUNT] * b[COUNT][D], a given as C fragments in float32.
template <class H, int COUNT, class T = typename H::T>
__device__ __forceinline__ void multiply_rows(Accumulators<H, H::D>& c, const Accumulators<H, COUNT>& a, Shared<T> b) {
#pragma unroll
  for (int k = 0; k < COUNT; k += 16) {
    uint32_t left[H::kFragments][4];
#pragma unroll
    for (int m = 0; m < H::kFragments; ++m) {
      const float(&low)[4] = a[m][k / 8], (&high)[4] = a[m][k / 8 + 1];
      left[m][0] = pack<T>(low[0], low[1]);
      left[m][1] = pack<T>(low[2], low[3]);
      left[m][2] = pack<T>(high[0], high[1]);
      left[m][3] = pack<T>(high[2], high[3]);
    }
#pragma unroll
    for (int n = 0; n + 16 <= H::D; n += 16) {
      uint32_t right[2][2];
      load_right_pair<Along::index>(right[0], right[1], b, H::kLine, n, k);
#pragma unroll
      for (int m = 0; m < H::kFragments; ++m) {
        mma<T>(c[m][n / 8], left[m], right[0]);
        mma<T>(c[m][n / 8 + 1], left[m], right[1]);
      }
    }
    if constexpr (H::D % 16 != 0) {
      uint32_t right[2];
      load_right<Along::index>(right, b, H::kLine, H::D - 8, k);
#pragma unroll
      for (int m = 0; m < H::kFragments; ++m) mma<T>(c[m][H::D / 8 - 1], left[m], right);
    }
  }
}

// Writes the rows of this warp through its rows of `tile`, in vectors where the tensor allows it: `factor(m, r)` times
// row lane / 4 + 8 r of fragment m. The tile must be done with by every lane of the warp.
template <class H, class Factor, class T = typename H::T>
__device__ __forceinline__ void store_rows(const Rows<T>& rows, const BlockOf& block, int64_t length, Shared<T> tile,
                                           const Accumulators<H, H::D>& c, const Factor& factor) {
  const int lane = threadIdx.x % 32, row0 = first_row_of_warp<H>();
  sync_warp();
#pragma unroll
  for (int m = 0; m < H::kFragments; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float by = factor(m, r);
#pragma unroll
      for (int n = 0; n < H::D / 8; ++n) {
        const Vec<T, 2> two = {{from_float<T>(c[m][n][r * 2] * by), from_float<T>(c[m][n][r * 2 + 1] * by)}};
        tile.template store_vec<2>((row0 + m * 16 + lane / 4 + r * 8) * H::kLine + n * 8 + lane % 4 * 2, two);
      }
    }
  sync_warp();
  constexpr int kPieces = H::D / 8;
#pragma unroll 1
  for (int p = lane; p < H::kRowsPerWarp * kPieces; p += 32) {
    const int row = row0 + p / kPieces, column = p % kPieces * 8;
    if (block.first + row >= length) continue;
    const auto piece = tile.template load_vec<8>(row * H::kLine + column);
    const Global<T> to = rows.at(block.batch, block.head, block.first + row);
    if (rows.vectors)
      to.template store_vec<8>(column, piece);
    else
      for (int i = 0; i < 8; ++i) to.store(column + i, piece[i]);
  }
}

// A dtype and a head dimension, from which a launcher makes the Head of each kernel.
template <class Type, int HEAD_DIM>
struct Kind {
  using T = Type;
  static constexpr int D = HEAD_DIM;
  using Short = Head<T, D, 4, 1>;                                              // 64 rows
  using Tall = std::conditional_t<D <= 64, Head<T, D, 4, 2>, Head<T, D, 8, 1>>;  // 128 rows, as registers allow
};

template <class T, class Run>
void with_head_dim(const char* name, int head_dim, const Run& run) {
  if (head_dim == 40)
    run(Kind<T, 40>{});
  else if (head_dim == 64)
    run(Kind<T, 64>{});
  else if (head_dim == 80)
    run(Kind<T, 80>{});
  else if (head_dim == 128)
    run(Kind<T, 128>{});
  else if (head_dim == 160)
    run(Kind<T, 160>{});
  else
    throw std::runtime_error(std::string(name) + ": no kernel for head dimension " + std::to_string(head_dim));
}

// run(Kind<T, D>{}) for the dtype and head dimension of a call.
template <class Run>
void with_kind(const char* name, const Attention& call, const Run& run) {
  if (call.dtype == Dtype::float16)
    with_head_dim<f16>(name, call.head_dim, run);
  else if (call.dtype == Dtype::bfloat16)
    with_head_dim<bf16>(name, call.head_dim, run);
  else
    throw std::runtime_error(std::string(name) + ": no kernel for float32");
}

inline int64_t blocks(const Attention& call, int64_t length, int rows) {
  return call.batch * call.heads * ceil_div<int64_t>(length, rows);
}

}  // namespace cnk::attention

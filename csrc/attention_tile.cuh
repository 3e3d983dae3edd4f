// What the attention kernels share: tiles of rows of heads in shared memory, products on fragments, head dimensions.
//
// Every kernel has four warps, each with 16 rows of its block's tile of 64. A head dimension D takes exactly D columns
// in the products that give D numbers, and D rounded up to 16 in those that sum over D, the rest being zeros in shared
// memory.
#pragma once
#include <stdexcept>

#include "device/fragments.cuh"
#include "device/launch.cuh"
#include "device/math.cuh"
#include "device/sync.cuh"

namespace cnk::attention {

constexpr int kThreads = 128, kRows = 64;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The compile-time shape of a kernel: head dimension, and rows of the tiles that it walks over.
template <class Type, int HEAD_DIM>
struct Head {
  using T = Type;
  static constexpr int D = HEAD_DIM;
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

// Which rows of which head a block works on; tiles of a head are neighbours, so that they share k and v in the L2
// cache.
struct BlockOf {
  int64_t batch, head, first;
  __device__ __forceinline__ BlockOf(int64_t heads, int64_t length) {
    const unsigned tiles = static_cast<unsigned>(ceil_div<int64_t>(length, kRows));
    const unsigned pair = blockIdx.x / tiles;
    first = static_cast<int64_t>(blockIdx.x % tiles) * kRows;
    batch = pair / static_cast<unsigned>(heads);
    head = pair % static_cast<unsigned>(heads);
  }
};

template <class H, int ROWS, class T = typename H::T>
__device__ __forceinline__ void load_rows(Shared<T> tile, const Rows<const T>& rows, const BlockOf& block,
                                          int64_t first, int64_t length) {
  load_tile<ROWS, H::kDepth, kThreads>(tile, H::kLine, rows.at(block.batch, block.head, first), rows.row,
                                       length - first, H::D, rows.vectors);
}

// c[16][COLUMNS] += a[16 rows from row0][depth] * b[COLUMNS][depth]^T, both tiles along depth.
template <class H, int COLUMNS, class T = typename H::T>
__device__ __forceinline__ void multiply_depth(float (&c)[COLUMNS / 8][4], Shared<T> a, int row0, Shared<T> b) {
#pragma unroll
  for (int k = 0; k < H::kDepth; k += 16) {
    uint32_t left[4];
    load_left<Along::depth>(left, a, H::kLine, row0, k);
#pragma unroll
    for (int n = 0; n < COLUMNS; n += 16) {
      uint32_t right[2][2];
      load_right_pair<Along::depth>(right[0], right[1], b, H::kLine, n, k);
      mma<T>(c[n / 8], left, right[0]);
      mma<T>(c[n / 8 + 1], left, right[1]);
    }
  }
}

// c[16][D] += a[16][COUNT] * b[COUNT][D], a given as C fragments in float32.
template <class H, int COUNT, class T = typename H::T>
__device__ __forceinline__ void multiply_rows(float (&c)[H::D / 8][4], const float (&a)[COUNT / 8][4], Shared<T> b) {
#pragma unroll
  for (int k = 0; k < COUNT; k += 16) {
    const float (&low)[4] = a[k / 8], (&high)[4] = a[k / 8 + 1];
    const uint32_t left[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]),
                              pack<T>(high[2], high[3])};
#pragma unroll
    for (int n = 0; n + 16 <= H::D; n += 16) {
      uint32_t right[2][2];
      load_right_pair<Along::index>(right[0], right[1], b, H::kLine, n, k);
      mma<T>(c[n / 8], left, right[0]);
      mma<T>(c[n / 8 + 1], left, right[1]);
    }
    if constexpr (H::D % 16 != 0) {
      uint32_t right[2];
      load_right<Along::index>(right, b, H::kLine, H::D - 8, k);
      mma<T>(c[H::D / 8 - 1], left, right);
    }
  }
}

// Writes this warp's 16 rows of accumulators through its rows of `tile`, in vectors where the tensor allows it. The
// tile must be done with by every lane of the warp.
template <class H, class T = typename H::T>
__device__ __forceinline__ void store_rows(const Rows<T>& rows, const BlockOf& block, int64_t length, Shared<T> tile,
                                           const float (&c)[H::D / 8][4]) {
  const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16;
  sync_warp();
#pragma unroll
  for (int n = 0; n < H::D / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Vec<T, 2> two = {{from_float<T>(c[n][half * 2]), from_float<T>(c[n][half * 2 + 1])}};
      tile.template store_vec<2>((row0 + lane / 4 + half * 8) * H::kLine + n * 8 + lane % 4 * 2, two);
    }
  sync_warp();
  constexpr int kPieces = H::D / 8;
  for (int p = lane; p < 16 * kPieces; p += 32) {
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

template <class T, class Run>
void with_head_dim(const char* name, int head_dim, const Run& run) {
  if (head_dim == 40)
    run(Head<T, 40>{});
  else if (head_dim == 64)
    run(Head<T, 64>{});
  else if (head_dim == 80)
    run(Head<T, 80>{});
  else if (head_dim == 128)
    run(Head<T, 128>{});
  else if (head_dim == 160)
    run(Head<T, 160>{});
  else
    throw std::runtime_error(std::string(name) + ": no kernel for head dimension " + std::to_string(head_dim));
}

// run(Head<T, D>{}) for the dtype and head dimension of a call.
template <class Run>
void with_head(const char* name, const Attention& call, const Run& run) {
  if (call.dtype == Dtype::float16)
    with_head_dim<f16>(name, call.head_dim, run);
  else if (call.dtype == Dtype::bfloat16)
    with_head_dim<bf16>(name, call.head_dim, run);
  else
    throw std::runtime_error(std::string(name) + ": no kernel for float32");
}

inline int64_t blocks(const Attention& call, int64_t length) {
  return call.batch * call.heads * ceil_div<int64_t>(length, kRows);
}

}  // namespace cnk::attention

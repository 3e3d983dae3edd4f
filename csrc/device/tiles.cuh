// Tiles of rows from global into shared memory.
#pragma once
#include "memory.cuh"

namespace cnk {

// Copies whole tiles of ROWS lines of WIDTH elements by cp.async, one tile after the other along a tensor. A thread
// keeps to one column of 16-byte pieces, so that a tile costs it one pointer and a multiple of the line's stride for
// every pass: no clamp, no division, no test but that of the last pass. Lines must start at multiples of 16 bytes.
template <int ROWS, int WIDTH, int LINE, int THREADS, class T>
class TileStream {
 public:
  static constexpr int kPiece = 16 / sizeof(T), kPieces = WIDTH / kPiece;
  static constexpr int kRowsPerPass = THREADS / kPieces < ROWS ? THREADS / kPieces : ROWS;
  static constexpr int kPasses = (ROWS + kRowsPerPass - 1) / kRowsPerPass;
  static_assert(WIDTH % kPiece == 0 && kPieces <= THREADS, "a line is whole pieces, at most one a thread");

  // The tile that `first_line` is the first line of is copied first.
  __device__ __forceinline__ TileStream(Global<const T> first_line, int64_t from_line)
      : row_(static_cast<int>(threadIdx.x) / kPieces),
        column_(static_cast<int>(threadIdx.x) % kPieces * kPiece),
        from_(first_line + (row_ * from_line + column_)),
        pass_(kRowsPerPass * from_line),
        tile_(ROWS * from_line) {}

  __device__ __forceinline__ void skip_tile() { from_ = from_ + tile_; }

  __device__ __forceinline__ void copy_tile(Shared<T> tile) {
    Global<const T> from = from_;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      constexpr bool kAllThreads = THREADS == kRowsPerPass * kPieces;
      const bool last = pass + 1 == kPasses && ROWS % kRowsPerPass != 0;
      if ((kAllThreads || row_ < kRowsPerPass) && (!last || row_ < ROWS % kRowsPerPass))
        copy_async_piece(tile, (row_ + pass * kRowsPerPass) * LINE + column_, from);
      if (pass + 1 < kPasses) from = from + pass_;
    }
    skip_tile();
  }

 private:
  int row_, column_;
  Global<const T> from_;
  int64_t pass_, tile_;
};

// The same for one tile of a matrix product that may end within the tensor's edge, tile after tile along the depth: lines
// and columns beyond the edge are read from the last ones that are there, which gives products that nobody uses.
template <int ROWS, int WIDTH, int LINE, int THREADS, class T>
class EdgeStream {
 public:
  static constexpr int kPiece = 16 / sizeof(T), kPieces = WIDTH / kPiece;
  static constexpr int kRowsPerPass = THREADS / kPieces < ROWS ? THREADS / kPieces : ROWS;
  static constexpr int kPasses = (ROWS + kRowsPerPass - 1) / kRowsPerPass;
  static_assert(WIDTH % kPiece == 0 && kPieces <= THREADS, "a line is whole pieces, at most one a thread");

  // `advance` elements from one tile to the next. valid_width is a multiple of 16 bytes.
  __device__ __forceinline__ EdgeStream(Global<const T> first_line, int64_t from_line, int valid_rows,
                                        int valid_width, int64_t advance)
      : row_(static_cast<int>(threadIdx.x) / kPieces), advance_(advance) {
    const int column = static_cast<int>(threadIdx.x) % kPieces * kPiece;
    to_ = row_ * LINE + column;
    const int last = (valid_width < WIDTH ? valid_width : WIDTH) - kPiece, rows = valid_rows < ROWS ? valid_rows : ROWS;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = row_ + pass * kRowsPerPass;
      from_[pass] = first_line + ((row < rows ? row : rows - 1) * from_line + (column < last ? column : last));
    }
  }

  __device__ __forceinline__ void copy_tile(Shared<T> tile) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      constexpr bool kAllThreads = THREADS == kRowsPerPass * kPieces;
      const bool last = pass + 1 == kPasses && ROWS % kRowsPerPass != 0;
      if ((kAllThreads || row_ < kRowsPerPass) && (!last || row_ < ROWS % kRowsPerPass))
        copy_async_piece(tile, to_ + pass * kRowsPerPass * LINE, from_[pass]);
      from_[pass] = from_[pass] + advance_;
    }
  }

 private:
  int row_, to_;
  int64_t advance_;
  Global<const T> from_[kPasses];
};

// Copies a tile of ROWS lines of WIDTH elements into shared memory, zeros where the source ends: asynchronously in
// 16-byte pieces if `vectors`, else element by element. All THREADS threads of the block take part. For the tiles at
// the edges: a whole tile in a loop is a TileStream's.
template <int ROWS, int WIDTH, int THREADS, class T>
__device__ __forceinline__ void load_tile(Shared<T> tile, int line, Global<const T> from, int64_t from_line,
                                          int64_t valid_rows, int64_t valid_width, bool vectors) {
  constexpr int kPiece = 16 / sizeof(T), kPieces = WIDTH / kPiece;
  static_assert(WIDTH % kPiece == 0, "a tile's line is whole 16-byte pieces");
  const int rows = valid_rows < ROWS ? static_cast<int>(valid_rows) : ROWS;
  const int width = valid_width < WIDTH ? static_cast<int>(valid_width) : WIDTH;
#pragma unroll 1
  for (int p = threadIdx.x; p < ROWS * kPieces; p += THREADS) {
    const int row = p / kPieces, column = p % kPieces * kPiece, left = row < rows ? width - column : 0;
    const int valid = left < 0 ? 0 : left < kPiece ? left : kPiece;
    const int64_t at = valid ? row * from_line + column : 0;
    if (vectors) {
      copy_async(tile, row * line + column, from, at, valid);
    } else {
      Vec<T, kPiece> piece = {};
#pragma unroll
      for (int i = 0; i < kPiece; ++i)
        if (i < valid) piece[i] = from.load(at + i);
      tile.template store_vec<kPiece>(row * line + column, piece);
    }
  }
}

// Zeros in the columns from FIRST to LAST of a tile.
template <int ROWS, int FIRST, int LAST, int THREADS, class T>
__device__ __forceinline__ void clear_columns(Shared<T> tile, int line) {
  constexpr int kPiece = 16 / sizeof(T), kPieces = (LAST - FIRST) / kPiece;
  static_assert((LAST - FIRST) % kPiece == 0, "whole 16-byte pieces");
  if constexpr (kPieces > 0)
    for (int p = threadIdx.x; p < ROWS * kPieces; p += THREADS)
      tile.template store_vec<kPiece>(p / kPieces * line + FIRST + p % kPieces * kPiece, Vec<T, kPiece>{});
}

}  // namespace cnk

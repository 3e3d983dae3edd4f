// Fragments of mma.sync from tiles in shared memory, whichever way the tile lies.
//
// A tile is rows of `line` elements. `depth` is the dimension that a product sums over: a tile of Along::depth has it
// along its rows (element (i, k) at i * line + k), one of Along::index has it across them (at k * line + i). A line
// that is an odd multiple of 16 bytes keeps the eight rows of an ldmatrix in different banks.
#pragma once
#include "mma.cuh"

namespace cnk {

enum class Along { depth, index };

// The 16x16 left fragment at (i, k).
template <Along ALONG, class T>
__device__ __forceinline__ void load_left(uint32_t (&out)[4], Shared<T> tile, int line, int i, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (ALONG == Along::depth)
    load_matrices<4, false>(out, tile, (i + lane % 16) * line + k + lane / 16 * 8);
  else
    load_matrices<4, true>(out, tile, (k + lane % 8 + lane / 16 * 8) * line + i + lane / 8 % 2 * 8);
}

// Two neighbouring 16x8 right fragments at (k, i) and (k, i + 8).
template <Along ALONG, class T>
__device__ __forceinline__ void load_right_pair(uint32_t (&first)[2], uint32_t (&second)[2], Shared<T> tile, int line,
                                                int i, int k) {
  const int lane = threadIdx.x % 32;
  uint32_t out[4];
  if constexpr (ALONG == Along::depth)
    load_matrices<4, false>(out, tile, (i + lane % 8 + lane / 16 * 8) * line + k + lane / 8 % 2 * 8);
  else
    load_matrices<4, true>(out, tile, (k + lane % 16) * line + i + lane / 16 * 8);
  first[0] = out[0];
  first[1] = out[1];
  second[0] = out[2];
  second[1] = out[3];
}

// One 16x8 right fragment at (k, i).
template <Along ALONG, class T>
__device__ __forceinline__ void load_right(uint32_t (&out)[2], Shared<T> tile, int line, int i, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (ALONG == Along::depth)
    load_matrices<2, false>(out, tile, (i + lane % 8) * line + k + lane / 8 % 2 * 8);
  else
    load_matrices<2, true>(out, tile, (k + lane % 16) * line + i);
}

}  // namespace cnk

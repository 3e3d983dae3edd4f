// Attention forward with an online softmax: out = softmax(scale q k^T) v, and the log-sum-exp of every row.
//
// A block holds 128 rows of q, or 64 where that leaves multiprocessors idle, and walks over tiles of k and v, the next
// pair loading while one is worked on. The method is that of FlashAttention-2 (Dao, 2023), with exact tiles for the
// head dimensions. Scores stay as the products give them: their maximum is scaled once a row, and an element's scale
// and shift are one multiply-add into exp2. For that the scale must be positive: a negative one changes the sign of q.
#include "attention_tile.cuh"

namespace cnk {

namespace attention {
namespace {

// The running softmax of the rows that a thread has a part of: lane / 4 and lane / 4 + 8 of every fragment.
template <class H>
struct Softmax {
  float max[H::kFragments][2], sum[H::kFragments][2];
  float scale;  // of scores to exponents of 2, positive

  __device__ __forceinline__ explicit Softmax(float scale) : scale(scale) {
#pragma unroll
    for (int m = 0; m < H::kFragments; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        max[m][r] = -INFINITY;
        sum[m][r] = 0.0f;
      }
  }

  // Turns the scores of a tile into weights under the new maximum, and rescales what was summed before.
  __device__ __forceinline__ void update(Accumulators<H, H::kWalk>& s, Accumulators<H, H::D>& out) {
#pragma unroll
    for (int m = 0; m < H::kFragments; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = max[m][r];
#pragma unroll
        for (int n = 0; n < H::kWalk / 8; ++n) top = fmaxf(top, fmaxf(s[m][n][r * 2], s[m][n][r * 2 + 1]));
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        const float rescale = exp2_approx((max[m][r] - top) * scale), shift = top * scale;
        float part = 0.0f;
#pragma unroll
        for (int n = 0; n < H::kWalk / 8; ++n)
#pragma unroll
          for (int e = r * 2; e < r * 2 + 2; ++e) {
            s[m][n][e] = exp2_approx(fmaf(s[m][n][e], scale, -shift));
            part += s[m][n][e];
          }
        sum[m][r] = fmaf(sum[m][r], rescale, part);
        max[m][r] = top;
#pragma unroll
        for (int n = 0; n < H::D / 8; ++n) {
          out[m][n][r * 2] *= rescale;
          out[m][n][r * 2 + 1] *= rescale;
        }
      }
  }

  __device__ __forceinline__ float total(int m, int r) const {
    const float pair = sum[m][r] + shuffle_xor(sum[m][r], 1);
    return pair + shuffle_xor(pair, 2);
  }
};

// Scores of keys beyond the last become -inf.
template <class H>
__device__ __forceinline__ void mask_tail(Accumulators<H, H::kWalk>& s, int64_t left) {
  const int valid = left < H::kWalk ? static_cast<int>(left) : H::kWalk;
#pragma unroll
  for (int m = 0; m < H::kFragments; ++m)
#pragma unroll
    for (int n = 0; n < H::kWalk / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + e % 2 >= valid) s[m][n][e] = -INFINITY;
}

// The sign of every element of this warp's rows of a tile, changed; the rows must have arrived for the whole warp.
template <class H, class T = typename H::T>
__device__ __forceinline__ void negate_rows(Shared<T> tile) {
  constexpr int kPieces = H::D / 8;
#pragma unroll 1
  for (int p = threadIdx.x % 32; p < H::kRowsPerWarp * kPieces; p += 32) {
    const int at = (first_row_of_warp<H>() + p / kPieces) * H::kLine + p % kPieces * 8;
    auto piece = tile.template load_vec<8>(at);
#pragma unroll
    for (int i = 0; i < 8; ++i) piece[i].bits ^= 0x8000u;
    tile.template store_vec<8>(at, piece);
  }
}

constexpr float kLeastPositive = 1.4e-45f;  // stands for a scale of zero: exp2 of any score times it is 1

template <class H, class T = typename H::T>
__global__ void __launch_bounds__(H::kThreads, H::kThreads == 128 ? 2 : 1)
    attention_fwd_kernel(const __grid_constant__ Problem<T> problem) {
  Arena arena;
  const BlockOf block(problem.heads, problem.q_length, H::kRows);
  const Shared<T> q = arena.take<T>(H::kRows * H::kLine, "q tile");
  Walk<H> walk(arena, "k and v tiles", problem.k, problem.v, block, problem.k_length);
  clear_padding<H, H::kRows>(q);
  load_held<H>(q, problem.q, block, problem.q_length);
  walk.template load<false>(0, 0);
  if (problem.scale < 0.0f) {
    wait_copies<0>();
    sync_block();
    negate_rows<H>(q);
    sync_warp();
  }
  Softmax<H> softmax(fmaxf(fabsf(problem.scale) * kLog2E, kLeastPositive));
  Accumulators<H, H::D> out = {};
  for_each_step(walk, [&](auto whole, int step, int stage) {
    constexpr bool kWhole = decltype(whole)::value;
    wait_copies<0>();
    sync_block();  // the tiles have arrived, and all are done with those that are loaded next
    walk.template load<kWhole>(step + 1, stage ^ 1);
    Accumulators<H, H::kWalk> s = {};
    multiply_depth<H, H::kWalk>(s, q, walk.tile(stage, 0));
    if constexpr (!kWhole) mask_tail<H>(s, problem.k_length - static_cast<int64_t>(step) * H::kWalk);
    softmax.update(s, out);
    multiply_rows<H, H::kWalk>(out, s, walk.tile(stage, 1));
  });
  float share[H::kFragments][2];
#pragma unroll
  for (int m = 0; m < H::kFragments; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = softmax.total(m, r);
      share[m][r] = divide_approx(1.0f, total);
      const int lane = threadIdx.x % 32;
      const int64_t row = block.first + first_row_of_warp<H>() + m * 16 + lane / 4 + r * 8;
      if (lane % 4 == 0 && row < problem.q_length)
        problem.lse.store((block.batch * problem.heads + block.head) * problem.q_length + row,
                          softmax.max[m][r] * softmax.scale * kLn2 + logf(total));
    }
  store_rows<H>(problem.write_out, block, problem.q_length, q, out, [&](int m, int r) { return share[m][r]; });
}

template <class H>
void launch_forward(const Place& place, const Attention& call) {
  using T = typename H::T;
  constexpr const char* kName = "attention_fwd";
  const size_t shared = Arena::bytes<T>(H::kRows * H::kLine) + Walk<H>::kBytes;
  launch(kName, attention_fwd_kernel<H>, place, {blocks(call, call.q_length, H::kRows), H::kThreads, shared},
         Problem<T>(call));
}

}  // namespace
}  // namespace attention

void attention_fwd(const Place& place, const Attention& call) {
  using namespace attention;
  with_kind("attention_fwd", call, [&](auto kind) {
    using K = decltype(kind);
    if (blocks(call, call.q_length, K::Tall::kRows) >= 2 * limits_of(place).multiprocessors)
      launch_forward<typename K::Tall>(place, call);
    else
      launch_forward<typename K::Short>(place, call);
  });
}

}  // namespace cnk

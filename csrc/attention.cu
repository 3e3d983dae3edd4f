// Attention forward with an online softmax: out = softmax(scale q k^T) v, and the log-sum-exp of every row.
//
// A block holds 64 rows of q and walks over tiles of k and v, the next pair loading while one is worked on. Scores stay
// in registers in base 2. The method is that of FlashAttention-2 (Dao, 2023), with exact tiles for the head dimensions.
#include "attention_tile.cuh"

namespace cnk {

namespace attention {
namespace {

template <class H, class T = typename H::T>
struct Workspace {
  static constexpr int kHeld = kRows * H::kLine, kWalked = H::kWalk * H::kLine;
  Shared<T> q, walked_tiles;

  __device__ __forceinline__ explicit Workspace(Arena& arena)
      : q(arena.take<T>(kHeld, "q tile")), walked_tiles(arena.take<T>(4 * kWalked, "k and v tiles")) {}

  __device__ __forceinline__ Shared<T> k(int stage) const { return walked_tiles.slice(stage * 2 * kWalked, kWalked); }
  __device__ __forceinline__ Shared<T> v(int stage) const {
    return walked_tiles.slice((stage * 2 + 1) * kWalked, kWalked);
  }
  static size_t bytes() { return Arena::bytes<T>(kHeld) + Arena::bytes<T>(4 * kWalked); }
};

// The running softmax of the two rows that a thread has a part of: rows lane / 4 and lane / 4 + 8 of its warp's 16.
struct Softmax {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};

  // Turns scores into weights under the new maximum; rescale[r] is what becomes of everything summed before.
  template <int TILES>
  __device__ __forceinline__ void update(float (&s)[TILES][4], float (&rescale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = max[r];
#pragma unroll
      for (int n = 0; n < TILES; ++n) top = fmaxf(top, fmaxf(s[n][r * 2], s[n][r * 2 + 1]));
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      rescale[r] = exp2_approx(max[r] - top);
      float part = 0.0f;
#pragma unroll
      for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int e = r * 2; e < r * 2 + 2; ++e) {
          s[n][e] = exp2_approx(s[n][e] - top);
          part += s[n][e];
        }
      sum[r] = sum[r] * rescale[r] + part;
      max[r] = top;
    }
  }

  __device__ __forceinline__ float total(int r) const {
    const float pair = sum[r] + shuffle_xor(sum[r], 1);
    return pair + shuffle_xor(pair, 2);
  }
};

// Scores of keys beyond the last become -inf.
template <int TILES>
__device__ __forceinline__ void mask_tail(float (&s)[TILES][4], int64_t valid) {
#pragma unroll
  for (int n = 0; n < TILES; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + e % 2 >= valid) s[n][e] = -INFINITY;
}

template <class H, class T = typename H::T>
__global__ void __launch_bounds__(kThreads, 2) attention_fwd_kernel(const __grid_constant__ Problem<T> problem) {
  Arena arena;
  const Workspace<H> workspace(arena);
  const BlockOf block(problem.heads, problem.q_length);
  const int row0 = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
  const auto load = [&](int64_t first, int stage) {
    if (first < problem.k_length) {
      load_rows<H, H::kWalk>(workspace.k(stage), problem.k, block, first, problem.k_length);
      load_rows<H, H::kWalk>(workspace.v(stage), problem.v, block, first, problem.k_length);
    }
    commit_copies();
  };
  load_rows<H, kRows>(workspace.q, problem.q, block, block.first, problem.q_length);
  load(0, 0);
  Softmax softmax;
  float out[H::D / 8][4] = {};
  int stage = 0;
  for (int64_t first = 0; first < problem.k_length; first += H::kWalk, stage ^= 1) {
    wait_copies<0>();
    sync_block();  // the tiles have arrived, and all are done with those that are loaded next
    load(first + H::kWalk, stage ^ 1);
    float s[H::kWalk / 8][4] = {};
    multiply_depth<H, H::kWalk>(s, workspace.q, row0, workspace.k(stage));
#pragma unroll
    for (int n = 0; n < H::kWalk / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] *= problem.scale * kLog2E;
    if (first + H::kWalk > problem.k_length) mask_tail(s, problem.k_length - first);
    float rescale[2];
    softmax.update(s, rescale);
#pragma unroll
    for (int n = 0; n < H::D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] *= rescale[e / 2];
    multiply_rows<H, H::kWalk>(out, s, workspace.v(stage));
  }
  wait_copies<0>();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = softmax.total(r), share = divide_approx(1.0f, total);
#pragma unroll
    for (int n = 0; n < H::D / 8; ++n) {
      out[n][r * 2] *= share;
      out[n][r * 2 + 1] *= share;
    }
    const int64_t row = block.first + row0 + lane / 4 + r * 8;
    if (lane % 4 == 0 && row < problem.q_length)
      problem.lse.store((block.batch * problem.heads + block.head) * problem.q_length + row,
                        softmax.max[r] * kLn2 + logf(total));
  }
  store_rows<H>(problem.write_out, block, problem.q_length, workspace.q, out);
}

}  // namespace
}  // namespace attention

void attention_fwd(const Place& place, const Attention& call) {
  using namespace attention;
  constexpr const char* kName = "attention_fwd";
  with_head(kName, call, [&](auto head) {
    using H = decltype(head);
    launch(kName, attention_fwd_kernel<H>, place, {blocks(call, call.q_length), kThreads, Workspace<H>::bytes()},
           Problem<typename H::T>(call));
  });
}

}  // namespace cnk

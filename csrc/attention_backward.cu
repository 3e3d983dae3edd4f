// Attention backward. With P = softmax(scale q k^T) recomputed from the saved log-sum-exp, dP = dout v^T and
// delta = rowsum(out * dout):
//   dv = P^T dout      dS = P * (dP - delta)      dq = scale dS k      dk = scale dS^T q
//
// dq has a kernel of its own that holds rows of q and walks over k and v, dk and dv one that holds rows of k and v and
// walks over q and dout. P is computed twice, but no two blocks ever add to the same place: the result is the same bits
// every time, without atomics, and what is not asked for is not computed.
#include "attention_tile.cuh"

namespace cnk {

namespace attention {
namespace {

constexpr const char* kName = "attention_bwd";

// delta as the diagonal of dout out^T, summed by the same instructions in the same order as dP: where a row has one
// key, out is v and the difference of the two is exactly zero.
template <class H, class T = typename H::T>
__global__ void __launch_bounds__(H::kThreads) attention_bwd_delta_kernel(const __grid_constant__ Problem<T> problem) {
  static_assert(H::kFragments == 1, "one diagonal a warp");
  Arena arena;
  const Shared<T> dout = arena.take<T>(H::kRows * H::kLine, "dout tile"),
                  out = arena.take<T>(H::kRows * H::kLine, "out tile");
  const BlockOf block(problem.heads, problem.q_length, H::kRows);
  clear_padding<H, H::kRows>(dout);
  clear_padding<H, H::kRows>(out);
  load_held<H>(dout, problem.dout, block, problem.q_length);
  load_held<H>(out, problem.out, block, problem.q_length);
  commit_copies();
  wait_copies<0>();
  sync_block();
  const int row0 = first_row_of_warp<H>(), row = threadIdx.x % 32 / 4;
  Accumulators<H, 16> c = {};
  multiply_depth<H, 16>(c, dout, out.slice(row0 * H::kLine, 16 * H::kLine));
  if (static_cast<int>(threadIdx.x) % 4 != row / 2) return;  // another lane has this row's diagonal
  const int64_t first = (block.batch * problem.heads + block.head) * problem.q_length;
  const int64_t low = block.first + row0 + row, high = low + 8;
  if (low < problem.q_length) problem.delta.store(first + low, row % 2 ? c[0][0][1] : c[0][0][0]);
  if (high < problem.q_length) problem.delta.store(first + high, row % 2 ? c[0][1][3] : c[0][1][2]);
}

// Two tiles that a block holds, and what it walks over.
template <class H, class T = typename H::T>
struct Workspace {
  static constexpr int kHeld = H::kRows * H::kLine;
  static constexpr size_t kBytes = Arena::bytes<T>(2 * kHeld) + Walk<H>::kBytes;
  Shared<T> held_tiles;
  Walk<H> walk;

  __device__ __forceinline__ Workspace(Arena& arena, const Rows<const T>& held_first, const Rows<const T>& held_second,
                                       int64_t held_length, const Rows<const T>& first, const Rows<const T>& second,
                                       int64_t length, const BlockOf& block)
      : held_tiles(arena.take<T>(2 * kHeld, "held tiles")),
        walk(arena, "walked tiles", first, second, block, length) {
    clear_padding<H, 2 * H::kRows>(held_tiles);
    load_held<H>(held(0), held_first, block, held_length);
    load_held<H>(held(1), held_second, block, held_length);
  }

  __device__ __forceinline__ Shared<T> held(int i) const { return held_tiles.slice(i * kHeld, kHeld); }
};

// dq: rows of q and dout are held, k and v walked over.
template <class H, class T = typename H::T>
__global__ void __launch_bounds__(H::kThreads, 2) attention_bwd_dq_kernel(const __grid_constant__ Problem<T> problem) {
  Arena arena;
  const BlockOf block(problem.heads, problem.q_length, H::kRows);
  Workspace<H> tiles(arena, problem.q, problem.dout, problem.q_length, problem.k, problem.v, problem.k_length, block);
  tiles.walk.template load<false>(0, 0);
  const int lane = threadIdx.x % 32;
  const float scale = problem.scale * kLog2E;
  float lse[H::kFragments][2], delta[H::kFragments][2];
#pragma unroll
  for (int m = 0; m < H::kFragments; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = block.first + first_row_of_warp<H>() + m * 16 + lane / 4 + r * 8;
      const int64_t at = (block.batch * problem.heads + block.head) * problem.q_length + row;
      lse[m][r] = row < problem.q_length ? problem.lse.load(at) * kLog2E : 0.0f;
      delta[m][r] = row < problem.q_length ? problem.delta.load(at) : 0.0f;
    }
  Accumulators<H, H::D> dq = {};
  for_each_step(tiles.walk, [&](auto whole, int step, int stage) {
    constexpr bool kWhole = decltype(whole)::value;
    wait_copies<0>();
    sync_block();  // the tiles have arrived, and all are done with those that are loaded next
    tiles.walk.template load<kWhole>(step + 1, stage ^ 1);
    const int64_t left = problem.k_length - static_cast<int64_t>(step) * H::kWalk;
    const int valid = left < H::kWalk ? static_cast<int>(left) : H::kWalk;
    Accumulators<H, H::kWalk> s = {}, dp = {};
    multiply_depth<H, H::kWalk>(s, tiles.held(0), tiles.walk.tile(stage, 0));
    multiply_depth<H, H::kWalk>(dp, tiles.held(1), tiles.walk.tile(stage, 1));
#pragma unroll
    for (int m = 0; m < H::kFragments; ++m)
#pragma unroll
      for (int n = 0; n < H::kWalk / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float p = exp2_approx(fmaf(s[m][n][e], scale, -lse[m][e / 2]));
          s[m][n][e] = p * (dp[m][n][e] - delta[m][e / 2]);
          if (!kWhole && n * 8 + lane % 4 * 2 + e % 2 >= valid) s[m][n][e] = 0.0f;
        }
    multiply_rows<H, H::kWalk>(dq, s, tiles.walk.tile(stage, 0));
  });
  store_rows<H>(problem.dq, block, problem.q_length, tiles.held(0), dq, [&](int, int) { return problem.scale; });
}

// The walked rows' numbers of both stages in shared memory: log-sum-exp in base 2 and delta.
template <class H>
struct Numbers {
  static constexpr size_t kBytes = Arena::bytes<float>(4 * H::kWalk);
  Shared<float> all;

  __device__ __forceinline__ explicit Numbers(Arena& arena) : all(arena.take<float>(4 * H::kWalk, "lse and delta")) {}
  __device__ __forceinline__ Shared<float> lse(int stage) const { return all.slice(stage * 2 * H::kWalk, H::kWalk); }
  __device__ __forceinline__ Shared<float> delta(int stage) const {
    return all.slice((stage * 2 + 1) * H::kWalk, H::kWalk);
  }

  // Those of the rows from `row` on; a row that is not there has no weight.
  template <bool WHOLE, bool DELTA>
  __device__ __forceinline__ void load(int stage, Global<const float> lse_rows, Global<const float> delta_rows,
                                       int64_t row, int64_t length) const {
    const int thread = threadIdx.x;
    if (thread >= H::kWalk) return;
    const bool valid = WHOLE || row + thread < length;
    lse(stage).store(thread, valid ? lse_rows.load(row + thread) * kLog2E : INFINITY);
    if (DELTA) delta(stage).store(thread, valid ? delta_rows.load(row + thread) : 0.0f);
  }
};

// dk and dv, or one of them: rows of k and v are held, q and dout walked over, scores transposed.
template <class H, bool DK, bool DV, class T = typename H::T>
__global__ void __launch_bounds__(H::kThreads, 2)
    attention_bwd_dkdv_kernel(const __grid_constant__ Problem<T> problem) {
  Arena arena;
  const BlockOf block(problem.heads, problem.k_length, H::kRows);
  Workspace<H> tiles(arena, problem.k, problem.v, problem.k_length, problem.q, problem.dout, problem.q_length, block);
  const Numbers<H> numbers(arena);
  const int64_t first_number = (block.batch * problem.heads + block.head) * problem.q_length;
  const Global<const float> lse_rows = {problem.lse.pointer + first_number},
                            delta_rows = {problem.delta.pointer + first_number};
  tiles.walk.template load<false>(0, 0);
  numbers.template load<false, DK>(0, lse_rows, delta_rows, 0, problem.q_length);
  const int lane = threadIdx.x % 32;
  const float scale = problem.scale * kLog2E;
  Accumulators<H, DK ? H::D : 8> dk = {};
  Accumulators<H, DV ? H::D : 8> dv = {};
  for_each_step(tiles.walk, [&](auto whole, int step, int stage) {
    constexpr bool kWhole = decltype(whole)::value;
    wait_copies<0>();
    sync_block();  // the tiles have arrived, and all are done with those that are loaded next
    tiles.walk.template load<kWhole>(step + 1, stage ^ 1);
    numbers.template load<kWhole, DK>(stage ^ 1, lse_rows, delta_rows, static_cast<int64_t>(step + 1) * H::kWalk,
                                      problem.q_length);
    Accumulators<H, H::kWalk> p = {};
    multiply_depth<H, H::kWalk>(p, tiles.held(0), tiles.walk.tile(stage, 0));
#pragma unroll
    for (int n = 0; n < H::kWalk / 8; ++n) {
      const auto lse = numbers.lse(stage).template load_vec<2>(n * 8 + lane % 4 * 2);
#pragma unroll
      for (int m = 0; m < H::kFragments; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) p[m][n][e] = exp2_approx(fmaf(p[m][n][e], scale, -lse[e % 2]));
    }
    if constexpr (DV) multiply_rows<H, H::kWalk>(dv, p, tiles.walk.tile(stage, 1));
    if constexpr (DK) {
      Accumulators<H, H::kWalk> dp = {};
      multiply_depth<H, H::kWalk>(dp, tiles.held(1), tiles.walk.tile(stage, 1));
#pragma unroll
      for (int n = 0; n < H::kWalk / 8; ++n) {
        const auto delta = numbers.delta(stage).template load_vec<2>(n * 8 + lane % 4 * 2);
#pragma unroll
        for (int m = 0; m < H::kFragments; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) p[m][n][e] *= dp[m][n][e] - delta[e % 2];
      }
      multiply_rows<H, H::kWalk>(dk, p, tiles.walk.tile(stage, 0));
    }
  });
  if constexpr (DV)
    store_rows<H>(problem.dv, block, problem.k_length, tiles.held(1), dv, [](int, int) { return 1.0f; });
  if constexpr (DK)
    store_rows<H>(problem.dk, block, problem.k_length, tiles.held(0), dk, [&](int, int) { return problem.scale; });
}

// Both at once where the accumulators of both fit in registers, else one after the other.
template <class H, class Problem>
void launch_dkdv(const Place& place, const Shape& shape, const Problem& problem, bool need_dk, bool need_dv) {
  if constexpr (H::D <= 80) {
    if (need_dk && need_dv) {
      launch(kName, attention_bwd_dkdv_kernel<H, true, true>, place, shape, problem);
      return;
    }
  }
  if (need_dk) launch(kName, attention_bwd_dkdv_kernel<H, true, false>, place, shape, problem);
  if (need_dv) launch(kName, attention_bwd_dkdv_kernel<H, false, true>, place, shape, problem);
}

}  // namespace
}  // namespace attention

void attention_bwd(const Place& place, const Attention& call) {
  using namespace attention;
  with_kind(kName, call, [&](auto kind) {
    using H = typename decltype(kind)::Short;
    using T = typename H::T;
    const Problem<T> problem(call);
    const bool need_dq = call.dq.address, need_dk = call.dk.address, need_dv = call.dv.address;
    const int64_t q_blocks = blocks(call, call.q_length, H::kRows), k_blocks = blocks(call, call.k_length, H::kRows);
    if (need_dq || need_dk)
      launch(kName, attention_bwd_delta_kernel<H>, place,
             {q_blocks, H::kThreads, 2 * Arena::bytes<T>(H::kRows * H::kLine)}, problem);
    if (need_dq)
      launch(kName, attention_bwd_dq_kernel<H>, place, {q_blocks, H::kThreads, Workspace<H>::kBytes}, problem);
    launch_dkdv<H>(place, {k_blocks, H::kThreads, Workspace<H>::kBytes + Numbers<H>::kBytes}, problem, need_dk,
                   need_dv);
  });
}

}  // namespace cnk

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
__global__ void __launch_bounds__(kThreads) attention_bwd_delta_kernel(const __grid_constant__ Problem<T> problem) {
  Arena arena;
  const Shared<T> dout = arena.take<T>(kRows * H::kLine, "dout tile"),
                  out = arena.take<T>(kRows * H::kLine, "out tile");
  const BlockOf block(problem.heads, problem.q_length);
  load_rows<H, kRows>(dout, problem.dout, block, block.first, problem.q_length);
  load_rows<H, kRows>(out, problem.out, block, block.first, problem.q_length);
  commit_copies();
  wait_copies<0>();
  sync_block();
  const int row0 = threadIdx.x / 32 * 16, row = threadIdx.x % 32 / 4;
  float c[2][4] = {};
  multiply_depth<H, 16>(c, dout, row0, out.slice(row0 * H::kLine, 16 * H::kLine));
  if (static_cast<int>(threadIdx.x) % 4 != row / 2) return;  // another lane has this row's diagonal
  const int64_t first = (block.batch * problem.heads + block.head) * problem.q_length;
  const int64_t low = block.first + row0 + row, high = low + 8;
  if (low < problem.q_length) problem.delta.store(first + low, row % 2 ? c[0][1] : c[0][0]);
  if (high < problem.q_length) problem.delta.store(first + high, row % 2 ? c[1][3] : c[1][2]);
}

// What a kernel holds, and what it walks over in two stages: tiles of two tensors, and with q and dout their rows'
// numbers.
template <class H, class T = typename H::T>
struct Workspace {
  static constexpr int kHeld = kRows * H::kLine, kWalked = H::kWalk * H::kLine;
  Shared<T> held_tiles, walked_tiles;
  Shared<float> numbers;

  __device__ __forceinline__ explicit Workspace(Arena& arena)
      : held_tiles(arena.take<T>(2 * kHeld, "held tiles")),
        walked_tiles(arena.take<T>(4 * kWalked, "walked tiles")),
        numbers(arena.take<float>(4 * H::kWalk, "lse and delta")) {}

  __device__ __forceinline__ Shared<T> held(int i) const { return held_tiles.slice(i * kHeld, kHeld); }
  __device__ __forceinline__ Shared<T> walked(int stage, int i) const {
    return walked_tiles.slice((stage * 2 + i) * kWalked, kWalked);
  }
  __device__ __forceinline__ Shared<float> lse(int stage) const {
    return numbers.slice(stage * 2 * H::kWalk, H::kWalk);
  }
  __device__ __forceinline__ Shared<float> delta(int stage) const {
    return numbers.slice((stage * 2 + 1) * H::kWalk, H::kWalk);
  }
  static size_t bytes() {
    return Arena::bytes<T>(2 * kHeld) + Arena::bytes<T>(4 * kWalked) + Arena::bytes<float>(4 * H::kWalk);
  }
};

// dq: rows of q and dout are held, k and v walked over.
template <class H, class T = typename H::T>
__global__ void __launch_bounds__(kThreads, 2) attention_bwd_dq_kernel(const __grid_constant__ Problem<T> problem) {
  Arena arena;
  const Workspace<H> workspace(arena);
  const BlockOf block(problem.heads, problem.q_length);
  const int row0 = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
  const auto load = [&](int64_t first, int stage) {
    if (first < problem.k_length) {
      load_rows<H, H::kWalk>(workspace.walked(stage, 0), problem.k, block, first, problem.k_length);
      load_rows<H, H::kWalk>(workspace.walked(stage, 1), problem.v, block, first, problem.k_length);
    }
    commit_copies();
  };
  load_rows<H, kRows>(workspace.held(0), problem.q, block, block.first, problem.q_length);
  load_rows<H, kRows>(workspace.held(1), problem.dout, block, block.first, problem.q_length);
  load(0, 0);
  float lse[2], delta[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = block.first + row0 + lane / 4 + r * 8;
    const int64_t at = (block.batch * problem.heads + block.head) * problem.q_length + row;
    lse[r] = row < problem.q_length ? problem.lse.load(at) * kLog2E : 0.0f;
    delta[r] = row < problem.q_length ? problem.delta.load(at) : 0.0f;
  }
  float dq[H::D / 8][4] = {};
  int stage = 0;
  for (int64_t first = 0; first < problem.k_length; first += H::kWalk, stage ^= 1) {
    wait_copies<0>();
    sync_block();  // the tiles have arrived, and all are done with those that are loaded next
    load(first + H::kWalk, stage ^ 1);
    float s[H::kWalk / 8][4] = {}, dp[H::kWalk / 8][4] = {};
    multiply_depth<H, H::kWalk>(s, workspace.held(0), row0, workspace.walked(stage, 0));
    multiply_depth<H, H::kWalk>(dp, workspace.held(1), row0, workspace.walked(stage, 1));
#pragma unroll
    for (int n = 0; n < H::kWalk / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool valid = first + n * 8 + lane % 4 * 2 + e % 2 < problem.k_length;
        const float p = exp2_approx(s[n][e] * (problem.scale * kLog2E) - lse[e / 2]);
        s[n][e] = valid ? p * (dp[n][e] - delta[e / 2]) : 0.0f;
      }
    multiply_rows<H, H::kWalk>(dq, s, workspace.walked(stage, 0));
  }
  wait_copies<0>();
#pragma unroll
  for (int n = 0; n < H::D / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) dq[n][e] *= problem.scale;
  store_rows<H>(problem.dq, block, problem.q_length, workspace.held(0), dq);
}

// dk and dv, or one of them: rows of k and v are held, q and dout walked over, scores transposed.
template <class H, bool DK, bool DV, class T = typename H::T>
__global__ void __launch_bounds__(kThreads, 2) attention_bwd_dkdv_kernel(const __grid_constant__ Problem<T> problem) {
  Arena arena;
  const Workspace<H> workspace(arena);
  const BlockOf block(problem.heads, problem.k_length);
  const int row0 = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
  const int64_t numbers = (block.batch * problem.heads + block.head) * problem.q_length;
  const auto load = [&](int64_t first, int stage) {
    if (first < problem.q_length) {
      load_rows<H, H::kWalk>(workspace.walked(stage, 0), problem.q, block, first, problem.q_length);
      load_rows<H, H::kWalk>(workspace.walked(stage, 1), problem.dout, block, first, problem.q_length);
      if (static_cast<int>(threadIdx.x) < H::kWalk) {
        const int64_t row = first + threadIdx.x;
        const bool valid = row < problem.q_length;
        workspace.lse(stage).store(threadIdx.x, valid ? problem.lse.load(numbers + row) * kLog2E : INFINITY);
        workspace.delta(stage).store(threadIdx.x, valid ? problem.delta.load(numbers + row) : 0.0f);
      }
    }
    commit_copies();
  };
  load_rows<H, kRows>(workspace.held(0), problem.k, block, block.first, problem.k_length);
  load_rows<H, kRows>(workspace.held(1), problem.v, block, block.first, problem.k_length);
  load(0, 0);
  float dk[DK ? H::D / 8 : 1][4] = {}, dv[DV ? H::D / 8 : 1][4] = {};
  int stage = 0;
  for (int64_t first = 0; first < problem.q_length; first += H::kWalk, stage ^= 1) {
    wait_copies<0>();
    sync_block();  // the tiles have arrived, and all are done with those that are loaded next
    load(first + H::kWalk, stage ^ 1);
    float p[H::kWalk / 8][4] = {};
    multiply_depth<H, H::kWalk>(p, workspace.held(0), row0, workspace.walked(stage, 0));
#pragma unroll
    for (int n = 0; n < H::kWalk / 8; ++n) {
      const auto lse = workspace.lse(stage).template load_vec<2>(n * 8 + lane % 4 * 2);
#pragma unroll
      for (int e = 0; e < 4; ++e) p[n][e] = exp2_approx(p[n][e] * (problem.scale * kLog2E) - lse[e % 2]);
    }
    if constexpr (DV) multiply_rows<H, H::kWalk>(dv, p, workspace.walked(stage, 1));
    if constexpr (DK) {
      float dp[H::kWalk / 8][4] = {};
      multiply_depth<H, H::kWalk>(dp, workspace.held(1), row0, workspace.walked(stage, 1));
#pragma unroll
      for (int n = 0; n < H::kWalk / 8; ++n) {
        const auto delta = workspace.delta(stage).template load_vec<2>(n * 8 + lane % 4 * 2);
#pragma unroll
        for (int e = 0; e < 4; ++e) p[n][e] *= dp[n][e] - delta[e % 2];
      }
      multiply_rows<H, H::kWalk>(dk, p, workspace.walked(stage, 0));
    }
  }
  wait_copies<0>();
  if constexpr (DV) store_rows<H>(problem.dv, block, problem.k_length, workspace.held(1), dv);
  if constexpr (DK) {
#pragma unroll
    for (int n = 0; n < H::D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[n][e] *= problem.scale;
    store_rows<H>(problem.dk, block, problem.k_length, workspace.held(0), dk);
  }
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
  with_head(kName, call, [&](auto head) {
    using H = decltype(head);
    const Problem<typename H::T> problem(call);
    const bool need_dq = call.dq.address, need_dk = call.dk.address, need_dv = call.dv.address;
    const size_t shared = Workspace<H>::bytes();
    const int64_t q_blocks = blocks(call, call.q_length);
    if (need_dq || need_dk)
      launch(kName, attention_bwd_delta_kernel<H>, place,
             {q_blocks, kThreads, 2 * Arena::bytes<typename H::T>(kRows * H::kLine)}, problem);
    if (need_dq) launch(kName, attention_bwd_dq_kernel<H>, place, {q_blocks, kThreads, shared}, problem);
    launch_dkdv<H>(place, {blocks(call, call.k_length), kThreads, shared}, problem, need_dk, need_dv);
  });
}

}  // namespace cnk

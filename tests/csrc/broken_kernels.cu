// Small kernels for the CPU execution: pairs of a right one and one with a single fault, and one per device wrapper.
// Each takes in[] and out[] of floats; the Python test names the fault that it expects.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "device/launch.cuh"
#include "device/mma.cuh"

namespace py = pybind11;
using namespace cnk;

namespace {

struct Call {
  Global<const float> in;
  Global<float> out;
  int count;
  bool broken;
};

// Each thread reads what its neighbour below wrote.
__global__ void shift_kernel(Call call) {
  CNK_STATIC_SHARED(float, tile, 256);
  tile.store(threadIdx.x, call.in.load(threadIdx.x));
  if (!call.broken) sync_block();  // missing barrier
  call.out.store(threadIdx.x, tile.load(threadIdx.x ? threadIdx.x - 1 : 0));
}

// The second round overwrites what others may still read.
__global__ void two_rounds_kernel(Call call) {
  CNK_STATIC_SHARED(float, tile, 256);
  for (int round = 0; round < 2; ++round) {
    tile.store(threadIdx.x, call.in.load(threadIdx.x) + round);
    sync_block();
    call.out.store(threadIdx.x, tile.load(255 - threadIdx.x));
    if (!call.broken) sync_block();  // missing barrier
  }
}

// Lanes of one warp exchange through shared memory.
__global__ void warp_exchange_kernel(Call call) {
  CNK_STATIC_SHARED(float, tile, 256);
  tile.store(threadIdx.x, call.in.load(threadIdx.x));
  if (!call.broken) sync_warp();  // missing warp barrier
  call.out.store(threadIdx.x, tile.load(threadIdx.x & ~1));
}

// Warps 0..3 and 4..7 synchronise apart from each other.
__global__ void named_barrier_kernel(Call call) {
  CNK_STATIC_SHARED(float, tile, 256);
  const int half = threadIdx.x / 128;
  tile.store(threadIdx.x, call.in.load(threadIdx.x));
  sync_named(1 + half, 128);
  const int from = call.broken ? 127 - threadIdx.x % 128 : half * 128 + 127 - threadIdx.x % 128;  // across the halves
  call.out.store(threadIdx.x, tile.load(from));
}

__global__ void wrong_index_kernel(Call call) {
  Arena arena;
  const Shared<float> tile = arena.take<float>(256, "tile"), next = arena.take<float>(256, "next");
  tile.store(threadIdx.x, call.in.load(threadIdx.x));
  next.store(threadIdx.x, 0.0f);
  sync_block();
  const int neighbour = threadIdx.x + 1;
  call.out.store(threadIdx.x, tile.load(call.broken ? neighbour : neighbour % 256));  // one past the end
}

__global__ void unmasked_tail_kernel(Call call) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (call.broken || i < call.count) call.out.store(i, 2.0f * call.in.load(i));
}

__global__ void vector_load_kernel(Call call) {
  const int i = threadIdx.x * 4 + call.broken;  // off by one element
  if (i + 4 <= call.count) call.out.store_vec<4>(threadIdx.x * 4, call.in.load_vec<4>(i));
}

__global__ void uninitialised_kernel(Call call) {
  CNK_STATIC_SHARED(float, tile, 256);
  if (!call.broken || threadIdx.x < 128) tile.store(threadIdx.x, 1.0f);  // half of it
  sync_block();
  call.out.store(threadIdx.x, tile.load(255 - threadIdx.x));
}

__global__ void copy_async_kernel(Call call) {
  CNK_STATIC_SHARED(float, tile, 1024);
  copy_async(tile, threadIdx.x * 4, call.in, threadIdx.x * 4, threadIdx.x * 4 + 4 <= call.count ? 4 : 0);
  commit_copies();
  if (!call.broken) wait_copies<0>();  // missing wait
  sync_block();
  call.out.store(threadIdx.x, tile.load(1023 - threadIdx.x * 4));
  wait_copies<0>();
}

__global__ void diverged_barrier_kernel(Call call) {
  if (!call.broken || threadIdx.x < 128) sync_block();
  call.out.store(threadIdx.x, call.in.load(threadIdx.x));
}

__global__ void diverged_shuffle_kernel(Call call) {
  const float x = call.in.load(threadIdx.x);
  const bool odd = threadIdx.x % 2;
  if (!call.broken)
    call.out.store(threadIdx.x, shuffle_xor(x, 1));
  else if (odd)
    call.out.store(threadIdx.x, shuffle_xor(x, 1));  // half a warp
}

// Each block of a cluster reads its neighbour's sum.
__global__ void cluster_kernel(Call call) {
  CNK_STATIC_SHARED(float, sum, 1);
  if (threadIdx.x == 0) sum.store(0, call.in.load(blockIdx.x));
  sync_cluster();
  const float next = sum.at_rank((cluster_rank() + 1) % 4).load(0);
  if (!call.broken) sync_cluster();  // a neighbour may be gone
  call.out.store(blockIdx.x * blockDim.x + threadIdx.x, next);
}

__global__ void cluster_race_kernel(Call call) {
  CNK_STATIC_SHARED(float, sum, 1);
  if (threadIdx.x == 0) sum.store(0, call.in.load(blockIdx.x));
  if (call.broken)
    sync_block();  // of one block, where the cluster's is needed
  else
    sync_cluster();
  call.out.store(blockIdx.x * blockDim.x + threadIdx.x, sum.at_rank((cluster_rank() + 1) % 4).load(0));
  sync_cluster();
}

// A slice that begins at an element which no vector may begin at.
__global__ void slice_kernel(Call call) {
  CNK_STATIC_SHARED(float, tile, 260);
  const Shared<float> part = tile.slice(call.broken ? 3 : 4, 256);
  if (threadIdx.x < 64) part.store_vec<4>(threadIdx.x * 4, call.in.load_vec<4>(threadIdx.x * 4));
  sync_block();
  call.out.store(threadIdx.x, part.load(threadIdx.x));
}

// Two blocks write the same element.
__global__ void same_place_kernel(Call call) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  call.out.store(call.broken ? i % 100 : i, 1.0f);
}

// A block reads what another block of the launch wrote, or reads what another is about to write.
__global__ void block_order_kernel(Call call) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float before = call.broken && i >= 64 ? call.out.load(i - 64) : 0.0f;
  call.out.store(i, before + call.in.load(i));
}

__global__ void copy_kernel(Call call) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < call.count; i += gridDim.x * blockDim.x)
    call.out.store(i, call.in.load(i));
}

using Kernel = void (*)(Call);
const std::map<std::string, std::pair<Kernel, Shape>> kKernels = {
    {"shift", {shift_kernel, {1, 256}}},
    {"two_rounds", {two_rounds_kernel, {1, 256}}},
    {"warp_exchange", {warp_exchange_kernel, {1, 256}}},
    {"named_barrier", {named_barrier_kernel, {1, 256}}},
    {"wrong_index", {wrong_index_kernel, {1, 256, 2048}}},
    {"unmasked_tail", {unmasked_tail_kernel, {4, 64}}},
    {"vector_load", {vector_load_kernel, {1, 64}}},
    {"uninitialised", {uninitialised_kernel, {1, 256}}},
    {"copy_async", {copy_async_kernel, {1, 256}}},
    {"diverged_barrier", {diverged_barrier_kernel, {1, 256}}},
    {"diverged_shuffle", {diverged_shuffle_kernel, {1, 256}}},
    {"cluster", {cluster_kernel, {8, 32, 0, 4}}},
    {"cluster_race", {cluster_race_kernel, {8, 32, 0, 4}}},
    {"slice", {slice_kernel, {1, 256}}},
    {"same_place", {same_place_kernel, {4, 64}}},
    {"block_order", {block_order_kernel, {4, 64}}},
};

using Floats = py::array_t<float, py::array::c_style>;

void watch(const Floats& a, const Floats& b) {
  host::global_memory().clear();
  for (const Floats* array : {&a, &b}) {
    const auto begin = reinterpret_cast<uintptr_t>(array->data());
    host::global_memory().add(begin, array->nbytes());
  }
}

void run(const std::string& name, const Floats& in, Floats out, bool broken) {
  watch(in, out);
  const auto& [kernel, shape] = kKernels.at(name);
  launch(name.c_str(), kernel, Place{}, shape,
         Call{{in.data()}, {out.mutable_data()}, static_cast<int>(in.size()), broken});
}

// A copy in a launch of this shape, on this compute capability.
void copy(const Floats& in, Floats out, int capability, int blocks, int threads, size_t shared, int cluster) {
  watch(in, out);
  host::architecture() = host::architecture_of(capability);
  launch("copy", copy_kernel, Place{}, {blocks, threads, shared, cluster},
         Call{{in.data()}, {out.mutable_data()}, static_cast<int>(in.size()), false});
}

// c[16][8] += a[16][16] b[16][8], all read through ldmatrix; b lies in memory as [16][8] or as [8][16].
template <class T, bool B_IS_ROWS>
__global__ void mma_kernel(Global<const float> a, Global<const float> b, Global<float> c) {
  CNK_STATIC_SHARED(T, left, 256);
  CNK_STATIC_SHARED(T, right, 128);
  for (int i = threadIdx.x; i < 256; i += 32) left.store(i, from_float<T>(a.load(i)));
  for (int i = threadIdx.x; i < 128; i += 32) right.store(i, from_float<T>(b.load(i)));
  sync_block();
  const int lane = threadIdx.x;
  uint32_t af[4], bf[2];
  load_matrices<4, false>(af, left, lane % 16 * 16 + lane / 16 * 8);
  load_matrices<2, B_IS_ROWS>(bf, right, B_IS_ROWS ? lane % 16 * 8 : lane % 8 * 16 + lane / 8 % 2 * 8);
  float cf[4];
  for (int i = 0; i < 4; ++i) cf[i] = c.load((lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2);
  mma<T>(cf, af, bf);
  for (int i = 0; i < 4; ++i) c.store((lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, cf[i]);
}

void run_mma(const Floats& a, const Floats& b, Floats c, bool is_bf16, bool b_is_rows) {
  watch(a, b);
  const auto begin = reinterpret_cast<uintptr_t>(c.data());
  host::global_memory().add(begin, c.nbytes());
  const auto kernel = is_bf16 ? (b_is_rows ? mma_kernel<bf16, true> : mma_kernel<bf16, false>)
                              : (b_is_rows ? mma_kernel<f16, true> : mma_kernel<f16, false>);
  launch("mma", kernel, Place{}, {1, 32}, Global<const float>{a.data()}, Global<const float>{b.data()},
         Global<float>{c.mutable_data()});
}

template <class T>
Floats round_trip(const Floats& in) {
  Floats out(in.size());
  for (py::ssize_t i = 0; i < in.size(); ++i) out.mutable_data()[i] = to_float(from_float<T>(in.data()[i]));
  return out;
}

}  // namespace

PYBIND11_MODULE(CNK_MODULE, module) {
  module.def("run", &run);
  module.def("copy", &copy);
  module.def("run_mma", &run_mma);
  module.def("round_float16", &round_trip<f16>);
  module.def("round_bfloat16", &round_trip<bf16>);
}

// Tensor-core tiles: ldmatrix and mma.sync m16n8k16, f16 or bf16 in, float32 out (sm_80 and later).
//
// Fragments, with g = lane / 4 and t = lane % 4; a register holds two neighbours:
//   A [16][16]  a0 = (g, 2t)  a1 = (g + 8, 2t)  a2 = (g, 2t + 8)  a3 = (g + 8, 2t + 8)
//   B [16][8]   b0 = (2t, g)  b1 = (2t + 8, g)            neighbours along k
//   C [16][8]   c0, c1 = (g, 2t), (g, 2t + 1)   c2, c3 = the same of row g + 8
#pragma once
#include "memory.cuh"
#include "sync.cuh"

namespace cnk {

#ifdef CNK_HOST

struct MatrixSlot {
  Vec<uint16_t, 8> row;
  uint32_t out[4];
};

// `MATRICES` 8x8 tiles: lane i hands in to[i] the place of row i % 8 of tile i / 8.
template <int MATRICES, bool TRANSPOSE, class T>
inline void load_matrices(uint32_t (&out)[MATRICES], Shared<T> from, int i) {
  MatrixSlot slot{};
  if (host::team().thread() % 32 < 8 * MATRICES) slot.row = bit_cast<Vec<uint16_t, 8>>(from.template load_vec<8>(i));
  host::team().collective("ldmatrix", &slot, [](void* const* slots) {
    const auto element = [&](int tile, int row, int column) {
      return static_cast<uint32_t>(static_cast<MatrixSlot*>(slots[tile * 8 + row])->row[column]);
    };
    for (int lane = 0; lane < 32; ++lane)
      for (int tile = 0; tile < MATRICES; ++tile) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint32_t low = TRANSPOSE ? element(tile, t, g) : element(tile, g, t);
        const uint32_t high = TRANSPOSE ? element(tile, t + 1, g) : element(tile, g, t + 1);
        static_cast<MatrixSlot*>(slots[lane])->out[tile] = low | high << 16;
      }
  });
  for (int tile = 0; tile < MATRICES; ++tile) out[tile] = slot.out[tile];
}

struct MmaSlot {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

template <class T>
inline float fragment_half(uint32_t word, int upper) {
  return to_float(T{static_cast<uint16_t>(upper ? word >> 16 : word)});
}

// c += a * b
template <class T>
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaSlot slot{c, a, b};
  host::team().collective("mma.sync", &slot, [](void* const* slots) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* from = static_cast<const MmaSlot*>(slots[lane]);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 8; ++i) {
        const int word = i / 2, upper = i % 2;
        left[g + word % 2 * 8][t + word / 2 * 8 + upper] = fragment_half<T>(from->a[word], upper);
        if (word < 2) right[t + word * 8 + upper][g] = fragment_half<T>(from->b[word], upper);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float& sum = static_cast<const MmaSlot*>(slots[lane])->c[i];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
      }
  });
}

#else

template <int MATRICES, bool TRANSPOSE, class T>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[MATRICES], Shared<T> from, int i) {
  static_assert(MATRICES == 2 || MATRICES == 4, "two or four tiles");
  const unsigned address = from.address(i);
  if constexpr (MATRICES == 4 && TRANSPOSE)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  else if constexpr (MATRICES == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  else if constexpr (TRANSPOSE)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
}

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace cnk

// Element types and short vectors. f16 and bf16 are plain bits, so that both compilers lay them out alike.
#pragma once
#include <cstring>

#include "platform.cuh"

namespace cnk {

struct f16 {
  uint16_t bits;
};

struct bf16 {
  uint16_t bits;
};

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
  __device__ __forceinline__ T& operator[](int i) { return v[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return v[i]; }
};

template <class To, class From>
__device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(bf16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

#ifdef CNK_HOST

inline float to_float(f16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide = exponent == 31 ? 0xffu : exponent + 112;
  return bit_cast<float>(sign | wide << 23 | mantissa << 13);
}

// Round to nearest even by hand: `keep` mantissa bits of a float survive.
inline uint32_t round_bits(uint32_t bits, int drop) {
  return (bits + ((1u << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop;
}

template <class T>
inline T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline bf16 from_float<bf16>(float x) {
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>(round_bits(bit_cast<uint32_t>(x), 16))};
}

template <>
inline f16 from_float<f16>(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65536 and up
  if (magnitude < 0x38800000u) {  // below the least normal half: count in steps of 2^-24
    const float steps = std::nearbyintf(bit_cast<float>(magnitude) * 0x1p24f);
    return {static_cast<uint16_t>(sign | static_cast<uint32_t>(steps))};
  }
  return {static_cast<uint16_t>(sign | round_bits(magnitude - 0x38000000u, 13))};
}

#else

__device__ __forceinline__ float to_float(f16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

template <class T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

#endif

// Two neighbours of a matrix fragment in one register, the lower column in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

}  // namespace cnk

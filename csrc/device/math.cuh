// Scalar functions whose GPU form is an instruction rather than a library call.
#pragma once
#include "platform.cuh"

#ifdef CNK_HOST
using std::fmaf;
#endif

namespace cnk {

__device__ __forceinline__ float exp2_approx(float x) {
#ifdef CNK_HOST
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// a / b within 2 ulp; b of 2^126 and more may give zero.
__device__ __forceinline__ float divide_approx(float a, float b) {
#ifdef CNK_HOST
  return a / b;
#else
  return __fdividef(a, b);
#endif
}

// 1 / a within 1 ulp; a of 2^126 and more may give zero.
__device__ __forceinline__ float reciprocal_approx(float a) {
#ifdef CNK_HOST
  return 1.0f / a;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
  return y;
#endif
}

// 1 / sqrt(x) to the last bit or nearly so: a machine estimate and one Newton step.
__device__ __forceinline__ float reciprocal_sqrt(float x) {
#ifdef CNK_HOST
  const float r = 1.0f / std::sqrt(x);
#else
  const float r = rsqrtf(x);
#endif
  const float left = fmaf(-x * r, r, 1.0f);
  return x > 0.0f && left == left ? fmaf(0.5f * r, left, r) : r;  // at 0 and infinity the estimate is the answer
}

// Two machine estimates: relative error 2^-21 and, from the rounding of z log2(e), |z| 2^-24 of exp(-z).
__device__ __forceinline__ float sigmoid(float z) {
  return reciprocal_approx(1.0f + exp2_approx(z * -1.4426950408889634f));
}

template <class I>
__host__ __device__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

}  // namespace cnk

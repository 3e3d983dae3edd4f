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

__device__ __forceinline__ float sigmoid(float z) {
  return divide_approx(1.0f, 1.0f + expf(-z));
}

template <class I>
__host__ __device__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

}  // namespace cnk

// Roots and quotients rounded to nearest, without a branch for each: what the compiler makes of __fsqrt_rn and
// __fdiv_rn, less its question whether the numbers are too small or too large for it. Who calls them knows, or asks
// once for many.
#pragma once

#include "device.cuh"

namespace fastllm {

// By one instruction. The sequences below are right for its approximations; the emulation's are the nearest floats.
__device__ __forceinline__ float reciprocal_approximation(float x) {
#ifdef FASTLLM_CUDA_EMULATION
  return static_cast<float>(1.0 / x);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float reciprocal_root_approximation(float x) {
#ifdef FASTLLM_CUDA_EMULATION
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
#else
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float exact_fma(float a, float b, float c) {
#ifdef FASTLLM_CUDA_EMULATION
  return __builtin_fmaf(a, b, c);
#else
  return __fmaf_rn(a, b, c);
#endif
}

// sqrt(x) for 2^-101 <= x < infinity. NaN for what is not positive, and for infinity.
__device__ __forceinline__ float exact_root(float x) {
  const float r = reciprocal_root_approximation(x);
  const float root = x * r;
  return exact_fma(exact_fma(-root, root, x), r * 0.5f, root);
}

// x / divisor, for as many x as one likes: exact where |x|, |divisor| and the quotient lie between 2^-100 and 2^100.
// NaN and infinite x give NaN.
class Divisor {
 public:
  __device__ __forceinline__ explicit Divisor(float divisor) : divisor_(divisor) {
    const float r = reciprocal_approximation(divisor);
    reciprocal_ = exact_fma(r, exact_fma(-divisor, r, 1.0f), r);
  }

  __device__ __forceinline__ float divide(float x) const {
    const float q = x * reciprocal_;
    return exact_fma(reciprocal_, exact_fma(-divisor_, q, x), q);
  }

 private:
  float divisor_, reciprocal_;
};

}  // namespace fastllm

// Exponential, logistic, tanh and erf of a vector of floats, for the instruction set this file is compiled for.
#pragma once

#include "vec.h"

namespace fastllm::FASTLLM_ISA {

inline Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}

inline Vec abs(Vec x) {
  return (Vec)((VecU32)x & 0x7fffffffu);
}

// e^x within two roundings: 2^n e^r with n = round(x / ln 2), and a polynomial in r (coefficients: Cephes' expf). Below
// -87.3, where e^x would be subnormal, it is 0; above 88, where it nears the largest float, e^88.
inline Vec exp(Vec x) {
  constexpr float kLowest = -87.3f, kHighest = 88.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 2^23: added, it leaves an integer in the lowest bits
  const Vec below = x > kHighest ? splat(kHighest) : x;
  const Vec clamped = x < kLowest ? splat(kLowest) : below;
  const Vec shifted = clamped * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec scaled = (Vec)((VecU32)p + ((VecU32)shifted << 23));
  const Vec cut = x < kLowest ? Vec{} : scaled;
  return x != x ? x : cut;
}

inline Vec sigmoid(Vec x) {
  return x < -88.0f ? Vec{} : 1.0f / (1.0f + exp(-x));
}

// Near zero a polynomial (Cephes' tanhf), where the other formula would cancel.
inline Vec tanh(Vec x) {
  const Vec e = exp(-2.0f * abs(x));
  const Vec large = (1.0f - e) / (1.0f + e);
  const Vec far = (Vec)((VecU32)large | ((VecU32)x & 0x80000000u));
  const Vec z = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return abs(x) < 0.625f ? p * z * x + x : far;
}

// Within 5e-7 in float32 (1.5e-7 in exact arithmetic): Abramowitz and Stegun, "Handbook of Mathematical
// Functions", 7.1.26. `gauss` is e^-x^2.
inline Vec erf(Vec x, Vec gauss) {
  const Vec t = 1.0f / (1.0f + 0.3275911f * abs(x));
  Vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return (Vec)((VecU32)(1.0f - p * t * gauss) ^ ((VecU32)x & 0x80000000u));
}

}  // namespace fastllm::FASTLLM_ISA

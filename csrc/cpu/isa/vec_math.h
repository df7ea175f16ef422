// Exponential, logistic, tanh and the normal distribution of a vector of floats, for the instruction set this file is
// compiled for.
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
  const Vec clamped = x > kHighest ? splat(kHighest) : x;
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

// e^(-s / 2) of s >= 0, within 1e-7 (1 + s) of it, in fewer steps than exp: 2^n 2^f with n + f = -s / (2 ln 2), and a
// polynomial in f (least largest relative error in [-1/2, 1/2]). 0 where it would be subnormal; of NaN, anything.
inline Vec gauss(Vec s) {
  constexpr float kExponent = -0.721347520f;
  constexpr float kRound = 12582912.0f;  // as in exp
  const Vec shifted = s * kExponent + kRound;
  const Vec n = shifted - kRound;
  const Vec f = s * kExponent - n;
  Vec p = splat(1.3264727e-3f);
  p = p * f + 9.6715127e-3f;
  p = p * f + 5.5507337e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314698e-1f;
  p = p * f + 1.0f;
  const Vec scaled = (Vec)((VecU32)p + ((VecU32)shifted << 23));
  return s > 174.6f ? Vec{} : scaled;
}

// The share of a normal distribution below x, (1 + erf(x / sqrt 2)) / 2, within 7.5e-8 in exact arithmetic: Abramowitz
// and Stegun, "Handbook of Mathematical Functions", 26.2.17. `gauss` is e^(-x^2 / 2).
inline Vec normal(Vec x, Vec gauss) {
  const Vec t = 1.0f / (1.0f + 0.231641888f * abs(x));
  Vec p = splat(0.530702715f);
  p = p * t - 0.726576014f;
  p = p * t + 0.710706871f;
  p = p * t - 0.142248368f;
  p = p * t + 0.127414796f;
  const Vec tail = p * t * gauss;
  return x < 0.0f ? tail : 1.0f - tail;
}

}  // namespace fastllm::FASTLLM_ISA

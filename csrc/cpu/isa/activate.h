// Activations and their derivatives.
//
//   SiLU: g s, s = 1 / (1 + e^-g)                      act' = s (1 + g (1 - s))
//   GELU: g P, P = (1 + erf(g / sqrt 2)) / 2           act' = P + g e^(-g^2 / 2) / sqrt(2 pi)
//   its tanh form: g s, s = (1 + tanh u) / 2 = 1 / (1 + e^-2u), u = k (g + c g^3), k = sqrt(2 / pi), c = 0.044715
//                                                      act' = s + g s (1 - s) 2 k (1 + 3 c g^2), 1 - s = s e^-2u
#pragma once

#include "../activation.h"
#include "vec_math.h"

namespace fastllm::FASTLLM_ISA {

struct Activated {
  Vec value, slope;
};

template <Activation kKind>
inline Activated activate(Vec g) {
  if constexpr (kKind == Activation::kSilu) {
    const Vec s = sigmoid(g);
    const Vec value = g * s;
    return {value, s + value * (1.0f - s)};
  } else if constexpr (kKind == Activation::kGeluTanh) {
    constexpr float k = 0.797884561f, c = 0.044715f;
    const Vec square = g * g;
    const Vec minus_2u = g * (-2.0f * k - 2.0f * k * c * square);
    const Vec e = exp(minus_2u);
    const Vec half = minus_2u > 87.0f ? Vec{} : 1.0f / (1.0f + e);
    const Vec value = g * half;
    return {value, half + value * (e * half) * (2.0f * k + 6.0f * k * c * square)};
  } else {
    const Vec square = g * g;
    const Vec density = gauss(square);
    const Vec half = normal(g, density);
    return {g * half, half + g * density * 0.398942280f};
  }
}

}  // namespace fastllm::FASTLLM_ISA

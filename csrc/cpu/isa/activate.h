// Activations and their derivatives.
//
//   SiLU: g s, s = 1 / (1 + e^-g)                      act' = s (1 + g (1 - s))
//   GELU: g P, P = (1 + erf(g / sqrt 2)) / 2           act' = P + g e^(-g^2 / 2) / sqrt(2 pi)
//   its tanh form: g (1 + t) / 2, t = tanh(k (g + c g^3)), k = sqrt(2 / pi), c = 0.044715
//                                                      act' = (1 + t) / 2 + g (1 - t^2) k (1 + 3 c g^2) / 2
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
    const Vec t = tanh(k * g * (1.0f + c * square));
    const Vec half = 0.5f * (1.0f + t);
    return {g * half, half + 0.5f * g * (1.0f - t * t) * (k * (1.0f + 3.0f * c * square))};
  } else {
    const Vec gauss = exp(-0.5f * (g * g));
    const Vec half = 0.5f * (1.0f + erf(g * 0.707106781f, gauss));
    return {g * half, half + g * gauss * 0.398942280f};
  }
}

}  // namespace fastllm::FASTLLM_ISA

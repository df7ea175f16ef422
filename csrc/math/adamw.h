// The arithmetic of AdamW (Loshchilov and Hutter, 2019), written once for the CPU and the GPU. At step t:
//
//   p <- p (1 - lr wd)                       m <- m + (1 - b1) (g - m)
//   v <- b2 v + (1 - b2) g^2                 u = v, or with amsgrad the largest v so far
//   p <- p - lr / (1 - b1^t) m / (sqrt(u) / sqrt(1 - b2^t) + eps)
//
// in the order of torch's own kernels and with the roundings of their vector loops, so that float32 comes out bit for
// bit as theirs on a CPU. (What is left behind the last vector they compute in a loop of its own, for which the
// compiler may choose another multiply-add for v: seen with AVX2 in torch 2.11 to 2.15.) Nothing here may be contracted
// to a multiply-add but what is written as one: `Ops` has the operations, on floats or on vectors of floats, and
// setup.py tells the compiler.
//
// Beside it, what keeps 16-bit weights from losing small updates, and 8-bit moments. Reference: reference/adamw.py.
#pragma once

#include "macros.h"
#include "philox.h"

#include <cmath>
#include <cstdint>

namespace fastllm {

constexpr int kAdamwBlock = 256;                   // elements that share a scale of 8-bit moments
constexpr float kAdamwLargest = 3.402823466e+38f;  // float's

struct AdamwHyper {
  double lr, beta1, beta2, weight_decay, eps;
};

// The hyperparameters at a step as what an element needs.
struct AdamwScalars {
  float decay;        // 1 - lr wd
  float lerp;         // 1 - b1
  float beta2;        // b2
  float square;       // 1 - b2
  float correction2;  // sqrt(1 - b2^t)
  float step_size;    // -lr / (1 - b1^t)
  float eps;
  float step;  // t
};

FASTLLM_HOST_DEVICE AdamwScalars adamw_scalars(const AdamwHyper& h, float step) {
  const double correction1 = 1.0 - pow(h.beta1, static_cast<double>(step));
  const double correction2 = 1.0 - pow(h.beta2, static_cast<double>(step));
  AdamwScalars s;
  s.decay = static_cast<float>(1.0 - h.lr * h.weight_decay);
  s.lerp = static_cast<float>(1.0 - h.beta1);
  s.beta2 = static_cast<float>(h.beta2);
  s.square = static_cast<float>(1.0 - h.beta2);
  s.correction2 = static_cast<float>(sqrt(correction2));
  s.step_size = static_cast<float>(-(h.lr / correction1));
  s.eps = static_cast<float>(h.eps);
  s.step = step;
  return s;
}

// What clip_grad_norm_ multiplies the gradients by; NaN where the norm is.
FASTLLM_HOST_DEVICE float adamw_clip(float norm, float max_norm) {
  const float factor = max_norm / (norm + 1e-6f);
  return factor > 1.0f ? 1.0f : factor;
}

template <class Ops>
FASTLLM_HOST_DEVICE void adamw_moments(
    typename Ops::F& exp_avg, typename Ops::F& exp_avg_sq, typename Ops::F grad, const AdamwScalars& s) {
  const auto difference = Ops::sub(grad, exp_avg);
  // As torch.lerp: from the nearer end.
  const bool near = s.lerp < 0.5f;
  exp_avg = Ops::fma(Ops::splat(near ? s.lerp : s.lerp - 1.0f), difference, near ? exp_avg : grad);
  exp_avg_sq = Ops::fma(Ops::mul(Ops::splat(s.square), grad), grad, Ops::mul(exp_avg_sq, Ops::splat(s.beta2)));
}

// The larger one; a NaN stays, as in torch.maximum.
template <class Ops>
FASTLLM_HOST_DEVICE typename Ops::F adamw_largest(typename Ops::F so_far, typename Ops::F square) {
  return Ops::select(so_far >= square, so_far, Ops::select(so_far != so_far, so_far, square));
}

template <class Ops>
FASTLLM_HOST_DEVICE typename Ops::F adamw_param(
    typename Ops::F param, typename Ops::F exp_avg, typename Ops::F square, const AdamwScalars& s) {
  const auto denominator = Ops::add(Ops::div(Ops::sqrt(square), Ops::splat(s.correction2)), Ops::splat(s.eps));
  const auto step = Ops::div(Ops::mul(Ops::splat(s.step_size), exp_avg), denominator);
  return Ops::add(Ops::mul(param, Ops::splat(s.decay)), step);
}

template <class Ops>
struct AdamwElement {
  typename Ops::F param, exp_avg, exp_avg_sq, max_exp_avg_sq;
};

template <class Ops, bool kAmsgrad>
FASTLLM_HOST_DEVICE void adamw_update(AdamwElement<Ops>& e, typename Ops::F grad, const AdamwScalars& s) {
  adamw_moments<Ops>(e.exp_avg, e.exp_avg_sq, grad, s);
  if constexpr (kAmsgrad) {
    e.max_exp_avg_sq = adamw_largest<Ops>(e.max_exp_avg_sq, e.exp_avg_sq);
  }
  e.param = adamw_param<Ops>(e.param, e.exp_avg, kAmsgrad ? e.max_exp_avg_sq : e.exp_avg_sq, s);
}

// A float kept as a bfloat16 weight, the upper 16 bits rounded to nearest, ties away from zero, and the 16-bit
// remainder that was rounded off, signed: the weight's bits times 2^16 plus the remainder are the float's bits. Ties
// go away from zero because to even they would leave two floats with the same weight and remainder.
template <class Ops>
FASTLLM_HOST_DEVICE typename Ops::F adamw_join(typename Ops::U weight, typename Ops::U remainder) {
  // The remainder's sign is extended by hand: it comes as 16 bits in 32.
  return Ops::value((weight << 16) + remainder - ((remainder & 0x8000u) << 1));
}

template <class Ops>
FASTLLM_HOST_DEVICE void adamw_split(typename Ops::F master, typename Ops::U& weight, typename Ops::U& remainder) {
  const auto bits = Ops::bits(master);
  const auto nan = master != master;
  weight = Ops::select(nan, (bits >> 16) | 0x40u, (bits + 0x8000u) >> 16);
  remainder = Ops::select(nan, Ops::whole(0u), bits & 0xffffu);
}

// Stochastic rounding: up with the probability of the part that is cut off, out of 16 random bits. One counter of
// Philox (philox.h) serves eight consecutive elements: element e takes half (e % 2) of word (e / 2 % 4) of counter
// (e / 8, parameter, step). Infinities and NaN
// stay; what would pass the largest finite number becomes infinite.
template <class Ops>
FASTLLM_HOST_DEVICE typename Ops::U adamw_round_bfloat16(typename Ops::F x, typename Ops::U random) {
  const auto bits = Ops::bits(x);
  const auto special = (bits & 0x7f800000u) == 0x7f800000u;
  const auto nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return Ops::select(special, Ops::select(nan, (bits >> 16) | 0x40u, bits >> 16), (bits + random) >> 16);
}

template <class Ops>
FASTLLM_HOST_DEVICE typename Ops::U adamw_round_half(typename Ops::F x, typename Ops::U random) {
  const auto bits = Ops::bits(x);
  const auto magnitude = bits & 0x7fffffffu;
  // Normal numbers lose 13 bits. Rounding may carry into the exponent, and past the largest into infinity.
  const auto normal = ((magnitude + (random >> 3)) >> 13) - 0x1c000u;
  // Below 2^-14 the last bit is worth 2^-24: scaled to that, the fraction of the number is what is cut off. Its bits
  // under 2^-16 are too small for 16 random ones to tell.
  const auto small = magnitude < 0x38800000u;
  const auto scaled = Ops::mul(Ops::value(Ops::select(small, magnitude, Ops::whole(0u))), Ops::splat(0x1p40f));
  const auto subnormal = (Ops::to_int(scaled) + random) >> 16;
  auto half = Ops::select(small, subnormal, normal);
  half = Ops::select(half > 0x7c00u, Ops::whole(0x7c00u), half);
  half = Ops::select(magnitude > 0x7f800000u, Ops::whole(0x7e00u), half);
  return half | ((bits >> 16) & 0x8000u);
}

// The dynamic 8-bit code (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022), of values in [-1, 1]
// for the first moment and in [0, 1] for the second, times the scale of their block: the largest finite magnitude in
// it. Decade i = 0..6, from 10^(i-7) to 10^(i-6), is cut into 2^i equal parts (2^(i+1) without a sign), each of which
// stands for its middle; 0 and 1 are exact. The bits, with magnitude k:
//   signed    0: zero, 1..127: k = code, 128: one, 129..255: -(k = code - 128); decade i starts at k = 2^i
//   unsigned  0: zero, 1..254: k = code + 1, 255: one;                        decade i starts at k = 2^(i+1)
// A second moment that is not zero is never coded as zero: its root divides.
//
// A scale that is negative says that some of its block are not finite, so that they do not spoil the others: then the
// code for one means NaN (signed) or infinity (unsigned), and the largest finite number gets the code below.

FASTLLM_HOST_DEVICE float adamw_block_scale(float largest_finite, bool all_finite) {
  return all_finite ? largest_finite : largest_finite > 0.0f ? -largest_finite : -1.0f;
}

template <class Ops, bool kSigned>
FASTLLM_HOST_DEVICE typename Ops::F adamw_decode(typename Ops::U code, float scale) {
  const auto k = kSigned ? Ops::select(code > 128u, code - 128u, code) : code + 1u;
  const auto bits = Ops::bits(Ops::from_int(k));
  const auto exponent = (bits >> 23) - 127u;  // of k: i or i + 1
  const auto fraction = Ops::sub(Ops::value((bits & 0x7fffffu) | 0x3f800000u), Ops::splat(1.0f));
  const auto half_part = Ops::value((126u - exponent) << 23);  // 2^-exponent / 2
  auto decade = Ops::splat(1e-6f);
  constexpr float kDecades[] = {1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  for (uint32_t i = 0; i < 6; ++i) {
    decade = Ops::select(exponent > i + (kSigned ? 0u : 1u), Ops::splat(kDecades[i]), decade);
  }
  const auto inside = Ops::add(Ops::mul(Ops::add(fraction, half_part), Ops::splat(0.9f)), Ops::splat(0.1f));
  auto value = Ops::select(code == 0u, Ops::splat(0.0f), Ops::mul(decade, inside));
  if constexpr (kSigned) {
    value = Ops::select(code > 128u, Ops::sub(Ops::splat(0.0f), value), value);
  }
  const auto size = Ops::splat(scale < 0.0f ? -scale : scale);
  const auto special = Ops::value(Ops::whole(kSigned ? 0x7fc00000u : 0x7f800000u));
  return Ops::select(code == (kSigned ? 128u : 255u), scale < 0.0f ? special : size, Ops::mul(value, size));
}

// `divide` gives a magnitude's quotient by the scale's. It must be exact from 1e-7 on; below, its size does not matter.
// kFinite: all of the block are, and the scale says so.
template <class Ops, bool kSigned, bool kFinite, class Divide>
FASTLLM_HOST_DEVICE typename Ops::U adamw_encode(typename Ops::F x, float scale, Divide divide) {
  const auto negative = x < Ops::splat(0.0f);
  auto magnitude = Ops::value(Ops::bits(x) & 0x7fffffffu);
  const auto finite = magnitude <= Ops::splat(kAdamwLargest);
  if constexpr (!kFinite) {
    magnitude = Ops::select(finite, magnitude, Ops::splat(0.0f));
  }
  const auto y = divide(magnitude);
  constexpr float kStarts[] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f};
  constexpr float kDecades[] = {1e5f, 1e4f, 1e3f, 1e2f, 1e1f, 1.0f};
  constexpr float kFirst = kSigned ? 1.0f : 2.0f;
  auto decade = Ops::splat(1e6f), parts = Ops::splat(kFirst);
  for (int i = 0; i < 6; ++i) {
    const auto inside = y >= Ops::splat(kStarts[i]);
    decade = Ops::select(inside, Ops::splat(kDecades[i]), decade);
    parts = Ops::select(inside, Ops::splat(kFirst * static_cast<float>(2 << i)), parts);
  }
  auto along = Ops::mul(Ops::sub(Ops::mul(y, decade), Ops::splat(0.1f)), Ops::splat(1.0f / 0.9f));
  along = Ops::select(along > Ops::splat(0.0f), along, Ops::splat(0.0f));
  auto k = Ops::to_int(Ops::fma(along, parts, parts));  // parts are a power of two: nothing is rounded twice
  constexpr uint32_t kOne = kSigned ? 128u : 256u;
  // Rounding may carry to 1 what lies below it, and cannot be trusted to carry 1 there.
  k = Ops::select(k >= kOne, Ops::whole(kOne - 1u), k);
  k = Ops::select(y >= Ops::splat(1.0f), Ops::whole(!kFinite && scale < 0.0f ? kOne - 1u : kOne), k);
  if constexpr (kSigned) {
    auto code = Ops::select(negative, Ops::select(k == kOne, Ops::whole(255u), k + 128u), k);
    code = Ops::select(y >= Ops::splat(1e-7f), code, Ops::whole(0u));
    return kFinite ? code : Ops::select(finite, code, Ops::whole(128u));
  } else {
    const auto code = Ops::select(magnitude > Ops::splat(0.0f), k - 1u, Ops::whole(0u));
    return kFinite ? code : Ops::select(finite, code, Ops::whole(255u));
  }
}

template <class Ops, bool kSigned>
FASTLLM_HOST_DEVICE typename Ops::U adamw_encode(typename Ops::F x, float scale) {
  return adamw_encode<Ops, kSigned, false>(x, scale, [scale](typename Ops::F magnitude) {
    return scale == 0.0f ? Ops::splat(0.0f) : Ops::div(magnitude, Ops::splat(scale < 0.0f ? -scale : scale));
  });
}

// What is kept in 8 bits of the first moment of an element whose second is infinite: it has stopped for good, and its
// first, most likely huge, would take the resolution of its block.
template <class Ops>
FASTLLM_HOST_DEVICE typename Ops::F adamw_first_moment(typename Ops::F exp_avg, typename Ops::F exp_avg_sq) {
  const auto largest = Ops::splat(kAdamwLargest);
  const auto stopped = Ops::select(exp_avg_sq > largest, Ops::splat(0.0f), exp_avg);
  return Ops::select(
      exp_avg <= largest, Ops::select(exp_avg >= Ops::sub(Ops::splat(0.0f), largest), stopped, exp_avg), exp_avg);
}

}  // namespace fastllm

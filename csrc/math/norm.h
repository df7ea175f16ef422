// The arithmetic of LayerNorm and RMSNorm, forward and backward, written once for the CPU and the GPU.
//
//   LayerNorm (centered):  mean = x[0] + sum(x - x[0]) / n,  rstd = 1 / sqrt(sum((x - mean)^2) / n + eps)
//   RMSNorm:               mean = 0,           rstd = 1 / sqrt(sum(x^2) / n + eps)
//
//   xhat = (x - mean) * rstd            y  = xhat * w + b
//   g    = dy * w                       dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  mean(g) only if centered
//   dw   = sum over rows of dy * xhat   db = sum over rows of dy
//
// The mean is summed from the row's first element up, which makes it exact for constant rows and better for all rows
// whose mean is large beside their deviation.
//
// V is float, or a SIMD vector of floats on the CPU. Reference: fastllm/reference/_norm.py.
#pragma once

#include "macros.h"

namespace fastllm {

template <bool kCentered, class V>
FASTLLM_HOST_DEVICE V norm_center(V x, float mean) {
  if constexpr (kCentered) {
    return x - mean;
  } else {
    return x;
  }
}

template <bool kCentered, class V>
FASTLLM_HOST_DEVICE V norm_xhat(V x, float mean, float rstd) {
  return norm_center<kCentered>(x, mean) * rstd;
}

FASTLLM_HOST_DEVICE float norm_rstd(float sum_of_squares, float n, float eps) {
  return 1.0f / FASTLLM_SQRTF(sum_of_squares / n + eps);
}

template <bool kCentered, class V>
FASTLLM_HOST_DEVICE V norm_dx(V g, V xhat, float mean_g, float mean_gx, float rstd) {
  if constexpr (kCentered) {
    return rstd * (g - mean_g - xhat * mean_gx);
  } else {
    return rstd * (g - xhat * mean_gx);
  }
}

}  // namespace fastllm

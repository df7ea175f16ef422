// What the host code of the norms hands to their kernels, on the CPU and on the GPU: plain data, no torch.
#pragma once

#include "dtype.h"

#include <cstdint>

namespace fastllm {

// Dropout of x before it is added to the residual (CPU only; on a GPU, kernels/_dropout_norm.py). Element (row, column)
// is kept where the upper 24 bits of word column % 4 of Philox at (column / 4, row, row >> 32, 0) reach the threshold.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // rate * 2^24
  float scale;         // 1 / (1 - rate) of what is kept
};

// Activations are of type `dtype`; rows are dense inside and `*_stride` elements apart, outputs dense throughout.
// Weight and bias are dense, of type float, or (GPU only) of the activations' type where `*_is_float` is false.
// Null: no residual, weight, bias, mean (RMSNorm), dsum; no gradient wanted.
struct NormFwd {
  DType dtype;
  bool centered;
  int64_t rows;
  int64_t n;
  float eps;
  const void* x;
  int64_t x_stride;
  const void* residual;
  int64_t residual_stride;
  const void* weight;
  bool weight_is_float;
  const void* bias;
  bool bias_is_float;
  void* y;
  Dropout dropout;
  void* sum;  // x + residual in the activations' type; written only if there is a residual
  float* mean;
  float* rstd;
  bool streamed;  // CPU only: y goes around the cache; its rows are aligned to 64 bytes then
};

struct NormBwd {
  DType dtype;
  bool centered;
  int64_t rows;
  int64_t n;
  const void* dy;
  int64_t dy_stride;
  const void* x;
  int64_t x_stride;
  const void* dsum;  // gradient of the second output of add_*_norm, added to dx
  int64_t dsum_stride;
  const void* weight;
  bool weight_is_float;
  const float* mean;
  const float* rstd;
  void* dx;
  Dropout dropout;
  void* dbranch;  // with dropout (CPU only): the gradient of what went through it, and dx that of the residual
  bool streamed;  // CPU only: as above, for dx and dbranch
};

}  // namespace fastllm

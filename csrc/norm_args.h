// What the host code of the norms hands to their kernels, on the CPU and on the GPU: plain data, no torch.
#pragma once

#include "dtype.h"

#include <cstdint>

namespace fastllm {

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
  bool streamed;  // CPU only: as above, for dx
};

// Dropout of x before it is added to the residual, on the CPU only: on a GPU, kernels/_dropout_norm.py has it. Element
// (row, column) is kept where the upper 24 bits of word column % 4 of Philox at (column / 4, row, row >> 32, 0) reach
// the threshold. Beside the arguments, not in them: CUDA kernels take those by value, and eight bytes more are eight
// bytes spilled.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // rate * 2^24
  float scale;         // 1 / (1 - rate) of what is kept
  void* dbranch;       // in the backward: the gradient of what went through it; dx is then that of the residual
};

}  // namespace fastllm

// Kernels of gelu (isa/gelu.cpp), one set for each instruction set: plain data, no torch.
#pragma once

#include "../dtype.h"
#include "activation.h"
#include "capability.h"

#include <cstdint>

namespace fastllm {

// Rows of `n` elements are dense inside and `*_stride` elements apart, the output dense throughout. Null: no bias, no
// dy (in the forward).
struct Gelu {
  DType dtype;
  Activation form;
  const void* x;
  int64_t x_stride;
  const float* bias;
  const void* dy;
  int64_t dy_stride;
  void* out;  // y, or dx
  int64_t n;
  bool streamed;  // out goes around the cache; its rows are aligned to 64 bytes then
};

// Elements [begin, end) of the rows [first, last). The backward writes the sum of dx over these rows to dbias (n
// floats, or null).
struct GeluKernels {
  void (*fwd)(const Gelu&, int64_t first, int64_t last, int64_t begin, int64_t end);
  void (*bwd)(const Gelu&, int64_t first, int64_t last, int64_t begin, int64_t end, float* dbias);
};

FASTLLM_DECLARE_KERNELS(GeluKernels, gelu_kernels)

}  // namespace fastllm

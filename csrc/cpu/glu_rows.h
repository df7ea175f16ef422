// Kernels of swiglu and geglu (isa/glu.cpp), one set for each instruction set: plain data, no torch.
#pragma once

#include "../dtype.h"
#include "activation.h"
#include "capability.h"

#include <cstdint>

namespace fastllm {

// Rows of `n` elements are dense inside and `*_stride` elements apart.
struct GluFwd {
  DType dtype;
  Activation kind;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* y;
  int64_t n;
  bool streamed;  // y goes around the cache; its rows are aligned to 64 bytes then
};

struct GluBwd {
  DType dtype;
  Activation kind;
  const void* dy;
  int64_t dy_stride;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* d;  // rows of 2 n: the gate's gradient, and up's
  int64_t n;
  bool streamed;
};

// Elements [begin, end) of one row.
struct GluKernels {
  void (*fwd)(const GluFwd&, int64_t row, int64_t begin, int64_t end);
  void (*bwd)(const GluBwd&, int64_t row, int64_t begin, int64_t end);
};

FASTLLM_DECLARE_KERNELS(GluKernels, glu_kernels)

}  // namespace fastllm

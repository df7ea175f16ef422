// Row kernels of cross_entropy (isa/cross_entropy.cpp), one set for each instruction set: plain data, no torch.
#pragma once

#include "../dtype.h"
#include "capability.h"

#include <cstdint>

namespace fastllm {

// Rows of `n` logits are dense inside and `stride` elements apart. A target outside [0, n) picks nothing.
struct CrossEntropyRows {
  DType dtype;
  int64_t n;
  const void* logits;
  int64_t stride;
  const int64_t* target;
  float softcap;  // 0: none
};

struct CrossEntropyFwd : CrossEntropyRows {
  float* top;
  float* lse;
  float* picked;
  float* mean;  // null: not wanted
};

struct CrossEntropyBwd : CrossEntropyRows {
  const float* top;
  const float* lse;
  const float* dlse;
  const float* dpicked;
  const float* dmean;  // null: zeros
  void* dlogits;       // may be the logits
  int64_t dlogits_stride;
  bool streamed;  // dlogits goes around the cache; its rows are aligned to 64 bytes then
};

// Rows [begin, end).
struct CrossEntropyKernels {
  void (*fwd)(const CrossEntropyFwd&, int64_t begin, int64_t end);
  void (*bwd)(const CrossEntropyBwd&, int64_t begin, int64_t end);
};

FASTLLM_DECLARE_KERNELS(CrossEntropyKernels, cross_entropy_kernels)

}  // namespace fastllm

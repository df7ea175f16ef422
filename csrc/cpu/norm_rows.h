// The norms' row kernels (isa/norm.cpp), one set for each instruction set.
#pragma once

#include "../norm_args.h"
#include "capability.h"

namespace fastllm {

// Rows [begin, end). The backward adds these rows' part to dweight and dbias (n floats each, or null).
struct NormRows {
  void (*fwd)(const NormFwd&, const Dropout&, int64_t begin, int64_t end);
  void (*bwd)(const NormBwd&, const Dropout&, int64_t begin, int64_t end, float* dweight, float* dbias);
};

FASTLLM_DECLARE_KERNELS(NormRows, norm_rows)

}  // namespace fastllm

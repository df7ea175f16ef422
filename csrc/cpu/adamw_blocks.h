// AdamW's kernels over a range of one parameter's elements (isa/adamw.cpp), one set for each instruction set.
#pragma once

#include "../adamw_args.h"
#include "capability.h"

namespace fastllm {

// What the gradients of a call are multiplied by.
struct AdamwFactors {
  float clip;        // clipping, and -1 where the objective is maximized
  bool unscale;      // divide by `grad_scale` first, and write that back
  float grad_scale;  // of a GradScaler
};

struct AdamwBlocks {
  // Elements [begin, end); begin is a multiple of kAdamwBlock.
  void (*step)(
      const AdamwTensor&, const AdamwCall&, const AdamwScalars&, const AdamwFactors&, int64_t begin, int64_t end);
  // The sum of squares of n elements.
  double (*square_sum)(const void* grad, DType dtype, int64_t n);
};

FASTLLM_DECLARE_KERNELS(AdamwBlocks, adamw_blocks)

}  // namespace fastllm

// Kernel of attention's dropout (isa/attention.cpp), one for each instruction set: plain data, no torch.
#pragma once

#include "capability.h"

#include <cstdint>

namespace fastllm {

// z has rows of seq_k floats: query i of head h of sequence b is row (b * heads + h) * seq_q + i.
struct AttentionDropout {
  uint64_t seed;
  uint32_t threshold;  // of 2^24: what is drawn below it is dropped
  float scale;         // of what is kept
  float* z;
  int64_t first;  // sequence and head that z begins with, as they are counted for the random numbers
  int64_t seq_q, seq_k;
};

struct AttentionKernels {
  // Rows [begin, end) of z: 0 for what is dropped, else the scale.
  void (*dropout)(const AttentionDropout&, int64_t begin, int64_t end);
};

FASTLLM_DECLARE_KERNELS(AttentionKernels, attention_kernels)

}  // namespace fastllm

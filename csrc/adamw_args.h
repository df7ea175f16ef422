// What the host code of AdamW hands to its kernels, on the CPU and on the GPU: plain data, no torch.
#pragma once

#include "dtype.h"
#include "math/adamw.h"

#include <cstdint>

namespace fastllm {

// The types of one parameter: several share a launch only where these agree.
struct AdamwTypes {
  DType param, grad, moment;
  bool quantized;  // the moments have 8 bits, whatever `moment` says
  bool remainder;  // master holds the 16 bits that the parameter lacks
  bool operator==(const AdamwTypes& o) const {
    return param == o.param && grad == o.grad && moment == o.moment && quantized == o.quantized &&
           remainder == o.remainder;
  }
};

// One parameter and what belongs to it, all dense and in the same order in memory. Tables of these outlive a step, as
// rows of int64 (fastllm/optim/adamw.py writes the second of them, `grad`).
struct AdamwTensor {
  void* param;
  void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;     // null without amsgrad
  void* master;             // null; float where the parameter has 16 bits; int16_t where types.remainder
  float* exp_avg_scale;     // one a block of kAdamwBlock elements, null unless the moments have 8 bits
  float* exp_avg_sq_scale;  // likewise
  float* step;              // on the host or on the device
  int64_t numel;
  uint32_t index;  // names the parameter in the random numbers
  uint32_t mark;   // kAdamwMark, so that no other int64 tensor passes for a table
  AdamwTypes types;
};
constexpr uint32_t kAdamwMark = 0x41644d57;
static_assert(sizeof(AdamwTensor) % sizeof(int64_t) == 0);

// What all parameters of a call share.
struct AdamwCall {
  AdamwHyper hyper;
  bool maximize;
  bool stochastic;
  uint64_t seed;
};

}  // namespace fastllm

// What the host code of AdamW (adamw.cpp) asks of its CUDA kernels. No torch here.
#pragma once

#include "../adamw_args.h"

#include <cuda_runtime.h>

#include <cstddef>

namespace fastllm {

// Kernel arguments hold the table: 32,764 bytes of them from CUDA 12.1 on, 4 KB before.
#if defined(CUDART_VERSION) && CUDART_VERSION >= 12010
constexpr int kAdamwArgumentBytes = 32764;
#else
constexpr int kAdamwArgumentBytes = 4096;
#endif

// What a call's elements have in common, once it is known on the device.
struct AdamwFactors {
  float clip;  // clipping, and -1 where the objective is maximized
  float grad_scale;
  float skip;  // not 0: infinities were found
};

// Pointers to one float on the device each, or null.
struct AdamwInputs {
  const float* grad_norm;
  const float* grad_scale;
  const float* found_inf;
  const float* lr;
  float max_norm;
};

// 32-bit words that 8-bit moments are looked up in (adamw_codes.cuh), aligned to 16 bytes.
constexpr int kAdamwCodesWords = 6276;

// Whether there is a kernel for these types.
bool adamw_cuda_supports(const AdamwTypes& types);

// Enqueues the increments of `count` steps, which lie on the device, or (`host_steps`) are floats already incremented;
// writes what follows from each step to scalars[0..count), what follows from the inputs to `factors`, and unless it is
// null, the words to `codes`.
void launch_adamw_prepare(
    const AdamwTensor* tensors,
    const float* host_steps,
    int64_t count,
    const AdamwCall& call,
    const AdamwInputs& inputs,
    AdamwScalars* scalars,
    AdamwFactors* factors,
    uint32_t* codes,
    cudaStream_t stream);

// Enqueues the update of tensors[order[i]], 0 <= i < count, all of the same types.
void launch_adamw_step(
    const AdamwTensor* tensors,
    const int64_t* order,
    int64_t count,
    const AdamwCall& call,
    bool unscale,
    const AdamwScalars* scalars,
    const AdamwFactors* factors,
    const uint32_t* codes,
    cudaStream_t stream);

// How many partial sums the norm of these gradients needs.
int64_t adamw_norm_parts(const AdamwTensor* tensors, int64_t count);

// Enqueues the partial sums of squares of gradients of any mix of types, and then their root's.
void launch_adamw_norm(
    const AdamwTensor* tensors, int64_t count, float* parts, int64_t part_count, float* norm, cudaStream_t stream);

}  // namespace fastllm

// What the host code of the norms (norm.cpp) asks of their CUDA kernels. No torch here.
#pragma once

#include "../norm_args.h"

#include <cuda_runtime.h>

namespace fastllm {

// Enqueues the forward on `stream`. Check cudaGetLastError() afterwards, as after launch_norm_bwd.
void launch_norm_fwd(const NormFwd& a, cudaStream_t stream);

// How many rows of partial sums (a.n floats each) the backward needs for each of dweight and dbias.
int64_t norm_bwd_parts(const NormBwd& a);

// Enqueues the backward on `stream`. dweight_parts and dbias_parts hold norm_bwd_parts(a) x a.n floats, or are null
// with their gradient; dweight and dbias hold a.n elements of their types.
struct NormParamGrads {
  float* dweight_parts;
  float* dbias_parts;
  void* dweight;
  DType dweight_dtype;
  void* dbias;
  DType dbias_dtype;
};
void launch_norm_bwd(const NormBwd& a, const NormParamGrads& grads, int64_t parts, cudaStream_t stream);

}  // namespace fastllm

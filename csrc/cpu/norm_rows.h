// What the host code of the norms (csrc/cpu/norm.h) asks of their row kernels (csrc/cpu/isa/norm.cpp).
#pragma once

#include <cstdint>

namespace fastllm {

enum class DType { kFloat, kBFloat16, kHalf };

// Pointers to activations are typed by `dtype`; a null residual, weight, bias, mean, dsum or dbias means there is none.
struct NormFwd {
  DType dtype;
  bool centered;
  int64_t n;
  float eps;
  const void* x;
  int64_t x_stride;
  const void* residual;
  int64_t residual_stride;
  const float* weight;
  const float* bias;
  void* y;
  void* sum;  // x + residual in the activations' type; written only if there is a residual
  float* mean;
  float* rstd;
};

struct NormBwd {
  DType dtype;
  bool centered;
  int64_t n;
  const void* dy;
  int64_t dy_stride;
  const void* x;
  int64_t x_stride;
  const void* dsum;  // gradient of the second output of add_*_norm, added to dx
  int64_t dsum_stride;
  const float* weight;
  const float* mean;
  const float* rstd;
  void* dx;
};

// Rows [begin, end). The backward adds these rows' part to dweight and dbias (n floats each, or null).
struct NormRows {
  void (*fwd)(const NormFwd&, int64_t begin, int64_t end);
  void (*bwd)(const NormBwd&, int64_t begin, int64_t end, float* dweight, float* dbias);
};

namespace baseline {
extern const NormRows norm_rows;
}
namespace avx2 {
extern const NormRows norm_rows;
}
namespace avx512 {
extern const NormRows norm_rows;
}

}  // namespace fastllm

// Host code of the norms on CUDA: allocates, chooses the stream, launches (norm_fwd.cu, norm_bwd.cu).
#include "norm.h"

#include "../norm.h"
#include "stream.h"

#include <torch/csrc/stable/accelerator.h>

namespace fastllm {

namespace {

// Weight or bias, dense, in float or in the activations' type.
MaybeTensor as_param(const MaybeTensor& t, ScalarType activations) {
  if (!t.has_value()) {
    return t;
  }
  Tensor dense = torch::stable::contiguous(*t);
  if (dense.scalar_type() != ScalarType::Float && dense.scalar_type() != activations) {
    dense = torch::stable::to(dense, ScalarType::Float);
  }
  return dense;
}

const void* data(const MaybeTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

bool is_float(const MaybeTensor& t) {
  return t.has_value() && t->scalar_type() == ScalarType::Float;
}

}  // namespace

Tensor new_output(const Tensor& x) {
  return torch::stable::new_empty(x, x.sizes());
}

void run_norm_fwd(NormFwd a, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const Dropout&) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const MaybeTensor w = as_param(weight, x.scalar_type()), b = as_param(bias, x.scalar_type());
  a.weight = data(w);
  a.weight_is_float = is_float(w);
  a.bias = data(b);
  a.bias_is_float = is_float(b);
  launch_norm_fwd(a, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void run_norm_bwd(NormBwd a, const Tensor& x, const MaybeTensor& weight, const NormBwdOut& out, const Dropout&) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const MaybeTensor w = as_param(weight, x.scalar_type());
  a.weight = data(w);
  a.weight_is_float = is_float(w);
  const int64_t parts = norm_bwd_parts(a);
  const Tensor sums = empty_vector(x, parts * (out.dweight.numel() + out.dbias.numel()), ScalarType::Float);
  float* next = static_cast<float*>(sums.mutable_data_ptr());
  NormParamGrads grads{};
  if (out.dweight.numel() > 0) {
    grads.dweight_parts = next;
    grads.dweight = out.dweight.mutable_data_ptr();
    grads.dweight_dtype = dtype_of(out.dweight);
    next += parts * a.n;
  }
  if (out.dbias.numel() > 0) {
    grads.dbias_parts = next;
    grads.dbias = out.dbias.mutable_data_ptr();
    grads.dbias_dtype = dtype_of(out.dbias);
  }
  launch_norm_bwd(a, grads, parts, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace fastllm

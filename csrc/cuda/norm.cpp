// Host code of the norms on CUDA: allocates, chooses the stream, launches (norm_fwd.cu, norm_bwd.cu).
#include "norm.h"

#include "../norm.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace fastllm {

namespace {

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

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

NormFwdOut norm_fwd(
    bool centered,
    const Tensor& x,
    const MaybeTensor& residual,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    double eps) {
  check_rows("residual", residual, x);
  check_parameter("weight", weight, x);
  check_parameter("bias", bias, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  NormFwdOut out;
  out.y = torch::stable::new_empty(x, x.sizes());
  out.rstd = empty_rows(x, ScalarType::Float);
  if (centered) {
    out.mean = empty_rows(x, ScalarType::Float);
  }
  if (residual.has_value()) {
    out.sum = torch::stable::new_empty(x, x.sizes());
  }
  if (x.numel() == 0) {
    return out;
  }
  const Rows x_rows = as_rows(x);
  const Rows residual_rows = residual.has_value() ? as_rows(*residual) : Rows{x, 0};
  const MaybeTensor w = as_param(weight, x.scalar_type()), b = as_param(bias, x.scalar_type());
  NormFwd a{};
  a.dtype = dtype_of(x);
  a.centered = centered;
  a.n = x.size(x.dim() - 1);
  a.rows = x.numel() / a.n;
  a.eps = static_cast<float>(eps);
  a.x = x_rows.data();
  a.x_stride = x_rows.stride;
  if (residual.has_value()) {
    a.residual = residual_rows.data();
    a.residual_stride = residual_rows.stride;
    a.sum = out.sum.mutable_data_ptr();
  }
  a.weight = data(w);
  a.weight_is_float = is_float(w);
  a.bias = data(b);
  a.bias_is_float = is_float(b);
  a.y = out.y.mutable_data_ptr();
  a.mean = centered ? static_cast<float*>(out.mean.mutable_data_ptr()) : nullptr;
  a.rstd = static_cast<float*>(out.rstd.mutable_data_ptr());
  launch_norm_fwd(a, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

NormBwdOut norm_bwd(
    bool centered,
    const Tensor& dy,
    const MaybeTensor& dsum,
    const Tensor& x,
    const MaybeTensor& mean,
    const Tensor& rstd,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    bool weight_grad,
    bool bias_grad) {
  check_rows("dy", dy, x);
  check_rows("dsum", dsum, x);
  check_statistic("mean", mean, x);
  check_statistic("rstd", rstd, x);
  check_parameter("weight", weight, x);
  check_parameter("bias", bias, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t n = x.size(x.dim() - 1);
  weight_grad = weight_grad && weight.has_value();
  bias_grad = bias_grad && bias.has_value();
  NormBwdOut out;
  out.dx = torch::stable::new_empty(x, x.sizes());
  out.dweight = empty_vector(x, weight_grad ? n : 0, weight.has_value() ? weight->scalar_type() : x.scalar_type());
  out.dbias = empty_vector(x, bias_grad ? n : 0, bias.has_value() ? bias->scalar_type() : x.scalar_type());
  if (x.numel() == 0) {
    torch::stable::zero_(out.dweight);
    torch::stable::zero_(out.dbias);
    return out;
  }
  const Rows dy_rows = as_rows(dy), x_rows = as_rows(x);
  const Rows dsum_rows = dsum.has_value() ? as_rows(*dsum) : Rows{x, 0};
  const Tensor rstd_dense = torch::stable::contiguous(rstd);
  const Tensor mean_dense = centered ? torch::stable::contiguous(*mean) : rstd_dense;
  const MaybeTensor w = as_param(weight, x.scalar_type());
  NormBwd a{};
  a.dtype = dtype_of(x);
  a.centered = centered;
  a.n = n;
  a.rows = x.numel() / n;
  a.dy = dy_rows.data();
  a.dy_stride = dy_rows.stride;
  a.x = x_rows.data();
  a.x_stride = x_rows.stride;
  if (dsum.has_value()) {
    a.dsum = dsum_rows.data();
    a.dsum_stride = dsum_rows.stride;
  }
  a.weight = data(w);
  a.weight_is_float = is_float(w);
  a.mean = centered ? static_cast<const float*>(mean_dense.const_data_ptr()) : nullptr;
  a.rstd = static_cast<const float*>(rstd_dense.const_data_ptr());
  a.dx = out.dx.mutable_data_ptr();

  const int64_t parts = norm_bwd_parts(a);
  const int64_t gradients = static_cast<int64_t>(weight_grad) + static_cast<int64_t>(bias_grad);
  const Tensor partial_sums = empty_vector(x, gradients * parts * n, ScalarType::Float);
  float* next = static_cast<float*>(partial_sums.mutable_data_ptr());
  NormParamGrads grads{};
  if (weight_grad) {
    grads.dweight_parts = next;
    grads.dweight = out.dweight.mutable_data_ptr();
    grads.dweight_dtype = dtype_of(out.dweight);
    next += parts * n;
  }
  if (bias_grad) {
    grads.dbias_parts = next;
    grads.dbias = out.dbias.mutable_data_ptr();
    grads.dbias_dtype = dtype_of(out.dbias);
  }
  launch_norm_bwd(a, grads, parts, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace fastllm

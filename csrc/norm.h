// The host side that the norms' CPU and CUDA kernels have in common: what a device implements, and over it the ops
// layer_norm, rms_norm, add_layer_norm and add_rms_norm as fastllm/ops/ declares them; with dropout before the
// addition, in cpu/dropout_norm.h. x is the sum where a residual was added.
#pragma once

#include "norm_args.h"
#include "tensor.h"

#include <optional>
#include <tuple>

namespace fastllm {

struct NormFwdOut {
  Tensor y, sum, mean, rstd;  // sum only with a residual, mean only if centered
};

struct NormBwdOut {
  Tensor dx, dweight, dbias;  // dweight and dbias are empty where no gradient was asked for
  Tensor dbranch;             // only with dropout
};

// x's like: residual, dy, dsum. Statistics: mean, rstd. Parameters: weight, bias.
inline void check_rows(const char* what, const MaybeTensor& t, const Tensor& x) {
  if (t.has_value()) {
    check_argument(t->scalar_type() == x.scalar_type() && same_shape(*t, x) && same_device(*t, x), what, *t, x);
  }
}

inline void check_statistic(const char* what, const MaybeTensor& t, const Tensor& x) {
  if (t.has_value()) {
    const bool fits = t->numel() * x.size(x.dim() - 1) == x.numel();
    check_argument(t->scalar_type() == ScalarType::Float && fits && same_device(*t, x), what, *t, x);
  }
}

inline void check_parameter(const char* what, const MaybeTensor& t, const Tensor& x) {
  if (t.has_value()) {
    const bool fits = t->dim() == 1 && t->size(0) == x.size(x.dim() - 1);
    check_argument(is_kernel_dtype(t->scalar_type()) && fits && same_device(*t, x), what, *t, x);
  }
}

// What cpu/norm.cpp and cuda/norm.cpp implement, each in its own shared object. `a` comes with everything but weight
// and bias; there is at least one element.
Tensor new_output(const Tensor& x);  // not initialized, contiguous, of x's shape and type
void run_norm_fwd(
    NormFwd a, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const Dropout& dropout);
void run_norm_bwd(NormBwd a, const Tensor& x, const MaybeTensor& weight, const NormBwdOut& out, const Dropout& dropout);

inline NormFwdOut norm_fwd(
    bool centered,
    const Tensor& x,
    const MaybeTensor& residual,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    double eps,
    const Dropout& dropout = {}) {
  check_rows("residual", residual, x);
  check_parameter("weight", weight, x);
  check_parameter("bias", bias, x);
  NormFwdOut out;
  out.y = new_output(x);
  out.rstd = empty_rows(x, ScalarType::Float);
  if (centered) {
    out.mean = empty_rows(x, ScalarType::Float);
  }
  if (residual.has_value()) {
    out.sum = new_output(x);
  }
  if (x.numel() == 0) {
    return out;
  }
  const Rows x_rows = as_rows(x);
  std::optional<Rows> residual_rows;
  NormFwd a{};
  a.dtype = dtype_of(x);
  a.centered = centered;
  a.n = x.size(x.dim() - 1);
  a.rows = x.numel() / a.n;
  a.eps = static_cast<float>(eps);
  a.x = x_rows.data();
  a.x_stride = x_rows.stride;
  if (residual.has_value()) {
    residual_rows = as_rows(*residual);
    a.residual = residual_rows->data();
    a.residual_stride = residual_rows->stride;
    a.sum = out.sum.mutable_data_ptr();
  }
  a.y = out.y.mutable_data_ptr();
  a.mean = centered ? static_cast<float*>(out.mean.mutable_data_ptr()) : nullptr;
  a.rstd = static_cast<float*>(out.rstd.mutable_data_ptr());
  run_norm_fwd(a, x, weight, bias, dropout);
  return out;
}

inline NormBwdOut norm_bwd(
    bool centered,
    const Tensor& dy,
    const MaybeTensor& dsum,
    const Tensor& x,
    const MaybeTensor& mean,
    const Tensor& rstd,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    bool weight_grad,
    bool bias_grad,
    std::optional<Dropout> dropout = std::nullopt) {
  check_rows("dy", dy, x);
  check_rows("dsum", dsum, x);
  check_statistic("mean", mean, x);
  check_statistic("rstd", rstd, x);
  check_parameter("weight", weight, x);
  check_parameter("bias", bias, x);
  const int64_t n = x.size(x.dim() - 1);
  NormBwdOut out;
  out.dx = new_output(x);
  if (dropout) {
    out.dbranch = new_output(x);
  }
  auto parameter_grad = [&](const MaybeTensor& parameter, bool wanted) {
    return empty_vector(x, parameter && wanted ? n : 0, parameter ? parameter->scalar_type() : x.scalar_type());
  };
  out.dweight = parameter_grad(weight, weight_grad);
  out.dbias = parameter_grad(bias, bias_grad);
  if (x.numel() == 0) {
    torch::stable::zero_(out.dweight);
    torch::stable::zero_(out.dbias);
    return out;
  }
  const Rows dy_rows = as_rows(dy), x_rows = as_rows(x);
  std::optional<Rows> dsum_rows;
  const Tensor rstd_dense = torch::stable::contiguous(rstd);
  const Tensor mean_dense = centered ? torch::stable::contiguous(*mean) : rstd_dense;
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
    dsum_rows = as_rows(*dsum);
    a.dsum = dsum_rows->data();
    a.dsum_stride = dsum_rows->stride;
  }
  a.mean = centered ? static_cast<const float*>(mean_dense.const_data_ptr()) : nullptr;
  a.rstd = static_cast<const float*>(rstd_dense.const_data_ptr());
  a.dx = out.dx.mutable_data_ptr();
  if (dropout) {
    dropout->dbranch = out.dbranch.mutable_data_ptr();
  }
  run_norm_bwd(a, x, weight, out, dropout.value_or(Dropout{}));
  return out;
}

// The kernels compute activations, weight and bias in fp32, bf16 or fp16 each; ops/_norm.py says the same to `explain`.
inline bool norm_supported(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias = std::nullopt) {
  return is_kernel_dtype(x.scalar_type()) && (!weight.has_value() || is_kernel_dtype(weight->scalar_type())) &&
         (!bias.has_value() || is_kernel_dtype(bias->scalar_type()));
}

inline std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, double eps) {
  if (!norm_supported(x, weight, bias)) {
    return to_tuple(call_fallback<3>("layer_norm_fwd", x, weight, bias, eps));
  }
  auto out = norm_fwd(true, x, std::nullopt, weight, bias, eps);
  return {out.y, out.mean, out.rstd};
}

inline std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    bool weight_grad,
    bool bias_grad) {
  if (!norm_supported(x, weight, bias)) {
    return to_tuple(call_fallback<3>("layer_norm_bwd", dy, x, mean, rstd, weight, bias, weight_grad, bias_grad));
  }
  auto out = norm_bwd(true, dy, std::nullopt, x, mean, rstd, weight, bias, weight_grad, bias_grad);
  return {out.dx, out.dweight, out.dbias};
}

inline std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const MaybeTensor& weight, double eps) {
  if (!norm_supported(x, weight)) {
    return to_tuple(call_fallback<2>("rms_norm_fwd", x, weight, eps));
  }
  auto out = norm_fwd(false, x, std::nullopt, weight, std::nullopt, eps);
  return {out.y, out.rstd};
}

inline std::tuple<Tensor, Tensor> rms_norm_bwd(
    const Tensor& dy, const Tensor& x, const Tensor& rstd, const MaybeTensor& weight, bool weight_grad) {
  if (!norm_supported(x, weight)) {
    return to_tuple(call_fallback<2>("rms_norm_bwd", dy, x, rstd, weight, weight_grad));
  }
  auto out = norm_bwd(false, dy, std::nullopt, x, std::nullopt, rstd, weight, std::nullopt, weight_grad, false);
  return {out.dx, out.dweight};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(
    const Tensor& x, const Tensor& residual, const MaybeTensor& weight, const MaybeTensor& bias, double eps) {
  if (!norm_supported(x, weight, bias)) {
    return to_tuple(call_fallback<4>("add_layer_norm_fwd", x, residual, weight, bias, eps));
  }
  auto out = norm_fwd(true, x, residual, weight, bias, eps);
  return {out.y, out.sum, out.mean, out.rstd};
}

inline std::tuple<Tensor, Tensor, Tensor> add_layer_norm_bwd(
    const Tensor& dy,
    const MaybeTensor& dsum,
    const Tensor& sum,
    const Tensor& mean,
    const Tensor& rstd,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    bool weight_grad,
    bool bias_grad) {
  if (!norm_supported(sum, weight, bias)) {
    return to_tuple(
        call_fallback<3>("add_layer_norm_bwd", dy, dsum, sum, mean, rstd, weight, bias, weight_grad, bias_grad));
  }
  auto out = norm_bwd(true, dy, dsum, sum, mean, rstd, weight, bias, weight_grad, bias_grad);
  return {out.dx, out.dweight, out.dbias};
}

inline std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(
    const Tensor& x, const Tensor& residual, const MaybeTensor& weight, double eps) {
  if (!norm_supported(x, weight)) {
    return to_tuple(call_fallback<3>("add_rms_norm_fwd", x, residual, weight, eps));
  }
  auto out = norm_fwd(false, x, residual, weight, std::nullopt, eps);
  return {out.y, out.sum, out.rstd};
}

inline std::tuple<Tensor, Tensor> add_rms_norm_bwd(
    const Tensor& dy,
    const MaybeTensor& dsum,
    const Tensor& sum,
    const Tensor& rstd,
    const MaybeTensor& weight,
    bool weight_grad) {
  if (!norm_supported(sum, weight)) {
    return to_tuple(call_fallback<2>("add_rms_norm_bwd", dy, dsum, sum, rstd, weight, weight_grad));
  }
  auto out = norm_bwd(false, dy, dsum, sum, std::nullopt, rstd, weight, std::nullopt, weight_grad, false);
  return {out.dx, out.dweight};
}

}  // namespace fastllm

// dropout_add_layer_norm and dropout_add_rms_norm on the CPU, as fastllm/ops/ declares them. Kernels: isa/norm.cpp.
#pragma once

#include "../norm.h"

#include <cmath>

namespace fastllm {

inline Dropout dropout_of(const Tensor& seed, double p) {
  STD_TORCH_CHECK(
      seed.numel() == 1 && seed.scalar_type() == ScalarType::Long && !seed.is_cuda(),
      "fastllm: seed must be one int64 on the CPU");
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "fastllm: p must be between 0 and 1, got ", p);
  return {
      static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())),
      static_cast<uint32_t>(std::nearbyint(p * 0x1p24)),
      static_cast<float>(p < 1.0 ? 1.0 / (1.0 - p) : 0.0),
      nullptr};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_fwd(
    const Tensor& x,
    const Tensor& residual,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    const Tensor& seed,
    double p,
    double eps) {
  if (!norm_supported(x, weight, bias)) {
    return to_tuple(call_fallback<4>("dropout_add_layer_norm_fwd", x, residual, weight, bias, seed, p, eps));
  }
  auto out = norm_fwd(true, x, residual, weight, bias, eps, dropout_of(seed, p));
  return {out.y, out.sum, out.mean, out.rstd};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_bwd(
    const Tensor& dy,
    const MaybeTensor& dsum,
    const Tensor& sum,
    const Tensor& mean,
    const Tensor& rstd,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    const Tensor& seed,
    double p,
    bool weight_grad,
    bool bias_grad) {
  if (!norm_supported(sum, weight, bias)) {
    return to_tuple(
        call_fallback<4>(
            "dropout_add_layer_norm_bwd", dy, dsum, sum, mean, rstd, weight, bias, seed, p, weight_grad, bias_grad));
  }
  auto out = norm_bwd(true, dy, dsum, sum, mean, rstd, weight, bias, weight_grad, bias_grad, dropout_of(seed, p));
  return {out.dbranch, out.dx, out.dweight, out.dbias};
}

inline std::tuple<Tensor, Tensor, Tensor> dropout_add_rms_norm_fwd(
    const Tensor& x, const Tensor& residual, const MaybeTensor& weight, const Tensor& seed, double p, double eps) {
  if (!norm_supported(x, weight)) {
    return to_tuple(call_fallback<3>("dropout_add_rms_norm_fwd", x, residual, weight, seed, p, eps));
  }
  auto out = norm_fwd(false, x, residual, weight, std::nullopt, eps, dropout_of(seed, p));
  return {out.y, out.sum, out.rstd};
}

inline std::tuple<Tensor, Tensor, Tensor> dropout_add_rms_norm_bwd(
    const Tensor& dy,
    const MaybeTensor& dsum,
    const Tensor& sum,
    const Tensor& rstd,
    const MaybeTensor& weight,
    const Tensor& seed,
    double p,
    bool weight_grad) {
  if (!norm_supported(sum, weight)) {
    return to_tuple(call_fallback<3>("dropout_add_rms_norm_bwd", dy, dsum, sum, rstd, weight, seed, p, weight_grad));
  }
  auto out =
      norm_bwd(false, dy, dsum, sum, std::nullopt, rstd, weight, std::nullopt, weight_grad, false, dropout_of(seed, p));
  return {out.dbranch, out.dx, out.dweight};
}

}  // namespace fastllm

// The host side that AdamW's CPU and CUDA kernels have in common: from the lists of fastllm/ops/adamw.py to the table
// that a device's kernels walk, and what a device implements.
#pragma once

#include "adamw_args.h"
#include "tensor.h"

#include <string>
#include <utility>
#include <vector>

namespace fastllm {

using TensorList = std::vector<Tensor>;

struct AdamwTable {
  std::vector<AdamwTensor> tensors;
  std::vector<AdamwTypes> types;
  bool steps_on_host = false;  // while the parameters are on a GPU
  TensorList kept;                                // copies that the table points to
  std::vector<std::pair<Tensor, Tensor>> copied;  // (original, copy): copied back after the step
};

// What a call is given as tensors, each of one element on the parameters' device.
struct AdamwDevice {
  MaybeTensor grad_norm, grad_scale, found_inf, lr;
  float max_norm;
};

// What cpu/adamw.cpp and cuda/adamw.cpp implement, each in its own shared object.
bool adamw_has_kernel(const AdamwTypes& types);
void run_adamw_step(const AdamwTable& table, const AdamwCall& call, const AdamwDevice& device, const Tensor& like);
// Writes the norm of all the tensors' gradients, whose other pointers are null, to one float.
void run_adamw_norm(const AdamwTable& table, const Tensor& norm);

inline const float* adamw_scalar(const MaybeTensor& t) {
  return t.has_value() ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// Whether the elements fill their memory without gaps or overlaps, in whatever order.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) {
    return true;
  }
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1) {
      order.emplace_back(strides[d], sizes[d]);
    }
  }
  std::sort(order.begin(), order.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : order) {
    if (stride != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

// Whether two tensors of one shape have their elements in the same order. Both are dense.
inline bool same_order(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && x[d] != y[d]) {
      return false;
    }
  }
  return true;
}

// How one parameter's tensors are read: all as they lie in memory, or contiguous copies of those that are not.
class AdamwReader {
 public:
  AdamwReader(AdamwTable& table, bool as_they_lie) : table_(table), as_they_lie_(as_they_lie) {}

  void* operator()(const Tensor& t, bool written) {
    if (as_they_lie_ || t.is_contiguous()) {
      return t.mutable_data_ptr();
    }
    Tensor copy = torch::stable::contiguous(t);
    table_.kept.push_back(copy);
    if (written) {
      table_.copied.emplace_back(t, copy);
    }
    return copy.mutable_data_ptr();
  }

 private:
  AdamwTable& table_;
  bool as_they_lie_;
};

inline void check_adamw(bool ok, const char* what, size_t index, const Tensor& got, const Tensor& param) {
  if (!ok) {
    STD_TORCH_CHECK(
        false, "fastllm: adamw: ", what, " ", index, " of shape ", to_string(got), " does not fit its parameter of shape ",
        to_string(param), " in shape, dtype or device");
  }
}

inline AdamwTypes adamw_types(const Tensor& param, const Tensor& grad, const Tensor& exp_avg) {
  const bool quantized = exp_avg.scalar_type() == ScalarType::Byte;
  return {dtype_of(param), dtype_of(grad), quantized ? DType::kFloat : dtype_of(exp_avg), quantized, false};
}

inline bool is_moment_dtype(ScalarType dtype) {
  return is_kernel_dtype(dtype) || dtype == ScalarType::Byte;
}

// The kernels compute float32, bfloat16 and float16; ops/adamw.py says the same to `explain`.
inline bool adamw_supported(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs) {
  for (size_t i = 0; i < params.size(); ++i) {
    if (!is_kernel_dtype(params[i].scalar_type()) || !is_kernel_dtype(grads[i].scalar_type()) ||
        !is_moment_dtype(exp_avgs[i].scalar_type()) || !adamw_has_kernel(adamw_types(params[i], grads[i], exp_avgs[i]))) {
      return false;
    }
  }
  return true;
}

struct AdamwLists {
  const TensorList &params, &grads, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs, &steps, &masters, &exp_avg_scales,
      &exp_avg_sq_scales;
};

inline AdamwTable adamw_table(const AdamwLists& l, const std::vector<int64_t>& indices, bool write_grads) {
  AdamwTable table;
  const size_t count = l.params.size();
  table.tensors.reserve(count);
  table.types.reserve(count);
  // One tensor may hold the steps of all parameters.
  const Tensor& steps = l.steps[0];
  const bool one_step_tensor = l.steps.size() == 1 && steps.numel() == static_cast<int64_t>(count) &&
                               steps.scalar_type() == ScalarType::Float && steps.is_contiguous();
  STD_TORCH_CHECK(one_step_tensor || l.steps.size() == count, "fastllm: adamw: ", l.steps.size(), " steps for ", count);
  float* first_step = static_cast<float*>(steps.mutable_data_ptr());
  table.steps_on_host = !same_device(steps, l.params[0]);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = l.params[i];
    const Tensor* parts[] = {
        &l.grads[i],
        &l.exp_avgs[i],
        &l.exp_avg_sqs[i],
        l.max_exp_avg_sqs.empty() ? nullptr : &l.max_exp_avg_sqs[i],
        l.masters.empty() ? nullptr : &l.masters[i]};
    const char* names[] = {"grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master"};
    const auto moment = l.exp_avgs[i].scalar_type();
    const bool quantized = moment == ScalarType::Byte;
    bool as_they_lie = is_dense(param);
    for (int part = 0; part < 5; ++part) {
      if (parts[part] == nullptr) {
        continue;
      }
      const Tensor& t = *parts[part];
      const auto dtype = t.scalar_type();
      const bool of_type = part == 0 || (part < 4 ? dtype == moment
                                                  : dtype == ScalarType::Float || (dtype == ScalarType::Short &&
                                                        param.scalar_type() == ScalarType::BFloat16));
      check_adamw(of_type && same_shape(t, param) && same_device(t, param), names[part], i, t, param);
      as_they_lie = as_they_lie && same_order(t, param);
    }
    if (param.scalar_type() == ScalarType::Float) {
      parts[4] = nullptr;  // is its own master
    }
    AdamwReader read(table, as_they_lie);
    AdamwTensor t{};
    t.numel = param.numel();
    t.index = static_cast<uint32_t>(indices.empty() ? i : indices[i]);
    t.param = read(param, true);
    t.grad = read(*parts[0], write_grads);
    t.exp_avg = read(*parts[1], true);
    t.exp_avg_sq = read(*parts[2], true);
    t.max_exp_avg_sq = parts[3] == nullptr ? nullptr : read(*parts[3], true);
    t.master = parts[4] == nullptr ? nullptr : read(*parts[4], true);
    if (one_step_tensor) {
      t.step = first_step + i;
    } else {
      const Tensor& step = l.steps[i];
      check_adamw(
          step.scalar_type() == ScalarType::Float && step.numel() == 1 && same_device(step, steps) &&
              (!step.is_cuda() || same_device(step, param)),
          "step", i, step, param);
      t.step = static_cast<float*>(step.mutable_data_ptr());
    }
    if (quantized) {
      const Tensor* scales[] = {&l.exp_avg_scales[i], &l.exp_avg_sq_scales[i]};
      for (const Tensor* scale : scales) {
        const bool fits = scale->scalar_type() == ScalarType::Float && scale->is_contiguous() &&
                          scale->numel() * kAdamwBlock >= t.numel && same_device(*scale, param);
        check_adamw(fits, "scale", i, *scale, param);
      }
      t.exp_avg_scale = static_cast<float*>(scales[0]->mutable_data_ptr());
      t.exp_avg_sq_scale = static_cast<float*>(scales[1]->mutable_data_ptr());
    }
    table.tensors.push_back(t);
    table.types.push_back(adamw_types(param, l.grads[i], l.exp_avgs[i]));
    table.types.back().remainder = parts[4] != nullptr && parts[4]->scalar_type() == ScalarType::Short;
  }
  return table;
}

inline void adamw_step(
    const TensorList& params,
    const TensorList& grads,
    const TensorList& exp_avgs,
    const TensorList& exp_avg_sqs,
    const TensorList& max_exp_avg_sqs,
    const TensorList& steps,
    const TensorList& masters,
    const TensorList& exp_avg_scales,
    const TensorList& exp_avg_sq_scales,
    const MaybeTensor& grad_norm,
    const MaybeTensor& grad_scale,
    const MaybeTensor& found_inf,
    const MaybeTensor& lr_tensor,
    const std::vector<int64_t>& indices,
    double lr,
    double beta1,
    double beta2,
    double weight_decay,
    double eps,
    double max_norm,
    bool maximize,
    bool stochastic,
    int64_t seed) {
  if (params.empty()) {
    return;
  }
  const size_t count = params.size();
  auto fits = [&](const TensorList& list, bool optional) { return list.size() == count || (optional && list.empty()); };
  STD_TORCH_CHECK(
      fits(grads, false) && fits(exp_avgs, false) && fits(exp_avg_sqs, false) && fits(max_exp_avg_sqs, true) &&
          !steps.empty() && fits(masters, true) && fits(exp_avg_scales, true) && fits(exp_avg_sq_scales, true) &&
          (indices.empty() || indices.size() == count),
      "fastllm: adamw: lists of different lengths for ",
      count,
      " parameters");
  if (!adamw_supported(params, grads, exp_avgs)) {
    call_fallback<0>("adamw_step", params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, masters,
                     exp_avg_scales, exp_avg_sq_scales, grad_norm, grad_scale, found_inf, lr_tensor, indices, lr, beta1,
                     beta2, weight_decay, eps, max_norm, maximize, stochastic, seed);
    return;
  }
  for (size_t i = 0; i < count && exp_avg_scales.empty(); ++i) {
    STD_TORCH_CHECK(exp_avgs[i].scalar_type() != ScalarType::Byte, "fastllm: adamw: exp_avg ", i, " lacks its scales");
  }
  for (const MaybeTensor* t : {&grad_norm, &grad_scale, &found_inf, &lr_tensor}) {
    STD_TORCH_CHECK(
        !t->has_value() || ((*t)->scalar_type() == ScalarType::Float && (*t)->numel() == 1 && same_device(**t, params[0])),
        "fastllm: adamw: grad_norm, grad_scale, found_inf and lr must be one float32 on the parameters' device");
  }
  const AdamwTable table = adamw_table(
      {params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, masters, exp_avg_scales, exp_avg_sq_scales},
      indices,
      grad_scale.has_value());
  const AdamwCall call{{lr, beta1, beta2, weight_decay, eps}, maximize, stochastic, static_cast<uint64_t>(seed)};
  const AdamwDevice device{grad_norm, grad_scale, found_inf, lr_tensor, static_cast<float>(max_norm)};
  run_adamw_step(table, call, device, params[0]);
  for (const auto& [original, copy] : table.copied) {
    Tensor target = original;
    torch::stable::copy_(target, copy);
  }
}

inline Tensor adamw_norm(const TensorList& grads) {
  STD_TORCH_CHECK(!grads.empty(), "fastllm: adamw_norm: no gradients");
  AdamwTable table;
  table.tensors.reserve(grads.size());
  for (const Tensor& grad : grads) {
    if (!is_kernel_dtype(grad.scalar_type())) {
      return call_fallback<1>("adamw_norm", grads)[0];
    }
    STD_TORCH_CHECK(same_device(grad, grads[0]), "fastllm: adamw_norm: gradients on different devices");
    AdamwReader read(table, is_dense(grad));
    AdamwTensor t{};
    t.numel = grad.numel();
    t.grad = read(grad, false);
    const DType dtype = dtype_of(grad);
    table.tensors.push_back(t);
    table.types.push_back({dtype, dtype, dtype, false, false});
  }
  const Tensor norm = torch::stable::new_empty(grads[0], {}, ScalarType::Float);
  run_adamw_norm(table, norm);
  return norm;
}

}  // namespace fastllm

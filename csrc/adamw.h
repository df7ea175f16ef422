// The host side that AdamW's CPU and CUDA kernels have in common: from the lists of fastllm/ops/adamw.py to the table
// that a device's kernels walk, and what a device implements.
#pragma once

#include "adamw_args.h"
#include "tensor.h"

#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace fastllm {

using TensorList = std::vector<Tensor>;

struct AdamwTable {
  std::vector<AdamwTensor> tensors;
  TensorList kept;                                // copies that the table points to
  std::vector<std::pair<Tensor, Tensor>> copied;  // (original, copy): copied back after the step
};

// What a call is given as tensors, each of one element on the parameters' device.
struct AdamwDevice {
  MaybeTensor grad_norm, grad_scale, found_inf, lr;
  float max_norm;
  bool steps_apart;  // the steps are on the host, the parameters on a GPU
};

struct AdamwTensors {
  const AdamwTensor* data;
  int64_t count;
  const AdamwTensor* begin() const {
    return data;
  }
  const AdamwTensor* end() const {
    return data + count;
  }
};

// What cpu/adamw.cpp and cuda/adamw.cpp implement, each in its own shared object.
bool adamw_has_kernel(const AdamwTypes& types);
void run_adamw_step(AdamwTensors tensors, const AdamwCall& call, const AdamwDevice& device, const Tensor& like);
// Called for the first table of parameters that will be updated again and again.
void prepare_adamw(AdamwTensors tensors);
// Writes the norm of all the tensors' gradients, whose other pointers are null, to one float.
void run_adamw_norm(AdamwTensors tensors, const Tensor& norm);

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

// Whether a tensor has its elements where a dense one of the same shape has them.
inline bool same_order(const Tensor& t, const Tensor& dense) {
  const auto sizes = t.sizes(), x = t.strides(), y = dense.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && x[d] != y[d]) {
      return false;
    }
  }
  return true;
}

// Whether an element of memory is more than one of the tensor, as after expand.
inline bool shares_elements(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && strides[d] == 0) {
      return true;
    }
  }
  return false;
}

// Reads one parameter's tensors, all in the order of `dense`: as they lie, or as copies where their order is another.
class AdamwReader {
 public:
  AdamwReader(AdamwTable& table, const Tensor& dense) : table_(table), dense_(dense) {}

  void* operator()(const Tensor& t, bool written) {
    if (same_order(t, dense_)) {
      return t.mutable_data_ptr();
    }
    Tensor copy = torch::stable::to(torch::stable::empty_like(dense_), t.scalar_type());
    torch::stable::copy_(copy, t);
    table_.kept.push_back(copy);
    if (written) {
      table_.copied.emplace_back(t, copy);
    }
    return copy.mutable_data_ptr();
  }

 private:
  AdamwTable& table_;
  const Tensor& dense_;
};

// A tensor whose order the others are read in: the first of these that is dense, else a contiguous one.
inline Tensor adamw_order(const Tensor& param, const Tensor& exp_avg) {
  return is_dense(param) ? param : is_dense(exp_avg) ? exp_avg : torch::stable::contiguous(param);
}

inline void check_adamw(bool ok, const char* what, size_t index, const Tensor& got, const Tensor& param) {
  if (!ok) {
    STD_TORCH_CHECK(
        false,
        "fastllm: adamw: ",
        what,
        " ",
        index,
        " of shape ",
        to_string(got),
        " does not fit its parameter of shape ",
        to_string(param),
        " in shape, dtype or device");
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
        !is_moment_dtype(exp_avgs[i].scalar_type()) ||
        !adamw_has_kernel(adamw_types(params[i], grads[i], exp_avgs[i]))) {
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
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = l.params[i];
    const Tensor* parts[] = {
        &l.grads[i],
        &l.exp_avgs[i],
        &l.exp_avg_sqs[i],
        l.max_exp_avg_sqs.empty() ? nullptr : &l.max_exp_avg_sqs[i],
        l.masters.empty() ? nullptr : &l.masters[i]};
    const char* names[] = {"grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master"};
    check_adamw(same_device(param, l.params[0]), "parameter", i, l.params[0], param);
    const auto moment = l.exp_avgs[i].scalar_type();
    const bool quantized = moment == ScalarType::Byte;
    for (int part = 0; part < 5; ++part) {
      if (parts[part] == nullptr) {
        continue;
      }
      const Tensor& t = *parts[part];
      const auto dtype = t.scalar_type();
      const bool of_type =
          part == 0 || (part < 4 ? dtype == moment
                                 : dtype == ScalarType::Float ||
                                       (dtype == ScalarType::Short && param.scalar_type() == ScalarType::BFloat16));
      check_adamw(of_type && same_shape(t, param) && same_device(t, param), names[part], i, t, param);
    }
    if (param.scalar_type() == ScalarType::Float) {
      parts[4] = nullptr;  // is its own master
    }
    const Tensor dense = adamw_order(param, l.exp_avgs[i]);
    STD_TORCH_CHECK(
        !quantized || (same_order(l.exp_avgs[i], dense) && same_order(l.exp_avg_sqs[i], dense)),
        "fastllm: adamw: the 8-bit moments of parameter ",
        i,
        " lie in another order than it does, and so do their scales");
    STD_TORCH_CHECK(
        !write_grads || !shares_elements(l.grads[i]),
        "fastllm: adamw: gradient ",
        i,
        " is to be divided by grad_scale in place, but its elements share memory");
    AdamwReader read(table, dense);
    AdamwTensor t{};
    t.numel = param.numel();
    t.mark = kAdamwMark;
    t.index = static_cast<uint32_t>(indices.empty() ? i : indices[i]);
    t.param = read(param, true);
    t.grad = read(*parts[0], write_grads);
    t.exp_avg = read(*parts[1], true);
    t.exp_avg_sq = read(*parts[2], true);
    t.max_exp_avg_sq = parts[3] == nullptr ? nullptr : read(*parts[3], true);
    t.master = parts[4] == nullptr ? nullptr : read(*parts[4], true);
    const Tensor& step = l.steps[i];
    check_adamw(
        step.scalar_type() == ScalarType::Float && step.numel() == 1 && same_device(step, l.steps[0]) &&
            (!step.is_cuda() || same_device(step, param)),
        "step",
        i,
        step,
        param);
    t.step = static_cast<float*>(step.mutable_data_ptr());
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
    t.types = adamw_types(param, l.grads[i], l.exp_avgs[i]);
    t.types.remainder = parts[4] != nullptr && parts[4]->scalar_type() == ScalarType::Short;
    table.tensors.push_back(t);
  }
  return table;
}

// What is the same for every parameter of a call, as the ops pass it.
struct AdamwScalarsOfCall {
  double lr, beta1, beta2, weight_decay, eps, max_norm;
  bool maximize, stochastic;
  int64_t seed;
};

inline void check_lists(const AdamwLists& l, const std::vector<int64_t>& indices) {
  const size_t count = l.params.size();
  auto fits = [&](const TensorList& list, bool optional) { return list.size() == count || (optional && list.empty()); };
  STD_TORCH_CHECK(
      fits(l.grads, false) && fits(l.exp_avgs, false) && fits(l.exp_avg_sqs, false) && fits(l.max_exp_avg_sqs, true) &&
          fits(l.steps, false) && fits(l.masters, true) && fits(l.exp_avg_scales, true) &&
          fits(l.exp_avg_sq_scales, true) && (indices.empty() || indices.size() == count),
      "fastllm: adamw: lists of different lengths for ",
      count,
      " parameters");
  for (size_t i = 0; i < count && (l.exp_avg_scales.empty() || l.exp_avg_sq_scales.empty()); ++i) {
    STD_TORCH_CHECK(
        l.exp_avgs[i].scalar_type() != ScalarType::Byte, "fastllm: adamw: exp_avg ", i, " lacks its scales");
  }
}

inline void run_adamw(
    AdamwTensors tensors,
    const Tensor& like,
    const MaybeTensor& grad_norm,
    const MaybeTensor& grad_scale,
    const MaybeTensor& found_inf,
    const MaybeTensor& lr_tensor,
    const AdamwScalarsOfCall& s,
    bool steps_apart) {
  for (const MaybeTensor* t : {&grad_norm, &grad_scale, &found_inf, &lr_tensor}) {
    STD_TORCH_CHECK(
        !t->has_value() || ((*t)->scalar_type() == ScalarType::Float && (*t)->numel() == 1 && same_device(**t, like)),
        "fastllm: adamw: grad_norm, grad_scale, found_inf and lr must be one float32 on the parameters' device");
  }
  const AdamwCall call{
      {s.lr, s.beta1, s.beta2, s.weight_decay, s.eps}, s.maximize, s.stochastic, static_cast<uint64_t>(s.seed)};
  run_adamw_step(
      tensors, call, {grad_norm, grad_scale, found_inf, lr_tensor, static_cast<float>(s.max_norm), steps_apart}, like);
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
  const AdamwLists lists{
      params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, masters, exp_avg_scales, exp_avg_sq_scales};
  check_lists(lists, indices);
  if (!adamw_supported(params, grads, exp_avgs)) {
    call_fallback<0>(
        "adamw_step",
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        masters,
        exp_avg_scales,
        exp_avg_sq_scales,
        grad_norm,
        grad_scale,
        found_inf,
        lr_tensor,
        indices,
        lr,
        beta1,
        beta2,
        weight_decay,
        eps,
        max_norm,
        maximize,
        stochastic,
        seed);
    return;
  }
  const AdamwTable table = adamw_table(lists, indices, grad_scale.has_value());
  run_adamw(
      {table.tensors.data(), static_cast<int64_t>(table.tensors.size())},
      params[0],
      grad_norm,
      grad_scale,
      found_inf,
      lr_tensor,
      {lr, beta1, beta2, weight_decay, eps, max_norm, maximize, stochastic, seed},
      !same_device(steps[0], params[0]));
  for (const auto& [original, copy] : table.copied) {
    Tensor target = original;
    torch::stable::copy_(target, copy);
  }
}

// The table of a call, for steps to come, as an int64 tensor on the CPU with a row for each parameter; empty if these
// tensors have no kernel, or cannot be read as they lie. It holds pointers: whoever keeps it must see to it that no
// tensor has moved before each use.
inline Tensor adamw_table_of(
    const TensorList& params,
    const TensorList& grads,
    const TensorList& exp_avgs,
    const TensorList& exp_avg_sqs,
    const TensorList& max_exp_avg_sqs,
    const TensorList& steps,
    const TensorList& masters,
    const TensorList& exp_avg_scales,
    const TensorList& exp_avg_sq_scales,
    const std::vector<int64_t>& indices,
    bool first) {
  const AdamwLists lists{
      params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, masters, exp_avg_scales, exp_avg_sq_scales};
  check_lists(lists, indices);
  AdamwTable table;
  if (adamw_supported(params, grads, exp_avgs)) {
    table = adamw_table(lists, indices, false);
  }
  if (!table.kept.empty()) {
    table = {};
  }
  const int64_t size[] = {static_cast<int64_t>(table.tensors.size()), sizeof(AdamwTensor) / sizeof(int64_t)};
  const Tensor rows = torch::stable::empty(
      {size, 2}, ScalarType::Long, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  if (!table.tensors.empty()) {
    if (first) {
      prepare_adamw({table.tensors.data(), size[0]});
    }
    std::memcpy(rows.mutable_data_ptr(), table.tensors.data(), table.tensors.size() * sizeof(AdamwTensor));
  }
  return rows;
}

// adamw_step for a table that is still true. `like` is one of the parameters.
inline void adamw_table_step(
    const Tensor& like,
    const Tensor& rows,
    const MaybeTensor& grad_norm,
    const MaybeTensor& grad_scale,
    const MaybeTensor& found_inf,
    const MaybeTensor& lr_tensor,
    bool steps_apart,
    double lr,
    double beta1,
    double beta2,
    double weight_decay,
    double eps,
    double max_norm,
    bool maximize,
    bool stochastic,
    int64_t seed) {
  STD_TORCH_CHECK(
      rows.scalar_type() == ScalarType::Long && rows.is_contiguous() && !rows.is_cuda() && rows.dim() == 2 &&
          rows.size(1) * sizeof(int64_t) == sizeof(AdamwTensor) && rows.size(0) > 0 &&
          static_cast<const AdamwTensor*>(rows.const_data_ptr())->mark == kAdamwMark,
      "fastllm: adamw_table_step: not a table of adamw_table: shape ",
      to_string(rows));
  run_adamw(
      {static_cast<const AdamwTensor*>(rows.const_data_ptr()), rows.size(0)},
      like,
      grad_norm,
      grad_scale,
      found_inf,
      lr_tensor,
      {lr, beta1, beta2, weight_decay, eps, max_norm, maximize, stochastic, seed},
      steps_apart);
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
    AdamwTensor t{};
    t.numel = grad.numel();
    if (!is_dense(grad)) {
      table.kept.push_back(torch::stable::contiguous(grad));
    }
    t.grad = (is_dense(grad) ? grad : table.kept.back()).mutable_data_ptr();
    t.types.grad = dtype_of(grad);
    table.tensors.push_back(t);
  }
  const Tensor norm = torch::stable::new_empty(grads[0], {}, ScalarType::Float);
  run_adamw_norm({table.tensors.data(), static_cast<int64_t>(table.tensors.size())}, norm);
  return norm;
}

}  // namespace fastllm

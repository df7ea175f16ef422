// adamw on CUDA. Arithmetic: math/adamw.h; kernels: cuda/adamw.cu.
#include "../adamw.h"

#include "adamw.h"
#include "stream.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

namespace fastllm {

bool adamw_has_kernel(const AdamwTypes& types) {
  return adamw_cuda_supports(types);
}

void prepare_adamw(AdamwTensors) {}

void run_adamw_step(AdamwTensors tensors, const AdamwCall& call, const AdamwDevice& device, const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const cudaStream_t stream = current_stream(like);
  const int64_t count = tensors.count;
  std::vector<float> host_steps;
  if (device.steps_apart) {
    STD_TORCH_CHECK(
        !device.found_inf.has_value(), "fastllm: adamw: with found_inf, state_steps must be on the parameters' device");
    for (const AdamwTensor& t : tensors) {
      host_steps.push_back(*t.step += 1.0f);
    }
  }
  constexpr int64_t kFloats = sizeof(AdamwScalars) / sizeof(float);
  static_assert(sizeof(AdamwFactors) <= sizeof(AdamwScalars));
  static_assert(kFloats % 4 == 0, "so that the codes are aligned");
  const bool quantized =
      std::any_of(tensors.begin(), tensors.end(), [](const AdamwTensor& t) { return t.types.quantized; });
  const Tensor scratch =
      empty_vector(like, (count + 1) * kFloats + (quantized ? kAdamwCodesWords : 0), ScalarType::Float);
  auto* scalars = static_cast<AdamwScalars*>(scratch.mutable_data_ptr());
  auto* factors = reinterpret_cast<AdamwFactors*>(scalars + count);
  auto* codes = quantized ? reinterpret_cast<uint32_t*>(scalars + count + 1) : nullptr;
  const AdamwInputs inputs{
      adamw_scalar(device.grad_norm),
      adamw_scalar(device.grad_scale),
      adamw_scalar(device.found_inf),
      adamw_scalar(device.lr),
      device.max_norm};
  launch_adamw_prepare(
      tensors.data,
      device.steps_apart ? host_steps.data() : nullptr,
      count,
      call,
      inputs,
      scalars,
      factors,
      codes,
      stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  // One pass over the tensors for each mix of types among them; nearly always there is one.
  std::vector<bool> done(count);
  for (int64_t first = 0; first < count; ++first) {
    if (done[first]) {
      continue;
    }
    std::vector<int64_t> order;
    for (int64_t i = first; i < count; ++i) {
      if (!done[i] && tensors.data[i].types == tensors.data[first].types) {
        done[i] = true;
        order.push_back(i);
      }
    }
    launch_adamw_step(
        tensors.data,
        order.data(),
        static_cast<int64_t>(order.size()),
        call,
        device.grad_scale.has_value(),
        scalars,
        factors,
        codes,
        stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

void run_adamw_norm(AdamwTensors tensors, const Tensor& norm) {
  const torch::stable::accelerator::DeviceGuard guard(norm.get_device_index());
  const int64_t count = tensors.count;
  const int64_t parts = adamw_norm_parts(tensors.data, count);
  const Tensor sums = empty_vector(norm, parts, ScalarType::Float);
  launch_adamw_norm(
      tensors.data,
      count,
      static_cast<float*>(sums.mutable_data_ptr()),
      parts,
      static_cast<float*>(norm.mutable_data_ptr()),
      current_stream(norm));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CUDA, m) {
  m.impl("adamw_step", TORCH_BOX(&fastllm::adamw_step));
  m.impl("adamw_norm", TORCH_BOX(&fastllm::adamw_norm));
  m.impl("adamw_table", TORCH_BOX(&fastllm::adamw_table_of));
  m.impl("adamw_table_step", TORCH_BOX(&fastllm::adamw_table_step));
}

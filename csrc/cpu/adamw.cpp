// adamw on CPU. Arithmetic: math/adamw.h; kernels: cpu/isa/adamw.cpp.
#include "../adamw.h"

#include "adamw_blocks.h"
#include "capability.h"
#include "large_memory.h"

#include <cmath>

namespace fastllm {

namespace {

// The tensors one after the other as blocks of kAdamwBlock elements, so that threads share them evenly, whether there
// is one huge tensor or thousands of small ones.
class Blocks {
 public:
  explicit Blocks(AdamwTensors tensors) : tensors_(tensors) {
    first_.reserve(tensors.count + 1);
    first_.push_back(0);
    for (const AdamwTensor& t : tensors) {
      first_.push_back(first_.back() + (t.numel + kAdamwBlock - 1) / kAdamwBlock);
    }
  }

  int64_t count() const {
    return first_.back();
  }

  // Calls f(tensor's number, begin, end) for each tensor's elements among the blocks [begin, end).
  template <class F>
  void for_each(int64_t begin, int64_t end, F f) const {
    size_t i = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, first_[i + 1]);
      if (begin < stop) {
        f(i, (begin - first_[i]) * kAdamwBlock, std::min(tensors_.data[i].numel, (stop - first_[i]) * kAdamwBlock));
        begin = stop;
      }
    }
  }

 private:
  AdamwTensors tensors_;
  std::vector<int64_t> first_;
};

constexpr int64_t kGrain = 32768 / kAdamwBlock;  // blocks a thread takes at the least

}  // namespace

bool adamw_has_kernel(const AdamwTypes&) {
  return true;
}

void prepare_adamw(AdamwTensors tensors) {
  // Small tensors lie close together, so that they fill huge pages as large ones do.
  constexpr int64_t kNear = int64_t{64} << 10;
  std::vector<std::pair<char*, char*>> spans;
  for (const AdamwTensor& t : tensors) {
    const auto bytes = [](DType dtype) { return dtype == DType::kFloat ? 4 : 2; };
    const int64_t moment = t.types.quantized ? 1 : bytes(t.types.moment);
    const std::pair<void*, int64_t> parts[] = {
        {t.param, bytes(t.types.param)},
        {t.exp_avg, moment},
        {t.exp_avg_sq, moment},
        {t.max_exp_avg_sq, moment},
        {t.master, t.types.remainder ? 2 : 4}};
    for (const auto& [memory, width] : parts) {
      if (memory != nullptr && t.numel > 0) {
        spans.emplace_back(static_cast<char*>(memory), static_cast<char*>(memory) + width * t.numel);
      }
    }
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 0; i < spans.size();) {
    auto [begin, end] = spans[i];
    for (++i; i < spans.size() && spans[i].first - end <= kNear; ++i) {
      end = std::max(end, spans[i].second);
    }
    collapse_to_huge_pages(begin, end - begin);
  }
}

void run_adamw_step(AdamwTensors tensors, const AdamwCall& call, const AdamwDevice& device, const Tensor&) {
  const float* found_inf = adamw_scalar(device.found_inf);
  if (found_inf != nullptr && *found_inf != 0.0f) {
    return;
  }
  AdamwHyper hyper = call.hyper;
  if (const float* lr = adamw_scalar(device.lr)) {
    hyper.lr = *lr;
  }
  AdamwFactors factors{call.maximize ? -1.0f : 1.0f, false, 1.0f};
  if (const float* norm = adamw_scalar(device.grad_norm)) {
    factors.clip *= adamw_clip(*norm, device.max_norm);
  }
  if (const float* scale = adamw_scalar(device.grad_scale)) {
    factors.unscale = true;
    factors.grad_scale = *scale;
  }
  std::vector<AdamwScalars> scalars;
  scalars.reserve(tensors.count);
  for (const AdamwTensor& t : tensors) {
    *t.step += 1.0f;
    // Most often all parameters are at the same step.
    const bool known = !scalars.empty() && scalars.back().step == *t.step;
    scalars.push_back(known ? scalars.back() : adamw_scalars(hyper, *t.step));
  }
  const AdamwBlocks& kernel = FASTLLM_KERNELS(adamw_blocks);
  const Blocks blocks(tensors);
  torch::stable::parallel_for(0, blocks.count(), kGrain, [&](int64_t begin, int64_t end) {
    blocks.for_each(begin, end, [&](size_t i, int64_t first, int64_t last) {
      kernel.step(tensors.data[i], call, scalars[i], factors, first, last);
    });
  });
}

void run_adamw_norm(AdamwTensors tensors, const Tensor& norm) {
  // Sums of a fixed number of blocks, added in order: neither the threads' number nor their timing matters.
  const AdamwBlocks& kernel = FASTLLM_KERNELS(adamw_blocks);
  const Blocks blocks(tensors);
  const int64_t parts = (blocks.count() + kGrain - 1) / kGrain;
  std::vector<double> sums(parts);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      blocks.for_each(
          part * kGrain, std::min(blocks.count(), (part + 1) * kGrain), [&](size_t i, int64_t first, int64_t last) {
            const DType dtype = tensors.data[i].types.grad;
            const char* grad = static_cast<const char*>(tensors.data[i].grad);
            const int64_t size = dtype == DType::kFloat ? 4 : 2;
            sums[part] += kernel.square_sum(grad + first * size, dtype, last - first);
          });
    }
  });
  double total = 0.0;
  for (const double sum : sums) {
    total += sum;
  }
  *static_cast<float*>(norm.mutable_data_ptr()) = static_cast<float>(std::sqrt(total));
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("adamw_step", TORCH_BOX(&fastllm::adamw_step));
  m.impl("adamw_norm", TORCH_BOX(&fastllm::adamw_norm));
  m.impl("adamw_table", TORCH_BOX(&fastllm::adamw_table_of));
  m.impl("adamw_table_step", TORCH_BOX(&fastllm::adamw_table_step));
}

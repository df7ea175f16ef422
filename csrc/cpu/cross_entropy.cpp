// cross_entropy on CPU. Arithmetic and kernels: cpu/isa/cross_entropy.cpp.
#include "../tensor.h"

#include "cross_entropy_rows.h"
#include "large_memory.h"

namespace fastllm {

namespace {

const float* statistic(const char* what, const Tensor& t, const Tensor& target) {
  const bool fits = t.scalar_type() == ScalarType::Float && same_shape(t, target) && t.is_contiguous();
  check_argument(fits && same_device(t, target), what, t, target);
  return static_cast<const float*>(t.const_data_ptr());
}

float* output(const Tensor& t) {
  return static_cast<float*>(t.mutable_data_ptr());
}

// What both directions take. `rows` keeps the memory alive.
CrossEntropyRows row_arguments(const Tensor& logits, const Rows& rows, const Tensor& target, double softcap) {
  CrossEntropyRows a{};
  a.dtype = dtype_of(logits);
  a.n = logits.size(1);
  a.logits = rows.data();
  a.stride = rows.stride;
  a.target = static_cast<const int64_t*>(target.const_data_ptr());
  a.softcap = static_cast<float>(softcap);
  return a;
}

void check_rows(const Tensor& logits, const Tensor& target) {
  const bool fits = logits.dim() == 2 && target.dim() == 1 && target.size(0) == logits.size(0);
  check_argument(fits && target.is_contiguous() && same_device(target, logits), "target", target, logits);
}

bool supported(const Tensor& logits, const Tensor& target, const MaybeTensor& weight) {
  return is_kernel_dtype(logits.scalar_type()) && target.scalar_type() == ScalarType::Long && !weight.has_value() &&
         logits.dim() == 2 && logits.size(1) > 0;
}

int64_t grain(int64_t n) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, n));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& logits, const Tensor& target, const MaybeTensor& weight, double softcap, bool mean) {
  if (!supported(logits, target, weight)) {
    return to_tuple(call_fallback<4>("cross_entropy_fwd", logits, target, weight, softcap, mean));
  }
  check_rows(logits, target);
  const int64_t count = logits.size(0);
  Tensor top = empty_vector(logits, count, ScalarType::Float), lse = empty_vector(logits, count, ScalarType::Float);
  Tensor picked = empty_vector(logits, count, ScalarType::Float);
  Tensor average = empty_vector(logits, mean ? count : 0, ScalarType::Float);
  if (logits.numel() > 0) {
    const Rows rows = as_rows(logits);
    CrossEntropyFwd a{row_arguments(logits, rows, target, softcap)};
    a.top = output(top);
    a.lse = output(lse);
    a.picked = output(picked);
    a.mean = mean ? output(average) : nullptr;
    const CrossEntropyKernels& kernels = FASTLLM_KERNELS(cross_entropy_kernels);
    torch::stable::parallel_for(0, count, grain(a.n), [&](int64_t begin, int64_t end) { kernels.fwd(a, begin, end); });
  }
  return {top, lse, picked, average};
}

// `dlogits` may be the logits, if their rows are dense.
void backward_into(
    const Tensor& dlogits,
    int64_t dlogits_stride,
    bool streamed,
    const Tensor& dlse,
    const Tensor& dpicked,
    const MaybeTensor& dmean,
    const Tensor& logits,
    const Rows& rows,
    const Tensor& target,
    const Tensor& top,
    const Tensor& lse,
    double softcap) {
  CrossEntropyBwd a{row_arguments(logits, rows, target, softcap)};
  a.top = statistic("top", top, target);
  a.lse = statistic("lse", lse, target);
  a.dlse = statistic("dlse", dlse, target);
  a.dpicked = statistic("dpicked", dpicked, target);
  a.dmean = dmean.has_value() ? statistic("dmean", *dmean, target) : nullptr;
  a.dlogits = dlogits.mutable_data_ptr();
  a.dlogits_stride = dlogits_stride;
  a.streamed = streamed;
  const CrossEntropyKernels& kernels = FASTLLM_KERNELS(cross_entropy_kernels);
  torch::stable::parallel_for(
      0, logits.size(0), grain(a.n), [&](int64_t begin, int64_t end) { kernels.bwd(a, begin, end); });
}

Tensor backward(
    const Tensor& dlse,
    const Tensor& dpicked,
    const MaybeTensor& dmean,
    const Tensor& logits,
    const Tensor& target,
    const MaybeTensor& weight,
    const Tensor& top,
    const Tensor& lse,
    double softcap) {
  if (!supported(logits, target, weight)) {
    return call_fallback<1>("cross_entropy_bwd", dlse, dpicked, dmean, logits, target, weight, top, lse, softcap)[0];
  }
  check_rows(logits, target);
  Tensor dlogits = torch::stable::new_empty(logits, logits.sizes());
  if (logits.numel() > 0) {
    advise_huge_pages(dlogits.mutable_data_ptr(), bytes_of(dlogits));
    const bool streamed = should_stream(dlogits.const_data_ptr(), bytes_of(logits), bytes_of(logits) / logits.size(0));
    const Rows rows = as_rows(logits);
    backward_into(dlogits, logits.size(1), streamed, dlse, dpicked, dmean, logits, rows, target, top, lse, softcap);
  }
  return dlogits;
}

void backward_in_place(
    const Tensor& dlse,
    const Tensor& dpicked,
    const MaybeTensor& dmean,
    const Tensor& logits,
    const Tensor& target,
    const Tensor& top,
    const Tensor& lse,
    double softcap) {
  if (!supported(logits, target, std::nullopt) || logits.stride(1) != 1 || logits.stride(0) < logits.size(1)) {
    call_fallback<0>("cross_entropy_bwd_", dlse, dpicked, dmean, logits, target, top, lse, softcap);
    return;
  }
  check_rows(logits, target);
  if (logits.numel() > 0) {
    const Rows rows = as_rows(logits);
    backward_into(logits, rows.stride, false, dlse, dpicked, dmean, logits, rows, target, top, lse, softcap);
  }
}

}  // namespace

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&fastllm::forward));
  m.impl("cross_entropy_bwd", TORCH_BOX(&fastllm::backward));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&fastllm::backward_in_place));
}

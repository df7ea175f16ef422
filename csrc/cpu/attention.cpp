// What attention's dropout keeps, on CPU, as fastllm/ops/_attention.py declares it. Kernel: isa/attention.cpp; the rest
// of attention is torch's.
#include "../tensor.h"
#include "attention_rows.h"

#include <algorithm>
#include <cmath>

namespace fastllm {

namespace {

Tensor attention_dropout(
    const Tensor& seed, double p, int64_t batch, int64_t heads, int64_t seq_q, int64_t seq_k, int64_t first_batch) {
  STD_TORCH_CHECK(
      seed.numel() == 1 && seed.scalar_type() == ScalarType::Long && !seed.is_cuda(),
      "fastllm: seed must be one int64 on the CPU");
  STD_TORCH_CHECK(p > 0.0 && p <= 1.0, "fastllm: dropout_p must be in (0, 1], got ", p);
  Tensor z = torch::stable::new_empty(seed, {batch, heads, seq_q, seq_k}, ScalarType::Float);
  if (z.numel() == 0) {
    return z;
  }
  AttentionDropout a{};
  a.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  a.threshold = static_cast<uint32_t>(std::nearbyint(p * 0x1p24));
  a.scale = static_cast<float>(p < 1.0 ? 1.0 / (1.0 - p) : 0.0);
  a.z = static_cast<float*>(z.mutable_data_ptr());
  a.first = first_batch * heads;
  a.seq_q = seq_q;
  a.seq_k = seq_k;
  const AttentionKernels& kernels = FASTLLM_KERNELS(attention_kernels);
  const int64_t grain = std::max<int64_t>(1, 8192 / seq_k);
  torch::stable::parallel_for(
      0, batch * heads * seq_q, grain, [&](int64_t begin, int64_t end) { kernels.dropout(a, begin, end); });
  return z;
}

}  // namespace

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("attention_dropout", TORCH_BOX(&fastllm::attention_dropout));
}

// What attention's dropout keeps. Reference: `dropout` of fastllm/reference/_attention.py.
#include "../attention_rows.h"
#include "../../math/philox.h"
#include "vec.h"

namespace fastllm::FASTLLM_ISA {

namespace {

void dropout(const AttentionDropout& a, int64_t begin, int64_t end) {
  const VecU32 zero = {};
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t query = static_cast<uint32_t>(row % a.seq_q);
    const uint32_t head = static_cast<uint32_t>(a.first + row / a.seq_q);
    float* z = a.z + row * a.seq_k;
    for_each_vector(0, a.seq_k, [&](int64_t key, auto... count) {
      VecU32 c[4] = {zero + query, lane_indices() + static_cast<uint32_t>(key), zero + head, zero};
      philox<Random>(c, a.seed);
      store(z + key, (c[0] >> 8) >= a.threshold ? splat(a.scale) : Vec{}, count...);
    });
  }
}

}  // namespace

const AttentionKernels attention_kernels = {dropout};

}  // namespace fastllm::FASTLLM_ISA

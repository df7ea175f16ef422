#include "../norm.h"

#include "capability.h"
#include "large_memory.h"
#include "norm_rows.h"
#include "parameters.h"

namespace fastllm {

Tensor new_output(const Tensor& x) {
  Tensor output = torch::stable::new_empty(x, x.sizes());
  advise_huge_pages(output.mutable_data_ptr(), bytes_of(output));
  return output;
}

void run_norm_fwd(
    NormFwd a, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const Dropout& dropout) {
  std::vector<float> weight_buffer, bias_buffer;
  a.weight = as_floats(weight, weight_buffer);
  a.bias = as_floats(bias, bias_buffer);
  a.weight_is_float = a.bias_is_float = true;
  a.streamed = should_stream(a.y, bytes_of(x), bytes_of(x) / a.rows);
  const NormRows& kernel = FASTLLM_KERNELS(norm_rows);
  torch::stable::parallel_for(
      0, a.rows, grain(a.n), [&](int64_t begin, int64_t end) { kernel.fwd(a, dropout, begin, end); });
}

void run_norm_bwd(
    NormBwd a, const Tensor& x, const MaybeTensor& weight, const NormBwdOut& out, const Dropout& dropout) {
  const RowBlocks blocks(a.rows);
  std::vector<float> dweight(blocks.count * out.dweight.numel()), dbias(blocks.count * out.dbias.numel());
  std::vector<float> weight_buffer;
  a.weight = as_floats(weight, weight_buffer);
  a.weight_is_float = true;
  const int64_t row_bytes = bytes_of(x) / a.rows;
  a.streamed = should_stream(a.dx, bytes_of(x), row_bytes) &&
               (dropout.dbranch == nullptr || should_stream(dropout.dbranch, bytes_of(x), row_bytes));
  auto block_of = [&](std::vector<float>& sums, int64_t block) {
    return sums.empty() ? nullptr : sums.data() + block * a.n;
  };
  const NormRows& kernel = FASTLLM_KERNELS(norm_rows);
  torch::stable::parallel_for(0, blocks.count, grain(blocks.rows_each * a.n), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * blocks.rows_each, last = std::min(a.rows, first + blocks.rows_each);
      kernel.bwd(a, dropout, first, last, block_of(dweight, block), block_of(dbias, block));
    }
  });
  if (!dweight.empty()) {
    add_blocks(dweight.data(), blocks.count, out.dweight);
  }
  if (!dbias.empty()) {
    add_blocks(dbias.data(), blocks.count, out.dbias);
  }
}

}  // namespace fastllm

#include "../norm.h"

#include "capability.h"
#include "large_memory.h"
#include "norm_rows.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

namespace fastllm {

namespace {

template <class F>
void with_pointer(const Tensor& t, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(static_cast<float*>(t.data_ptr()));
    case ScalarType::BFloat16:
      return f(static_cast<torch::headeronly::BFloat16*>(t.data_ptr()));
    default:
      return f(static_cast<torch::headeronly::Half*>(t.data_ptr()));
  }
}

// Weight or bias as dense floats: the tensor itself, or a converted copy in `buffer`.
const float* as_floats(const MaybeTensor& t, std::vector<float>& buffer) {
  if (!t.has_value()) {
    return nullptr;
  }
  const int64_t n = t->numel(), stride = t->stride(0);
  if (t->scalar_type() == ScalarType::Float && (stride == 1 || n == 1)) {
    return static_cast<const float*>(t->const_data_ptr());
  }
  buffer.resize(n);
  with_pointer(*t, [&](auto* p) {
    for (int64_t i = 0; i < n; ++i) {
      buffer[i] = static_cast<float>(p[i * stride]);
    }
  });
  return buffer.data();
}

// Rows (or columns) a thread takes at the least: 32k elements, as PyTorch's own elementwise kernels.
int64_t grain(int64_t elements_each) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_each));
}

}  // namespace

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
  // Rows are cut into blocks, each with partial sums of its own, added in order afterwards: the result depends on
  // neither the number of threads nor their timing, and long sums stay short. 16 rows a block bound the partial sums'
  // memory by that of x.
  const int64_t blocks = std::clamp<int64_t>(a.rows / 16, 1, 64);
  const int64_t block_rows = (a.rows + blocks - 1) / blocks;
  std::vector<float> dweight(blocks * out.dweight.numel()), dbias(blocks * out.dbias.numel()), weight_buffer;
  a.weight = as_floats(weight, weight_buffer);
  a.weight_is_float = true;
  const int64_t row_bytes = bytes_of(x) / a.rows;
  a.streamed = should_stream(a.dx, bytes_of(x), row_bytes) &&
               (dropout.dbranch == nullptr || should_stream(dropout.dbranch, bytes_of(x), row_bytes));
  auto block_of = [&](std::vector<float>& sums, int64_t block) {
    return sums.empty() ? nullptr : sums.data() + block * a.n;
  };
  const NormRows& kernel = FASTLLM_KERNELS(norm_rows);
  torch::stable::parallel_for(0, blocks, grain(block_rows * a.n), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = std::min(a.rows, block * block_rows), last = std::min(a.rows, first + block_rows);
      kernel.bwd(a, dropout, first, last, block_of(dweight, block), block_of(dbias, block));
    }
  });
  auto reduce = [&](const std::vector<float>& sums, const Tensor& result) {
    with_pointer(result, [&](auto* p) {
      torch::stable::parallel_for(0, result.numel(), grain(blocks), [&](int64_t begin, int64_t end) {
        std::vector<float> total(sums.begin() + begin, sums.begin() + end);
        for (int64_t block = 1; block < blocks; ++block) {
          const float* part = sums.data() + block * a.n + begin;
          for (int64_t i = 0; i < end - begin; ++i) {
            total[i] += part[i];
          }
        }
        std::copy(total.begin(), total.end(), p + begin);
      });
    });
  };
  if (!dweight.empty()) {
    reduce(dweight, out.dweight);
  }
  if (!dbias.empty()) {
    reduce(dbias, out.dbias);
  }
}

}  // namespace fastllm

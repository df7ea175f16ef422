// What CPU kernels over rows do with parameters (weight, bias), and how their gradients are summed over the rows.
#pragma once

#include "../tensor.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

namespace fastllm {

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
inline const float* as_floats(const MaybeTensor& t, std::vector<float>& buffer) {
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
inline int64_t grain(int64_t elements_each) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_each));
}

// Rows are cut into blocks, each with partial sums of its own, added in order afterwards (add_blocks): the result
// depends on neither the number of threads nor their timing, and long sums stay short. 16 rows a block bound the
// partial sums' memory by that of the rows.
struct RowBlocks {
  int64_t rows_each, count;

  explicit RowBlocks(int64_t rows) {
    const int64_t wanted = std::clamp<int64_t>(rows / 16, 1, 64);
    rows_each = (rows + wanted - 1) / wanted;
    count = (rows + rows_each - 1) / rows_each;
  }
};

// result (n) = the sum of `blocks` rows of n partial sums.
inline void add_blocks(const float* sums, int64_t blocks, const Tensor& result) {
  const int64_t n = result.numel();
  with_pointer(result, [&](auto* p) {
    torch::stable::parallel_for(0, n, grain(blocks), [&](int64_t begin, int64_t end) {
      std::vector<float> total(sums + begin, sums + end);
      for (int64_t block = 1; block < blocks; ++block) {
        const float* part = sums + block * n + begin;
        for (int64_t i = 0; i < end - begin; ++i) {
          total[i] += part[i];
        }
      }
      std::copy(total.begin(), total.end(), p + begin);
    });
  });
}

}  // namespace fastllm

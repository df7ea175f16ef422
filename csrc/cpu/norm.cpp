#include "../norm.h"

#include "capability.h"
#include "large_output.h"
#include "norm_rows.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

namespace fastllm {

namespace {

const NormRows& rows_kernel() {
  switch (cpu_capability()) {
#ifdef FASTLLM_X86
    case Capability::kAvx512:
      return avx512::norm_rows;
    case Capability::kAvx2:
      return avx2::norm_rows;
#endif
    default:
      return baseline::norm_rows;
  }
}

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

NormFwdOut norm_fwd(
    bool centered,
    const Tensor& x,
    const MaybeTensor& residual,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    double eps) {
  check_rows("residual", residual, x);
  check_parameter("weight", weight, x);
  check_parameter("bias", bias, x);
  const int64_t n = x.size(x.dim() - 1);
  NormFwdOut out;
  out.y = new_output(x);
  out.rstd = empty_rows(x, ScalarType::Float);
  if (centered) {
    out.mean = empty_rows(x, ScalarType::Float);
  }
  if (residual.has_value()) {
    out.sum = new_output(x);
  }
  if (x.numel() == 0) {
    return out;
  }
  const Rows x_rows = as_rows(x);
  std::optional<Rows> residual_rows;
  std::vector<float> weight_buffer, bias_buffer;
  NormFwd a{};
  a.dtype = dtype_of(x);
  a.centered = centered;
  a.rows = x.numel() / n;
  a.n = n;
  a.eps = static_cast<float>(eps);
  a.x = x_rows.data();
  a.x_stride = x_rows.stride;
  if (residual.has_value()) {
    residual_rows = as_rows(*residual);
    a.residual = residual_rows->data();
    a.residual_stride = residual_rows->stride;
    a.sum = out.sum.mutable_data_ptr();
  }
  a.weight = as_floats(weight, weight_buffer);
  a.bias = as_floats(bias, bias_buffer);
  a.weight_is_float = a.bias_is_float = true;
  a.y = out.y.mutable_data_ptr();
  a.mean = centered ? static_cast<float*>(out.mean.mutable_data_ptr()) : nullptr;
  a.rstd = static_cast<float*>(out.rstd.mutable_data_ptr());
  a.streamed = should_stream(out.y, n);
  const NormRows& kernel = rows_kernel();
  torch::stable::parallel_for(0, a.rows, grain(n), [&](int64_t begin, int64_t end) { kernel.fwd(a, begin, end); });
  return out;
}

NormBwdOut norm_bwd(
    bool centered,
    const Tensor& dy,
    const MaybeTensor& dsum,
    const Tensor& x,
    const MaybeTensor& mean,
    const Tensor& rstd,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    bool weight_grad,
    bool bias_grad) {
  check_rows("dy", dy, x);
  check_rows("dsum", dsum, x);
  check_statistic("mean", mean, x);
  check_statistic("rstd", rstd, x);
  check_parameter("weight", weight, x);
  check_parameter("bias", bias, x);
  const int64_t n = x.size(x.dim() - 1);
  const int64_t rows = n == 0 ? 0 : x.numel() / n;
  weight_grad = weight_grad && weight.has_value();
  bias_grad = bias_grad && bias.has_value();
  NormBwdOut out;
  out.dx = new_output(x);
  out.dweight = empty_vector(x, weight_grad ? n : 0, weight.has_value() ? weight->scalar_type() : x.scalar_type());
  out.dbias = empty_vector(x, bias_grad ? n : 0, bias.has_value() ? bias->scalar_type() : x.scalar_type());

  // Rows are cut into blocks, each with partial sums of its own, added in order afterwards: the result depends on
  // neither the number of threads nor their timing, and long sums stay short. 16 rows a block bound the partial sums'
  // memory by that of x.
  const int64_t blocks = std::clamp<int64_t>(rows / 16, 1, 64);
  const int64_t block_rows = (rows + blocks - 1) / blocks;
  std::vector<float> dweight(weight_grad ? blocks * n : 0), dbias(bias_grad ? blocks * n : 0);
  if (rows > 0) {
    const Rows dy_rows = as_rows(dy), x_rows = as_rows(x);
    std::optional<Rows> dsum_rows;
    const Tensor rstd_dense = torch::stable::contiguous(rstd);
    const MaybeTensor mean_dense = centered ? MaybeTensor(torch::stable::contiguous(*mean)) : std::nullopt;
    std::vector<float> weight_buffer;
    NormBwd a{};
    a.dtype = dtype_of(x);
    a.centered = centered;
    a.rows = rows;
    a.n = n;
    a.dy = dy_rows.data();
    a.dy_stride = dy_rows.stride;
    a.x = x_rows.data();
    a.x_stride = x_rows.stride;
    if (dsum.has_value()) {
      dsum_rows = as_rows(*dsum);
      a.dsum = dsum_rows->data();
      a.dsum_stride = dsum_rows->stride;
    }
    a.weight = as_floats(weight, weight_buffer);
    a.weight_is_float = true;
    a.mean = centered ? static_cast<const float*>(mean_dense->const_data_ptr()) : nullptr;
    a.rstd = static_cast<const float*>(rstd_dense.const_data_ptr());
    a.dx = out.dx.mutable_data_ptr();
    a.streamed = should_stream(out.dx, n);
    const NormRows& kernel = rows_kernel();
    torch::stable::parallel_for(0, blocks, grain(block_rows * n), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = std::min(rows, block * block_rows), last = std::min(rows, first + block_rows);
        kernel.bwd(
            a,
            first,
            last,
            weight_grad ? dweight.data() + block * n : nullptr,
            bias_grad ? dbias.data() + block * n : nullptr);
      }
    });
  }
  auto reduce = [&](const std::vector<float>& partial, const Tensor& result) {
    with_pointer(result, [&](auto* p) {
      torch::stable::parallel_for(0, n, grain(blocks), [&](int64_t begin, int64_t end) {
        std::vector<float> total(partial.begin() + begin, partial.begin() + end);
        for (int64_t block = 1; block < blocks; ++block) {
          const float* part = partial.data() + block * n + begin;
          for (int64_t i = 0; i < end - begin; ++i) {
            total[i] += part[i];
          }
        }
        std::copy(total.begin(), total.end(), p + begin);
      });
    });
  };
  if (weight_grad) {
    reduce(dweight, out.dweight);
  }
  if (bias_grad) {
    reduce(dbias, out.dbias);
  }
  return out;
}

}  // namespace fastllm

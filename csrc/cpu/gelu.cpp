// gelu on CPU. Arithmetic and kernels: isa/gelu.cpp.
#include "gelu_rows.h"
#include "glu.h"
#include "parameters.h"

#include <memory>
#include <tuple>

namespace fastllm {

namespace {

bool supported(const Tensor& x, const MaybeTensor& bias) {
  return glu_supported(x) && (!bias.has_value() || is_kernel_dtype(bias->scalar_type()));
}

void check_bias(const MaybeTensor& bias, const Tensor& x) {
  if (bias.has_value()) {
    const bool fits = bias->dim() == 1 && bias->size(0) == x.size(x.dim() - 1) && same_device(*bias, x);
    check_argument(fits, "bias", *bias, x);
  }
}

// All but dy, and bias as floats; there is at least one element.
Gelu arguments(const Rows& rows, bool tanh, const Tensor& out) {
  Gelu a{};
  a.dtype = dtype_of(out);
  a.form = gelu_form(tanh);
  a.x = rows.data();
  a.x_stride = rows.stride;
  a.out = out.mutable_data_ptr();
  a.n = out.size(out.dim() - 1);
  advise_huge_pages(a.out, bytes_of(out));
  a.streamed = should_stream(a.out, bytes_of(out), bytes_of(out) / out.numel() * a.n);
  return a;
}

Tensor gelu_fwd(const Tensor& x, const MaybeTensor& bias, bool tanh) {
  if (!supported(x, bias)) {
    return call_fallback<1>("gelu_fwd", x, bias, tanh)[0];
  }
  check_bias(bias, x);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) {
    return y;
  }
  const Rows x_rows = as_rows(x);
  std::vector<float> buffer;
  Gelu a = arguments(x_rows, tanh, y);
  a.bias = as_floats(bias, buffer);
  const GeluKernels& kernels = FASTLLM_KERNELS(gelu_kernels);
  for_pieces(
      x.numel() / a.n, a.n, [&](int64_t row, int64_t begin, int64_t end) { kernels.fwd(a, row, row + 1, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> gelu_bwd(
    const Tensor& dy, const Tensor& x, const MaybeTensor& bias, bool tanh, bool bias_grad) {
  if (!supported(x, bias)) {
    return to_tuple(call_fallback<2>("gelu_bwd", dy, x, bias, tanh, bias_grad));
  }
  check_like("dy", dy, x);
  check_bias(bias, x);
  bias_grad = bias_grad && bias.has_value();
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dbias = empty_vector(x, bias_grad ? bias->numel() : 0, bias ? bias->scalar_type() : x.scalar_type());
  if (x.numel() == 0) {
    torch::stable::zero_(dbias);
    return {dx, dbias};
  }
  const Rows x_rows = as_rows(x), dy_rows = as_rows(dy);
  std::vector<float> buffer;
  Gelu a = arguments(x_rows, tanh, dx);
  a.bias = as_floats(bias, buffer);
  a.dy = dy_rows.data();
  a.dy_stride = dy_rows.stride;
  const GeluKernels& kernels = FASTLLM_KERNELS(gelu_kernels);
  const int64_t rows = x.numel() / a.n;
  if (!bias_grad) {
    for_pieces(
        rows, a.n, [&](int64_t row, int64_t begin, int64_t end) { kernels.bwd(a, row, row + 1, begin, end, nullptr); });
    return {dx, dbias};
  }
  const RowBlocks blocks(rows);
  const std::unique_ptr<float[]> sums(new float[blocks.count * a.n]);
  auto add_block = [&](int64_t block, int64_t begin, int64_t end) {
    const int64_t first = block * blocks.rows_each, last = std::min(rows, first + blocks.rows_each);
    kernels.bwd(a, first, last, begin, end, sums.get() + block * a.n);
  };
  for_pieces(blocks.count, a.n, add_block, blocks.rows_each);
  add_blocks(sums.get(), blocks.count, dbias);
  return {dx, dbias};
}

}  // namespace

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("gelu_fwd", TORCH_BOX(&fastllm::gelu_fwd));
  m.impl("gelu_bwd", TORCH_BOX(&fastllm::gelu_bwd));
}

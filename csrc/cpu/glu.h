// The host side of swiglu and geglu on the CPU. Arithmetic and kernels: isa/glu.cpp.
#pragma once

#include "../tensor.h"

#include "glu_rows.h"
#include "large_memory.h"

#include <vector>

namespace fastllm {

inline bool glu_supported(const Tensor& gate) {
  return is_kernel_dtype(gate.scalar_type()) && gate.dim() > 0;
}

inline void check_like(const char* what, const Tensor& t, const Tensor& gate) {
  const bool fits = t.scalar_type() == gate.scalar_type() && same_shape(t, gate) && same_device(t, gate);
  check_argument(fits, what, t, gate);
}

// Calls f(row, begin, end) for pieces of every row, on all threads; or f(block, begin, end) for pieces of every block
// of `block_rows` rows.
template <class F>
void for_pieces(int64_t blocks, int64_t n, F f, int64_t block_rows = 1) {
  constexpr int64_t kPiece = 8192;
  const int64_t pieces = (n + kPiece - 1) / kPiece;
  const int64_t grain = std::max<int64_t>(1, 16384 / (block_rows * std::min(n, kPiece)));
  torch::stable::parallel_for(0, blocks * pieces, grain, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = piece % pieces * kPiece;
      f(piece / pieces, begin, std::min(n, begin + kPiece));
    }
  });
}

inline Activation gelu_form(bool tanh) {
  return tanh ? Activation::kGeluTanh : Activation::kGelu;
}

inline Tensor glu_fwd(Activation kind, const Tensor& gate, const Tensor& up) {
  check_like("up", up, gate);
  Tensor y = torch::stable::new_empty(gate, gate.sizes());
  if (gate.numel() == 0) {
    return y;
  }
  advise_huge_pages(y.mutable_data_ptr(), bytes_of(y));
  const Rows gate_rows = as_rows(gate), up_rows = as_rows(up);
  GluFwd a{};
  a.dtype = dtype_of(gate);
  a.kind = kind;
  a.gate = gate_rows.data();
  a.gate_stride = gate_rows.stride;
  a.up = up_rows.data();
  a.up_stride = up_rows.stride;
  a.y = y.mutable_data_ptr();
  a.n = gate.size(gate.dim() - 1);
  const int64_t rows = gate.numel() / a.n;
  a.streamed = should_stream(a.y, bytes_of(y), bytes_of(y) / rows);
  const GluKernels& kernels = FASTLLM_KERNELS(glu_kernels);
  for_pieces(rows, a.n, [&](int64_t row, int64_t begin, int64_t end) { kernels.fwd(a, row, begin, end); });
  return y;
}

// The gradients side by side: (..., 2 n).
inline Tensor glu_bwd(Activation kind, const Tensor& dy, const Tensor& gate, const Tensor& up) {
  check_like("up", up, gate);
  check_like("dy", dy, gate);
  std::vector<int64_t> sizes(gate.sizes().begin(), gate.sizes().end());
  sizes.back() *= 2;
  Tensor d = torch::stable::new_empty(gate, {sizes.data(), sizes.size()});
  if (gate.numel() == 0) {
    return d;
  }
  advise_huge_pages(d.mutable_data_ptr(), bytes_of(d));
  const Rows dy_rows = as_rows(dy), gate_rows = as_rows(gate), up_rows = as_rows(up);
  GluBwd a{};
  a.dtype = dtype_of(gate);
  a.kind = kind;
  a.dy = dy_rows.data();
  a.dy_stride = dy_rows.stride;
  a.gate = gate_rows.data();
  a.gate_stride = gate_rows.stride;
  a.up = up_rows.data();
  a.up_stride = up_rows.stride;
  a.d = d.mutable_data_ptr();
  a.n = gate.size(gate.dim() - 1);
  const int64_t rows = gate.numel() / a.n;
  a.streamed = should_stream(a.d, bytes_of(d), bytes_of(gate) / rows);
  const GluKernels& kernels = FASTLLM_KERNELS(glu_kernels);
  for_pieces(rows, a.n, [&](int64_t row, int64_t begin, int64_t end) { kernels.bwd(a, row, begin, end); });
  return d;
}

}  // namespace fastllm

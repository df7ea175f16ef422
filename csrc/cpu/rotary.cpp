// rotary on CPU. Arithmetic and kernels: cpu/isa/rotary.cpp.
#include "../tensor.h"

#include "large_memory.h"
#include "rotary_rows.h"

namespace fastllm {

namespace {

bool supported(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const MaybeTensor& positions) {
  return is_kernel_dtype(q.scalar_type()) && cos.scalar_type() == ScalarType::Float &&
         sin.scalar_type() == ScalarType::Float &&
         (!positions.has_value() || positions->scalar_type() == ScalarType::Long);
}

void check_arguments(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const MaybeTensor& positions) {
  const bool alike = q.dim() == 4 && k.dim() == 4 && k.scalar_type() == q.scalar_type() && same_device(k, q) &&
                     k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3);
  check_argument(alike, "k", k, q);
  const int64_t rank = cos.dim();
  const bool table = (rank == 2 || (rank == 3 && cos.size(0) == q.size(0))) && 2 * cos.size(rank - 1) <= q.size(3) &&
                     same_device(cos, q) && (positions.has_value() || cos.size(rank - 2) >= q.size(2));
  check_argument(table, "cos", cos, q);
  check_argument(same_shape(sin, cos) && same_device(sin, q), "sin", sin, q);
  if (positions.has_value()) {
    const bool fits = positions->dim() == 2 && positions->size(0) == q.size(0) && positions->size(1) == q.size(2) &&
                      same_device(*positions, q);
    check_argument(fits && rank == 2, "positions", *positions, q);
  }
}

Tensor dense_last(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

RotaryHeads heads_of(const Tensor& in, const Tensor& out) {
  return {
      in.const_data_ptr(),
      in.stride(0),
      in.stride(1),
      in.stride(2),
      out.mutable_data_ptr(),
      out.stride(0),
      out.stride(1),
      out.stride(2),
      in.size(1)};
}

void turn(
    const Tensor& q,
    const Tensor& k,
    const Tensor& q_out,
    const Tensor& k_out,
    const Tensor& cos_given,
    const Tensor& sin_given,
    const MaybeTensor& positions,
    bool interleaved,
    bool inverse) {
  const Tensor cos = dense_last(cos_given), sin = dense_last(sin_given);
  const int64_t rank = cos.dim();
  Rotary a{};
  a.dtype = dtype_of(q);
  a.seq = q.size(2);
  a.size = q.size(3);
  a.half = cos.size(rank - 1);
  a.interleaved = interleaved;
  a.sign = inverse ? -1.0f : 1.0f;
  a.cos = static_cast<const float*>(cos.const_data_ptr());
  a.sin = static_cast<const float*>(sin.const_data_ptr());
  a.cos_batch = rank == 3 ? cos.stride(0) : 0;
  a.cos_row = cos.stride(rank - 2);
  a.sin_batch = rank == 3 ? sin.stride(0) : 0;
  a.sin_row = sin.stride(rank - 2);
  a.rows = cos.size(rank - 2);
  if (positions.has_value()) {
    a.positions = static_cast<const int64_t*>(positions->const_data_ptr());
    a.positions_batch = positions->stride(0);
    a.positions_seq = positions->stride(1);
  }
  const RotaryHeads both[] = {heads_of(q, q_out), heads_of(k, k_out)};
  const RotaryKernels& kernels = FASTLLM_KERNELS(rotary_kernels);
  const int64_t grain = std::max<int64_t>(1, 16384 / ((q.size(1) + k.size(1)) * a.size));
  torch::stable::parallel_for(0, q.size(0) * a.seq, grain, [&](int64_t begin, int64_t end) {
    for (const RotaryHeads& heads : both) {
      kernels.turn(a, heads, begin, end);
    }
  });
}

bool empty(const Tensor& q, const Tensor& k, const Tensor& cos) {
  return q.numel() + k.numel() == 0 || cos.size(cos.dim() - 2) == 0;
}

// In memory as `like`: its heads outside or inside its positions.
Tensor new_heads(const Tensor& like) {
  const bool inside = like.stride(1) < like.stride(2);
  const std::array<int64_t, 4> sizes = {
      like.size(0), like.size(inside ? 2 : 1), like.size(inside ? 1 : 2), like.size(3)};
  Tensor out = torch::stable::new_empty(like, {sizes.data(), sizes.size()});
  advise_huge_pages(out.mutable_data_ptr(), bytes_of(out));
  return inside ? torch::stable::transpose(out, 1, 2) : out;
}

std::tuple<Tensor, Tensor> rotary_fwd(
    const Tensor& q,
    const Tensor& k,
    const Tensor& cos,
    const Tensor& sin,
    const MaybeTensor& positions,
    bool interleaved,
    bool inverse) {
  if (!supported(q, k, cos, sin, positions)) {
    return to_tuple(call_fallback<2>("rotary_fwd", q, k, cos, sin, positions, interleaved, inverse));
  }
  check_arguments(q, k, cos, sin, positions);
  Tensor q_out = new_heads(q), k_out = new_heads(k);
  if (!empty(q, k, cos)) {
    turn(dense_last(q), dense_last(k), q_out, k_out, cos, sin, positions, interleaved, inverse);
  }
  return {q_out, k_out};
}

void rotary_in_place(
    const Tensor& q,
    const Tensor& k,
    const Tensor& cos,
    const Tensor& sin,
    const MaybeTensor& positions,
    bool interleaved,
    bool inverse) {
  if (!supported(q, k, cos, sin, positions) || q.stride(3) != 1 || k.stride(3) != 1) {
    call_fallback<0>("rotary_", q, k, cos, sin, positions, interleaved, inverse);
    return;
  }
  check_arguments(q, k, cos, sin, positions);
  if (!empty(q, k, cos)) {
    turn(q, k, q, k, cos, sin, positions, interleaved, inverse);
  }
}

}  // namespace

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("rotary_fwd", TORCH_BOX(&fastllm::rotary_fwd));
  m.impl("rotary_", TORCH_BOX(&fastllm::rotary_in_place));
}

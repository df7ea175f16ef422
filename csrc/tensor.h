// Small helpers over the stable ABI's Tensor, shared by the CPU and CUDA host code.
#pragma once

#include "dtype.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>

namespace fastllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::string to_string(const Tensor& t) {
  std::string text = "(";
  for (const int64_t size : t.sizes()) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + ")";
}

// fastllm/ops/ checks arguments and says more. The checks here keep a direct call of torch.ops.fastllm.* from touching
// memory that is not its own.
inline void check_argument(bool ok, const char* what, const Tensor& got, const Tensor& x) {
  if (!ok) {
    STD_TORCH_CHECK(
        false,
        "fastllm: ",
        what,
        " must fit x in shape, dtype and device; got shape ",
        to_string(got),
        " for x of shape ",
        to_string(x));
  }
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

inline bool is_kernel_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Of a tensor of kernel dtype.
inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kHalf;
  }
}

// A tensor seen as rows of n elements, n its last size. Rows are dense inside; `stride` elements lie between them.
struct Rows {
  Tensor tensor;  // keeps the memory alive, a copy where the strides did not fit
  int64_t stride;
  const void* data() const {
    return tensor.const_data_ptr();
  }
};

// The distance between rows if the leading dimensions collapse into one and the last is dense, else -1.
inline int64_t row_stride(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
  if (sizes[last] != 1 && strides[last] != 1) {
    return -1;
  }
  int64_t stride = -1, span = 0;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (sizes[d] == 1) {
      continue;
    }
    if (stride < 0) {
      stride = strides[d];
      span = stride * sizes[d];
    } else if (strides[d] != span) {
      return -1;
    } else {
      span *= sizes[d];
    }
  }
  return stride < 0 ? sizes[last] : stride;
}

inline Rows as_rows(const Tensor& t) {
  if (t.numel() == 0) {
    return {t, 0};
  }
  const int64_t stride = row_stride(t);
  return stride < 0 ? Rows{torch::stable::contiguous(t), t.size(t.dim() - 1)} : Rows{t, stride};
}

inline Tensor empty_rows(const Tensor& like, ScalarType dtype) {
  return torch::stable::new_empty(like, {like.sizes().data(), like.sizes().size() - 1}, dtype);
}

inline Tensor empty_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  return torch::stable::new_empty(like, {&size, 1}, dtype);
}

// Calls fastllm::<name>_fallback, which runs the op's reference: what a kernel does not compute (float64, say) goes
// there.
template <size_t kOutputs, class... Args>
std::array<Tensor, kOutputs> call_fallback(const char* name, const Args&... args) {
  std::array<StableIValue, (sizeof...(Args) > kOutputs ? sizeof...(Args) : kOutputs)> stack{
      torch::stable::detail::from(args)...};
  const std::string op = std::string("fastllm::") + name + "_fallback";
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op.c_str(), "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, kOutputs> outputs;
  for (size_t i = 0; i < kOutputs; ++i) {
    outputs[i] = torch::stable::detail::to<Tensor>(stack[i]);
  }
  return outputs;
}

template <class Array>
auto to_tuple(const Array& array) {
  return std::apply([](const auto&... items) { return std::make_tuple(items...); }, array);
}

}  // namespace fastllm

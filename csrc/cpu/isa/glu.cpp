// Gated activations. Reference: fastllm/reference/_glu.py.
//
//   y = act(g) u          du = dy act(g)          dg = dy u act'(g)
#include "../glu_rows.h"
#include "activate.h"

namespace fastllm::FASTLLM_ISA {

namespace {

template <Activation kKind, class T>
void fwd_elements(const GluFwd& a, int64_t row, int64_t begin, int64_t end) {
  const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
  const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
  T* y = static_cast<T*>(a.y) + row * a.n;
  for_each_vector(begin, end, [&](int64_t i, auto... count) {
    store_output(y + i, activate<kKind>(load(gate + i, count...)).value * load(up + i, count...), a.streamed, count...);
  });
  stream_fence();
}

template <Activation kKind, class T>
void bwd_elements(const GluBwd& a, int64_t row, int64_t begin, int64_t end) {
  const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
  const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
  const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
  T* dgate = static_cast<T*>(a.d) + row * 2 * a.n;
  T* dup = dgate + a.n;
  for_each_vector(begin, end, [&](int64_t i, auto... count) {
    const Vec d = load(dy + i, count...);
    const Activated act = activate<kKind>(load(gate + i, count...));
    store_output(dgate + i, d * load(up + i, count...) * act.slope, a.streamed, count...);
    store_output(dup + i, d * act.value, a.streamed, count...);
  });
  stream_fence();
}

template <class T>
void fwd_typed(const GluFwd& a, int64_t row, int64_t begin, int64_t end) {
  switch (a.kind) {
    case Activation::kSilu:
      return fwd_elements<Activation::kSilu, T>(a, row, begin, end);
    case Activation::kGeluTanh:
      return fwd_elements<Activation::kGeluTanh, T>(a, row, begin, end);
    case Activation::kGelu:
      return fwd_elements<Activation::kGelu, T>(a, row, begin, end);
  }
}

template <class T>
void bwd_typed(const GluBwd& a, int64_t row, int64_t begin, int64_t end) {
  switch (a.kind) {
    case Activation::kSilu:
      return bwd_elements<Activation::kSilu, T>(a, row, begin, end);
    case Activation::kGeluTanh:
      return bwd_elements<Activation::kGeluTanh, T>(a, row, begin, end);
    case Activation::kGelu:
      return bwd_elements<Activation::kGelu, T>(a, row, begin, end);
  }
}

void fwd(const GluFwd& a, int64_t row, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kFloat:
      return fwd_typed<float>(a, row, begin, end);
    case DType::kBFloat16:
      return fwd_typed<BFloat16>(a, row, begin, end);
    case DType::kHalf:
      return fwd_typed<Half>(a, row, begin, end);
  }
}

void bwd(const GluBwd& a, int64_t row, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kFloat:
      return bwd_typed<float>(a, row, begin, end);
    case DType::kBFloat16:
      return bwd_typed<BFloat16>(a, row, begin, end);
    case DType::kHalf:
      return bwd_typed<Half>(a, row, begin, end);
  }
}

}  // namespace

const GluKernels glu_kernels = {fwd, bwd};

}  // namespace fastllm::FASTLLM_ISA

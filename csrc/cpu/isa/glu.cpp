// Gated activations. Reference: fastllm/reference/_glu.py.
//
//   y = act(g) u          du = dy act(g)          dg = dy u act'(g)
//
//   SiLU: g s, s = 1 / (1 + e^-g)                      act' = s (1 + g (1 - s))
//   GELU: g P, P = (1 + erf(g / sqrt 2)) / 2           act' = P + g e^(-g^2 / 2) / sqrt(2 pi)
//   its tanh form: g (1 + t) / 2, t = tanh(k (g + c g^3)), k = sqrt(2 / pi), c = 0.044715
//                                                      act' = (1 + t) / 2 + g (1 - t^2) k (1 + 3 c g^2) / 2
#include "../glu_rows.h"
#include "vec_math.h"

namespace fastllm::FASTLLM_ISA {

namespace {

struct Activated {
  Vec value, slope;
};

template <Gate kKind>
Activated activate(Vec g) {
  if constexpr (kKind == Gate::kSilu) {
    const Vec s = sigmoid(g);
    const Vec value = g * s;
    return {value, s + value * (1.0f - s)};
  } else if constexpr (kKind == Gate::kGeluTanh) {
    constexpr float k = 0.797884561f, c = 0.044715f;
    const Vec square = g * g;
    const Vec t = tanh(k * g * (1.0f + c * square));
    const Vec half = 0.5f * (1.0f + t);
    return {g * half, half + 0.5f * g * (1.0f - t * t) * (k * (1.0f + 3.0f * c * square))};
  } else {
    const Vec gauss = exp(-0.5f * (g * g));
    const Vec half = 0.5f * (1.0f + erf(g * 0.707106781f, gauss));
    return {g * half, half + g * gauss * 0.398942280f};
  }
}

template <Gate kKind, class T>
void fwd_elements(const GluFwd& a, int64_t row, int64_t begin, int64_t end) {
  const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
  const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
  T* y = static_cast<T*>(a.y) + row * a.n;
  for_each_vector(begin, end, [&](int64_t i, auto... count) {
    store_output(y + i, activate<kKind>(load(gate + i, count...)).value * load(up + i, count...), a.streamed, count...);
  });
  stream_fence();
}

template <Gate kKind, class T>
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
    case Gate::kSilu:
      return fwd_elements<Gate::kSilu, T>(a, row, begin, end);
    case Gate::kGeluTanh:
      return fwd_elements<Gate::kGeluTanh, T>(a, row, begin, end);
    case Gate::kGelu:
      return fwd_elements<Gate::kGelu, T>(a, row, begin, end);
  }
}

template <class T>
void bwd_typed(const GluBwd& a, int64_t row, int64_t begin, int64_t end) {
  switch (a.kind) {
    case Gate::kSilu:
      return bwd_elements<Gate::kSilu, T>(a, row, begin, end);
    case Gate::kGeluTanh:
      return bwd_elements<Gate::kGeluTanh, T>(a, row, begin, end);
    case Gate::kGelu:
      return bwd_elements<Gate::kGelu, T>(a, row, begin, end);
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

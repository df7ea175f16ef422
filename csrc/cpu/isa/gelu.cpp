// GELU of x + bias. Reference: fastllm/reference/gelu.py.
//
//   y = act(x + b)          dx = dy act'(x + b)          db = sum of dx over rows
#include "../gelu_rows.h"
#include "activate.h"

namespace fastllm::FASTLLM_ISA {

namespace {

// Calls f(i, activated, count...) for every vector of the elements [begin, end) of a row.
template <Activation kForm, class T, class F>
void for_each_activated(const Gelu& a, int64_t row, int64_t begin, int64_t end, F f) {
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const float* bias = a.bias;
  for_each_vector(begin, end, [&](int64_t i, auto... count) {
    const Vec v = load(x + i, count...);
    f(i, activate<kForm>(bias != nullptr ? v + load(bias + i, count...) : v), count...);
  });
}

template <Activation kForm, class T>
void fwd_rows(const Gelu& a, int64_t first, int64_t last, int64_t begin, int64_t end) {
  for (int64_t row = first; row < last; ++row) {
    T* y = static_cast<T*>(a.out) + row * a.n;
    for_each_activated<kForm, T>(a, row, begin, end, [&](int64_t i, Activated act, auto... count) {
      store_output(y + i, act.value, a.streamed, count...);
    });
  }
  stream_fence();
}

template <Activation kForm, class T>
void bwd_rows(const Gelu& a, int64_t first, int64_t last, int64_t begin, int64_t end, float* dbias) {
  for (int64_t row = first; row < last; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    T* dx = static_cast<T*>(a.out) + row * a.n;
    for_each_activated<kForm, T>(a, row, begin, end, [&](int64_t i, Activated act, auto... count) {
      const Vec d = load(dy + i, count...) * act.slope;
      store_output(dx + i, d, a.streamed, count...);
      if (dbias != nullptr) {
        store(dbias + i, row > first ? load(dbias + i, count...) + d : d, count...);
      }
    });
  }
  stream_fence();
}

template <Activation kForm>
void fwd_typed(const Gelu& a, int64_t first, int64_t last, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kFloat:
      return fwd_rows<kForm, float>(a, first, last, begin, end);
    case DType::kBFloat16:
      return fwd_rows<kForm, BFloat16>(a, first, last, begin, end);
    case DType::kHalf:
      return fwd_rows<kForm, Half>(a, first, last, begin, end);
  }
}

template <Activation kForm>
void bwd_typed(const Gelu& a, int64_t first, int64_t last, int64_t begin, int64_t end, float* dbias) {
  switch (a.dtype) {
    case DType::kFloat:
      return bwd_rows<kForm, float>(a, first, last, begin, end, dbias);
    case DType::kBFloat16:
      return bwd_rows<kForm, BFloat16>(a, first, last, begin, end, dbias);
    case DType::kHalf:
      return bwd_rows<kForm, Half>(a, first, last, begin, end, dbias);
  }
}

void fwd(const Gelu& a, int64_t first, int64_t last, int64_t begin, int64_t end) {
  a.form == Activation::kGelu ? fwd_typed<Activation::kGelu>(a, first, last, begin, end)
                              : fwd_typed<Activation::kGeluTanh>(a, first, last, begin, end);
}

void bwd(const Gelu& a, int64_t first, int64_t last, int64_t begin, int64_t end, float* dbias) {
  a.form == Activation::kGelu ? bwd_typed<Activation::kGelu>(a, first, last, begin, end, dbias)
                              : bwd_typed<Activation::kGeluTanh>(a, first, last, begin, end, dbias);
}

}  // namespace

const GeluKernels gelu_kernels = {fwd, bwd};

}  // namespace fastllm::FASTLLM_ISA

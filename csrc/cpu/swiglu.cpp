// swiglu on CPU. Arithmetic and kernels: cpu/isa/glu.cpp.
#include "glu.h"

namespace fastllm {

namespace {

Tensor swiglu_fwd(const Tensor& gate, const Tensor& up) {
  return glu_supported(gate) ? glu_fwd(Activation::kSilu, gate, up) : call_fallback<1>("swiglu_fwd", gate, up)[0];
}

Tensor swiglu_bwd(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  return glu_supported(gate) ? glu_bwd(Activation::kSilu, dy, gate, up)
                             : call_fallback<1>("swiglu_bwd", dy, gate, up)[0];
}

}  // namespace

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&fastllm::swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&fastllm::swiglu_bwd));
}

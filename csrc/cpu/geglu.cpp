// geglu on CPU. Arithmetic and kernels: cpu/isa/glu.cpp.
#include "glu.h"

namespace fastllm {

namespace {

Tensor geglu_fwd(const Tensor& gate, const Tensor& up, bool tanh) {
  return glu_supported(gate) ? glu_fwd(gelu_form(tanh), gate, up) : call_fallback<1>("geglu_fwd", gate, up, tanh)[0];
}

Tensor geglu_bwd(const Tensor& dy, const Tensor& gate, const Tensor& up, bool tanh) {
  return glu_supported(gate) ? glu_bwd(gelu_form(tanh), dy, gate, up)
                             : call_fallback<1>("geglu_bwd", dy, gate, up, tanh)[0];
}

}  // namespace

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("geglu_fwd", TORCH_BOX(&fastllm::geglu_fwd));
  m.impl("geglu_bwd", TORCH_BOX(&fastllm::geglu_bwd));
}

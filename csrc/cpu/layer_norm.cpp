// layer_norm on CPU. Arithmetic: math/norm.h; kernels: cpu/isa/norm.cpp.
#include "../norm.h"

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&fastllm::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&fastllm::layer_norm_bwd));
}

// add_rms_norm on CPU. Arithmetic: math/norm.h; kernels: cpu/isa/norm.cpp.
#include "../norm.h"

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("add_rms_norm_fwd", TORCH_BOX(&fastllm::add_rms_norm_fwd));
  m.impl("add_rms_norm_bwd", TORCH_BOX(&fastllm::add_rms_norm_bwd));
}

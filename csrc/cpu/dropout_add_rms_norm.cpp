// dropout_add_rms_norm on CPU. Arithmetic: math/norm.h, math/philox.h; kernels: cpu/isa/norm.cpp.
#include "dropout_norm.h"

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("dropout_add_rms_norm_fwd", TORCH_BOX(&fastllm::dropout_add_rms_norm_fwd));
  m.impl("dropout_add_rms_norm_bwd", TORCH_BOX(&fastllm::dropout_add_rms_norm_bwd));
}

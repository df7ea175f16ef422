// add_rms_norm on CUDA. Arithmetic: math/norm.h; kernels: cuda/norm_fwd.cu, cuda/norm_bwd.cu.
#include "../norm.h"

STABLE_TORCH_LIBRARY_IMPL(fastllm, CUDA, m) {
  m.impl("add_rms_norm_fwd", TORCH_BOX(&fastllm::add_rms_norm_fwd));
  m.impl("add_rms_norm_bwd", TORCH_BOX(&fastllm::add_rms_norm_bwd));
}

// The element types that kernels compute.
#pragma once

namespace fastllm {

enum class DType { kFloat, kBFloat16, kHalf };

}  // namespace fastllm

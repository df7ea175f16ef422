// The element types that kernels compute.
#pragma once

#include <cstdint>

namespace fastllm {

enum class DType : uint8_t { kFloat, kBFloat16, kHalf };

}  // namespace fastllm

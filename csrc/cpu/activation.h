// The activations that isa/activate.h computes.
#pragma once

#include <cstdint>

namespace fastllm {

enum class Activation : uint8_t { kSilu, kGeluTanh, kGelu };

}  // namespace fastllm

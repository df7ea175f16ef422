// Which instruction set the CPU kernels run with.
#pragma once

#if defined(__x86_64__)
#define FASTLLM_X86
#endif

namespace fastllm {

enum class Capability { kBaseline, kAvx2, kAvx512 };

// What this machine has, or less where the environment variable FASTLLM_CPU_CAPABILITY (baseline, avx2, avx512) or
// set_cpu_capability says so.
Capability cpu_capability();
const char* cpu_capability_name();

// Declares a set of kernels that csrc/cpu/isa defines once for each instruction set (in namespace fastllm), and picks
// the one in use.
#define FASTLLM_DECLARE_KERNELS(Type, name) \
  namespace baseline {                      \
  extern const Type name;                   \
  }                                         \
  namespace avx2 {                          \
  extern const Type name;                   \
  }                                         \
  namespace avx512 {                        \
  extern const Type name;                   \
  }
#if defined(FASTLLM_X86)
#define FASTLLM_KERNELS(name)                             \
  (cpu_capability() == Capability::kAvx512 ? avx512::name \
   : cpu_capability() == Capability::kAvx2 ? avx2::name   \
                                           : baseline::name)
#else
#define FASTLLM_KERNELS(name) baseline::name
#endif

// Throws std::invalid_argument for an unknown name and for more than this machine has.
void set_cpu_capability(const char* name);

}  // namespace fastllm

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

// Throws std::invalid_argument for an unknown name and for more than this machine has.
void set_cpu_capability(const char* name);

}  // namespace fastllm

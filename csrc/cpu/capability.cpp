#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastllm {

namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Capability machine_capability() {
#ifdef FASTLLM_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return Capability::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Capability::kAvx2;
  }
#endif
  return Capability::kBaseline;
}

Capability parse(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name == kNames[i]) {
      if (i > static_cast<int>(machine_capability())) {
        throw std::invalid_argument(
            "CPU capability " + name + " asked for, but this machine has " +
            kNames[static_cast<int>(machine_capability())]);
      }
      return static_cast<Capability>(i);
    }
  }
  throw std::invalid_argument("unknown CPU capability " + name + "; known are baseline, avx2 and avx512");
}

Capability initial() {
  const char* name = std::getenv("FASTLLM_CPU_CAPABILITY");
  return name == nullptr || *name == '\0' ? machine_capability() : parse(name);
}

std::atomic<Capability>& current() {
  static std::atomic<Capability> capability{initial()};
  return capability;
}

}  // namespace

Capability cpu_capability() {
  return current().load(std::memory_order_relaxed);
}

const char* cpu_capability_name() {
  return kNames[static_cast<int>(cpu_capability())];
}

void set_cpu_capability(const char* name) {
  current().store(parse(name), std::memory_order_relaxed);
}

}  // namespace fastllm

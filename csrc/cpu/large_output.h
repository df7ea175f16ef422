// How large outputs are allocated and written.
#pragma once

#include "../tensor.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastllm {

// Outputs from this size on go around the cache: by the time they are read, most of them would have left it. Measured
// in docs/performance.md. (sysconf gives a whole socket's cache, of which a core sees a part.)
constexpr int64_t kLargeBytes = int64_t{8} << 20;

inline int64_t bytes_of(const Tensor& t) {
  return t.numel() * (t.scalar_type() == ScalarType::Float ? 4 : 2);
}

// An output of x's shape and type. A large one comes as fresh memory again and again, whose page faults cost several
// times what it takes to write it: huge pages, where the system leaves the choice to the program, take 512 times fewer.
inline Tensor new_output(const Tensor& x) {
  Tensor output = torch::stable::new_empty(x, x.sizes());
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  if (bytes_of(output) >= kLargeBytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(output.const_data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (begin + bytes_of(output)) / kHugePage * kHugePage;
    if (first < last) {
      madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: nothing is lost if it fails
    }
  }
#endif
  return output;
}

// Whether an output, rows of n elements, is to be written around the cache: its rows are aligned for it then.
inline bool should_stream(const Tensor& output, int64_t n) {
  return bytes_of(output) >= kLargeBytes && n * bytes_of(output) / output.numel() % 64 == 0 &&
         reinterpret_cast<uintptr_t>(output.const_data_ptr()) % 64 == 0;
}

}  // namespace fastllm

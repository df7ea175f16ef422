// How large memory is allocated and written.
#pragma once

#include "../tensor.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <fstream>
#include <string>
#endif

namespace fastllm {

// Outputs from this size on go around the cache: by the time they are read, most of them would have left it. Measured
// in docs/performance.md. (sysconf gives a whole socket's cache, of which a core sees a part.)
constexpr int64_t kLargeBytes = int64_t{8} << 20;

inline int64_t bytes_of(const Tensor& t) {
  return t.numel() * (t.scalar_type() == ScalarType::Float ? 4 : 2);
}

#if defined(__linux__) && defined(MADV_HUGEPAGE)
inline void advise_whole_huge_pages(void* memory, int64_t bytes, int advice) {
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  if (bytes >= kLargeBytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(first), last - first, advice);  // advice: nothing is lost if it fails
  }
}
#endif

// A large output often comes as fresh memory, whose page faults cost several times what it takes to write it: huge
// pages, where the system leaves the choice to the program, take 512 times fewer.
inline void advise_huge_pages(void* output, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  advise_whole_huge_pages(output, bytes, MADV_HUGEPAGE);
#endif
}

// Large memory that is there already and stays, moved into huge pages now (Linux 6.1 on): a copy, once, for a fifth
// less time at each pass over it. Not where the system's administrator wants no huge pages.
inline void collapse_to_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
  static const bool wanted = [] {
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string text;
    return std::getline(file, text) && text.find("[never]") == std::string::npos;
  }();
  if (wanted) {
    advise_whole_huge_pages(memory, bytes, MADV_HUGEPAGE);
    advise_whole_huge_pages(memory, bytes, kCollapse);
  }
#endif
}

// Whether an output is to be written around the cache: it is large, and its rows are aligned for it.
inline bool should_stream(const void* output, int64_t bytes, int64_t row_bytes) {
  return bytes >= kLargeBytes && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(output) % 64 == 0;
}

}  // namespace fastllm

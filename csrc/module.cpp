// fastllm._C: what was built and how. Loading it registers the CPU kernels (cpu/*.cpp) with the dispatcher.
#include "cpu/capability.h"
#include "layout.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and CPU capability of fastllm's compiled kernels.";
  m.def(
      "build_info",
      [] {
        py::dict info;
#if defined(__clang__)
        info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
        info["compiler"] = "g++ " __VERSION__;
#else
        info["compiler"] = "unknown";
#endif
        info["torch"] = FASTLLM_BUILT_TORCH;
        info["torch_target_version"] = "2.11";
        info["cuda_compiler"] = FASTLLM_BUILT_CUDA_COMPILER;  // empty: built without CUDA kernels
        info["cuda_archs"] = FASTLLM_BUILT_CUDA_ARCHS;
#ifdef FASTLLM_X86
        info["cpu_kernels"] = py::make_tuple("baseline", "avx2", "avx512");
#else
        info["cpu_kernels"] = py::make_tuple("baseline");
#endif
        return info;
      },
      "Compiler, the torch whose headers were used, the oldest torch it runs with, instruction sets and GPUs compiled "
      "for.");
  m.def("cpu_capability", &fastllm::cpu_capability_name, "Instruction set in use: baseline, avx2 or avx512.");
  m.def(
      "set_cpu_capability",
      &fastllm::set_cpu_capability,
      py::arg("name"),
      "Use this instruction set from now on. ValueError for an unknown one and for more than the machine has.");
  m.def(
      "layout",
      &fastllm::layout,
      "(bytes, bytes) of lists of tensors: where and how all of them lie but for the addresses of the second list, and "
      "these. RuntimeError for a tensor without an address, such as a sparse one.");
}

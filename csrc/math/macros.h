// What lets one header serve nvcc and any C++17 compiler.
#pragma once

#if defined(__CUDACC__)
#define FASTLLM_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTLLM_SQRTF sqrtf
#else
// static: each instruction set's copy stays in its own object file (see csrc/cpu/isa/vec.h).
#define FASTLLM_HOST_DEVICE static inline
#define FASTLLM_SQRTF __builtin_sqrtf
#endif

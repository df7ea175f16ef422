// Stands in for the CUDA toolkit's headers, so that a C++ compiler can build csrc/cuda and a CPU can run it: slowly,
// one block at a time, every thread a fiber that is switched at barriers and shuffles only. It knows what csrc/cuda
// uses.
//
// What it finds that a GPU may hide: a shuffle or barrier that not all threads reach (an error), a missing barrier (the
// result changes with the order in which threads run, see emulation_set_order), an asynchronous copy that is read
// before it was waited for, or whose place is still read. What it cannot find: anything about memory models, streams or
// speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __builtin_assume(condition) emulation::assume(condition)
#define __shared__ static  // blocks run one after the other

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

struct Position {
  dim3 thread, block, block_dim, grid_dim;
};
extern Position position;  // of the fiber that runs
extern char* shared;       // what the launch gives each block

void barrier();
uint32_t shuffle_xor(unsigned mask, uint32_t value, int lane_mask);
// A copy to shared memory that is made when it is waited for; until then its place holds NaN.
void copy_later(void* to, const void* from, size_t bytes);
void end_group_of_copies();
void wait_for_copies(size_t groups);
void assume(bool condition);  // an error if it is false
void run(dim3 grid, dim3 block, int bytes, const std::function<void()>& kernel);
void note(const char* launcher, dim3 grid, dim3 block);

}  // namespace emulation

#define threadIdx (::emulation::position.thread)
#define blockIdx (::emulation::position.block)
#define blockDim (::emulation::position.block_dim)
#define gridDim (::emulation::position.grid_dim)

inline void __syncthreads() {
  emulation::barrier();
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  bits = emulation::shuffle_xor(mask, bits, lane_mask);
  memcpy(&value, &bits, sizeof(bits));
  return value;
}

inline void __syncwarp() {
  emulation::shuffle_xor(0xffffffffu, 0u, 0);
}

inline uint32_t __reduce_max_sync(unsigned mask, uint32_t value) {
  for (int lane_mask = 1; lane_mask < 32; lane_mask *= 2) {
    const uint32_t other = emulation::shuffle_xor(mask, value, lane_mask);
    value = other > value ? other : value;
  }
  return value;
}

// Without the selectors from 8 on, which spread a sign.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> 8 * (selectors >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}

inline float rsqrtf(float x) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}

typedef struct CUstream_st* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

namespace fastllm {

template <class... Params, class... Args>
void launch_shared(void (*kernel)(Params...), dim3 grid, dim3 block, int bytes, cudaStream_t, const Args&... args) {
  emulation::note(__PRETTY_FUNCTION__, grid, block);
  emulation::run(grid, block, bytes, [&] { kernel(static_cast<Params>(args)...); });
}

inline void* shared_bytes() {
  return emulation::shared;
}

// A small GPU, so that persistent grids have several rows a block.
inline int multiprocessors() {
  return 3;
}

template <auto kKernel, int kBytes>
int blocks_per_multiprocessor(int) {
  return 2;
}

}  // namespace fastllm

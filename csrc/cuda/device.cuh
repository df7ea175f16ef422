// Device-side building blocks: packed memory access, conversions, reductions over a row, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastllm {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// 32 bits of memory: a float, or two numbers of 16 bits, rounded by one instruction.
template <class T>
__device__ __forceinline__ uint32_t word_of(const float* x) {
  if constexpr (sizeof(T) == 4) {
    return bits_as<uint32_t>(x[0]);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return bits_as<uint32_t>(__floats2bfloat162_rn(x[0], x[1]));
  } else {
    return bits_as<uint32_t>(__floats2half2_rn(x[0], x[1]));
  }
}

// The float in a word of memory, or the first or second of two numbers of 16 bits.
template <class T>
__device__ __forceinline__ float float_of(uint32_t word, bool second) {
  if constexpr (sizeof(T) == 4) {
    return bits_as<float>(word);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return bits_as<float>(second ? word & 0xffff0000u : word << 16);  // one instruction each
  } else {
    return to_float(bits_as<T>(static_cast<uint16_t>(second ? word >> 16 : word)));
  }
}

// Stores 4, 8 or 16 bytes by one instruction. The compiler takes a vector apart whose words are computed apart.
template <int kWords>
__device__ __forceinline__ void store_words(void* p, const uint32_t (&words)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
#ifdef FASTLLM_CUDA_EMULATION
  memcpy(p, words, sizeof(words));
#else
  const auto address = __cvta_generic_to_global(p);
  if constexpr (kWords == 4) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address),
                 "r"(words[0]),
                 "r"(words[1]),
                 "r"(words[2]),
                 "r"(words[3])
                 : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
  } else {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(address), "r"(words[0]) : "memory");
  }
#endif
}

// kVec elements moved by one instruction: 16 bytes in the fast paths. Held as 32-bit words: as an array of 16-bit
// elements, the compiler would give each a register of its own.
template <class T, int kVec>
struct alignas(sizeof(T) * kVec) Packed {
  static constexpr int kPerWord = 4 / sizeof(T);
  static_assert(kVec % kPerWord == 0);
  uint32_t words[kVec / kPerWord];

  __device__ __forceinline__ float get(int i) const {
    return float_of<T>(words[i / kPerWord], i % kPerWord != 0);
  }

  __device__ __forceinline__ void set(const float (&x)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; i += kPerWord) {
      words[i / kPerWord] = word_of<T>(x + i);
    }
  }
};

template <class T>
struct Packed<T, 1> {
  T value;

  __device__ __forceinline__ float get(int) const {
    return to_float(value);
  }
  __device__ __forceinline__ void set(const float (&x)[1]) {
    value = from_float<T>(x[0]);
  }
};

template <class T>
constexpr int kFullVec = 16 / sizeof(T);

template <class T, int kVec>
__device__ __forceinline__ Packed<T, kVec> load_packed(const T* p) {
  return *reinterpret_cast<const Packed<T, kVec>*>(p);
}

template <class T, int kVec>
__device__ __forceinline__ void store_packed(T* p, const Packed<T, kVec>& value) {
  if constexpr (kVec == 1) {
    *p = value.value;
  } else {
    store_words(p, value.words);
  }
}

// kVec elements of a weight or bias at `offset` as floats; `fallback` where there is none. Its type is float or T.
template <class T, int kVec>
__device__ __forceinline__ void load_param(
    float (&out)[kVec], const void* param, bool is_float, int64_t offset, float fallback) {
  if (param == nullptr) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      out[i] = fallback;
    }
  } else if (is_float) {
    constexpr int kStep = kVec < kFullVec<float> ? kVec : kFullVec<float>;
#pragma unroll
    for (int i = 0; i < kVec; i += kStep) {
      const auto packed = load_packed<float, kStep>(static_cast<const float*>(param) + offset + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
        out[i + j] = packed.get(j);
      }
    }
  } else {
    const auto packed = load_packed<T, kVec>(static_cast<const T*>(param) + offset);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      out[i] = packed.get(i);
    }
  }
}

// Copies a pack to shared memory without waiting for it, where it has 4 or 16 bytes. wait_for_copies<k>: for all of
// this thread's but those of the last k groups.
template <class P>
__device__ __forceinline__ void copy_async(P* shared, const P* global) {
#ifdef FASTLLM_CUDA_EMULATION
  if constexpr (sizeof(P) == 16 || sizeof(P) == 4) {
    return emulation::copy_later(shared, global, sizeof(P));
  }
#else
  if constexpr (sizeof(P) == 16) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        "l"(__cvta_generic_to_global(global))
        : "memory");
    return;
  } else if constexpr (sizeof(P) == 4) {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        "l"(__cvta_generic_to_global(global))
        : "memory");
    return;
  }
#endif
  *shared = *global;
}

__device__ __forceinline__ void end_group_of_copies() {
#ifdef FASTLLM_CUDA_EMULATION
  emulation::end_group_of_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
#ifdef FASTLLM_CUDA_EMULATION
  emulation::wait_for_copies(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  }
  return value;
}

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
  return __reduce_max_sync(0xffffffffu, value);
}

// Sums `kCount` values over the threads of a row, which are those of one threadIdx.y: a warp, or several, up to
// kMaxWarps in a block. `scratch` is for several and must not be the one of the call before: two alternate, so that one
// barrier a call is enough.
template <int kCount>
__device__ __forceinline__ void row_sum(float (&values)[kCount], float (&scratch)[kCount][kMaxWarps]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = warp_sum(values[i]);
  }
  if (blockDim.x == kWarp) {
    return;
  }
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp, first = threadIdx.y * warps;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scratch[i][first + threadIdx.x / kWarp] = values[i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = warp_sum(lane < warps ? scratch[i][first + lane] : 0.0f);
  }
}

// True if p can be read kVec elements of T at a time, given that offsets are multiples of kVec.
template <class T, int kVec>
inline bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * kVec) == 0;
}

inline int ceil_div(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

inline int warps_for(int64_t threads) {
  return ceil_div(threads, kWarp) * kWarp;
}

#ifndef FASTLLM_CUDA_EMULATION
// A launch, the shared memory that it gives each block, and the two device facts that grids are made from. Tests put a
// CPU emulation of them in this place.
template <class... Params, class... Args>
inline void launch_shared(
    void (*kernel)(Params...), dim3 grid, dim3 block, int bytes, cudaStream_t stream, const Args&... args) {
  kernel<<<grid, block, bytes, stream>>>(args...);
}

__device__ __forceinline__ void* shared_bytes() {
  extern __shared__ float4 given[];
  return given;
}

inline int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device % 64;
}

inline int multiprocessors() {
  static int counts[64] = {};  // by device; a race writes the same value twice
  const int device = current_device();
  int& count = counts[device];
  if (count == 0) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  return count;
}

// How many blocks of this many threads and bytes one multiprocessor holds. Asked once, since the question costs more
// than a launch; and the kernel is told once that it gets so many bytes.
template <auto kKernel, int kBytes>
int blocks_per_multiprocessor(int threads) {
  static int counts[64][kMaxWarps + 1] = {};
  int& count = counts[current_device()][threads / kWarp];
  if (count == 0) {
    cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kKernel, threads, kBytes);
  }
  return count;
}
#endif

template <class... Params, class... Args>
inline void launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, const Args&... args) {
  launch_shared(kernel, grid, block, 0, stream, args...);
}

}  // namespace fastllm

// What AdamW's kernels have in common: how elements are shared out, the operations, and how vectors are read and
// written.
#pragma once

#include "adamw.h"
#include "device.cuh"

#include <type_traits>

namespace fastllm {

namespace {

constexpr int kThreads = 256;
constexpr int kVec =
    8;  // elements a thread takes at a time: one counter of random numbers, and 16 bytes of 16-bit ones
constexpr int kStride = kThreads * kVec;
constexpr int kSteps = 4;
constexpr int64_t kChunk = kStride * kSteps;
static_assert(kWarp * kVec == kAdamwBlock, "a warp shares the scale of a block of 8-bit moments");

struct Code {
  uint8_t bits;
};

// The operations that math/adamw.h asks for, none of them contracted.
struct Ops {
  using F = float;
  using U = uint32_t;
  static __device__ __forceinline__ F splat(float x) {
    return x;
  }
  static __device__ __forceinline__ U whole(uint32_t x) {
    return x;
  }
  static __device__ __forceinline__ U bits(F a) {
    return bits_as<uint32_t>(a);
  }
  static __device__ __forceinline__ F value(U a) {
    return bits_as<float>(a);
  }
  static __device__ __forceinline__ U to_int(F a) {
    return static_cast<U>(static_cast<int>(a));
  }
  static __device__ __forceinline__ F from_int(U a) {
    return static_cast<F>(static_cast<int>(a));
  }
  template <class T>
  static __device__ __forceinline__ T select(bool condition, T a, T b) {
    return condition ? a : b;
  }
  static __device__ __forceinline__ U mul_high(U a, uint32_t b) {
    return static_cast<U>((static_cast<uint64_t>(a) * b) >> 32);
  }
#ifdef FASTLLM_CUDA_EMULATION
  static F add(F a, F b) {
    return a + b;
  }
  static F sub(F a, F b) {
    return a - b;
  }
  static F mul(F a, F b) {
    return a * b;
  }
  static F div(F a, F b) {
    return a / b;
  }
  static F fma(F a, F b, F c) {
    return __builtin_fmaf(a, b, c);
  }
  static F sqrt(F a) {
    return __builtin_sqrtf(a);
  }
#else
  static __device__ __forceinline__ F add(F a, F b) {
    return __fadd_rn(a, b);
  }
  static __device__ __forceinline__ F sub(F a, F b) {
    return __fsub_rn(a, b);
  }
  static __device__ __forceinline__ F mul(F a, F b) {
    return __fmul_rn(a, b);
  }
  static __device__ __forceinline__ F div(F a, F b) {
    return __fdiv_rn(a, b);
  }
  static __device__ __forceinline__ F fma(F a, F b, F c) {
    return __fmaf_rn(a, b, c);
  }
  static __device__ __forceinline__ F sqrt(F a) {
    return __fsqrt_rn(a);
  }
#endif
};

// The entry whose chunk a block has.
template <class E>
__device__ __forceinline__ int find_entry(const E* entries, int count, int32_t chunk) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (entries[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// kVec elements at p as raw bits, 16 bytes an instruction if `vector`, else the first `count`, and zeros.
template <class T>
struct Raw {
  static constexpr int kWords = kVec * sizeof(T) / 4;
  static constexpr int kPerWord = 4 / sizeof(T), kBits = 8 * sizeof(T);
  static constexpr uint32_t kMask = 0xffffffffu >> (32 - kBits);
  static constexpr int kStep = kWords < 4 ? kWords : 4;  // words that one instruction moves
  struct alignas(4 * kStep) Chunk {
    uint32_t words[kStep];
  };
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const T* p, bool vector, int count) {
    if (vector) {
#pragma unroll
      for (int i = 0; i < kWords; i += kStep) {
        const Chunk chunk = reinterpret_cast<const Chunk*>(p)[i / kStep];
#pragma unroll
        for (int j = 0; j < kStep; ++j) {
          words[i + j] = chunk.words[j];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        words[i] = 0;
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        set(i, i < count ? element(p, i) : 0u);
      }
    }
  }

  __device__ __forceinline__ void store(T* p, bool vector, int count) const {
    if (vector) {
#pragma unroll
      for (int i = 0; i < kWords; i += kStep) {
        Chunk chunk;
#pragma unroll
        for (int j = 0; j < kStep; ++j) {
          chunk.words[j] = words[i + j];
        }
        reinterpret_cast<Chunk*>(p)[i / kStep] = chunk;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (i < count) {
          put(p, i, get(i));
        }
      }
    }
  }

  __device__ __forceinline__ uint32_t get(int i) const {
    return words[i / kPerWord] >> (i % kPerWord * kBits) & kMask;
  }

  __device__ __forceinline__ void set(int i, uint32_t bits) {
    const int shift = i % kPerWord * kBits;
    uint32_t& word = words[i / kPerWord];
    word = (word & ~(kMask << shift)) | (bits & kMask) << shift;
  }

 private:
  static __device__ __forceinline__ uint32_t element(const T* p, int i) {
    if constexpr (sizeof(T) == 4) {
      return bits_as<uint32_t>(p[i]);
    } else if constexpr (sizeof(T) == 2) {
      return bits_as<uint16_t>(p[i]);
    } else {
      return bits_as<uint8_t>(p[i]);
    }
  }
  static __device__ __forceinline__ void put(T* p, int i, uint32_t bits) {
    if constexpr (sizeof(T) == 4) {
      p[i] = bits_as<T>(bits);
    } else if constexpr (sizeof(T) == 2) {
      p[i] = bits_as<T>(static_cast<uint16_t>(bits));
    } else {
      p[i] = bits_as<T>(static_cast<uint8_t>(bits));
    }
  }
};

template <class T>
__device__ __forceinline__ float decode_float(uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    return bits_as<float>(bits);
  } else {
    return to_float(bits_as<T>(static_cast<uint16_t>(bits)));
  }
}

template <class T>
__device__ __forceinline__ uint32_t encode_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return bits_as<uint32_t>(x);
  } else {
    return bits_as<uint16_t>(from_float<T>(x));
  }
}

inline int64_t chunks(int64_t numel) {
  return (numel + kChunk - 1) / kChunk;
}

inline int bytes(DType dtype) {
  return dtype == DType::kFloat ? 4 : 2;
}

inline bool aligned(const void* p, int element_bytes) {
  return reinterpret_cast<uintptr_t>(p) % (element_bytes == 1 ? kVec : 16) == 0;
}

}  // namespace

}  // namespace fastllm

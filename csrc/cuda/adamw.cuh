// What AdamW's kernels have in common: how elements are shared out, the operations, and how vectors are read and
// written.
#pragma once

#include "adamw.h"
#include "device.cuh"

#include <type_traits>

namespace fastllm {

namespace {

// A thread takes packs of four elements, so that each access of a warp is of memory that is whole: 512 bytes side by
// side where an element has 32 bits. It takes two of them at a time, a warp's elements further on in the second: as
// many loads are in flight, and a warp has the elements of one block of 8-bit moments.
constexpr int kThreads = 256;
constexpr int kPack = 4;
constexpr int kPacks = 2;
constexpr int kVec = kPack * kPacks;
constexpr int kApart = kWarp * kPack;     // from a thread's pack to its next
constexpr int kStride = kThreads * kVec;  // of a block's steps
static_assert(kWarp * kVec == kAdamwBlock, "a warp shares the scale of a block of 8-bit moments");

// Where a thread's elements lie, counted from the first.
__device__ __forceinline__ int place(int i) {
  return i / kPack * kApart + i % kPack;
}

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

// A thread's elements, the first of which is at p, as raw bits: a pack an instruction if `vector`, else those before
// `rest`, and zeros.
template <class T>
struct Raw {
  static constexpr int kWords = kPack * sizeof(T) / 4;  // of a pack
  static constexpr int kPerWord = 4 / sizeof(T), kBits = 8 * sizeof(T);
  static constexpr uint32_t kMask = 0xffffffffu >> (32 - kBits);
  struct alignas(4 * kWords) Words {
    uint32_t words[kWords];
  };
  Words packs[kPacks];

  __device__ __forceinline__ void load(const T* p, bool vector, int64_t rest) {
    if (vector) {
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        packs[pack] = *reinterpret_cast<const Words*>(p + pack * kApart);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        set(i, place(i) < rest ? element(p, place(i)) : 0u);
      }
    }
  }

  __device__ __forceinline__ void store(T* p, bool vector, int64_t rest) const {
    if (vector) {
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        store_words(p + pack * kApart, packs[pack].words);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (place(i) < rest) {
          put(p, place(i), get(i));
        }
      }
    }
  }

  __device__ __forceinline__ void get(float (&x)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      x[i] = float_of<T>(packs[i / kPack].words[i % kPack / kPerWord], i % kPerWord != 0);
    }
  }

  __device__ __forceinline__ void set(const float (&x)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; i += kPerWord) {
      word(i) = word_of<T>(x + i);
    }
  }

  __device__ __forceinline__ uint32_t get(int i) const {
    const uint32_t word = packs[i / kPack].words[i % kPack / kPerWord];
    if constexpr (kBits == 8) {
      return __byte_perm(word, 0u, 0x4440 | i % kPerWord);  // one instruction, where a shift and a mask become three
    }
    return word >> (i % kPerWord * kBits) & kMask;
  }

  __device__ __forceinline__ void set(int i, uint32_t bits) {
    const int shift = i % kPerWord * kBits;
    word(i) = (word(i) & ~(kMask << shift)) | (bits & kMask) << shift;
  }

 private:
  __device__ __forceinline__ uint32_t& word(int i) {
    return packs[i / kPack].words[i % kPack / kPerWord];
  }
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

inline int bytes(DType dtype) {
  return dtype == DType::kFloat ? 4 : 2;
}

inline bool aligned(const void* p, int element_bytes) {
  return reinterpret_cast<uintptr_t>(p) % (kPack * element_bytes) == 0;
}

}  // namespace

}  // namespace fastllm

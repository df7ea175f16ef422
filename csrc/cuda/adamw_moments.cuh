// A thread's elements of a moment, of which 8 bits need their whole block's.
#pragma once

#include "adamw_codes.cuh"
#include "exact.cuh"

#include <algorithm>

namespace fastllm {

namespace {

constexpr uint32_t kInfinity = 0x7f800000u;  // its bits

// The larger of `so_far`, which is not negative, and the magnitude of x; NaN if one is.
__device__ __forceinline__ float larger_magnitude(float x, float so_far) {
#ifdef FASTLLM_CUDA_EMULATION
  return bits_as<float>(std::max(bits_as<uint32_t>(x) & 0x7fffffffu, bits_as<uint32_t>(so_far)));
#else
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(fabsf(x)), "f"(so_far));
  return larger;
#endif
}

struct NoCodes {};  // moments of 16 and 32 bits need none

// A moment of T, or of Code, whose block of 256 elements is the warp's and has one scale.
template <class T, bool kSigned>
struct Moment {
  Raw<T> raw;
  float scale;

  __device__ __forceinline__ void load(
      const void* base, const float* scales, int64_t offset, bool vector, int64_t rest) {
    raw.load(static_cast<const T*>(base) + offset, vector, rest);
    if constexpr (sizeof(T) == 1) {
      scale = scales[offset / kAdamwBlock];
    }
  }

  template <class C>
  __device__ __forceinline__ void get(float (&x)[kVec], const C& codes) const {
    if constexpr (sizeof(T) == 1) {
      const float size = fabsf(scale);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        x[i] = Ops::mul(codes.decoded[kSigned ? 0 : 1][raw.get(i)], size);
      }
      if (scale < 0.0f) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          x[i] = adamw_decode<Ops, kSigned>(raw.get(i), scale);
        }
      }
    } else {
      raw.get(x);
    }
  }

  // All lanes of a warp must call this. Elements behind the tensor's end must be 0, or, if the block has others that
  // are not finite, may be NaN.
  template <class C>
  __device__ __forceinline__ void set(float (&x)[kVec], const C& codes) {
    if constexpr (sizeof(T) == 1) {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        largest = larger_magnitude(x[i], largest);
      }
      // As integers, infinities and NaN are larger than numbers.
      const uint32_t bits = warp_max(bits_as<uint32_t>(largest));
      if (bits < kInfinity) {
        scale = adamw_block_scale(bits_as<float>(bits), true);
        // In this range, quotients from 1e-7 on are exact (exact.cuh).
        const float factor = scale < 0x1p-70f ? 0x1p100f : scale > 0x1p100f ? 0x1p-100f : 1.0f;
        const Divisor by_scale(scale * factor);
#pragma unroll
        for (int i = 0; i < kVec; i += kPack) {
          const auto word = [&](int j) {
            return code_word<kSigned>(codes, x[i + j], by_scale.divide(x[i + j] * factor));
          };
          raw.packs[i / kPack].words[0] = upper_bytes(word(0), word(1), word(2), word(3));
        }
      } else {
        uint32_t finite = 0;
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const uint32_t magnitude = bits_as<uint32_t>(x[i]) & 0x7fffffffu;
          finite = magnitude < kInfinity && magnitude > finite ? magnitude : finite;
        }
        scale = adamw_block_scale(bits_as<float>(warp_max(finite)), false);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          raw.set(i, adamw_encode<Ops, kSigned>(x[i], scale));
        }
      }
    } else {
      raw.set(x);
    }
  }

  __device__ __forceinline__ void store(void* base, float* scales, int64_t offset, bool vector, int64_t rest) const {
    raw.store(static_cast<T*>(base) + offset, vector, rest);
    if constexpr (sizeof(T) == 1) {
      if (threadIdx.x % kWarp == 0) {
        scales[offset / kAdamwBlock] = scale;
      }
    }
  }
};

}  // namespace

}  // namespace fastllm

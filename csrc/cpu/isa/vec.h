// A SIMD vector of floats and its loads and stores, for the instruction set this file is compiled for.
//
// Everything in csrc/cpu/isa is compiled once for each instruction set (FASTLLM_ISA names it, setup.py lists them), so
// nothing here may call an inline function that other files share: the linker would keep one copy of it, perhaps the
// one with instructions that the machine lacks. Hence builtins only, and a namespace of its own for each pass.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastllm::FASTLLM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU32 __attribute__((vector_size(4 * kLanes)));
typedef uint64_t VecU64 __attribute__((vector_size(8 * kLanes)));
typedef int32_t VecI32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecU16 __attribute__((vector_size(2 * kLanes)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline Vec splat(float value) {
  return value - Vec{};
}

// The lanes of a and b in turn, from the lower (0) or upper (1) half of each.
inline Vec interleave(Vec a, Vec b, int half) {
  VecI32 order;
  for (int i = 0; i < kLanes; ++i) {
    order[i] = i / 2 + half * kLanes / 2 + i % 2 * kLanes;
  }
#if defined(__clang__)
  Vec out;
  for (int i = 0; i < kLanes; ++i) {
    out[i] = i % 2 ? b[order[i] - kLanes] : a[order[i]];
  }
  return out;
#else
  return __builtin_shuffle(a, b, order);
#endif
}

// 0, 1, 2, ...
inline VecU32 lane_indices() {
  VecU32 lane;
  for (int i = 0; i < kLanes; ++i) {
    lane[i] = i;
  }
  return lane;
}

// What math/philox.h asks for.
struct Random {
  using U = VecU32;

  // The upper halves of 64-bit products.
  static U mul_high(U a, uint32_t b) {
#if defined(__AVX512F__)
    // By name: GCC 12 multiplies all 64 bits, which takes three times as long.
    const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
    const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32((__m512i)a, factor), 32);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
    return (VecU32)_mm512_mask_blend_epi32(0xaaaa, even, odd);
#elif defined(__AVX2__)
    const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
    const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32((__m256i)a, factor), 32);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
    return (VecU32)_mm256_blend_epi32(even, odd, 0xaa);
#else
    return __builtin_convertvector((__builtin_convertvector(a, VecU64) * b) >> 32, VecU32);
#endif
  }
};

// v, rounded: the compiler may not take the product that it is into a multiply-add.
inline Vec rounded(Vec v) {
#if defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

inline float sum(Vec v) {
  // Pairwise, so that the result does not depend on how the compiler would order a loop.
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      lane[i] += lane[i + width];
    }
  }
  return lane[0];
}

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, Vec v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

inline Vec load(const BFloat16* p) {
#if defined(__AVX512F__)
  // By name: GCC 12 takes the conversion below apart into five instructions.
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (Vec)_mm512_slli_epi32(wide, 16);
#endif
  VecU16 half;
  __builtin_memcpy(&half, p, sizeof(half));
  return (Vec)(__builtin_convertvector(half, VecU32) << 16);
}

// v's bits with the upper half rounded to bfloat16: to nearest even; a NaN keeps its sign and becomes quiet, whatever
// its payload. What the lower half holds means nothing.
inline VecU32 round_bfloat16(Vec v) {
  const VecU32 bits = (VecU32)v;
  const VecU32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return v != v ? bits | 0x400000u : rounded;
}

inline void store(BFloat16* p, Vec v) {
  const VecU32 upper = round_bfloat16(v) >> 16;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)upper));
#else
  const VecU16 out = __builtin_convertvector(upper, VecU16);
  __builtin_memcpy(p, &out, sizeof(out));
#endif
}

// 2 kLanes elements as those at even places and those at odd ones, which spares the shuffles: for arithmetic that
// treats every element alike.
struct Pair {
  Vec even, odd;
};

inline Pair load_pair(const BFloat16* p) {
  VecU32 both;
  __builtin_memcpy(&both, p, sizeof(both));
  return {(Vec)(both << 16), (Vec)(both & 0xffff0000u)};
}

inline void store_pair(BFloat16* p, Pair pair) {
  const VecU32 both = (round_bfloat16(pair.even) >> 16) | (round_bfloat16(pair.odd) & 0xffff0000u);
  __builtin_memcpy(p, &both, sizeof(both));
}

#if defined(__AVX512F__)
inline Vec load(const Half* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(Half* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline Vec load(const Half* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(Half* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without F16C: exact in both directions through one float multiplication, which also takes care of subnormals.
inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline Vec load(const Half* p) {
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t h = p[i].bits, magnitude = h & 0x7fffu;
    const float value = magnitude >= 0x7c00u ? from_bits(0x7f800000u | (magnitude & 0x3ffu) << 13)
                                             : from_bits(magnitude << 13) * 0x1p112f;
    lane[i] = from_bits(to_bits(value) | (h & 0x8000u) << 16);
  }
  return load(lane);
}
inline void store(Half* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = to_bits(v[i]), magnitude = bits & 0x7fffffffu;
    uint32_t out;
    if (magnitude > 0x7f800000u) {
      out = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // 65520, the first value that rounds to infinity
      out = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {  // 2^-14, the smallest normal half
      const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
      out = (rounded - 0x38000000u) >> 13;
    } else {
      // Adding 0.5 moves the last bit of a subnormal half (2^-24) to the last bit of the float: the sum rounds it.
      out = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    }
    p[i].bits = static_cast<uint16_t>(out | (bits >> 16 & 0x8000u));
  }
}
#endif

// Stores a whole vector around the cache: what it overwrites need not be fetched first. p must be a multiple of the
// vector's size. stream_fence() orders such stores before what follows.
template <class T>
inline void stream(T* p, Vec v) {
  T buffer[kLanes];
  store(buffer, v);
#if defined(__AVX512F__) || defined(__AVX2__)
  if constexpr (sizeof(buffer) == 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), *reinterpret_cast<const __m512i_u*>(buffer));
#endif
  } else if constexpr (sizeof(buffer) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i_u*>(buffer));
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i_u*>(buffer));
  }
#else
  __builtin_memcpy(p, buffer, sizeof(buffer));
#endif
}

inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Starts to fetch the cache line at p, into the second level: the first is full of the row in hand.
inline void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

// The first `count` lanes only; the others read as zero.
template <class T>
inline Vec load(const T* p, int64_t count) {
  T buffer[kLanes] = {};
  __builtin_memcpy(buffer, p, sizeof(T) * count);
  return load(buffer);
}

template <class T>
inline void store(T* p, Vec v, int64_t count) {
  T buffer[kLanes];
  store(buffer, v);
  __builtin_memcpy(p, buffer, sizeof(T) * count);
}

// Whole vectors go around the cache where `streamed`.
template <class T>
inline void store_output(T* p, Vec v, bool streamed) {
  streamed ? stream(p, v) : store(p, v);
}
template <class T>
inline void store_output(T* p, Vec v, bool, int64_t count) {
  store(p, v, count);
}

// v without what stands past the end of a row, the lanes from `count` on.
inline Vec inside(Vec v) {
  return v;
}
inline Vec inside(Vec v, int64_t count) {
  for (int i = static_cast<int>(count); i < kLanes; ++i) {
    v[i] = 0.0f;
  }
  return v;
}

// Calls f for every vector of the elements [begin, end): f(offset) for the whole ones, f(offset, rest) for the last.
template <class F>
inline void for_each_vector(int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    f(i);
  }
  if (i < end) {
    f(i, end - i);
  }
}

}  // namespace fastllm::FASTLLM_ISA

// 8-bit moments by lookup. A code is a step function of the quotient of a number and its block's scale
// (adamw_encode in math/adamw.h), so that the quotient's upper bits, its cell, say the code but for one threshold:
// cells are so narrow that none holds two. Each has a word in the table, which is added to the quotient's bits so that
// the sum has the code in its upper 8 bits: the code of the cell's start, less what the cell itself has there; and in
// the lower 24 what carries into them from the threshold on. The words are made by adamw_encode itself, at each step
// anew: nothing is kept between calls.
#pragma once

#include "adamw.cuh"

namespace fastllm {

namespace {

constexpr uint32_t kOneBits = 0x3f800000u;       // 1.0f's
constexpr uint32_t kSmallestBits = 0x33d6bf95u;  // 1e-7f's: signed quotients below have code 0

template <bool kSigned>
struct Cells {
  static constexpr int kShift = kSigned ? 17 : 16;  // 64 cells from a power of two to the next, or 128
  // 2^-24 or 2^-21: what is smaller has the code of the first cell.
  static constexpr uint32_t kLowest = kSigned ? 0x33800000u : 0x35000000u;
  static constexpr uint32_t kCells = ((kOneBits - kLowest) >> kShift) + 1;
  // Behind the cells, those of negative quotients, or zero's.
  static constexpr uint32_t kWords = kSigned ? 2 * kCells : kCells + 1;
  static constexpr uint32_t kUnit = 1u << (24 - kShift);  // moves the bits of a place in a cell to 24
};

__device__ __forceinline__ float identity(float x) {
  return x;
}

template <bool kSigned>
__device__ inline uint32_t cell_word(uint32_t i) {
  using C = Cells<kSigned>;
  if (!kSigned && i == C::kCells) {
    return 0u - C::kLowest * C::kUnit;
  }
  const bool negative = i >= C::kCells;
  const auto code_of = [&](uint32_t bits) {
    // Negative quotients that have code 0 are looked up as positive ones.
    if (negative) {
      bits = (bits < kSmallestBits ? kSmallestBits : bits) | 0x80000000u;
    }
    return adamw_encode<Ops, kSigned, true>(bits_as<float>(bits), 1.0f, identity);
  };
  const uint32_t start = C::kLowest + ((negative ? i - C::kCells : i) << C::kShift);
  const uint32_t code = code_of(start);
  uint32_t below = 0, above = 1u << C::kShift;  // the threshold is the upper of these places, the next cell if none
  if (code_of(start + above - 1) != code) {
    while (above - below > 1) {
      const uint32_t middle = (below + above) / 2;
      (code_of(start + middle) == code ? below : above) = middle;
    }
  }
  return (code << 24) + (1u << 24) - (start + above) * C::kUnit;
}

// In shared memory; what a block copies there.
struct alignas(16) Codes {
  uint32_t signed_words[Cells<true>::kWords];
  uint32_t unsigned_words[Cells<false>::kWords];
  float decoded[2][256];  // what signed and unsigned codes stand for at the scale 1
};
constexpr uint32_t kCodesWords = sizeof(Codes) / 4;
static_assert(kCodesWords == kAdamwCodesWords && kCodesWords % 4 == 0);
static_assert(sizeof(Codes) <= 31 << 10, "three blocks, and 1 KB more each, must fit into the 100 KB of some chips");

__device__ inline uint32_t codes_word(uint32_t i) {
  if (i < Cells<true>::kWords) {
    return cell_word<true>(i);
  }
  i -= Cells<true>::kWords;
  if (i < Cells<false>::kWords) {
    return cell_word<false>(i);
  }
  i -= Cells<false>::kWords;
  return bits_as<uint32_t>(i < 256 ? adamw_decode<Ops, true>(i, 1.0f) : adamw_decode<Ops, false>(i - 256, 1.0f));
}

// Starts to copy them. All threads of a block must call both, the second before the first lookup.
__device__ __forceinline__ void start_copying_codes(Codes& to, const uint32_t* from) {
  using Four = Raw<float>::Words;
  for (uint32_t i = threadIdx.x; i < kCodesWords / 4; i += kThreads) {
    copy_async(reinterpret_cast<Four*>(&to) + i, reinterpret_cast<const Four*>(from) + i);
  }
  end_group_of_copies();
}
__device__ __forceinline__ void wait_for_codes() {
  wait_for_copies<0>();
  __syncthreads();
}

// A word with the code of x in its upper 8 bits. y: its quotient by the scale, at most 1 in magnitude, or NaN where the
// scale is 0. It must be exact from 1e-7 on; below, its size does not matter. Without a sign, x must not be negative.
template <bool kSigned>
__device__ __forceinline__ uint32_t code_word(const Codes& codes, float x, float y) {
  using C = Cells<kSigned>;
  const uint32_t bits = bits_as<uint32_t>(fmaxf(fabsf(y), bits_as<float>(C::kLowest)));  // the lowest for NaN
  uint32_t cell = (bits >> C::kShift) - (C::kLowest >> C::kShift);
  if constexpr (kSigned) {
    cell += y <= -bits_as<float>(kSmallestBits) ? C::kCells : 0;
  } else {
    cell = x > 0.0f ? cell : C::kCells;
  }
  const uint32_t* words = kSigned ? codes.signed_words : codes.unsigned_words;
  return words[cell] + bits * C::kUnit;
}

// The upper 8 bits of four words side by side.
__device__ __forceinline__ uint32_t upper_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0073), __byte_perm(c, d, 0x0073), 0x5410);
}

}  // namespace

}  // namespace fastllm

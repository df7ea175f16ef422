// Philox-4x32-7, random numbers by counting (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), on
// integers or vectors of them: Ops::U, whose Ops::mul_high gives the upper halves of its products. Reference:
// fastllm/reference/_philox.py.
#pragma once

#include "macros.h"

#include <cstdint>

namespace fastllm {

// Turns a counter of four words into four random ones.
template <class Ops>
FASTLLM_HOST_DEVICE void philox(typename Ops::U (&c)[4], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const auto high0 = Ops::mul_high(c[0], 0xD2511F53u), high2 = Ops::mul_high(c[2], 0xCD9E8D57u);
    const auto low0 = c[0] * 0xD2511F53u, low2 = c[2] * 0xCD9E8D57u;
    c[0] = high2 ^ c[1] ^ key0;
    c[1] = low2;
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace fastllm

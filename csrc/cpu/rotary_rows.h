// Kernels of rotary (isa/rotary.cpp), one set for each instruction set: plain data, no torch.
#pragma once

#include "../dtype.h"
#include "capability.h"

#include <cstdint>

namespace fastllm {

// (batch, heads, sequence, size) by strides; the last is 1. `out` may be `in`.
struct RotaryHeads {
  const void* in;
  int64_t in_batch, in_head, in_seq;
  void* out;
  int64_t out_batch, out_head, out_seq;
  int64_t heads;
};

struct Rotary {
  DType dtype;
  int64_t seq, size;  // of a sequence, and of a head
  int64_t half;       // pairs that are turned, at the front of a head
  bool interleaved;   // pairs are (2 i, 2 i + 1), not (i, i + half)
  float sign;         // -1 turns back
  const float* cos;   // rows of `half`, dense inside
  const float* sin;
  int64_t cos_batch, cos_row, sin_batch, sin_row;
  const int64_t* positions;  // rows of the tables; null: the place in the sequence
  int64_t positions_batch, positions_seq;
  int64_t rows;  // of the tables: positions past them take the last one, and read nothing that is not there
};

struct RotaryKernels {
  // Places [begin, end) of batch * sequence, in all heads.
  void (*turn)(const Rotary&, const RotaryHeads&, int64_t begin, int64_t end);
};

FASTLLM_DECLARE_KERNELS(RotaryKernels, rotary_kernels)

}  // namespace fastllm

"""The table by which CUDA codes 8-bit moments: the same codes as the function that it is made from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import bindings
import pytest

pytestmark = bindings.needs_compiler

ROOT = Path(__file__).parents[1]
PROGRAM = """
#include "cuda/adamw_codes.cuh"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

using namespace fastllm;

Codes codes;
long compared = 0, wrong = 0;

template <bool kSigned>
void compare(float y) {
  const uint32_t expected = adamw_encode<Ops, kSigned, true>(y, 1.0f, identity);
  const uint32_t found = code_word<kSigned>(codes, y, y) >> 24;
  ++compared;
  if (found != expected && ++wrong <= 5) {
    std::printf("%s %.9g: %u, not %u\\n", kSigned ? "signed" : "unsigned", y, found, expected);
  }
}

void compare(uint32_t bits) {
  if (bits <= kOneBits) {
    const float y = bits_as<float>(bits);
    compare<true>(y);
    compare<true>(-y);
    compare<false>(y);
  }
}

// Around every place where a code changes, found without the table, and where a cell starts.
template <bool kSigned>
void compare_edges() {
  const auto code_of = [](uint32_t bits) {
    return adamw_encode<Ops, kSigned, true>(bits_as<float>(bits), 1.0f, identity);
  };
  std::vector<uint32_t> edges;
  for (uint32_t bits = 0; bits < kOneBits;) {
    uint32_t below = bits, above = kOneBits;
    while (above - below > 1) {
      const uint32_t middle = (below + above) / 2;
      (code_of(middle) == code_of(bits) ? below : above) = middle;
    }
    edges.push_back(bits = above);
  }
  std::printf("%zu ", edges.size());
  for (uint32_t i = 0; i < Cells<kSigned>::kCells; ++i) {
    edges.push_back(Cells<kSigned>::kLowest + (i << Cells<kSigned>::kShift));
  }
  for (uint32_t edge : edges) {
    for (int apart = -3; apart <= 3; ++apart) {
      compare(edge + apart);
    }
  }
}

int main(int, char** args) {
  const uint32_t step = std::atoi(args[1]);
  for (uint32_t i = 0; i < kCodesWords; ++i) {
    reinterpret_cast<uint32_t*>(&codes)[i] = codes_word(i);
  }
  compare_edges<true>();
  compare_edges<false>();
  const uint32_t everything = 0x33000000u;  // 2^-25: what is smaller, in larger steps
  for (uint32_t bits = 0; bits < everything; bits += 100003) {
    compare(bits);
  }
  for (uint32_t bits = everything; bits <= kOneBits; bits += step) {
    compare(bits);
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();  // 0 / 0, of a block of zeros
  for (float y : {nan, -nan}) {
    wrong += code_word<true>(codes, 0.0f, y) >> 24 != 0;
    wrong += code_word<false>(codes, 0.0f, y) >> 24 != 0;
  }
  const float least = std::numeric_limits<float>::denorm_min();  // not zero, though its quotient may be
  wrong += code_word<false>(codes, least, 0.0f) >> 24 != 1;
  wrong += code_word<true>(codes, -least, -0.0f) >> 24 != 0;
  std::printf("changes, %ld compared, %ld wrong\\n", compared, wrong);
}
"""


@pytest.mark.parametrize("step", [997, pytest.param(1, marks=pytest.mark.slow)])
def test_codes_by_lookup(tmp_path, step):
    """From 0 to 1, a signed quotient's code changes 128 times, an unsigned one's 255 times: from zero, too."""
    source, program = tmp_path / "codes.cpp", tmp_path / "codes"
    source.write_text(PROGRAM)
    flags = ["-O2", "-std=c++17", "-ffp-contract=off", "-DFASTLLM_CUDA_EMULATION", "-Wno-unknown-pragmas"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda_emulation'}"]
    subprocess.run([bindings.CXX, *flags, *includes, source, "-o", program], check=True)
    said = subprocess.run([program, str(step)], check=True, capture_output=True, text=True).stdout
    assert said.startswith("128 255 changes, "), said
    assert said.endswith(" compared, 0 wrong\n"), said
    assert int(said.split()[3]) > 600_000_000 // step, said

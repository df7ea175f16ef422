"""Functions that Triton's language lacks, or has only where a vendor's library is linked."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    square = x * x
    series = x * (1 + square * (-0.33333333 + square * (0.13333333 - square * 0.053968254)))
    return tl.where(tl.abs(x) < 0.15, series, 1 - 2 / (1 + tl.exp2(x * 2.8853900817779268)))

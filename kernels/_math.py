"""Functions that Triton's language lacks, or has only where a vendor's library is linked."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    square = x * x
    series = x * (1 + square * (-0.33333333 + square * (0.13333333 - square * 0.053968254)))
    return tl.where(tl.abs(x) < 0.15, series, 1 - 2 / (1 + tl.exp2(x * 2.8853900817779268)))


@triton.jit
def _normal(x, gauss):
    """The share of a normal distribution below x, (1 + erf(x / sqrt 2)) / 2, within 1e-7 (Abramowitz and Stegun,
    "Handbook of Mathematical Functions", 26.2.17). `gauss` is e^(-x^2 / 2)."""
    t = 1.0 / (1.0 + 0.2316418882663604 * tl.abs(x))
    p = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    return tl.where(x < 0, p * gauss, 1.0 - p * gauss)

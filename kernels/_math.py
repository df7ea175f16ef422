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
def _erf(x, gauss):
    """Within 5e-7 (Abramowitz and Stegun, "Handbook of Mathematical Functions", 7.1.26). `gauss` is e^-x^2."""
    t = 1.0 / (1.0 + 0.3275911 * tl.abs(x))
    p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return tl.where(x < 0, p * gauss - 1.0, 1.0 - p * gauss)

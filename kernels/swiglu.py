"""SwiGLU (reference: fastllm/reference/swiglu.py); the kernels are in `_glu`."""

from __future__ import annotations

from torch import Tensor

from fastllm.kernels import _glu


def swiglu_fwd(
    y: Tensor,  # (..., N), contiguous
    gate: Tensor,  # (..., N)
    up: Tensor,  # (..., N)
) -> None:
    _glu.fwd(_glu.SILU, y, gate, up)


def swiglu_bwd(
    d: Tensor,  # (..., 2 N), contiguous: the gradient of gate, then of up
    dy: Tensor,  # (..., N)
    gate: Tensor,  # (..., N)
    up: Tensor,  # (..., N)
) -> None:
    _glu.bwd(_glu.SILU, d, dy, gate, up)

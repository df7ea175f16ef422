"""GEGLU (reference: fastllm/reference/geglu.py); the kernels are in `_glu`."""

from __future__ import annotations

from torch import Tensor

from fastllm.kernels import _glu


def geglu_fwd(
    y: Tensor,  # (..., N), contiguous
    gate: Tensor,  # (..., N)
    up: Tensor,  # (..., N)
    tanh: bool,
) -> None:
    _glu.fwd(_glu.GELU_TANH if tanh else _glu.GELU, y, gate, up)


def geglu_bwd(
    d: Tensor,  # (..., 2 N), contiguous: the gradient of gate, then of up
    dy: Tensor,  # (..., N)
    gate: Tensor,  # (..., N)
    up: Tensor,  # (..., N)
    tanh: bool,
) -> None:
    _glu.bwd(_glu.GELU_TANH if tanh else _glu.GELU, d, dy, gate, up)

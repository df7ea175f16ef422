"""SwiGLU: act(g) = g s, act'(g) = s (1 + g (1 - s)), s = 1 / (1 + e^-g)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.reference._glu import glu_bwd, glu_fwd


def silu(g: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(g)
    return g * s, s * (1 + g * (1 - s))


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    return glu_fwd(silu, gate, up)


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return glu_bwd(silu, dy, gate, up)

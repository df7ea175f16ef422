"""GEGLU: act is GELU, or its tanh form (fastllm/reference/gelu.py)."""

from __future__ import annotations

from torch import Tensor

from fastllm.reference._glu import glu_bwd, glu_fwd
from fastllm.reference.gelu import gelu, gelu_tanh


def geglu_fwd(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return glu_fwd(gelu_tanh if tanh else gelu, gate, up)


def geglu_bwd(dy: Tensor, gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return glu_bwd(gelu_tanh if tanh else gelu, dy, gate, up)

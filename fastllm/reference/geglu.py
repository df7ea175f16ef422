"""GEGLU: act is GELU (Hendrycks and Gimpel, 2016), or its tanh form.

g P, P = (1 + erf(g / sqrt 2)) / 2                          act' = P + g e^(-g^2 / 2) / sqrt(2 pi)
g (1 + t) / 2, t = tanh(sqrt(2 / pi) (g + 0.044715 g^3))    act' by the chain rule
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllm.reference._glu import glu_bwd, glu_fwd


def gelu(g: Tensor) -> tuple[Tensor, Tensor]:
    p = (1 + torch.erf(g / math.sqrt(2))) / 2
    return g * p, p + g * torch.exp(-g.square() / 2) / math.sqrt(2 * math.pi)


def gelu_tanh(g: Tensor) -> tuple[Tensor, Tensor]:
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (g + c * g**3))
    return g * (1 + t) / 2, (1 + t) / 2 + g * (1 - t.square()) * k * (1 + 3 * c * g.square()) / 2


def geglu_fwd(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return glu_fwd(gelu_tanh if tanh else gelu, gate, up)


def geglu_bwd(dy: Tensor, gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return glu_bwd(gelu_tanh if tanh else gelu, dy, gate, up)

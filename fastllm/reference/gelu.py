"""GELU (Hendrycks and Gimpel, 2016) of g = x + bias, or its tanh form, forward and backward.

g P, P = (1 + erf(g / sqrt 2)) / 2                          act' = P + g e^(-g^2 / 2) / sqrt(2 pi)
g (1 + t) / 2, t = tanh(sqrt(2 / pi) (g + 0.044715 g^3))    act' by the chain rule

    y = act(g)        dx = dy act'(g)        dbias = sum over rows of dy act'(g)

Computed in float32 (float64 for float64); y and dx are then rounded to the input's dtype, dbias to the bias's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllm.reference._norm import accumulate_dtype, parameter_grad


def gelu(g: Tensor) -> tuple[Tensor, Tensor]:
    p = (1 + torch.erf(g / math.sqrt(2))) / 2
    return g * p, p + g * torch.exp(-g.square() / 2) / math.sqrt(2 * math.pi)


def gelu_tanh(g: Tensor) -> tuple[Tensor, Tensor]:
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (g + c * g**3))
    return g * (1 + t) / 2, (1 + t) / 2 + g * (1 - t.square()) * k * (1 + 3 * c * g.square()) / 2


def _activate(x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """act and act' of x + bias."""
    g = x.to(accumulate_dtype(x.dtype))
    if bias is not None:
        g = g + bias.to(g.dtype)
    return gelu_tanh(g) if tanh else gelu(g)


def gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return _activate(x, bias, tanh)[0].to(x.dtype).contiguous()


def gelu_bwd(
    dy: Tensor,  # (..., N)
    x: Tensor,  # (..., N)
    bias: Tensor | None,  # (N,)
    tanh: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Returns dx (..., N), and dbias (N,), empty where it is not asked for."""
    slope = _activate(x, bias, tanh)[1]
    dx = dy.to(slope.dtype) * slope
    return dx.to(x.dtype).contiguous(), parameter_grad(dx, bias, bias_grad, x)

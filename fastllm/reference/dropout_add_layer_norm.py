"""sum = dropout(x) + residual, rounded; y = layer_norm(sum). The formulas are in `_dropout` and `_norm`."""

from __future__ import annotations

from torch import Tensor

from fastllm.reference import _dropout, _norm
from fastllm.reference._dropout import dropped

__all__ = ["dropout_add_layer_norm_bwd", "dropout_add_layer_norm_fwd", "dropped"]


def dropout_add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor, p: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = _dropout.dropout_add(x, residual, seed, p)
    y, mean, rstd = _norm.norm_fwd(total, weight, bias, eps, centered=True)
    return y, total, mean, rstd


def dropout_add_layer_norm_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    sum: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor,
    p: float,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, residual, weight and bias."""
    dtotal, dweight, dbias = _norm.norm_bwd(dy, dsum, sum, mean, rstd, weight, bias, weight_grad, bias_grad)
    return dropped(dtotal, seed, p).to(dtotal.dtype), dtotal, dweight, dbias

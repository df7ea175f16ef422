"""sum = dropout(x) + residual, rounded; y = rms_norm(sum). The formulas are in `_dropout` and `_norm`."""

from __future__ import annotations

from torch import Tensor

from fastllm.reference import _dropout, _norm
from fastllm.reference._dropout import dropped

__all__ = ["dropout_add_rms_norm_bwd", "dropout_add_rms_norm_fwd", "dropped"]


def dropout_add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, seed: Tensor, p: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = _dropout.dropout_add(x, residual, seed, p)
    y, _, rstd = _norm.norm_fwd(total, weight, None, eps, centered=False)
    return y, total, rstd


def dropout_add_rms_norm_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    sum: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    seed: Tensor,
    p: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, residual and weight."""
    dtotal, dweight, _ = _norm.norm_bwd(dy, dsum, sum, None, rstd, weight, None, weight_grad, False)
    return dropped(dtotal, seed, p).to(dtotal.dtype), dtotal, dweight

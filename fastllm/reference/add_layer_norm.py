"""sum = x + residual, rounded to its dtype; y = layer_norm(sum). The formulas are in `_norm`."""

from __future__ import annotations

from torch import Tensor

from fastllm.reference import _norm


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    y, mean, rstd = _norm.norm_fwd(total, weight, bias, eps, centered=True)
    return y, total, mean, rstd


def add_layer_norm_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    sum: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm.norm_bwd(dy, dsum, sum, mean, rstd, weight, bias, weight_grad, bias_grad)

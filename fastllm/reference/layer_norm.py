"""y = (x - mean) * rstd * weight + bias over the last dimension; the formulas are in `_norm`."""

from __future__ import annotations

from torch import Tensor

from fastllm.reference import _norm


def layer_norm_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _norm.norm_fwd(x, weight, bias, eps, centered=True)


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm.norm_bwd(dy, None, x, mean, rstd, weight, bias, weight_grad, bias_grad)

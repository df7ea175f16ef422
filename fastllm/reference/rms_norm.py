"""y = x * rstd * weight over the last dimension; the formulas are in `_norm`."""

from __future__ import annotations

from torch import Tensor

from fastllm.reference import _norm


def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _norm.norm_fwd(x, weight, None, eps, centered=False)
    return y, rstd


def rms_norm_bwd(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return _norm.norm_bwd(dy, None, x, None, rstd, weight, None, weight_grad, False)[:2]

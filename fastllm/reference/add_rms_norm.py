"""sum = x + residual, rounded to its dtype; y = rms_norm(sum). The formulas are in `_norm`."""

from __future__ import annotations

from torch import Tensor

from fastllm.reference import _norm


def add_rms_norm_fwd(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    y, _, rstd = _norm.norm_fwd(total, weight, None, eps, centered=False)
    return y, total, rstd


def add_rms_norm_bwd(
    dy: Tensor, dsum: Tensor | None, sum: Tensor, rstd: Tensor, weight: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return _norm.norm_bwd(dy, dsum, sum, None, rstd, weight, None, weight_grad, False)[:2]

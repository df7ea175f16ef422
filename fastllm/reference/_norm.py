"""LayerNorm and RMSNorm over the last dimension, forward and backward.

    LayerNorm: mean = mean(x), rstd = 1 / sqrt(mean((x - mean)^2) + eps)
    RMSNorm:   mean = 0,       rstd = 1 / sqrt(mean(x^2) + eps)
    xhat = (x - mean) * rstd,  y = xhat * weight + bias
    g = dy * weight,           dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), with mean(g) in LayerNorm only
    dweight = sum over rows of dy * xhat,  dbias = sum over rows of dy

Computed in float32, or in float64 for float64 input; y and dx are then rounded to the input's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def norm_fwd(
    x: Tensor,  # (..., N)
    weight: Tensor | None,  # (N,)
    bias: Tensor | None,  # (N,)
    eps: float,
    *,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (..., N) in x's dtype, and mean and rstd (...) in the accumulation dtype."""
    acc = x.to(accumulate_dtype(x.dtype))
    mean = acc.mean(-1) if centered else acc.new_zeros(acc.shape[:-1])
    acc = acc - mean[..., None]
    rstd = torch.rsqrt(acc.square().mean(-1) + eps)
    y = acc * rstd[..., None]
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype).contiguous(), mean, rstd


def norm_bwd(
    dy: Tensor,  # (..., N)
    dsum: Tensor | None,  # (..., N), added to dx
    x: Tensor,  # (..., N)
    mean: Tensor | None,  # (...), None for RMSNorm
    rstd: Tensor,  # (...)
    weight: Tensor | None,
    bias: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx (..., N), dweight (N,) and dbias (N,); the last two are empty where not asked for."""
    xhat = x.to(rstd.dtype)
    if mean is not None:
        xhat = xhat - mean[..., None]
    xhat = xhat * rstd[..., None]
    dy = dy.to(rstd.dtype)
    g = dy if weight is None else dy * weight.to(dy.dtype)
    dx = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if mean is not None:
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd[..., None]
    if dsum is not None:
        dx = dx + dsum.to(dx.dtype)
    dweight = parameter_grad(dy * xhat, weight, weight_grad, x)
    dbias = parameter_grad(dy, bias, bias_grad, x)
    return dx.to(x.dtype).contiguous(), dweight, dbias


def parameter_grad(per_row: Tensor, parameter: Tensor | None, wanted: bool, x: Tensor) -> Tensor:
    """The sum of `per_row` (..., N) over rows in the parameter's dtype; empty where it is not asked for."""
    if parameter is None or not wanted:
        return x.new_empty(0, dtype=x.dtype if parameter is None else parameter.dtype)
    rows = tuple(range(x.dim() - 1))
    total = per_row.sum(rows) if rows else per_row.clone()  # sum(()) would add up everything
    return total.to(parameter.dtype)

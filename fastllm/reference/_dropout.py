"""Dropout of the branch that is added to a residual: sum = Z x + residual, Z 0 or 1 / (1 - rate)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.reference._norm import accumulate_dtype
from fastllm.reference._philox import keep_scale, kept, philox


def dropped(x: Tensor, seed: Tensor, rate: float) -> Tensor:
    """Z x in the accumulation dtype, x (..., N).

    Element (row, column) takes word column % 4 of counter (column / 4, row, row >> 32, 0). What is dropped is zero, NaN
    and infinities too.
    """
    n = x.shape[-1]
    rows = torch.arange(x.numel() // n if n else 0, device=x.device)[:, None]
    columns = torch.arange((n + 3) // 4, device=x.device)[None, :]
    words = torch.stack(philox(seed, columns, rows, rows >> 32, torch.zeros_like(rows)), -1).flatten(1)[:, :n]
    acc = x.to(accumulate_dtype(x.dtype))
    return torch.where(kept(words, rate).view(x.shape), acc * keep_scale(rate), 0.0)


def dropout_add(x: Tensor, residual: Tensor, seed: Tensor, rate: float) -> Tensor:
    """Z x + residual, rounded once to x's dtype."""
    total = dropped(x, seed, rate) + residual
    return total.to(x.dtype).contiguous()

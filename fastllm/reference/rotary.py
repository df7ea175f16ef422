"""Rotary positions (Su et al., "RoFormer", 2021): each pair of a head is turned by the angle of its position.

    (a, b) -> (a cos - b sin, b cos + a sin)

Pair i is elements (i, i + R / 2) of the first R, or interleaved (2 i, 2 i + 1); what lies behind R stays. The gradient
is turned by the opposite angle (inverse). Computed in float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _table(table: Tensor, positions: Tensor | None, length: int, dtype: torch.dtype) -> Tensor:
    """(1 or B, 1, S, R / 2)."""
    if positions is not None:
        table = table[positions]
    elif table.dim() == 2:
        table = table[:length][None]
    return table.to(dtype)[:, None]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(cos.dtype), x[..., 2 * half :]
    a, b = turned.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def rotary_fwd(
    q: Tensor,  # (B, H, S, D)
    k: Tensor,  # (B, HK, S, D)
    cos: Tensor,  # (P, R / 2), or (B, S, R / 2)
    sin: Tensor,
    positions: Tensor | None,  # (B, S) int64: rows of cos and sin
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (_table(table, positions, q.shape[2], acc) for table in (cos, sin))
    return tuple(_turn(x, cos, -sin if inverse else sin, interleaved) for x in (q, k))  # type: ignore[return-value]

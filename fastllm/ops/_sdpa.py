"""The `torch` backend of attention: scaled_dot_product_attention's fused CPU kernel, without idle work.

That kernel knows "everything", "causal from the top left" and "add this mask". Other diagonals and windows are cut into
blocks of queries, each with the keys that it can see and a mask no larger than that; queries that see nothing are left
out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
ROWS = 256  # of queries in a block


class Part(NamedTuple):
    """Queries [q0, q1) see keys [k0, k1): all, causally from their corner, or as the window says (`banded`)."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False
    banded: bool = False


def parts(seq_q: int, seq_k: int, left: int, right: int, bottom_right: bool) -> Iterator[Part]:
    diagonal = seq_k - seq_q if bottom_right else 0
    begin = max(0, -diagonal - right) if right >= 0 else 0
    end = min(seq_q, seq_k - diagonal + left) if left >= 0 else seq_q
    if left >= 0 and begin + diagonal <= left and end - 1 + diagonal <= left:
        left = -1  # wide enough to reach the first key from everywhere
    if right >= 0 and begin + diagonal + right >= seq_k - 1:
        right = -1
    if end <= begin or seq_k == 0:
        return
    if left < 0 and right < 0:
        yield Part(begin, end, 0, seq_k)
    elif left < 0 and begin + diagonal + right == 0:
        yield Part(begin, end, 0, min(seq_k, end - begin), causal=True)
    else:
        for q0 in range(begin, end, ROWS):
            q1 = min(end, q0 + ROWS)
            k0 = max(0, q0 + diagonal - left) if left >= 0 else 0
            k1 = min(seq_k, q1 + diagonal + right) if right >= 0 else seq_k
            yield Part(q0, q1, k0, k1, banded=True)


def _bias(part: Part, mask: Tensor | None, like: Tensor, diagonal: int, left: int, right: int, bands: dict):
    """The additive mask of a part, (1 or B, 1 or H, rows, keys), or None."""
    bias = None
    if mask is not None:
        bias = mask[:, :, part.q0 : part.q1, part.k0 : part.k1]
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=like.dtype).masked_fill_(~bias, -torch.inf)
        # The kernel takes a float32 mask beside 16 bits; beside float64 it does not convert it, but misreads it.
        elif bias.dtype not in (like.dtype, acc := torch.promote_types(like.dtype, torch.float32)):
            bias = bias.to(acc)
    if part.banded:
        shape = (part.q1 - part.q0, part.k1 - part.k0, part.q0 + diagonal - part.k0)  # rows, keys, where row 0 stands
        if shape not in bands:
            rows, keys, shift = shape
            ahead = torch.arange(keys)[None, :] - torch.arange(rows)[:, None] - shift
            unseen = torch.zeros_like(ahead, dtype=torch.bool)
            if left >= 0:
                unseen |= ahead < -left
            if right >= 0:
                unseen |= ahead > right
            bands[shape] = torch.zeros(rows, keys, dtype=like.dtype).masked_fill_(unseen, -torch.inf)[None, None]
        bias = bands[shape] if bias is None else bias + bands[shape]
    return bias


def _unexpanded(mask: Tensor | None) -> Tensor | None:
    """The mask without the batch and heads that it was expanded over."""
    for dim in (0, 1):
        if mask is not None and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _padded(x: Tensor, size: int) -> Tensor:
    """`x` with zeros up to the head size `size`, and the last stride 1 that the kernel takes for granted."""
    if x.shape[-1] < size:
        return F.pad(x, (0, size - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _plan(query: Tensor, key: Tensor, mask: Tensor | None, left: int, right: int, bottom_right: bool):
    seq_q, seq_k = query.shape[2], key.shape[2]
    diagonal = seq_k - seq_q if bottom_right else 0
    bands: dict[tuple, Tensor] = {}
    mask = _unexpanded(mask)
    for part in parts(seq_q, seq_k, left, right, bottom_right):
        bias = _bias(part, mask, query, diagonal, left, right, bands)
        if part.causal and bias is not None:
            rows, keys = part.q1 - part.q0, part.k1 - part.k0
            bias = bias + torch.full((rows, keys), -torch.inf, dtype=bias.dtype).triu_(1)
        yield part, slice(part.q0, part.q1), slice(part.k0, part.k1), part.causal and bias is None, bias


def forward(
    lse: Tensor,  # (B, H, Sq) float32
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
) -> Tensor:
    """Fills lse; returns out (B, H, Sq, DV), with the strides that the kernel chose."""
    size = max(query.shape[3], value.shape[3])
    q, k, v = [_padded(x, size) for x in (query, key, value)]
    rows = query.shape[2]
    covered = 0
    out: Tensor | None = None
    for part, at, keys, causal, bias in _plan(query, key, mask, left, right, bottom_right):
        result, part_lse = _forward(q[:, :, at], k[:, :, keys], v[:, :, keys], 0.0, causal, attn_mask=bias, scale=scale)
        if mask is not None:  # the kernel gives a row without a key lse = 0
            part_lse = part_lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
        result = result[..., : value.shape[3]]
        if out is None and part.q1 - part.q0 == rows:
            lse.copy_(part_lse)
            return result
        if out is None:
            out = torch.empty_like(query[..., :1].expand(*query.shape[:3], value.shape[3]))
        out[:, :, at] = result
        lse[:, :, at] = part_lse
        if covered < part.q0:
            out[:, :, covered : part.q0] = 0
            lse[:, :, covered : part.q0] = -torch.inf
        covered = part.q1
    if out is None:
        out = query.new_empty(*query.shape[:3], value.shape[3])
    out[:, :, covered:] = 0
    lse[:, :, covered:] = -torch.inf
    return out


def backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size = max(query.shape[3], value.shape[3])
    q, k, v, padded_out, padded_dout = [_padded(x, size) for x in (query, key, value, out, dout)]
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    grads: list[Tensor] = []
    for part, at, keys, causal, bias in _plan(query, key, mask, left, right, bottom_right):
        dq, dk, dv = _backward(
            padded_dout[:, :, at], q[:, :, at], k[:, :, keys], v[:, :, keys], padded_out[:, :, at], lse[:, :, at],
            0.0, causal, attn_mask=bias, scale=scale,
        )  # fmt: skip
        dq, dk, dv = dq[..., : query.shape[3]], dk[..., : query.shape[3]], dv[..., : value.shape[3]]
        if dq.shape == query.shape and dk.shape == key.shape:
            return dq, dk, dv
        if not grads:
            acc = query.dtype if not part.banded else torch.promote_types(query.dtype, torch.float32)
            grads = [torch.zeros_like(query), *(torch.zeros_like(x, dtype=acc) for x in (key, value))]
        grads[0][:, :, at] = dq
        grads[1][:, :, keys] += dk
        grads[2][:, :, keys] += dv
    if not grads:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    return grads[0], grads[1].to(key.dtype), grads[2].to(value.dtype)

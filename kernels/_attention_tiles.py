"""Pieces of an attention tile. `i` and `j` broadcast against each other, either one down the tile."""

from __future__ import annotations

import triton
import triton.language as tl

from fastllm.kernels._math import _tanh


@triton.jit
def _load(pointers, inside, d, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr):
    """A tile of rows; zero for rows that are not `inside` (only looked at where EDGE) and past the head size."""
    if EDGE:
        return tl.load(pointers, mask=inside if D == BLOCK_D else inside & (d < D), other=0.0)
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=d < D, other=0.0)


@triton.jit
def _logits(
    qk, i, j, inside, position, slope, mask, stride_mi, stride_mj, scale_log2, cap_in, cap_out,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Logits in base 2, and what tanh gave (anything without a softcap)."""
    tanh = qk
    if SOFTCAP:
        tanh = _tanh(qk * cap_in)
        t = tanh * cap_out
    else:
        t = qk * scale_log2
    if ALIBI:
        t -= slope * tl.abs(position - j).to(tl.float32)
    if MASK != 0:
        pointers = mask + i.to(tl.int64) * stride_mi + j.to(tl.int64) * stride_mj
        if MASK == 1:
            if EDGE:
                seen = tl.load(pointers, mask=inside, other=0)
            else:
                seen = tl.load(pointers)
            t = tl.where(seen != 0, t, float("-inf"))
        else:
            if EDGE:
                bias = tl.load(pointers, mask=inside, other=0.0)
            else:
                bias = tl.load(pointers)
            t += bias.to(tl.float32) * 1.4426950408889634
    return t, tanh


@triton.jit
def _visible(i, position, j, seq_q, seq_k, window_left, window_right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    seen = (j < seq_k) & (i < seq_q)
    if RIGHT:
        seen = seen & (j <= position + window_right)
    if LEFT:
        seen = seen & (j >= position - window_left)
    return seen


@triton.jit
def _kept(seed, i, j, row, threshold):
    """Dropout's mask: 24 bits of Philox at counter (query, key, batch and head), the same in every kernel."""
    zero = i * 0 + j * 0
    bits, _, _, _ = tl.philox(seed, zero + i, zero + j, zero + row, zero, 7)
    return (bits >> 8).to(tl.int32) >= threshold

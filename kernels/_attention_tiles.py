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
def _offset(i, stride, WIDE: tl.constexpr):
    """Of the elements of a tile: 32 bits, which take half the registers, unless its strides are WIDE."""
    return i.to(tl.int64) * stride if WIDE else i * stride


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


@triton.jit
def _program(heads, seq_q, seq_k, blocks, tiles, LAST_FIRST: tl.constexpr, VARLEN: tl.constexpr):
    """What is a program's: batch (in packed tensors: sequence), head and block; where its sequences begin in packed
    tensors, and their lengths."""
    pid = tl.program_id(0)
    if VARLEN:
        head = (pid % heads).to(tl.int64)
        tiles += 6 * (pid // heads)
        batch = tl.load(tiles).to(tl.int64)
        block = tl.load(tiles + 1)
        q_start = tl.load(tiles + 2).to(tl.int64)
        k_start = tl.load(tiles + 3).to(tl.int64)
        seq_q = tl.load(tiles + 4)
        seq_k = tl.load(tiles + 5)
    else:
        head = (pid // blocks % heads).to(tl.int64)
        batch = (pid // blocks // heads).to(tl.int64)
        block = pid % blocks
        if LAST_FIRST:
            block = blocks - 1 - block
        q_start = tl.zeros([], tl.int64)
        k_start = tl.zeros([], tl.int64)
    return batch, head, block, q_start, k_start, seq_q, seq_k


@triton.jit
def _scratch_row(batch, q_start, VARLEN: tl.constexpr):
    """Where a sequence begins in `normals` and `deltas`: tiles of 128 rows have no row of two sequences there."""
    return 128 * ((q_start + 127) // 128 + batch) if VARLEN else q_start


@triton.jit
def _key_span(
    first, seq_q, seq_k, diagonal, window_left, window_right, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of the queries from `first` on: keys [lo, hi) hold all that they see, [full_lo, full_hi) what every one of them
    sees; all but hi are multiples of BLOCK_N."""
    last = tl.minimum(first + BLOCK_M, seq_q) - 1
    lo = 0
    full_lo = 0
    hi = seq_k
    full_hi = seq_k
    if RIGHT:
        hi = tl.maximum(tl.minimum(hi, last + diagonal + window_right + 1), 0)
        full_hi = tl.maximum(tl.minimum(hi, first + diagonal + window_right + 1), 0)
    if LEFT:
        lo = tl.maximum(first + diagonal - window_left, 0) // BLOCK_N * BLOCK_N
        full_lo = (tl.maximum(last + diagonal - window_left, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_hi = tl.maximum(full_hi // BLOCK_N * BLOCK_N, lo)
    full_lo = tl.minimum(full_lo, full_hi)
    return lo, hi, full_lo, full_hi


@triton.jit
def _query_span(
    first, seq_q, seq_k, diagonal, window_left, window_right, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of the keys from `first` on: queries [lo, hi) hold all that see them, [full_lo, full_hi) those that see every one
    of them; all but hi are multiples of BLOCK_M."""
    last = tl.minimum(first + BLOCK_N, seq_k) - 1
    lo = 0
    full_lo = 0
    hi = seq_q
    full_hi = seq_q
    if RIGHT:
        lo = tl.maximum(first - diagonal - window_right, 0) // BLOCK_M * BLOCK_M
        full_lo = (tl.maximum(last - diagonal - window_right, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if LEFT:
        hi = tl.maximum(tl.minimum(hi, last - diagonal + window_left + 1), 0)
        full_hi = tl.maximum(tl.minimum(hi, first - diagonal + window_left + 1), 0)
    full_hi = tl.maximum(full_hi // BLOCK_M * BLOCK_M, lo)
    full_lo = tl.minimum(full_lo, full_hi)
    return lo, hi, full_lo, full_hi

"""Attention, forward and backward (reference: fastllm/reference/attention.py).

    p_i = i + diagonal                               the key position that query i stands at
    t_ij = scale q_i.k_j                             softcap c: c tanh(t_ij / c)
           - slope |p_i - j| + mask_ij               ALiBi, additive mask
           -inf unless p_i - left <= j <= p_i + right
    lse_i = log(sum_j exp(t_ij) + exp(sink))         P = exp(t - lse)
    o_i = sum_j P_ij Z_ij v_j                        Z: dropout's 0 or 1 / (1 - rate)

    delta_i = o_i.do_i - dlse_i                      dv_j = sum_i P_ij Z_ij do_i
    dt_ij = P_ij (Z_ij do_i.v_j - delta_i)           ds_ij = dt_ij (1 - tanh^2) scale
    dq_i = sum_j ds_ij k_j,  dk_j = sum_i ds_ij q_i, dsink = -sum_i exp(sink - lse_i) delta_i

Softmax is online and in base 2 (Dao, FlashAttention-2, 2023, https://arxiv.org/abs/2307.08691): a program holds one
tile of queries and walks along the keys. The tiles in which every pair may see each other, nearly all of them, go
through a loop without a mask; those that the diagonal, a window's border or the sequence's end cuts go through the same
code with one. dK/dV and dQ are two kernels, so that each output has one writer, and the sums one order.

Dense tensors are (B, H, S, D) by strides. Packed ones (VARLEN) are (total, H, D): `tiles` names the sequence and the
block of each program, and sequence b is rows cu[b] to cu[b + 1].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels import _utils
from fastllm.kernels._utils import LOG2E, Config

NO_MASK, BOOL_MASK, FLOAT_MASK = 0, 1, 2


# Pieces of a tile. `i` and `j` broadcast against each other, either one down the tile.


@triton.jit
def _tanh(x):
    square = x * x
    series = x * (1 + square * (-0.33333333 + square * (0.13333333 - square * 0.053968254)))
    return tl.where(tl.abs(x) < 0.15, series, 1 - 2 / (1 + tl.exp2(x * 2.8853900817779268)))


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


# Forward


@triton.jit
def _fwd_tiles(
    acc, total, top, q, k, v, mask, lo, hi, border, skip, i, position, seq_q, seq_k, slope, seed, row,
    stride_ks, stride_kd, stride_vs, stride_vd, stride_mi, stride_mj, window_left, window_right,
    scale_log2, cap_in, cap_out, threshold,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Takes the keys [lo, hi) into the running maximum `top`, the sum `total` and `acc`."""
    PLAIN: tl.constexpr = not (SOFTCAP or ALIBI or MASK != 0)
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[:, None]
    dv = tl.arange(0, BLOCK_DV)[None, :]
    k_tile = columns[None, :].to(tl.int64) * stride_ks + d.to(tl.int64) * stride_kd
    v_tile = columns[:, None].to(tl.int64) * stride_vs + dv.to(tl.int64) * stride_vd
    for start in range(lo, hi, BLOCK_N):
        if EDGE:
            start = tl.where(start >= border, start + skip, start)
        start = tl.multiple_of(start, BLOCK_N)
        j = (start + columns)[None, :]
        key = _load(k + start.to(tl.int64) * stride_ks + k_tile, j < seq_k, d, D, BLOCK_D, EDGE)
        t = tl.dot(q, key, input_precision=PRECISION)
        if not PLAIN:
            inside = (i < seq_q) & (j < seq_k)
            t, _ = _logits(t, i, j, inside, position, slope, mask, stride_mi, stride_mj, scale_log2, cap_in, cap_out,
                           SOFTCAP, ALIBI, MASK, EDGE or MASK != 0)  # fmt: skip
        if EDGE:
            seen = _visible(i, position, j, seq_q, seq_k, window_left, window_right, LEFT, RIGHT)
            t = tl.where(seen, t, float("-inf"))
        highest = tl.max(t, 1)
        if PLAIN:
            highest = highest * scale_log2
        highest = tl.maximum(top, highest)
        shift = highest
        if EDGE or MASK != 0:  # a row that has seen no key yet
            shift = tl.where(highest == float("-inf"), 0.0, highest)
        if PLAIN:
            p = tl.exp2(t * scale_log2 - shift[:, None])
        else:
            p = tl.exp2(t - shift[:, None])
        alpha = tl.exp2(top - shift)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if DROPOUT:
            p = tl.where(_kept(seed, i, j, row, threshold), p, 0.0)
        value = _load(v + start.to(tl.int64) * stride_vs + v_tile, (start + columns)[:, None] < seq_k, dv, DV, BLOCK_DV,
                      EDGE)  # fmt: skip
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
        top = highest
    return acc, total, top


@triton.jit
def _attention_fwd_kernel(
    q, k, v, o, lse, mask, sinks, slopes, seeds, cu_q, cu_k, tiles,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_ob, stride_oh, stride_os, stride_lb, stride_lh,
    stride_mb, stride_mh, stride_mi, stride_mj, stride_slope_b, stride_slope_h,
    heads, group, seq_q, seq_k, blocks, window_left, window_right,
    scale_log2, cap_in, cap_out, threshold, dropout_scale,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if VARLEN:
        head = (pid % heads).to(tl.int64)
        batch = tl.load(tiles + 2 * (pid // heads)).to(tl.int64)
        block = tl.load(tiles + 2 * (pid // heads) + 1)
        if batch < 0:
            return
        q_start = tl.load(cu_q + batch).to(tl.int64)
        k_start = tl.load(cu_k + batch).to(tl.int64)
        seq_q = (tl.load(cu_q + batch + 1) - q_start).to(tl.int32)
        seq_k = (tl.load(cu_k + batch + 1) - k_start).to(tl.int32)
        q += q_start * stride_qs
        k += k_start * stride_ks
        v += k_start * stride_vs
        o += q_start * stride_os
        lse += q_start
    else:
        head = (pid // blocks % heads).to(tl.int64)
        batch = (pid // blocks // heads).to(tl.int64)
        block = pid % blocks
        if RIGHT:  # the longest rows first
            block = blocks - 1 - block
        q += batch * stride_qb
        k += batch * stride_kb
        v += batch * stride_vb
        o += batch * stride_ob
        lse += batch * stride_lb
    q += head * stride_qh
    k += head // group * stride_kh
    v += head // group * stride_vh
    o += head * stride_oh
    lse += head * stride_lh
    if MASK != 0:
        mask += batch * stride_mb + head * stride_mh
    diagonal = seq_k - seq_q if BOTTOM_RIGHT else 0
    row = (batch * heads + head).to(tl.int32)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * stride_slope_b + head * stride_slope_h).to(tl.float32) * 1.4426950408889634
    seed = 0
    if DROPOUT:
        seed = tl.load(seeds)

    first = block * BLOCK_M
    last = tl.minimum(first + BLOCK_M, seq_q) - 1
    rows = first + tl.arange(0, BLOCK_M)
    i = rows[:, None]
    position = i + diagonal
    # Keys [lo, hi) hold all that these rows see, [full_lo, full_hi) what every row of them sees.
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
    skip = full_hi - full_lo

    d = tl.arange(0, BLOCK_D)[None, :]
    query = _load(q + i.to(tl.int64) * stride_qs + d.to(tl.int64) * stride_qd, i < seq_q, d, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if SINKS:  # a key with this logit and no value
        top = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    acc, total, top = _fwd_tiles(
        acc, total, top, query, k, v, mask, full_lo, full_hi, 0, 0, i, position, seq_q, seq_k, slope, seed, row,
        stride_ks, stride_kd, stride_vs, stride_vd, stride_mi, stride_mj, window_left, window_right,
        scale_log2, cap_in, cap_out, threshold,
        D, DV, LEFT, RIGHT, MASK, ALIBI, SOFTCAP, DROPOUT, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    acc, total, top = _fwd_tiles(
        acc, total, top, query, k, v, mask, lo, hi - skip, full_lo, skip, i, position, seq_q, seq_k, slope, seed, row,
        stride_ks, stride_kd, stride_vs, stride_vd, stride_mi, stride_mj, window_left, window_right,
        scale_log2, cap_in, cap_out, threshold,
        D, DV, LEFT, RIGHT, MASK, ALIBI, SOFTCAP, DROPOUT, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip

    inverse = tl.where(total == 0, 0.0, 1.0 / total)
    if DROPOUT:
        inverse = inverse * dropout_scale
    dv = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(o + i.to(tl.int64) * stride_os + dv, (acc * inverse[:, None]).to(o.dtype.element_ty),
             mask=(i < seq_q) & (dv < DV))  # fmt: skip
    tl.store(lse + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=rows < seq_q)


# Backward


@triton.jit
def _attention_delta_kernel(
    o, do, dlse, delta, stride_ob, stride_oh, stride_os, stride_dob, stride_doh, stride_dos, stride_dod,
    stride_dlb, stride_dlh, stride_dls, stride_lb, stride_lh, heads, seq_q, blocks,
    DV: tl.constexpr, DLSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = (pid // blocks % heads).to(tl.int64)
    batch = (pid // blocks // heads).to(tl.int64)
    rows = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    i = rows[:, None].to(tl.int64)
    d = tl.arange(0, BLOCK_DV)[None, :]
    inside = (i < seq_q) & (d < DV)
    out = tl.load(o + batch * stride_ob + head * stride_oh + i * stride_os + d, mask=inside, other=0.0)
    grad = tl.load(do + batch * stride_dob + head * stride_doh + i * stride_dos + d.to(tl.int64) * stride_dod,
                   mask=inside, other=0.0)  # fmt: skip
    result = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if DLSE:
        result -= tl.load(dlse + batch * stride_dlb + head * stride_dlh + rows.to(tl.int64) * stride_dls,
                          mask=rows < seq_q, other=0.0).to(tl.float32)  # fmt: skip
    tl.store(delta + batch * stride_lb + head * stride_lh + rows, result, mask=rows < seq_q)


@triton.jit
def _dkdv_tiles(
    dk, dv, key, value, q, do, lse, delta, mask, slopes, lo, tiles, border, skip, j, seq_q, seq_k, diagonal, seed,
    first_head, first_row, group, stride_qh, stride_qs, stride_qd, stride_doh, stride_dos, stride_dod, stride_lh,
    stride_mh, stride_mi, stride_mj, stride_slope_h, window_left, window_right,
    scale_log2, cap_in, cap_out, threshold, dropout_scale,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GRAD_K: tl.constexpr, GRAD_V: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Adds to dk (without its scale) and dv what `tiles` blocks of queries from `lo` on give, of each of the heads.

    Tiles are transposed: keys down. Heads and blocks are one loop, which needs fewer registers than two.
    """
    PLAIN: tl.constexpr = not (SOFTCAP or ALIBI or MASK != 0)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)[None, :]
    d_v = tl.arange(0, BLOCK_DV)[None, :]
    q_tile = m[:, None].to(tl.int64) * stride_qs + d.to(tl.int64) * stride_qd
    do_tile = m[:, None].to(tl.int64) * stride_dos + d_v.to(tl.int64) * stride_dod
    for step in range(group * tiles):
        member = step // tiles
        head = first_head + member
        start = lo + (step - member * tiles) * BLOCK_M
        if EDGE:
            start = tl.where(start >= border, start + skip, start)
        start = tl.multiple_of(start, BLOCK_M)
        row = first_row + member
        rows = start + m
        i = rows[None, :]
        inside = rows[:, None] < seq_q
        query = _load(q + head * stride_qh + start.to(tl.int64) * stride_qs + q_tile, inside, d, D, BLOCK_D, EDGE)
        if EDGE:
            normal = tl.load(lse + head * stride_lh + rows, mask=rows < seq_q, other=float("-inf"))
        else:
            normal = tl.load(lse + head * stride_lh + rows)
        # A row without keys has lse = -inf: +inf makes its P zero.
        normal = tl.where(normal == float("-inf"), float("inf"), normal * 1.4426950408889634)
        t = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        tanh = t
        if PLAIN:
            p = tl.exp2(t * scale_log2 - normal[None, :])
        else:
            slope = 0.0
            if ALIBI:
                slope = tl.load(slopes + head * stride_slope_h).to(tl.float32) * 1.4426950408889634
            tile_mask = mask
            if MASK != 0:
                tile_mask = mask + head * stride_mh
            t, tanh = _logits(t, i, j, (i < seq_q) & (j < seq_k), i + diagonal, slope, tile_mask, stride_mi, stride_mj,
                              scale_log2, cap_in, cap_out, SOFTCAP, ALIBI, MASK, EDGE or MASK != 0)  # fmt: skip
            p = tl.exp2(t - normal[None, :])
        if EDGE:
            p = tl.where(_visible(i, i + diagonal, j, seq_q, seq_k, window_left, window_right, LEFT, RIGHT), p, 0.0)
        grad = _load(do + head * stride_doh + start.to(tl.int64) * stride_dos + do_tile, inside, d_v, DV, BLOCK_DV,
                     EDGE)  # fmt: skip
        if DROPOUT:
            kept = _kept(seed, i, j, row, threshold)
        if GRAD_V:
            z = tl.where(kept, p * dropout_scale, 0.0) if DROPOUT else p
            dv = tl.dot(z.to(grad.dtype), grad, dv, input_precision=PRECISION)
        if GRAD_K:
            dp = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
            if DROPOUT:
                dp = tl.where(kept, dp * dropout_scale, 0.0)
            if EDGE:
                correction = tl.load(delta + head * stride_lh + rows, mask=rows < seq_q, other=0.0)
            else:
                correction = tl.load(delta + head * stride_lh + rows)
            ds = p * (dp - correction[None, :])
            if SOFTCAP:
                ds = ds * (1 - tanh * tanh)
            dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _attention_dkdv_kernel(
    q, k, v, do, lse, delta, dk, dv, mask, slopes, seeds, cu_q, cu_k, tiles,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_dob, stride_doh, stride_dos, stride_dod,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, stride_lb, stride_lh,
    stride_mb, stride_mh, stride_mi, stride_mj, stride_slope_b, stride_slope_h,
    heads, group, seq_q, seq_k, blocks, window_left, window_right,
    scale, scale_log2, cap_in, cap_out, threshold, dropout_scale,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GRAD_K: tl.constexpr, GRAD_V: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    kv_heads = heads // group
    if VARLEN:
        kv_head = (pid % kv_heads).to(tl.int64)
        batch = tl.load(tiles + 2 * (pid // kv_heads)).to(tl.int64)
        block = tl.load(tiles + 2 * (pid // kv_heads) + 1)
        if batch < 0:
            return
        q_start = tl.load(cu_q + batch).to(tl.int64)
        k_start = tl.load(cu_k + batch).to(tl.int64)
        seq_q = (tl.load(cu_q + batch + 1) - q_start).to(tl.int32)
        seq_k = (tl.load(cu_k + batch + 1) - k_start).to(tl.int32)
        q += q_start * stride_qs
        k += k_start * stride_ks
        v += k_start * stride_vs
        do += q_start * stride_dos
        dk += k_start * stride_dks
        dv += k_start * stride_dvs
        lse += q_start
        delta += q_start
    else:
        kv_head = (pid // blocks % kv_heads).to(tl.int64)
        batch = (pid // blocks // kv_heads).to(tl.int64)
        block = pid % blocks
        q += batch * stride_qb
        k += batch * stride_kb
        v += batch * stride_vb
        do += batch * stride_dob
        dk += batch * stride_dkb
        dv += batch * stride_dvb
        lse += batch * stride_lb
        delta += batch * stride_lb
    k += kv_head * stride_kh
    v += kv_head * stride_vh
    diagonal = seq_k - seq_q if BOTTOM_RIGHT else 0
    seed = 0
    if DROPOUT:
        seed = tl.load(seeds)

    first = block * BLOCK_N
    last = tl.minimum(first + BLOCK_N, seq_k) - 1
    j = (first + tl.arange(0, BLOCK_N))[:, None]
    # Queries [lo, hi) hold all that see these keys, [full_lo, full_hi) those that see every one of them.
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
    skip = full_hi - full_lo

    d = tl.arange(0, BLOCK_D)[None, :]
    d_v = tl.arange(0, BLOCK_DV)[None, :]
    key = _load(k + j.to(tl.int64) * stride_ks + d.to(tl.int64) * stride_kd, j < seq_k, d, D, BLOCK_D, True)
    value = _load(v + j.to(tl.int64) * stride_vs + d_v.to(tl.int64) * stride_vd, j < seq_k, d_v, DV, BLOCK_DV, True)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D if GRAD_K else 1], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_DV if GRAD_V else 1], tl.float32)
    row = (batch * heads + kv_head * group).to(tl.int32)
    edge_tiles = tl.cdiv(tl.maximum(hi - skip - lo, 0), BLOCK_M)
    if ALIBI:
        slopes += batch * stride_slope_b
    if MASK != 0:
        mask += batch * stride_mb
    grad_k, grad_v = _dkdv_tiles(
        grad_k, grad_v, key, value, q, do, lse, delta, mask, slopes, full_lo, skip // BLOCK_M, 0, 0,
        j, seq_q, seq_k, diagonal, seed, kv_head * group, row, group, stride_qh, stride_qs, stride_qd, stride_doh,
        stride_dos, stride_dod, stride_lh, stride_mh, stride_mi, stride_mj, stride_slope_h, window_left, window_right,
        scale_log2, cap_in, cap_out, threshold, dropout_scale, D, DV, LEFT, RIGHT, MASK, ALIBI, SOFTCAP, DROPOUT,
        PRECISION, BLOCK_M, BLOCK_D, BLOCK_DV, GRAD_K, GRAD_V, False,
    )  # fmt: skip
    grad_k, grad_v = _dkdv_tiles(
        grad_k, grad_v, key, value, q, do, lse, delta, mask, slopes, lo, edge_tiles, full_lo, skip, j, seq_q,
        seq_k, diagonal, seed, kv_head * group, row, group, stride_qh, stride_qs, stride_qd, stride_doh,
        stride_dos, stride_dod, stride_lh, stride_mh, stride_mi, stride_mj, stride_slope_h, window_left, window_right,
        scale_log2, cap_in, cap_out, threshold, dropout_scale, D, DV, LEFT, RIGHT, MASK, ALIBI, SOFTCAP, DROPOUT,
        PRECISION, BLOCK_M, BLOCK_D, BLOCK_DV, GRAD_K, GRAD_V, True,
    )  # fmt: skip
    dk += kv_head * stride_dkh
    dv += kv_head * stride_dvh
    if GRAD_K:
        tl.store(dk + j.to(tl.int64) * stride_dks + d, (grad_k * scale).to(dk.dtype.element_ty),
                 mask=(j < seq_k) & (d < D))  # fmt: skip
    if GRAD_V:
        tl.store(dv + j.to(tl.int64) * stride_dvs + d_v, grad_v.to(dv.dtype.element_ty), mask=(j < seq_k) & (d_v < DV))


@triton.jit
def _dq_tiles(
    dq, query, grad, normal, correction, k, v, mask, lo, hi, border, skip, i, position, seq_q, seq_k, slope, seed, row,
    stride_ks, stride_kd, stride_vs, stride_vd, stride_mi, stride_mj, window_left, window_right,
    scale_log2, cap_in, cap_out, threshold, dropout_scale,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds what the keys [lo, hi) give to dq (without its scale)."""
    PLAIN: tl.constexpr = not (SOFTCAP or ALIBI or MASK != 0)
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    d_v = tl.arange(0, BLOCK_DV)[None, :]
    k_tile = columns[:, None].to(tl.int64) * stride_ks + d.to(tl.int64) * stride_kd
    v_tile = columns[:, None].to(tl.int64) * stride_vs + d_v.to(tl.int64) * stride_vd
    for start in range(lo, hi, BLOCK_N):
        if EDGE:
            start = tl.where(start >= border, start + skip, start)
        start = tl.multiple_of(start, BLOCK_N)
        j = (start + columns)[None, :]
        inside = (start + columns)[:, None] < seq_k
        key = _load(k + start.to(tl.int64) * stride_ks + k_tile, inside, d, D, BLOCK_D, EDGE)
        t = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        tanh = t
        if PLAIN:
            p = tl.exp2(t * scale_log2 - normal[:, None])
        else:
            t, tanh = _logits(t, i, j, (i < seq_q) & (j < seq_k), position, slope, mask, stride_mi, stride_mj,
                              scale_log2, cap_in, cap_out, SOFTCAP, ALIBI, MASK, EDGE or MASK != 0)  # fmt: skip
            p = tl.exp2(t - normal[:, None])
        if EDGE:
            p = tl.where(_visible(i, position, j, seq_q, seq_k, window_left, window_right, LEFT, RIGHT), p, 0.0)
        value = _load(v + start.to(tl.int64) * stride_vs + v_tile, inside, d_v, DV, BLOCK_DV, EDGE)
        dp = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(_kept(seed, i, j, row, threshold), dp * dropout_scale, 0.0)
        ds = p * (dp - correction[:, None])
        if SOFTCAP:
            ds = ds * (1 - tanh * tanh)
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _attention_dq_kernel(
    q, k, v, do, lse, delta, dq, mask, slopes, seeds, cu_q, cu_k, tiles,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_dob, stride_doh, stride_dos, stride_dod,
    stride_dqb, stride_dqh, stride_dqs, stride_lb, stride_lh,
    stride_mb, stride_mh, stride_mi, stride_mj, stride_slope_b, stride_slope_h,
    heads, group, seq_q, seq_k, blocks, window_left, window_right,
    scale, scale_log2, cap_in, cap_out, threshold, dropout_scale,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if VARLEN:
        head = (pid % heads).to(tl.int64)
        batch = tl.load(tiles + 2 * (pid // heads)).to(tl.int64)
        block = tl.load(tiles + 2 * (pid // heads) + 1)
        if batch < 0:
            return
        q_start = tl.load(cu_q + batch).to(tl.int64)
        k_start = tl.load(cu_k + batch).to(tl.int64)
        seq_q = (tl.load(cu_q + batch + 1) - q_start).to(tl.int32)
        seq_k = (tl.load(cu_k + batch + 1) - k_start).to(tl.int32)
        q += q_start * stride_qs
        k += k_start * stride_ks
        v += k_start * stride_vs
        do += q_start * stride_dos
        dq += q_start * stride_dqs
        lse += q_start
        delta += q_start
    else:
        head = (pid // blocks % heads).to(tl.int64)
        batch = (pid // blocks // heads).to(tl.int64)
        block = pid % blocks
        if RIGHT:
            block = blocks - 1 - block
        q += batch * stride_qb
        k += batch * stride_kb
        v += batch * stride_vb
        do += batch * stride_dob
        dq += batch * stride_dqb
        lse += batch * stride_lb
        delta += batch * stride_lb
    q += head * stride_qh
    k += head // group * stride_kh
    v += head // group * stride_vh
    do += head * stride_doh
    dq += head * stride_dqh
    lse += head * stride_lh
    delta += head * stride_lh
    if MASK != 0:
        mask += batch * stride_mb + head * stride_mh
    diagonal = seq_k - seq_q if BOTTOM_RIGHT else 0
    row = (batch * heads + head).to(tl.int32)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * stride_slope_b + head * stride_slope_h).to(tl.float32) * 1.4426950408889634
    seed = 0
    if DROPOUT:
        seed = tl.load(seeds)

    first = block * BLOCK_M
    last = tl.minimum(first + BLOCK_M, seq_q) - 1
    rows = first + tl.arange(0, BLOCK_M)
    i = rows[:, None]
    position = i + diagonal
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
    skip = full_hi - full_lo

    d = tl.arange(0, BLOCK_D)[None, :]
    d_v = tl.arange(0, BLOCK_DV)[None, :]
    query = _load(q + i.to(tl.int64) * stride_qs + d.to(tl.int64) * stride_qd, i < seq_q, d, D, BLOCK_D, True)
    grad = _load(do + i.to(tl.int64) * stride_dos + d_v.to(tl.int64) * stride_dod, i < seq_q, d_v, DV, BLOCK_DV, True)
    normal = tl.load(lse + rows, mask=rows < seq_q, other=float("-inf"))
    normal = tl.where(normal == float("-inf"), float("inf"), normal * 1.4426950408889634)
    correction = tl.load(delta + rows, mask=rows < seq_q, other=0.0)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    result = _dq_tiles(
        result, query, grad, normal, correction, k, v, mask, full_lo, full_hi, 0, 0, i, position, seq_q, seq_k, slope,
        seed, row, stride_ks, stride_kd, stride_vs, stride_vd, stride_mi, stride_mj, window_left, window_right,
        scale_log2, cap_in, cap_out, threshold, dropout_scale,
        D, DV, LEFT, RIGHT, MASK, ALIBI, SOFTCAP, DROPOUT, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    result = _dq_tiles(
        result, query, grad, normal, correction, k, v, mask, lo, hi - skip, full_lo, skip, i, position, seq_q,
        seq_k, slope, seed, row, stride_ks, stride_kd, stride_vs, stride_vd, stride_mi, stride_mj, window_left,
        window_right,
        scale_log2, cap_in, cap_out, threshold, dropout_scale,
        D, DV, LEFT, RIGHT, MASK, ALIBI, SOFTCAP, DROPOUT, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip
    tl.store(dq + i.to(tl.int64) * stride_dqs + d, (result * scale).to(dq.dtype.element_ty),
             mask=(i < seq_q) & (d < D))  # fmt: skip


# Launchers. They assume what the op has checked.


class Scores(NamedTuple):
    """The scalar arguments of attention, as the ops pass them: window -1 is no limit."""

    dropout_p: float
    scale: float
    window_left: int
    window_right: int
    softcap: float
    bottom_right: bool


class Packed(NamedTuple):
    """Where the sequences of packed tensors lie; None for dense ones."""

    cu_q: Tensor  # (N + 1,)
    cu_k: Tensor  # (N + 1,)

    def tiles(self, of_keys: bool, block: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
        """(cu_q, cu_k, tiles (n, 2)) for programs that own blocks of queries, or of keys.

        tiles[t] is the sequence and the block of program t, longest work first, -1 past the last. What lies behind the
        last sequence belongs to one more, which has nothing to attend to: its rows come out as zeros.
        """
        own, other = (self.cu_k, self.cu_q) if of_keys else (self.cu_q, self.cu_k)
        count = own.shape[0]
        own = torch.cat([own, own.new_full((1,), total)])
        other = torch.cat([other, other[-1:]])
        order = torch.argsort(other.diff(), descending=True, stable=True)
        ends = torch.cumsum((own.diff()[order] + (block - 1)) // block, 0)
        t = torch.arange(total // block + count, device=own.device)
        at = torch.searchsorted(ends, t, right=True)
        inside = at < count
        at = at.clamp(max=count - 1)
        tiles = torch.stack([torch.where(inside, order[at], -1), ends[at] - 1 - t], 1).to(torch.int32)
        return (other, own, tiles) if of_keys else (own, other, tiles)


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _common(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None, seed: Tensor | None, scores: Scores
) -> dict[str, Any]:
    """What all three kernels take. Tensors are (B, H, S, D) views, mask (B, H, Sq, Sk) and slopes (B, H) expanded."""
    dropout_p, scale, left, right, softcap, bottom_right = scores
    kind = NO_MASK
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind, strides = (BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK), mask.stride()
        mask = mask.view(torch.uint8) if kind == BOOL_MASK else mask
    names = ("b", "h", "s", "d")
    far = 2**30  # wider than any sequence, and far from overflow when added to a position
    return {
        "q": q, "k": k, "v": v, "mask": mask, "slopes": slopes, "seeds": seed,
        **{f"stride_q{n}": s for n, s in zip(names, q.stride(), strict=True)},
        **{f"stride_k{n}": s for n, s in zip(names, k.stride(), strict=True)},
        **{f"stride_v{n}": s for n, s in zip(names, v.stride(), strict=True)},
        **{f"stride_m{n}": s for n, s in zip("bhij", strides, strict=True)},
        "stride_slope_b": 0 if slopes is None else slopes.stride(0),
        "stride_slope_h": 0 if slopes is None else slopes.stride(1),
        "heads": q.shape[1], "group": q.shape[1] // k.shape[1], "seq_q": q.shape[2], "seq_k": k.shape[2],
        "window_left": min(max(left, 0), far), "window_right": min(max(right, 0), far),
        "scale_log2": scale * LOG2E,
        "cap_in": scale / softcap if softcap else 0.0, "cap_out": softcap * LOG2E,
        "threshold": round(dropout_p * 2**24),
        "D": q.shape[3], "DV": v.shape[3], "LEFT": left >= 0, "RIGHT": right >= 0, "BOTTOM_RIGHT": bottom_right,
        "MASK": kind, "ALIBI": slopes is not None, "SOFTCAP": softcap > 0, "DROPOUT": dropout_p > 0,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "BLOCK_D": _block(q.shape[3]), "BLOCK_DV": _block(v.shape[3]),
    }  # fmt: skip


def _keep_scale(dropout_p: float) -> float:
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _strides(name: str, tensor: Tensor, dimensions: str) -> dict[str, int]:
    return {f"stride_{name}{n}": s for n, s in zip(dimensions, tensor.stride(), strict=False)}


def _run(kind: str, kernel, common: dict, args: dict, packed: Packed | None) -> None:
    """Chooses the configuration, lays out the programs and launches. Blocks are of keys for dkdv, else of queries."""
    of_keys = kind == "dkdv"
    batch, heads, rows = common["k" if of_keys else "q"].shape[:3]

    def start(config: Config) -> None:
        size = config.blocks["BLOCK_N" if of_keys else "BLOCK_M"]
        blocks = triton.cdiv(rows, size)
        cu_q, cu_k, tiles = packed.tiles(of_keys, size, rows) if packed else (None, None, None)
        programs = (blocks * batch if tiles is None else tiles.shape[0]) * heads
        _utils.launch(kernel, (programs,), config, **common, **args, cu_q=cu_q, cu_k=cu_k, tiles=tiles, blocks=blocks,
                      VARLEN=packed is not None)  # fmt: skip

    variant = [common[name] for name in ("D", "DV", "LEFT", "RIGHT", "MASK", "ALIBI", "SOFTCAP", "DROPOUT")]
    chip, dtype = _utils.chip(common["q"].device), common["q"].dtype
    featured = any(common[name] for name in ("MASK", "ALIBI", "SOFTCAP", "DROPOUT"))
    default = config(kind, max(common["BLOCK_D"], common["BLOCK_DV"]), dtype, featured, chip)
    key = (kind, *chip, str(dtype), *variant, packed is not None, rows.bit_length())
    start(_utils.choose(key, default, CANDIDATES[kind], start))


def attention_fwd(
    out: Tensor,  # (B, H, Sq, DV), last stride 1
    lse: Tensor,  # (B, H, Sq) float32, last stride 1
    q: Tensor,  # (B, H, Sq, D)
    k: Tensor,  # (B, HK, Sk, D)
    v: Tensor,  # (B, HK, Sk, DV)
    mask: Tensor | None,  # (B, H, Sq, Sk), bool or additive
    sinks: Tensor | None,  # (H,)
    slopes: Tensor | None,  # (B, H)
    seed: Tensor | None,  # (1,) int64
    scores: Scores,
    packed: Packed | None = None,
) -> None:
    common = _common(q, k, v, mask, slopes, seed, scores)
    args = {
        "o": out, "lse": lse, "sinks": sinks, "SINKS": sinks is not None,
        **_strides("o", out, "bhs"), **_strides("l", lse, "bh"), "dropout_scale": _keep_scale(scores.dropout_p),
    }  # fmt: skip
    _run("fwd", _attention_fwd_kernel, common, args, packed)


def attention_bwd(
    dq: Tensor,  # gradients like q, k and v, last stride 1
    dk: Tensor,
    dv: Tensor,
    dsinks: Tensor | None,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    scores: Scores,
    packed: Packed | None = None,
) -> None:
    batch, heads, rows, size = out.shape
    delta = torch.empty_like(lse)
    delta_config = Config({"BLOCK_M": 64, "BLOCK_DV": _block(size)}, 4, 1)
    blocks = triton.cdiv(rows, 64)
    _utils.launch(
        _attention_delta_kernel, (blocks * batch * heads,), delta_config, o=out, do=dout, dlse=dlse, delta=delta,
        **_strides("o", out, "bhs"), **_strides("do", dout, "bhsd"), **_strides("l", lse, "bh"),
        **_strides("dl", lse if dlse is None else dlse, "bhs"),
        heads=heads, seq_q=rows, blocks=blocks, DV=size, DLSE=dlse is not None,
    )  # fmt: skip
    if dsinks is not None and sinks is not None:
        shares = torch.exp(sinks.float()[:, None] - lse) * delta
        torch.sum(shares, (0, 2), out=dsinks) if dsinks.dtype == torch.float32 else dsinks.copy_(shares.sum((0, 2)))
        dsinks.neg_()
    common = _common(q, k, v, mask, slopes, seed, scores)
    common |= {
        "do": dout,
        "lse": lse,
        "delta": delta,
        "scale": scores.scale,
        "dropout_scale": _keep_scale(scores.dropout_p),
    }
    common |= _strides("do", dout, "bhsd") | _strides("l", lse, "bh")
    args = {"dk": dk, "dv": dv, **_strides("dk", dk, "bhs"), **_strides("dv", dv, "bhs")}
    # Two accumulators of head size 256 do not fit into the registers: dk and dv then take a pass each.
    passes = ((True, False), (False, True)) if max(common["BLOCK_D"], common["BLOCK_DV"]) > 128 else ((True, True),)
    for grad_k, grad_v in passes:
        _run("dkdv", _attention_dkdv_kernel, common, args | {"GRAD_K": grad_k, "GRAD_V": grad_v}, packed)
    _run("dq", _attention_dq_kernel, common, {"dq": dq, **_strides("dq", dq, "bhs")}, packed)


# Configurations: BLOCK_M x BLOCK_N, warps, stages.


def _c(block_m: int, block_n: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages)


# FEATURED: where a mask, ALiBi, a softcap or dropout is on, the logits need registers that larger tiles would take.
HOPPER = {
    "fwd": {64: _c(128, 128, 8, 3), 128: _c(128, 64, 8, 3), 256: _c(128, 32, 8, 2)},
    "dkdv": {64: _c(64, 128, 8, 3), 128: _c(32, 128, 8, 2), 256: _c(32, 64, 8, 2)},
    "dq": {64: _c(128, 64, 8, 3), 128: _c(128, 64, 8, 2), 256: _c(64, 32, 8, 2)},
}
HOPPER_FEATURED = {
    "fwd": {64: _c(64, 64, 4, 3), 128: _c(128, 64, 8, 3), 256: _c(128, 32, 8, 2)},
    "dkdv": {64: _c(32, 128, 8, 2), 128: _c(32, 64, 8, 2), 256: _c(16, 64, 8, 2)},
    "dq": {64: _c(128, 32, 8, 2), 128: _c(128, 32, 8, 2), 256: _c(128, 16, 8, 2)},
}
BLACKWELL = HOPPER | {"fwd": HOPPER["fwd"] | {256: _c(64, 64, 8, 2)}}
AMPERE = {
    "fwd": {64: _c(64, 64, 4, 3), 128: _c(128, 32, 8, 2), 256: _c(64, 32, 8, 1)},
    "dkdv": {64: _c(32, 64, 4, 2), 128: _c(32, 64, 8, 1), 256: _c(16, 32, 8, 1)},
    "dq": {64: _c(64, 32, 4, 2), 128: _c(64, 32, 8, 1), 256: _c(32, 32, 8, 1)},
}
AMPERE_FEATURED = {
    "fwd": {64: _c(64, 32, 4, 2), 128: _c(64, 32, 8, 1), 256: _c(64, 32, 8, 1)},
    "dkdv": {64: _c(32, 32, 4, 1), 128: _c(32, 32, 8, 1), 256: _c(16, 32, 8, 1)},
    "dq": {64: _c(32, 32, 4, 1), 128: _c(32, 32, 8, 1), 256: _c(16, 32, 8, 1)},
}
Chip = tuple[str, Any]  # ("cuda", 90) or ("hip", "gfx942")
TABLE: dict[Chip, tuple[dict, dict]] = {  # plain, featured
    ("cuda", 80): (AMPERE, AMPERE_FEATURED),
    ("cuda", 90): (HOPPER, HOPPER_FEATURED),
    ("cuda", 100): (BLACKWELL, HOPPER_FEATURED),
    ("cuda", 120): (AMPERE, AMPERE_FEATURED),
    ("hip", "gfx942"): (AMPERE, AMPERE_FEATURED),
}
FLOAT32 = {
    "fwd": {64: _c(32, 32, 4, 2), 128: _c(32, 32, 8, 1), 256: _c(16, 32, 8, 1)},
    "dkdv": {64: _c(32, 32, 4, 1), 128: _c(32, 32, 8, 1), 256: _c(16, 16, 8, 1)},
    "dq": {64: _c(32, 32, 4, 1), 128: _c(32, 16, 8, 1), 256: _c(16, 16, 8, 1)},
}
INTERPRETER = {"fwd": _c(32, 16, 1, 1), "dkdv": _c(16, 32, 1, 1), "dq": _c(32, 16, 1, 1)}
CANDIDATES = {
    "fwd": [_c(m, n, w, s) for m, n, w in ((64, 64, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)) for s in (2, 3)],
    "dkdv": [_c(m, n, w, s) for m, n, w in ((32, 64, 4), (64, 64, 4), (64, 128, 8), (32, 128, 8)) for s in (1, 2, 3)],
    "dq": [_c(m, n, w, s) for m, n, w in ((64, 32, 4), (64, 64, 4), (128, 64, 8), (128, 32, 8)) for s in (1, 2, 3)],
}


def config(kind: str, block_d: int, dtype: torch.dtype, featured: bool, chip: Chip) -> Config:
    """The table's configuration; an unknown chip takes its nearest older relative's."""
    if chip[0] == "cpu":
        return INTERPRETER[kind]
    if dtype == torch.float32:
        return FLOAT32[kind][max(64, block_d)]
    if chip not in TABLE:
        # A GPU of AMD is told by a name, one of NVIDIA by a number.
        older = [name for kind_of, name in TABLE if kind_of == chip[0] and (kind_of == "hip" or name <= chip[1])]
        chip = (chip[0], max(older)) if older else ("cuda", 80)
    return TABLE[chip][featured][kind][max(64, block_d)]

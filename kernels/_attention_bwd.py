"""Attention backward: delta, then dK and dV, then dQ; the mathematics is in `attention`."""

from __future__ import annotations

import triton
import triton.language as tl

from fastllm.kernels._attention_tiles import (
    _kept,
    _key_span,
    _load,
    _logits,
    _offset,
    _program,
    _query_span,
    _scratch_row,
    _visible,
)


@triton.jit
def _attention_delta_kernel(
    o, do, lse, dlse, normals, deltas, tiles, stride_ob, stride_oh, stride_os, stride_dob, stride_doh, stride_dos,
    stride_dod, stride_dlb, stride_dlh, stride_dls, stride_lseb, stride_lseh, stride_lb, stride_lh,
    heads, seq_q, seq_k, blocks,
    DV: tl.constexpr, DLSE: tl.constexpr, VARLEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """What the backward needs of each row: `deltas`, and `normals`, lse in base 2. Both are 0 past a sequence's end."""
    batch, head, block, q_start, _, seq_q, _ = _program(heads, seq_q, seq_k, blocks, tiles, False, VARLEN)
    if seq_q == 0:  # a program that is left over: its rows would be another's
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = q_start + rows
    inside = rows < seq_q
    o += batch * stride_ob + head * stride_oh + (i * stride_os)[:, None]
    do += batch * stride_dob + head * stride_doh + (i * stride_dos)[:, None]
    delta = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.static_range(0, DV, BLOCK_DV):
        d = start + tl.arange(0, BLOCK_DV)[None, :]
        there = inside[:, None] & (d < DV)
        out = tl.load(o + d, mask=there, other=0.0).to(tl.float32)
        delta += tl.sum(out * tl.load(do + d.to(tl.int64) * stride_dod, mask=there, other=0.0).to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse + batch * stride_dlb + head * stride_dlh + i * stride_dls, mask=inside,
                         other=0.0).to(tl.float32)  # fmt: skip
    normal = tl.load(lse + batch * stride_lseb + head * stride_lseh + i, mask=inside, other=0.0)
    # A row without keys has lse = -inf: +inf makes its P zero.
    normal = tl.where(normal == float("-inf"), float("inf"), normal * 1.4426950408889634)
    at = batch * stride_lb + head * stride_lh + _scratch_row(batch, q_start, VARLEN) + rows
    tl.store(normals + at, normal)
    tl.store(deltas + at, delta)


@triton.jit
def _dkdv_tiles(
    dk, dv, key, value, q, do, normals, deltas, mask, slopes, lo, tiles, border, skip, j, seq_q, seq_k, diagonal, seed,
    first_head, first_row, group, stride_qh, stride_qs, stride_qd, stride_doh, stride_dos, stride_dod, stride_lh,
    stride_mh, stride_mi, stride_mj, stride_slope_h, window_left, window_right,
    scale_log2, cap_in, cap_out, threshold, dropout_scale,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GRAD_K: tl.constexpr, GRAD_V: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds to dk (without its scale) and dv what `tiles` blocks of queries from `lo` on give, of each of the heads.

    Tiles are transposed: keys down. Heads and blocks are one loop, which needs fewer registers than two.
    """
    PLAIN: tl.constexpr = not (SOFTCAP or ALIBI or MASK != 0)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)[None, :]
    d_v = tl.arange(0, BLOCK_DV)[None, :]
    q_tile = _offset(m[:, None], stride_qs, WIDE) + _offset(d, stride_qd, WIDE)
    do_tile = _offset(m[:, None], stride_dos, WIDE) + _offset(d_v, stride_dod, WIDE)
    end = lo + tiles * BLOCK_M
    member = 0
    at = lo
    for _ in range(group * tiles):
        head = first_head + member
        start = at
        if EDGE:
            start = tl.where(at >= border, at + skip, at)
        start = tl.multiple_of(start, BLOCK_M)
        row = first_row + member
        rows = start + m
        i = rows[None, :]
        inside = rows[:, None] < seq_q
        query = _load(q + head * stride_qh + start.to(tl.int64) * stride_qs + q_tile, inside, d, D, BLOCK_D, EDGE)
        if EDGE:
            normal = tl.load(normals + head * stride_lh + rows, mask=rows < seq_q, other=float("inf"))
        else:
            normal = tl.load(normals + head * stride_lh + rows)
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
                delta = tl.load(deltas + head * stride_lh + rows, mask=rows < seq_q, other=0.0)
            else:
                delta = tl.load(deltas + head * stride_lh + rows)
            ds = p * (dp - delta[None, :])
            if SOFTCAP:
                ds = ds * (1 - tanh * tanh)
            dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=PRECISION)
        at += BLOCK_M
        member = tl.where(at < end, member, member + 1)
        at = tl.where(at < end, at, lo)
    return dk, dv


@triton.jit
def _attention_dkdv_kernel(
    q, k, v, do, normals, deltas, dk, dv, mask, slopes, seeds, tiles,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_dob, stride_doh, stride_dos, stride_dod,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, stride_lb, stride_lh,
    stride_mb, stride_mh, stride_mi, stride_mj, stride_slope_b, stride_slope_h,
    heads, group, seq_q, seq_k, blocks, window_left, window_right,
    scale, scale_log2, cap_in, cap_out, threshold, dropout_scale,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GRAD_K: tl.constexpr, GRAD_V: tl.constexpr,
):  # fmt: skip
    batch, kv_head, block, q_start, k_start, seq_q, seq_k = _program(
        heads // group, seq_q, seq_k, blocks, tiles, False, VARLEN
    )
    q += batch * stride_qb + q_start * stride_qs
    do += batch * stride_dob + q_start * stride_dos
    k += batch * stride_kb + kv_head * stride_kh + k_start * stride_ks
    v += batch * stride_vb + kv_head * stride_vh + k_start * stride_vs
    dk += batch * stride_dkb + kv_head * stride_dkh + k_start * stride_dks
    dv += batch * stride_dvb + kv_head * stride_dvh + k_start * stride_dvs
    at = batch * stride_lb + _scratch_row(batch, q_start, VARLEN)
    normals += at
    deltas += at
    diagonal = seq_k - seq_q if BOTTOM_RIGHT else 0
    seed = 0
    if DROPOUT:
        seed = tl.load(seeds)

    first = block * BLOCK_N
    j = (first + tl.arange(0, BLOCK_N))[:, None]
    lo, hi, full_lo, full_hi = _query_span(
        first, seq_q, seq_k, diagonal, window_left, window_right, LEFT, RIGHT, BLOCK_M, BLOCK_N
    )
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
        grad_k, grad_v, key, value, q, do, normals, deltas, mask, slopes, full_lo, skip // BLOCK_M, 0, 0,
        j, seq_q, seq_k, diagonal, seed, kv_head * group, row, group, stride_qh, stride_qs, stride_qd, stride_doh,
        stride_dos, stride_dod, stride_lh, stride_mh, stride_mi, stride_mj, stride_slope_h, window_left, window_right,
        scale_log2, cap_in, cap_out, threshold, dropout_scale, D, DV, LEFT, RIGHT, MASK, ALIBI, SOFTCAP, DROPOUT,
        PRECISION, WIDE, BLOCK_M, BLOCK_D, BLOCK_DV, GRAD_K, GRAD_V, False,
    )  # fmt: skip
    grad_k, grad_v = _dkdv_tiles(
        grad_k, grad_v, key, value, q, do, normals, deltas, mask, slopes, lo, edge_tiles, full_lo, skip, j, seq_q,
        seq_k, diagonal, seed, kv_head * group, row, group, stride_qh, stride_qs, stride_qd, stride_doh,
        stride_dos, stride_dod, stride_lh, stride_mh, stride_mi, stride_mj, stride_slope_h, window_left, window_right,
        scale_log2, cap_in, cap_out, threshold, dropout_scale, D, DV, LEFT, RIGHT, MASK, ALIBI, SOFTCAP, DROPOUT,
        PRECISION, WIDE, BLOCK_M, BLOCK_D, BLOCK_DV, GRAD_K, GRAD_V, True,
    )  # fmt: skip
    if GRAD_K:
        tl.store(dk + j.to(tl.int64) * stride_dks + d, (grad_k * scale).to(dk.dtype.element_ty),
                 mask=(j < seq_k) & (d < D))  # fmt: skip
    if GRAD_V:
        tl.store(dv + j.to(tl.int64) * stride_dvs + d_v, grad_v.to(dv.dtype.element_ty), mask=(j < seq_k) & (d_v < DV))


@triton.jit
def _dq_tiles(
    dq, query, grad, normal, delta, k, v, mask, lo, hi, border, skip, i, position, seq_q, seq_k, slope, seed, row,
    stride_ks, stride_kd, stride_vs, stride_vd, stride_mi, stride_mj, window_left, window_right,
    scale_log2, cap_in, cap_out, threshold, dropout_scale,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds what the keys [lo, hi) give to dq (without its scale)."""
    PLAIN: tl.constexpr = not (SOFTCAP or ALIBI or MASK != 0)
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    d_v = tl.arange(0, BLOCK_DV)[None, :]
    k_tile = _offset(columns[:, None], stride_ks, WIDE) + _offset(d, stride_kd, WIDE)
    v_tile = _offset(columns[:, None], stride_vs, WIDE) + _offset(d_v, stride_vd, WIDE)
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
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * (1 - tanh * tanh)
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _attention_dq_kernel(
    q, k, v, do, normals, deltas, dq, mask, slopes, seeds, tiles,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_dob, stride_doh, stride_dos, stride_dod,
    stride_dqb, stride_dqh, stride_dqs, stride_lb, stride_lh,
    stride_mb, stride_mh, stride_mi, stride_mj, stride_slope_b, stride_slope_h,
    heads, group, seq_q, seq_k, blocks, window_left, window_right,
    scale, scale_log2, cap_in, cap_out, threshold, dropout_scale,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    batch, head, block, q_start, k_start, seq_q, seq_k = _program(heads, seq_q, seq_k, blocks, tiles, RIGHT, VARLEN)
    q += batch * stride_qb + head * stride_qh + q_start * stride_qs
    k += batch * stride_kb + head // group * stride_kh + k_start * stride_ks
    v += batch * stride_vb + head // group * stride_vh + k_start * stride_vs
    do += batch * stride_dob + head * stride_doh + q_start * stride_dos
    dq += batch * stride_dqb + head * stride_dqh + q_start * stride_dqs
    at = batch * stride_lb + head * stride_lh + _scratch_row(batch, q_start, VARLEN)
    normals += at
    deltas += at
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
    rows = first + tl.arange(0, BLOCK_M)
    i = rows[:, None]
    position = i + diagonal
    lo, hi, full_lo, full_hi = _key_span(
        first, seq_q, seq_k, diagonal, window_left, window_right, LEFT, RIGHT, BLOCK_M, BLOCK_N
    )
    skip = full_hi - full_lo

    d = tl.arange(0, BLOCK_D)[None, :]
    d_v = tl.arange(0, BLOCK_DV)[None, :]
    query = _load(q + i.to(tl.int64) * stride_qs + d.to(tl.int64) * stride_qd, i < seq_q, d, D, BLOCK_D, True)
    grad = _load(do + i.to(tl.int64) * stride_dos + d_v.to(tl.int64) * stride_dod, i < seq_q, d_v, DV, BLOCK_DV, True)
    normal = tl.load(normals + rows, mask=rows < seq_q, other=float("inf"))
    delta = tl.load(deltas + rows, mask=rows < seq_q, other=0.0)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    result = _dq_tiles(
        result, query, grad, normal, delta, k, v, mask, full_lo, full_hi, 0, 0, i, position, seq_q, seq_k, slope,
        seed, row, stride_ks, stride_kd, stride_vs, stride_vd, stride_mi, stride_mj, window_left, window_right,
        scale_log2, cap_in, cap_out, threshold, dropout_scale,
        D, DV, LEFT, RIGHT, MASK, ALIBI, SOFTCAP, DROPOUT, PRECISION, WIDE, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    result = _dq_tiles(
        result, query, grad, normal, delta, k, v, mask, lo, hi - skip, full_lo, skip, i, position, seq_q,
        seq_k, slope, seed, row, stride_ks, stride_kd, stride_vs, stride_vd, stride_mi, stride_mj, window_left,
        window_right,
        scale_log2, cap_in, cap_out, threshold, dropout_scale,
        D, DV, LEFT, RIGHT, MASK, ALIBI, SOFTCAP, DROPOUT, PRECISION, WIDE, BLOCK_N, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip
    tl.store(dq + i.to(tl.int64) * stride_dqs + d, (result * scale).to(dq.dtype.element_ty),
             mask=(i < seq_q) & (d < D))  # fmt: skip

"""Attention forward; the mathematics is in `attention`."""

from __future__ import annotations

import triton
import triton.language as tl

from fastllm.kernels._attention_tiles import _kept, _key_span, _load, _logits, _offset, _program, _visible


@triton.jit
def _fwd_tiles(
    acc, total, top, q, k, v, mask, lo, hi, border, skip, i, position, seq_q, seq_k, slope, seed, row,
    stride_ks, stride_kd, stride_vs, stride_vd, stride_mi, stride_mj, window_left, window_right,
    scale_log2, cap_in, cap_out, threshold,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Takes the keys [lo, hi) into the running maximum `top`, the sum `total` and `acc`."""
    PLAIN: tl.constexpr = not (SOFTCAP or ALIBI or MASK != 0)
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[:, None]
    dv = tl.arange(0, BLOCK_DV)[None, :]
    k_tile = _offset(columns[None, :], stride_ks, WIDE) + _offset(d, stride_kd, WIDE)
    v_tile = _offset(columns[:, None], stride_vs, WIDE) + _offset(dv, stride_vd, WIDE)
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
    q, k, v, o, lse, mask, sinks, slopes, seeds, tiles,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_ob, stride_oh, stride_os, stride_lb, stride_lh,
    stride_mb, stride_mh, stride_mi, stride_mj, stride_slope_b, stride_slope_h,
    heads, group, seq_q, seq_k, blocks, window_left, window_right,
    scale_log2, cap_in, cap_out, threshold, dropout_scale,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    batch, head, block, q_start, k_start, seq_q, seq_k = _program(heads, seq_q, seq_k, blocks, tiles, RIGHT, VARLEN)
    q += batch * stride_qb + head * stride_qh + q_start * stride_qs
    k += batch * stride_kb + head // group * stride_kh + k_start * stride_ks
    v += batch * stride_vb + head // group * stride_vh + k_start * stride_vs
    o += batch * stride_ob + head * stride_oh + q_start * stride_os
    lse += batch * stride_lb + head * stride_lh + q_start
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
        D, DV, LEFT, RIGHT, MASK, ALIBI, SOFTCAP, DROPOUT, PRECISION, WIDE, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    acc, total, top = _fwd_tiles(
        acc, total, top, query, k, v, mask, lo, hi - skip, full_lo, skip, i, position, seq_q, seq_k, slope, seed, row,
        stride_ks, stride_kd, stride_vs, stride_vd, stride_mi, stride_mj, window_left, window_right,
        scale_log2, cap_in, cap_out, threshold,
        D, DV, LEFT, RIGHT, MASK, ALIBI, SOFTCAP, DROPOUT, PRECISION, WIDE, BLOCK_N, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip

    inverse = tl.where(total == 0, 0.0, 1.0 / total)
    if DROPOUT:
        inverse = inverse * dropout_scale
    dv = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(o + i.to(tl.int64) * stride_os + dv, (acc * inverse[:, None]).to(o.dtype.element_ty),
             mask=(i < seq_q) & (dv < DV))  # fmt: skip
    tl.store(lse + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=rows < seq_q)

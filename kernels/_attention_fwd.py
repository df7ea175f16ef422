"""Attention forward; the mathematics is in `attention`."""

from __future__ import annotations

import triton
import triton.language as tl

from fastllm.kernels._attention_tiles import _kept, _load, _logits, _visible


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

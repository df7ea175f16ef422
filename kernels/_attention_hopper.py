"""Attention for Hopper: warp-specialised kernels over tensor descriptors. The mathematics is in `attention`.

With `warp_specialize=True` and four warps, Triton makes of each program a warp that only copies (TMA) and two groups
of warps that compute, a half of the tile each: one multiplies while the other is at the softmax. The compiler takes one
loop, all descriptors made in the kernel, nothing read through pointers along the tile's rows, and results stored
through pointers. Hence one loop with a mask throughout, and rows' numbers that come through descriptors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastllm.kernels._attention_tiles import _key_span, _program, _query_span, _scratch_row

# A length of 1 that the compiler knows of leaves nothing of what it is to divide among warps.
_LENGTHS = ["heads", "group", "seq_q", "seq_k", "blocks", "window_left", "window_right"]


@triton.jit
def _rows(pointer, rows, stride, BLOCK: tl.constexpr, D: tl.constexpr):
    """Describes a (rows, D) matrix to be read in blocks of BLOCK rows; zeros past its end."""
    return tl.make_tensor_descriptor(pointer, [tl.maximum(rows, 1), D], [stride, 1], [BLOCK, D])


@triton.jit(do_not_specialize=_LENGTHS)
def _attention_fwd_hopper_kernel(
    q, k, v, o, lse, sinks, tiles,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os, stride_lb, stride_lh,
    heads, group, seq_q, seq_k, blocks, window_left, window_right, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    SINKS: tl.constexpr, VARLEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, head, block, q_start, k_start, seq_q, seq_k = _program(heads, seq_q, seq_k, blocks, tiles, RIGHT, VARLEN)
    q += batch * stride_qb + head * stride_qh + q_start * stride_qs
    k += batch * stride_kb + head // group * stride_kh + k_start * stride_ks
    v += batch * stride_vb + head // group * stride_vh + k_start * stride_vs
    o += batch * stride_ob + head * stride_oh + q_start * stride_os
    lse += batch * stride_lb + head * stride_lh + q_start
    diagonal = seq_k - seq_q if BOTTOM_RIGHT else 0
    first = block * BLOCK_M
    lo, hi, _, _ = _key_span(first, seq_q, seq_k, diagonal, window_left, window_right, LEFT, RIGHT, BLOCK_M, BLOCK_N)

    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)[None, :]
    position = (rows + diagonal)[:, None]
    newest = tl.zeros([BLOCK_M, 1], tl.int32) + seq_k - 1
    if RIGHT:
        newest = tl.minimum(newest, position + window_right)
    query = _rows(q, seq_q, stride_qs, BLOCK_M, D).load([first, 0])
    keys = _rows(k, seq_k, stride_ks, BLOCK_N, D)
    values = _rows(v, seq_k, stride_vs, BLOCK_N, DV)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    if SINKS:  # a key with this logit and no value
        top = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(lo, hi, BLOCK_N, warp_specialize=True):
        t = tl.dot(query, keys.load([start, 0]).T)
        seen = columns <= newest - start
        if LEFT:
            seen = seen & (columns >= position - window_left - start)
        t = tl.where(seen, t, float("-inf"))
        highest = tl.maximum(top, tl.max(t, 1) * scale_log2)
        shift = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen no key yet
        p = tl.exp2(t * scale_log2 - shift[:, None])
        alpha = tl.exp2(top - shift)
        total = total * alpha + tl.sum(p, 1)
        value = values.load([start, 0])
        acc = tl.dot(p.to(value.dtype), value, acc * alpha[:, None])
        top = highest
    acc *= tl.where(total == 0, 0.0, 1.0 / total)[:, None]
    inside = rows < seq_q
    dv = tl.arange(0, DV)[None, :]
    tl.store(o + rows[:, None].to(tl.int64) * stride_os + dv, acc.to(o.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def _attention_dkdv_hopper_kernel(
    q, k, v, do, normals, deltas, dk, dv, tiles,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dos, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    stride_lb, stride_lh,
    heads, group, seq_q, seq_k, blocks, window_left, window_right, scale, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    VARLEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, kv_head, block, q_start, k_start, seq_q, seq_k = _program(
        heads // group, seq_q, seq_k, blocks, tiles, False, VARLEN
    )
    head = kv_head * group
    q += batch * stride_qb + head * stride_qh + q_start * stride_qs
    do += batch * stride_dob + head * stride_doh + q_start * stride_dos
    k += batch * stride_kb + kv_head * stride_kh + k_start * stride_ks
    v += batch * stride_vb + kv_head * stride_vh + k_start * stride_vs
    dk += batch * stride_dkb + kv_head * stride_dkh + k_start * stride_dks
    dv += batch * stride_dvb + kv_head * stride_dvh + k_start * stride_dvs
    at = batch * stride_lb + head * stride_lh
    normals = tl.make_tensor_descriptor(normals + at, [group, stride_lh], [stride_lh, 1], [1, BLOCK_M])
    deltas = tl.make_tensor_descriptor(deltas + at, [group, stride_lh], [stride_lh, 1], [1, BLOCK_M])
    diagonal = seq_k - seq_q if BOTTOM_RIGHT else 0
    first = block * BLOCK_N
    lo, hi, _, _ = _query_span(first, seq_q, seq_k, diagonal, window_left, window_right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    steps = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_M)

    keys = first + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    oldest = tl.zeros([BLOCK_N, 1], tl.int32)
    if RIGHT:
        oldest = (keys - diagonal - window_right)[:, None]
    newest = tl.zeros([BLOCK_N, 1], tl.int32) + seq_q - 1
    if LEFT:
        newest = tl.minimum(newest, (keys - diagonal + window_left)[:, None])
    key = _rows(k, seq_k, stride_ks, BLOCK_N, D).load([first, 0])
    value = _rows(v, seq_k, stride_vs, BLOCK_N, DV).load([first, 0])
    queries = tl.make_tensor_descriptor(q, [group, tl.maximum(seq_q, 1), D], [stride_qh, stride_qs, 1], [1, BLOCK_M, D])
    grads = tl.make_tensor_descriptor(
        do, [group, tl.maximum(seq_q, 1), DV], [stride_doh, stride_dos, 1], [1, BLOCK_M, DV]
    )
    grad_k = tl.zeros([BLOCK_N, D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, DV], tl.float32)
    row = _scratch_row(batch, q_start, VARLEN).to(tl.int32)
    member = 0
    start = lo
    for _ in tl.range(0, group * steps, 1, warp_specialize=True):
        query = queries.load([member, start, 0]).reshape(BLOCK_M, D)
        normal = normals.load([member, row + start]).reshape(BLOCK_M)
        t = tl.dot(key, query.T)
        p = tl.exp2(t * scale_log2 - normal[None, :])
        seen = columns[None, :] <= newest - start
        if RIGHT:
            seen = seen & (columns[None, :] >= oldest - start)
        p = tl.where(seen, p, 0.0)
        grad = grads.load([member, start, 0]).reshape(BLOCK_M, DV)
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v)
        dp = tl.dot(value, grad.T)
        delta = deltas.load([member, row + start]).reshape(BLOCK_M)
        ds = p * (dp - delta[None, :])
        grad_k = tl.dot(ds.to(query.dtype), query, grad_k)
        start += BLOCK_M
        member = tl.where(start < hi, member, member + 1)
        start = tl.where(start < hi, start, lo)
    inside = (keys < seq_k)[:, None]
    rows = keys[:, None].to(tl.int64)
    tl.store(dk + rows * stride_dks + tl.arange(0, D)[None, :], (grad_k * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + rows * stride_dvs + tl.arange(0, DV)[None, :], grad_v.to(dv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def _attention_dq_hopper_kernel(
    q, k, v, do, normals, deltas, dq, tiles,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dos, stride_dqb, stride_dqh, stride_dqs, stride_lb, stride_lh,
    heads, group, seq_q, seq_k, blocks, window_left, window_right, scale, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    VARLEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, head, block, q_start, k_start, seq_q, seq_k = _program(heads, seq_q, seq_k, blocks, tiles, RIGHT, VARLEN)
    q += batch * stride_qb + head * stride_qh + q_start * stride_qs
    do += batch * stride_dob + head * stride_doh + q_start * stride_dos
    dq += batch * stride_dqb + head * stride_dqh + q_start * stride_dqs
    k += batch * stride_kb + head // group * stride_kh + k_start * stride_ks
    v += batch * stride_vb + head // group * stride_vh + k_start * stride_vs
    at = batch * stride_lb + head * stride_lh
    row = _scratch_row(batch, q_start, VARLEN).to(tl.int32)
    diagonal = seq_k - seq_q if BOTTOM_RIGHT else 0
    first = block * BLOCK_M
    lo, hi, _, _ = _key_span(first, seq_q, seq_k, diagonal, window_left, window_right, LEFT, RIGHT, BLOCK_M, BLOCK_N)

    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < seq_q
    columns = tl.arange(0, BLOCK_N)[None, :]
    position = (rows + diagonal)[:, None]
    newest = tl.zeros([BLOCK_M, 1], tl.int32) + seq_k - 1
    if RIGHT:
        newest = tl.minimum(newest, position + window_right)
    query = _rows(q, seq_q, stride_qs, BLOCK_M, D).load([first, 0])
    grad = _rows(do, seq_q, stride_dos, BLOCK_M, DV).load([first, 0])
    keys = _rows(k, seq_k, stride_ks, BLOCK_N, D)
    values = _rows(v, seq_k, stride_vs, BLOCK_N, DV)
    normal = tl.make_tensor_descriptor(normals + at, [stride_lh], [1], [BLOCK_M]).load([row + first])
    delta = tl.make_tensor_descriptor(deltas + at, [stride_lh], [1], [BLOCK_M]).load([row + first])
    result = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(lo, hi, BLOCK_N, warp_specialize=True):
        key = keys.load([start, 0])
        p = tl.exp2(tl.dot(query, key.T) * scale_log2 - normal[:, None])
        seen = columns <= newest - start
        if LEFT:
            seen = seen & (columns >= position - window_left - start)
        p = tl.where(seen, p, 0.0)
        ds = p * (tl.dot(grad, values.load([start, 0]).T) - delta[:, None])
        result = tl.dot(ds.to(key.dtype), key, result)
    tl.store(dq + rows[:, None].to(tl.int64) * stride_dqs + tl.arange(0, D)[None, :],
             (result * scale).to(dq.dtype.element_ty), mask=inside[:, None])  # fmt: skip

"""Attention of a few new queries over a long cache (reference: fastllm/reference/attention_kvcache.py).

    The cache is cut into `splits` ranges of keys, a program each (Dao et al., Flash-Decoding, 2023):
    lse_s = log2(sum_{j in s} 2^t_ij),  o_s = sum_{j in s} 2^(t_ij - lse_s) v_j
    and put together:  lse = log2(sum_s 2^lse_s + 2^sink),  o = sum_s 2^(lse_s - lse) o_s

All query heads that share a key head are rows of one tile, so that the cache is read once. Query i of Sq stands at key
length - Sq + i.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels import _utils
from fastllm.kernels._attention_tiles import _load, _logits, _visible
from fastllm.kernels._utils import LOG2E, Config
from fastllm.kernels.attention import Scores, _block, _strides


@triton.jit
def _attention_decode_kernel(
    q, k, v, lengths, slopes, parts, part_lse,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_slope_b, stride_slope_h,
    batch_size, heads, group, seq_q, seq_k, row_blocks, splits, window_left, window_right, scale_log2, cap_in, cap_out,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    split = pid % splits
    row_block = pid // splits % row_blocks
    kv_heads = heads // group
    kv_head = (pid // splits // row_blocks % kv_heads).to(tl.int64)
    batch = (pid // splits // row_blocks // kv_heads).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), seq_k).to(tl.int32)  # never out of bounds

    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    head = kv_head * group + rows // seq_q
    i = rows % seq_q
    inside = rows < group * seq_q
    position = (i + length - seq_q)[:, None]
    begin = 0
    if LEFT:
        begin = tl.maximum(length - seq_q - window_left, 0) // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(length - begin, BLOCK_N), splits) * BLOCK_N
    lo = begin + split * share
    hi = tl.minimum(lo + share, length)

    d = tl.arange(0, BLOCK_D)[None, :]
    d_v = tl.arange(0, BLOCK_DV)[None, :]
    columns = tl.arange(0, BLOCK_N)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * stride_slope_b + head * stride_slope_h, mask=inside, other=0.0).to(tl.float32)
        slope = slope[:, None] * 1.4426950408889634
    q_rows = batch * stride_qb + head * stride_qh + i.to(tl.int64) * stride_qs
    query = _load(q + q_rows[:, None] + d.to(tl.int64) * stride_qd, inside[:, None], d, D, BLOCK_D, True)
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(lo, hi, BLOCK_N):
        j = start + columns
        keys = (j < hi)[:, None]
        key = _load(k + j[:, None].to(tl.int64) * stride_ks + d.to(tl.int64) * stride_kd, keys, d, D, BLOCK_D, True)
        t = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        t, _ = _logits(t, position, j[None, :], inside[:, None], position, slope, None, 0, 0, scale_log2, cap_in,
                       cap_out, SOFTCAP, ALIBI, 0, True)  # fmt: skip
        seen = _visible(i[:, None], position, j[None, :], seq_q, hi, window_left, window_right, LEFT, RIGHT)
        t = tl.where(seen, t, float("-inf"))
        highest = tl.maximum(top, tl.max(t, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(t - shift[:, None])
        alpha = tl.exp2(top - shift)
        total = total * alpha + tl.sum(p, 1)
        v_tile = j[:, None].to(tl.int64) * stride_vs + d_v.to(tl.int64) * stride_vd
        value = _load(v + v_tile, keys, d_v, DV, BLOCK_DV, True)
        acc = tl.dot(p.to(value.dtype), value, acc * alpha[:, None], input_precision=PRECISION)
        top = highest
    acc = acc * tl.where(total == 0, 0.0, 1.0 / total)[:, None]
    at = ((split * batch_size + batch) * heads + head) * seq_q + i
    tl.store(parts + at[:, None] * DV + d_v, acc, mask=inside[:, None] & (d_v < DV))
    tl.store(part_lse + at, top + tl.log2(total), mask=inside)


@triton.jit
def _attention_combine_kernel(
    parts, part_lse, sinks, o, lse, stride_ob, stride_oh, stride_os, rows, heads, seq_q, splits,
    DV: tl.constexpr, SINKS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = row % seq_q
    head = row // seq_q % heads
    batch = row // seq_q // heads
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_DV)[None, :]
    shares = tl.load(part_lse + s.to(tl.int64) * rows + row, mask=s < splits, other=float("-inf"))
    top = tl.max(shares, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(shares - shift)
    total = tl.sum(weights, 0)
    if SINKS:
        total += tl.exp2(sink - shift)
    pointers = parts + (s.to(tl.int64)[:, None] * rows + row) * DV + d
    part = tl.load(pointers, mask=(s[:, None] < splits) & (d < DV), other=0.0)
    out = tl.sum(part * weights[:, None], 0) * tl.where(total == 0, 0.0, 1.0 / total)
    d = tl.arange(0, BLOCK_DV)
    tl.store(o + batch * stride_ob + head * stride_oh + i * stride_os + d, out.to(o.dtype.element_ty), mask=d < DV)
    tl.store(lse + row, (shift + tl.log2(total)) * 0.6931471805599453)


def splits_for(programs: int, max_keys: int, block: int, multiprocessors: int) -> int:
    """The fewest that keep the multiprocessors, two programs each, within 5% as busy as any number does (the idea is
    FlashAttention's). None is shorter than four blocks of keys; at most 64."""

    def busy(splits: int) -> float:
        waves = programs * splits / (2 * multiprocessors)
        return waves / math.ceil(waves)

    numbers = range(1, max(1, min(triton.cdiv(max_keys, 4 * block), 64)) + 1)
    enough = 0.95 * max(map(busy, numbers))
    return next(splits for splits in numbers if busy(splits) >= enough)


def attention_kvcache_fwd(
    out: Tensor,  # (B, H, Sq, DV), last stride 1
    lse: Tensor,  # (B, H, Sq) float32, contiguous
    q: Tensor,  # (B, H, Sq, D)
    k: Tensor,  # (B, HK, Smax, D)
    v: Tensor,  # (B, HK, Smax, DV)
    lengths: Tensor,  # (B,) integer: how many keys there are
    sinks: Tensor | None,  # (H,)
    slopes: Tensor | None,  # (B, H)
    scores: Scores,
) -> None:
    _, scale, left, right, softcap, _ = scores
    (batch, heads, seq_q, size), (kv_heads, max_k), value_size = q.shape, k.shape[1:3], v.shape[3]
    group = heads // kv_heads
    block_m = min(_block(group * seq_q), 64 if max(size, value_size) <= 128 else 16)
    config = decode_config(block_m, max(size, value_size), q.dtype)
    row_blocks = triton.cdiv(group * seq_q, block_m)
    programs = batch * kv_heads * row_blocks
    splits = splits_for(programs, max_k, config.blocks["BLOCK_N"], _utils.multiprocessors(q.device))
    parts = q.new_empty((splits, batch, heads, seq_q, value_size), dtype=torch.float32)
    part_lse = q.new_empty((splits, batch, heads, seq_q), dtype=torch.float32)
    far = 2**30
    _utils.launch(
        _attention_decode_kernel, (programs * splits,), config, q=q, k=k, v=v, lengths=lengths, slopes=slopes,
        parts=parts, part_lse=part_lse,
        **_strides("q", q, "bhsd"), **_strides("k", k, "bhsd"), **_strides("v", v, "bhsd"),
        stride_slope_b=0 if slopes is None else slopes.stride(0),
        stride_slope_h=0 if slopes is None else slopes.stride(1),
        batch_size=batch, heads=heads, group=group, seq_q=seq_q, seq_k=max_k, row_blocks=row_blocks, splits=splits,
        window_left=min(max(left, 0), far), window_right=min(max(right, 0), far), scale_log2=scale * LOG2E,
        cap_in=scale / softcap if softcap else 0.0, cap_out=softcap * LOG2E, D=size, DV=value_size,
        LEFT=left >= 0, RIGHT=right >= 0, ALIBI=slopes is not None, SOFTCAP=softcap > 0,
        PRECISION=_utils.precision(q.dtype), BLOCK_D=_block(size),
        BLOCK_DV=_block(value_size),
    )  # fmt: skip
    rows = batch * heads * seq_q
    combine = Config({"BLOCK_S": triton.next_power_of_2(splits), "BLOCK_DV": _block(value_size)}, 4, 1)
    _utils.launch(
        _attention_combine_kernel, (rows,), combine, parts=parts, part_lse=part_lse, sinks=sinks, o=out, lse=lse,
        stride_ob=out.stride(0), stride_oh=out.stride(1), stride_os=out.stride(2), rows=rows, heads=heads, seq_q=seq_q,
        splits=splits, DV=value_size, SINKS=sinks is not None,
    )  # fmt: skip


def decode_config(block_m: int, size: int, dtype: torch.dtype) -> Config:
    """Keys a step: as many as keep two steps in flight in shared memory on every chip."""
    if _utils.interpreted():
        return Config({"BLOCK_M": block_m, "BLOCK_N": 16}, 1, 1)
    block_n = 64 if size <= 128 else 32
    if dtype == torch.float32:
        block_n //= 2
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, 4, 2)

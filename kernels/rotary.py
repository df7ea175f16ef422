"""Rotary positions (reference: fastllm/reference/rotary.py).

    (a, b) -> (a cos - b sin, b cos + a sin) for each pair, by the angle of its position

A program takes one position, with some heads of q and of k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels import _utils
from fastllm.kernels._utils import Config


@triton.jit
def _turn(
    x, out, heads, stride_h, stride_oh, first, cos, sin, half, size, INTERLEAVED: tl.constexpr, COPY: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = (first + tl.arange(0, BLOCK_H))[:, None]
    i = tl.arange(0, BLOCK_R)[None, :]
    inside = (head < heads) & (i < half)
    at_a = i
    at_b = i + half
    if INTERLEAVED:
        at_a = 2 * i
        at_b = 2 * i + 1
    rows = x + head.to(tl.int64) * stride_h
    outs = out + head.to(tl.int64) * stride_oh
    a = tl.load(rows + at_a, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(rows + at_b, mask=inside, other=0.0).to(tl.float32)
    tl.store(outs + at_a, (a * cos - b * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(outs + at_b, (b * cos + a * sin).to(out.dtype.element_ty), mask=inside)
    if COPY:
        d = tl.arange(0, BLOCK_D)[None, :]
        behind = (head < heads) & (d >= 2 * half) & (d < size)
        tl.store(outs + d, tl.load(rows + d, mask=behind, other=0.0), mask=behind)


@triton.jit
def _rotary_kernel(
    q, k, q_out, k_out, cos, sin, positions,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_qob, stride_qoh, stride_qos, stride_kob, stride_koh, stride_kos,
    stride_cb, stride_cs, stride_sb, stride_ss, stride_pb, stride_ps,
    seq, heads, kv_heads, head_blocks, half, size, sign, rows,
    POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, COPY: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    first = (pid % head_blocks).to(tl.int32) * BLOCK_H
    batch = pid // head_blocks // seq
    s = pid // head_blocks % seq
    row = s
    if POSITIONS:
        row = tl.load(positions + batch * stride_pb + s * stride_ps)
        row = tl.minimum(tl.maximum(row, 0), rows - 1)
    i = tl.arange(0, BLOCK_R)[None, :]
    c = tl.load(cos + batch * stride_cb + row * stride_cs + i, mask=i < half, other=0.0)
    sn = tl.load(sin + batch * stride_sb + row * stride_ss + i, mask=i < half, other=0.0) * sign
    _turn(q + batch * stride_qb + s * stride_qs, q_out + batch * stride_qob + s * stride_qos, heads, stride_qh,
          stride_qoh, first, c, sn, half, size, INTERLEAVED, COPY, BLOCK_H, BLOCK_R, BLOCK_D)  # fmt: skip
    if first < kv_heads:
        _turn(k + batch * stride_kb + s * stride_ks, k_out + batch * stride_kob + s * stride_kos, kv_heads, stride_kh,
              stride_koh, first, c, sn, half, size, INTERLEAVED, COPY, BLOCK_H, BLOCK_R, BLOCK_D)  # fmt: skip


def _strides(name: str, x: Tensor, dimensions: str) -> dict[str, int]:
    return {f"stride_{name}{n}": s for n, s in zip(dimensions, x.stride(), strict=False)}


def rotary(
    q: Tensor,  # (B, H, S, D)
    k: Tensor,  # (B, HK, S, D)
    q_out: Tensor,  # like q, last stride 1; may be q
    k_out: Tensor,  # like k, last stride 1; may be k
    cos: Tensor,  # (P, R / 2) or (B, S, R / 2), float32
    sin: Tensor,
    positions: Tensor | None,  # (B, S) int64
    interleaved: bool,
    inverse: bool,
) -> None:
    sources = [x if x.stride(3) == 1 else x.contiguous() for x in (q, k)]
    targets = [
        x if x.stride(3) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_out, k_out)
    ]
    cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos, sin))
    batched = cos.dim() == 3
    batch, heads, seq, size = q.shape
    half = cos.shape[-1]
    config = Config(
        {
            "BLOCK_H": 4 if _utils.interpreted() else 8,
            "BLOCK_R": triton.next_power_of_2(max(half, 1)),
            "BLOCK_D": triton.next_power_of_2(size),
        },
        1 if _utils.interpreted() else 4,
        1,
    )
    head_blocks = triton.cdiv(max(heads, k.shape[1]), config.blocks["BLOCK_H"])
    _utils.launch(
        _rotary_kernel, (batch * seq * head_blocks,), config, q=sources[0], k=sources[1], q_out=targets[0],
        k_out=targets[1], cos=cos, sin=sin, positions=positions,
        **_strides("q", sources[0], "bhs"), **_strides("k", sources[1], "bhs"), **_strides("qo", targets[0], "bhs"),
        **_strides("ko", targets[1], "bhs"),
        stride_cb=cos.stride(0) if batched else 0, stride_cs=cos.stride(-2),
        stride_sb=sin.stride(0) if batched else 0, stride_ss=sin.stride(-2),
        stride_pb=0 if positions is None else positions.stride(0),
        stride_ps=0 if positions is None else positions.stride(1),
        seq=seq, heads=heads, kv_heads=k.shape[1], head_blocks=head_blocks, half=half, size=size,
        sign=-1.0 if inverse else 1.0, rows=cos.shape[-2], POSITIONS=positions is not None, INTERLEAVED=interleaved,
        COPY=2 * half < size and (targets[0] is not sources[0] or targets[1] is not sources[1]),
    )  # fmt: skip
    for target, out in zip(targets, (q_out, k_out), strict=True):
        if target is not out:
            out.copy_(target)

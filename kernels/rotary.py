"""Rotary positions (reference: fastllm/reference/rotary.py).

    (a, b) -> (a cos - b sin, b cos + a sin) for each pair, by the angle of its position

A program takes some positions, with some heads of q and of k. Pairs that lie side by side are read together and parted
in registers.
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
    x, out, s, seq, stride_s, stride_os, first, heads, stride_h, stride_oh, cos, sin, half, size,
    INTERLEAVED: tl.constexpr, COPY: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    s = s[:, None, None]
    head = (first + tl.arange(0, BLOCK_H))[None, :, None]
    there = (s < seq) & (head < heads)
    rows = x + s.to(tl.int64) * stride_s + head.to(tl.int64) * stride_h
    outs = out + s.to(tl.int64) * stride_os + head.to(tl.int64) * stride_oh
    if INTERLEAVED:
        i = tl.arange(0, 2 * BLOCK_R)[None, None, :]
        inside = there & (i < 2 * half)
        pairs = tl.load(rows + i, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(pairs, [BLOCK_S, BLOCK_H, BLOCK_R, 2]))
        turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [BLOCK_S, BLOCK_H, 2 * BLOCK_R])
        tl.store(outs + i, turned.to(out.dtype.element_ty), mask=inside)
    else:
        i = tl.arange(0, BLOCK_R)[None, None, :]
        inside = there & (i < half)
        a = tl.load(rows + i, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(rows + half + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(outs + i, (a * cos - b * sin).to(out.dtype.element_ty), mask=inside)
        tl.store(outs + half + i, (b * cos + a * sin).to(out.dtype.element_ty), mask=inside)
    if COPY:
        d = tl.arange(0, BLOCK_D)[None, None, :]
        behind = there & (d >= 2 * half) & (d < size)
        tl.store(outs + d, tl.load(rows + d, mask=behind, other=0.0), mask=behind)


@triton.jit
def _rotary_kernel(
    q, k, q_out, k_out, cos, sin, positions,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_qob, stride_qoh, stride_qos, stride_kob, stride_koh, stride_kos,
    stride_cb, stride_cs, stride_sb, stride_ss, stride_pb, stride_ps,
    seq, heads, kv_heads, blocks, head_blocks, half, size, sign, rows,
    POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, COPY: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block = pid % head_blocks
    s = (pid // head_blocks) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    batch = (pid // head_blocks // blocks).to(tl.int64)
    row = s.to(tl.int64)
    if POSITIONS:
        row = tl.load(positions + batch * stride_pb + row * stride_ps, mask=s < seq, other=0)
        row = tl.minimum(tl.maximum(row, 0), rows - 1)
    i = tl.arange(0, BLOCK_R)[None, None, :]
    inside = (s[:, None, None] < seq) & (i < half)
    row = row[:, None, None]
    c = tl.load(cos + batch * stride_cb + row * stride_cs + i, mask=inside, other=0.0)
    sn = tl.load(sin + batch * stride_sb + row * stride_ss + i, mask=inside, other=0.0) * sign
    _turn(q + batch * stride_qb, q_out + batch * stride_qob, s, seq, stride_qs, stride_qos, block * BLOCK_H, heads,
          stride_qh, stride_qoh, c, sn, half, size, INTERLEAVED, COPY, BLOCK_S, BLOCK_H, BLOCK_R, BLOCK_D)  # fmt: skip
    if block * BLOCK_HK < kv_heads:
        _turn(k + batch * stride_kb, k_out + batch * stride_kob, s, seq, stride_ks, stride_kos, block * BLOCK_HK,
              kv_heads, stride_kh, stride_koh, c, sn, half, size, INTERLEAVED, COPY, BLOCK_S, BLOCK_HK, BLOCK_R,
              BLOCK_D)  # fmt: skip


def _c(pairs: int, warps: int) -> Config:
    return Config({"PAIRS": pairs}, warps, 1)


CANDIDATES = [_c(pairs, warps) for pairs in (1024, 2048, 4096) for warps in (4, 8)]


def config() -> Config:
    """2,048 pairs of q, 16 for each thread: 16 bytes twice of each half."""
    return _c(128, 1) if _utils.interpreted() else _c(2048, 4)


def _blocks(pairs: int, heads: int, kv_heads: int, half: int, size: int, copy: bool) -> dict[str, int]:
    """All heads of a position, if they are no more than so many pairs; then of as many positions as that makes. What is
    copied beside them counts, too."""
    power = triton.next_power_of_2
    block_r = power(max(half, 1))
    width = max(block_r, power(size) // 2) if copy else block_r
    block_h = min(power(heads), max(1, pairs // width))
    return {
        "BLOCK_S": max(1, pairs // (width * block_h)),
        "BLOCK_H": block_h,
        "BLOCK_HK": min(power(kv_heads), block_h),
        "BLOCK_R": block_r,
        "BLOCK_D": power(size),
    }


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
    kv_heads = k.shape[1]
    copy = 2 * half < size and (targets[0] is not sources[0] or targets[1] is not sources[1])
    if not batch * seq:
        return

    def start(config: Config, q_out: Tensor, k_out: Tensor) -> None:
        blocks = _blocks(config.blocks["PAIRS"], heads, kv_heads, half, size, copy)
        head_blocks = max(triton.cdiv(heads, blocks["BLOCK_H"]), triton.cdiv(kv_heads, blocks["BLOCK_HK"]))
        position_blocks = triton.cdiv(seq, blocks["BLOCK_S"])
        _utils.launch(
            _rotary_kernel, (batch * position_blocks * head_blocks,), Config(blocks, config.warps, config.stages),
            q=sources[0], k=sources[1], q_out=q_out, k_out=k_out, cos=cos, sin=sin, positions=positions,
            **_strides("q", sources[0], "bhs"), **_strides("k", sources[1], "bhs"), **_strides("qo", q_out, "bhs"),
            **_strides("ko", k_out, "bhs"),
            stride_cb=cos.stride(0) if batched else 0, stride_cs=cos.stride(-2),
            stride_sb=sin.stride(0) if batched else 0, stride_ss=sin.stride(-2),
            stride_pb=0 if positions is None else positions.stride(0),
            stride_ps=0 if positions is None else positions.stride(1),
            seq=seq, heads=heads, kv_heads=kv_heads, blocks=position_blocks, head_blocks=head_blocks, half=half,
            size=size, sign=-1.0 if inverse else 1.0, rows=cos.shape[-2], POSITIONS=positions is not None,
            INTERLEAVED=interleaved, COPY=copy,
        )  # fmt: skip

    def start_apart(config: Config) -> None:
        """What is computed may be in its input's memory, which must stay what it is while candidates are timed."""
        start(config, *(x.new_empty_strided(x.shape, x.stride()) for x in targets))

    key = (
        "rotary", *_utils.chip(q.device), str(q.dtype), heads, kv_heads, half, size, interleaved, copy,
        q.stride(1) < q.stride(2),
    )  # fmt: skip
    start(_utils.choose(key, config(), CANDIDATES, start_apart), *targets)
    for target, out in zip(targets, (q_out, k_out), strict=True):
        if target is not out:
            out.copy_(target)

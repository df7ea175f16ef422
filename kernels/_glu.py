"""Gated activations (reference: fastllm/reference/_glu.py).

    y = act(g) u          du = dy act(g)          dg = dy u act'(g)

A program takes a piece of a row. The gradients of gate and up lie side by side in rows of 2 n.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels import _utils
from fastllm.kernels._math import _erf, _tanh
from fastllm.kernels._utils import Config

SILU, GELU_TANH, GELU = 0, 1, 2


@triton.jit
def _activate(g, KIND: tl.constexpr):
    """act(g) and act'(g)."""
    if KIND == 0:
        s = 1.0 / (1.0 + tl.exp2(g * -1.4426950408889634))
        value = g * s
        return value, s + value * (1.0 - s)
    if KIND == 1:
        square = g * g
        t = _tanh(0.7978845608028654 * g * (1.0 + 0.044715 * square))
        half = 0.5 * (1.0 + t)
        return g * half, half + 0.5 * g * (1.0 - t * t) * (0.7978845608028654 * (1.0 + 0.134145 * square))
    gauss = tl.exp2(g * g * -0.7213475204444817)
    half = 0.5 * (1.0 + _erf(g * 0.7071067811865476, gauss))
    return g * half, half + g * gauss * 0.3989422804014327


@triton.jit
def _glu_fwd_kernel(
    gate, up, y, stride_gate, stride_up, n, pieces, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row = pid // pieces
    i = (pid % pieces) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * stride_gate + i, mask=i < n, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + i, mask=i < n, other=0.0).to(tl.float32)
    value, _ = _activate(g, KIND)
    tl.store(y + row * n + i, (value * u).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def _glu_bwd_kernel(
    dy, gate, up, d, stride_dy, stride_gate, stride_up, n, pieces, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row = pid // pieces
    i = (pid % pieces) * BLOCK + tl.arange(0, BLOCK)
    out = tl.load(dy + row * stride_dy + i, mask=i < n, other=0.0).to(tl.float32)
    g = tl.load(gate + row * stride_gate + i, mask=i < n, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + i, mask=i < n, other=0.0).to(tl.float32)
    value, slope = _activate(g, KIND)
    d += row * 2 * n + i
    tl.store(d, (out * u * slope).to(d.dtype.element_ty), mask=i < n)
    tl.store(d + n, (out * value).to(d.dtype.element_ty), mask=i < n)


def config(n: int) -> Config:
    """Up to 2,048 elements, 16 for each thread."""
    block = min(2048, max(128, triton.next_power_of_2(n)))
    return Config({"BLOCK": block}, 1 if _utils.interpreted() else max(1, block // 512), 1)


def fwd(kind: int, y: Tensor, gate: Tensor, up: Tensor) -> None:
    gate, up = _utils.rows(gate), _utils.rows(up)
    rows, n = gate.shape
    chosen = config(n)
    pieces = triton.cdiv(n, chosen.blocks["BLOCK"])
    _utils.launch(
        _glu_fwd_kernel, (rows * pieces,), chosen, gate=gate, up=up, y=y, stride_gate=gate.stride(0),
        stride_up=up.stride(0), n=n, pieces=pieces, KIND=kind,
    )  # fmt: skip


def bwd(kind: int, d: Tensor, dy: Tensor, gate: Tensor, up: Tensor) -> None:
    dy, gate, up = _utils.rows(dy), _utils.rows(gate), _utils.rows(up)
    rows, n = gate.shape
    chosen = config(n)
    pieces = triton.cdiv(n, chosen.blocks["BLOCK"])
    _utils.launch(
        _glu_bwd_kernel, (rows * pieces,), chosen, dy=dy, gate=gate, up=up, d=d, stride_dy=dy.stride(0),
        stride_gate=gate.stride(0), stride_up=up.stride(0), n=n, pieces=pieces, KIND=kind,
    )  # fmt: skip

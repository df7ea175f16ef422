"""Gated activations (reference: fastllm/reference/_glu.py).

    y = act(g) u          du = dy act(g)          dg = dy u act'(g)

A program takes a piece of a row. The gradients of gate and up lie side by side in rows of 2 n.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels import _utils
from fastllm.kernels._math import _normal
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
        # (1 + tanh u) / 2 is the logistic function of 2 u: 1 / (1 + e), e = e^-2u, and e / (1 + e) the rest to 1.
        exponent = g * (-2.302208198 - 0.1029432396 * square)
        e = tl.exp2(tl.minimum(exponent, 126.0))
        half = tl.where(exponent > 126.0, 0.0, 1.0 / (1.0 + e))
        value = g * half
        return value, half + value * (e * half) * (1.5957691216057308 + 0.21406444881780076 * square)
    gauss = tl.exp2(g * g * -0.7213475204444817)
    half = _normal(g, gauss)
    return g * half, half + g * gauss * 0.3989422804014327


@triton.jit
def _glu_fwd_kernel(
    gate, up, y, stride_gate, stride_up, n, pieces, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = (pid // pieces).to(tl.int64)
    i = (pid % pieces) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * stride_gate + i, mask=i < n, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + i, mask=i < n, other=0.0).to(tl.float32)
    value, _ = _activate(g, KIND)
    tl.store(y + row * n + i, (value * u).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def _glu_bwd_kernel(
    dy, gate, up, d, stride_dy, stride_gate, stride_up, n, pieces, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = (pid // pieces).to(tl.int64)
    i = (pid % pieces) * BLOCK + tl.arange(0, BLOCK)
    out = tl.load(dy + row * stride_dy + i, mask=i < n, other=0.0).to(tl.float32)
    g = tl.load(gate + row * stride_gate + i, mask=i < n, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + i, mask=i < n, other=0.0).to(tl.float32)
    value, slope = _activate(g, KIND)
    d += row * 2 * n + i
    tl.store(d, (out * u * slope).to(d.dtype.element_ty), mask=i < n)
    tl.store(d + n, (out * value).to(d.dtype.element_ty), mask=i < n)


def _c(block: int, warps: int) -> Config:
    return Config({"BLOCK": block}, warps, 1)


CANDIDATES = [_c(block, warps) for block in (1024, 2048, 4096) for warps in (4, 8)]


def config(n: int) -> Config:
    """Up to 2,048 elements, 16 for each thread."""
    block = min(2048, max(128, triton.next_power_of_2(n)))
    return _c(block, 1 if _utils.interpreted() else max(1, block // 512))


def _launch(kernel, kind: int, gate: Tensor, args: dict[str, Tensor]) -> None:
    """`args` are the tensors that the kernel walks along with `gate`, each with its stride."""
    rows, n = gate.shape
    args = {**args, "gate": gate}
    strides = {f"stride_{name}": x.stride(0) for name, x in args.items() if name not in ("y", "d")}

    def start(config: Config) -> None:
        pieces = triton.cdiv(n, config.blocks["BLOCK"])
        _utils.launch(kernel, (rows * pieces,), config, **args, **strides, n=n, pieces=pieces, KIND=kind)

    key = (kernel.__name__, kind, *_utils.chip(gate.device), str(gate.dtype), n, *(s % 8 for s in strides.values()))
    start(_utils.choose(key, config(n), CANDIDATES, start))


def fwd(kind: int, y: Tensor, gate: Tensor, up: Tensor) -> None:
    _launch(_glu_fwd_kernel, kind, _utils.rows(gate), {"up": _utils.rows(up), "y": y})


def bwd(kind: int, d: Tensor, dy: Tensor, gate: Tensor, up: Tensor) -> None:
    _launch(_glu_bwd_kernel, kind, _utils.rows(gate), {"dy": _utils.rows(dy), "up": _utils.rows(up), "d": d})

"""GELU of x + bias (reference: fastllm/reference/gelu.py).

    y = act(x + b)          dx = dy act'(x + b)          db = sum of dx over rows

A program takes a piece of a row; in the backward with a gradient of the bias, that piece of several rows, whose part of
db it keeps in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels import _glu, _utils
from fastllm.kernels._glu import _activate
from fastllm.kernels._utils import Config


@triton.jit
def _gelu_fwd_kernel(x, bias, y, stride_x, n, pieces, KIND: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    row = (pid // pieces).to(tl.int64)
    i = (pid % pieces) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(x + row * stride_x + i, mask=i < n, other=0.0).to(tl.float32)
    if bias is not None:
        g += tl.load(bias + i, mask=i < n, other=0.0).to(tl.float32)
    value, _ = _activate(g, KIND)
    tl.store(y + row * n + i, value.to(y.dtype.element_ty), mask=i < n)


@triton.jit
def _gelu_bwd_kernel(
    dy, x, bias, dx, dbias, stride_dy, stride_x, rows, n, pieces, walkers, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    first = (pid // pieces).to(tl.int64)
    i = (pid % pieces) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    if bias is not None:
        shift = tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(first, rows, walkers):
        g = tl.load(x + row * stride_x + i, mask=inside, other=0.0).to(tl.float32)
        out = tl.load(dy + row * stride_dy + i, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            g += shift
        _, slope = _activate(g, KIND)
        out *= slope
        tl.store(dx + row * n + i, out.to(dx.dtype.element_ty), mask=inside)
        if dbias is not None:
            total += out
    if dbias is not None:
        tl.store(dbias + first * n + i, total, mask=inside)


def gelu_fwd(
    y: Tensor,  # (..., N), contiguous
    x: Tensor,  # (..., N)
    bias: Tensor | None,  # (N,)
    tanh: bool,
) -> None:
    x, bias = _utils.rows(x), None if bias is None else bias.contiguous()
    rows, n = x.shape
    kind = _glu.GELU_TANH if tanh else _glu.GELU

    def start(config: Config) -> None:
        pieces = triton.cdiv(n, config.blocks["BLOCK"])
        _utils.launch(
            _gelu_fwd_kernel, (rows * pieces,), config, x=x, bias=bias, y=y, stride_x=x.stride(0), n=n, pieces=pieces,
            KIND=kind,
        )  # fmt: skip

    key = ("gelu_fwd", kind, *_utils.chip(x.device), str(x.dtype), n, x.stride(0) % 8, bias is None)
    start(_utils.choose(key, _glu.config(n), _glu.CANDIDATES, start))


def gelu_bwd(
    dx: Tensor,  # (..., N), contiguous
    dbias: Tensor,  # (N,), or empty where it is not wanted
    dy: Tensor,  # (..., N)
    x: Tensor,  # (..., N)
    bias: Tensor | None,  # (N,)
    tanh: bool,
) -> None:
    x, dy, bias = _utils.rows(x), _utils.rows(dy), None if bias is None else bias.contiguous()
    rows, n = x.shape
    kind = _glu.GELU_TANH if tanh else _glu.GELU
    wanted = dbias.numel() > 0

    def start(config: Config) -> Tensor | None:
        pieces = triton.cdiv(n, config.blocks["BLOCK"])
        # Without a sum, a row each. With one, as many as are there at once, with up to 96 registers a thread.
        there = _utils.multiprocessors(x.device) * max(1, 20 // config.warps)
        walkers = min(rows, max(1, there // pieces)) if wanted else rows
        part = torch.empty(walkers, n, dtype=torch.float32, device=x.device) if wanted else None
        _utils.launch(
            _gelu_bwd_kernel, (walkers * pieces,), config, dy=dy, x=x, bias=bias, dx=dx, dbias=part,
            stride_dy=dy.stride(0), stride_x=x.stride(0), rows=rows, n=n, pieces=pieces, walkers=walkers, KIND=kind,
        )  # fmt: skip
        return part

    strides = (x.stride(0) % 8, dy.stride(0) % 8)
    key = ("gelu_bwd", kind, *_utils.chip(x.device), str(x.dtype), n, *strides, bias is None, wanted)
    part = start(_utils.choose(key, _glu.config(n), _glu.CANDIDATES, start))
    if part is not None:
        dbias.copy_(part.sum(0))

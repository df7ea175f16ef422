"""Dropout, residual addition and LayerNorm or RMSNorm in one pass (reference: fastllm/reference/_dropout.py, _norm.py).

    s = Z x + r, rounded                     xhat = (s - mean) rstd            y = xhat w + b
    dr = ds + rstd (g - mean(g) - xhat mean(g xhat)),  g = dy w               dx = Z dr

Z is 0 or 1 / (1 - rate), drawn anew in the backward. A row is one program's and stays in registers; in the backward a
program walks over several rows, whose parts of dw and db it keeps, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels import _utils
from fastllm.kernels._utils import Config


@triton.jit
def _factors(seed, row, threshold, scale, BLOCK: tl.constexpr):
    """Z of a row: element j takes word j % 4 of Philox at (j / 4, row, row >> 32, 0)."""
    counter = tl.arange(0, BLOCK // 4)
    zero = counter * 0
    rows = zero.to(tl.int64) + row
    a, b, c, d = tl.philox(seed, counter, (rows & 0xFFFFFFFF).to(tl.uint32), (rows >> 32).to(tl.uint32), zero, 7)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])
    return tl.where((words >> 8).to(tl.int32) >= threshold, scale, 0.0)


@triton.jit
def _dropout_norm_fwd_kernel(
    x, residual, weight, bias, seed, y, total, mean, rstd, stride_x, stride_residual, n, threshold, scale, eps,
    CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    inside = j < n
    # All that is read first, so that it arrives while Philox counts.
    branch = tl.load(x + row * stride_x + j, mask=inside, other=0.0)
    before = tl.load(residual + row * stride_residual + j, mask=inside, other=0.0)
    z = _factors(tl.load(seed), row, threshold, scale, BLOCK)
    s = tl.where(z == 0, 0.0, branch.to(tl.float32) * z) + before.to(tl.float32)
    rounded = s.to(total.dtype.element_ty)
    tl.store(total + row * n + j, rounded, mask=inside)
    s = rounded.to(tl.float32)
    if CENTERED:
        # From the row's first element up: exact for constant rows.
        first = tl.sum(tl.where(j == 0, s, 0.0), 0)
        row_mean = first + tl.sum(tl.where(inside, s - first, 0.0), 0) / n
        tl.store(mean + row, row_mean)
        s -= row_mean
    s = tl.where(inside, s, 0.0)
    row_rstd = 1.0 / tl.sqrt(tl.sum(s * s, 0) / n + eps)
    tl.store(rstd + row, row_rstd)
    s *= row_rstd
    if weight is not None:
        s *= tl.load(weight + j, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        s += tl.load(bias + j, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * n + j, s.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _dropout_norm_bwd_kernel(
    dy, dtotal, total, mean, rstd, weight, seed, dx, dresidual, dweight, dbias, stride_dy, stride_dtotal, stride_total,
    rows, n, threshold, scale, CENTERED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    inside = j < n
    key = tl.load(seed)
    sum_dw = tl.zeros([BLOCK], tl.float32)
    sum_db = tl.zeros([BLOCK], tl.float32)
    # With two stages, a row is on its way into shared memory while the one before is computed.
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        out = tl.load(dy + row * stride_dy + j, mask=inside, other=0.0).to(tl.float32)
        row_rstd = tl.load(rstd + row)
        xhat = tl.load(total + row * stride_total + j, mask=inside, other=0.0).to(tl.float32)
        if CENTERED:
            xhat -= tl.load(mean + row)
        xhat = tl.where(inside, xhat * row_rstd, 0.0)
        if dweight is not None:
            sum_dw += out * xhat
        if dbias is not None:
            sum_db += out
        if weight is not None:
            out *= tl.load(weight + j, mask=inside, other=0.0).to(tl.float32)
        grad = out - xhat * (tl.sum(out * xhat, 0) / n)
        if CENTERED:
            grad -= tl.sum(out, 0) / n
        grad *= row_rstd
        if dtotal is not None:
            grad += tl.load(dtotal + row * stride_dtotal + j, mask=inside, other=0.0).to(tl.float32)
        tl.store(dresidual + row * n + j, grad.to(dresidual.dtype.element_ty), mask=inside)
        z = _factors(key, row, threshold, scale, BLOCK)
        tl.store(dx + row * n + j, tl.where(z == 0, 0.0, grad * z).to(dx.dtype.element_ty), mask=inside)
    if dweight is not None:
        tl.store(dweight + program * n + j, sum_dw, mask=inside)
    if dbias is not None:
        tl.store(dbias + program * n + j, sum_db, mask=inside)


def _c(n: int, warps: int, **more: int) -> Config:
    return Config({"BLOCK": max(128, triton.next_power_of_2(n)), **more}, warps, 1)


def _warps(x: Tensor) -> int:
    """32 bytes for each of 32 threads of a warp, or as many as 16 warps need; AMD's spill with so few."""
    row = triton.next_power_of_2(x.shape[-1]) * x.element_size()
    few = row // (512 if _utils.chip(x.device)[0] == "hip" else 1024)
    return 1 if _utils.interpreted() else min(16, max(1, few))


def _stages(x: Tensor) -> int:
    """Two, with 16 bits: float32 would spill. AMD's 64 KiB of shared memory are too few."""
    return 2 if x.element_size() == 2 and _utils.chip(x.device)[0] == "cuda" else 1


def _candidates(n: int) -> list[Config]:
    return [_c(n, warps) for warps in (4, 8, 16)]


def _bwd_candidates(n: int) -> list[Config]:
    return [_c(n, warps, STAGES=stages) for warps in (4, 8, 16) for stages in (1, 2)]


def _mask(p: float) -> dict[str, float]:
    return {"threshold": round(p * 2**24), "scale": 1 / (1 - p) if p < 1 else 0.0}


def fwd(
    y: Tensor,  # (..., N), contiguous, as total
    total: Tensor,
    mean: Tensor | None,  # (...) float32; None for RMSNorm
    rstd: Tensor,  # (...) float32
    x: Tensor,  # (..., N)
    residual: Tensor,  # (..., N)
    weight: Tensor | None,  # (N,)
    bias: Tensor | None,  # (N,)
    seed: Tensor,  # (1,) int64
    p: float,
    eps: float,
) -> None:
    x, residual = _utils.rows(x), _utils.rows(residual)
    rows, n = x.shape
    weight, bias = _dense(weight), _dense(bias)

    def start(config: Config) -> None:
        _utils.launch(
            _dropout_norm_fwd_kernel, (rows,), config, x=x, residual=residual, weight=weight, bias=bias, seed=seed,
            y=y, total=total, mean=mean, rstd=rstd, stride_x=x.stride(0), stride_residual=residual.stride(0), n=n,
            **_mask(p), eps=eps, CENTERED=mean is not None,
        )  # fmt: skip

    key = ("dropout_norm_fwd", *_utils.chip(x.device), str(x.dtype), n, mean is None, weight is None, bias is None)
    start(_utils.choose(key, _c(n, _warps(x)), _candidates(n), start))


def bwd(
    dx: Tensor,  # (..., N), contiguous, as dresidual
    dresidual: Tensor,
    dweight: Tensor,  # (N,), or empty where it is not wanted
    dbias: Tensor,  # (N,), or empty
    dy: Tensor,  # (..., N)
    dtotal: Tensor | None,  # (..., N)
    total: Tensor,  # (..., N)
    mean: Tensor | None,  # (...) float32; None for RMSNorm
    rstd: Tensor,  # (...) float32
    weight: Tensor | None,  # (N,)
    seed: Tensor,  # (1,) int64
    p: float,
) -> None:
    dy, total = _utils.rows(dy), _utils.rows(total)
    dtotal = None if dtotal is None else _utils.rows(dtotal)
    rows, n = total.shape
    weight, rstd, mean = _dense(weight), rstd.contiguous(), None if mean is None else mean.contiguous()

    def start(config: Config) -> list[Tensor | None]:
        # As many programs as are there at once, with up to 128 registers a thread.
        programs = min(rows, _utils.multiprocessors(dy.device) * max(1, 16 // config.warps))
        parts = [
            torch.empty(programs, n, dtype=torch.float32, device=dy.device) if grad.numel() else None
            for grad in (dweight, dbias)
        ]
        _utils.launch(
            _dropout_norm_bwd_kernel, (programs,), config, dy=dy, dtotal=dtotal, total=total, mean=mean, rstd=rstd,
            weight=weight, seed=seed, dx=dx, dresidual=dresidual, dweight=parts[0], dbias=parts[1],
            stride_dy=dy.stride(0), stride_dtotal=0 if dtotal is None else dtotal.stride(0),
            stride_total=total.stride(0), rows=rows, n=n, **_mask(p), CENTERED=mean is not None,
        )  # fmt: skip
        return parts

    wanted = dweight.numel() > 0, dbias.numel() > 0
    key = ("dropout_norm_bwd", *_utils.chip(dy.device), str(dy.dtype), n, mean is None, dtotal is None, *wanted)
    parts = start(_utils.choose(key, _c(n, _warps(dy), STAGES=_stages(dy)), _bwd_candidates(n), start))
    for grad, part in zip((dweight, dbias), parts, strict=True):
        if part is not None:
            grad.copy_(part.sum(0))


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()

"""Cross-entropy: what it needs to know of a row of logits, and the gradient (reference:
fastllm/reference/cross_entropy.py).

    t = x, or c tanh(x / c) with a softcap c       top = max_j t_j       lse = log(sum_j exp(t_j - top))
    picked = t_target - top                        mean = mean_j(t_j - top)
    dx_j = (dlse exp(t_j - top - lse) + dpicked [j = target] + dmean / n) (1 - (t_j / c)^2)

A program walks along one row. A target outside [0, n) picks nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels import _utils
from fastllm.kernels._math import _tanh
from fastllm.kernels._utils import Config


@triton.jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        x = _tanh(x / softcap) * softcap
    return x


@triton.jit
def _cross_entropy_fwd_kernel(
    logits, target, top, lse, picked, mean, stride, n, softcap, CAPPED: tl.constexpr, MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, BLOCK)
    highest = float("-inf")
    shift = 0.0
    total = tl.zeros([BLOCK], tl.float32)
    total_t = 0.0
    for start in range(0, n, BLOCK):
        j = start + columns
        t = _capped(tl.load(logits + j, mask=j < n, other=float("-inf")).to(tl.float32), softcap, CAPPED)
        if CAPPED:
            t = tl.where(j < n, t, float("-inf"))
        before, shift_before = highest, shift
        highest = tl.maximum(highest, tl.max(t, 0))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp2((before - shift) * 1.4426950408889634) + tl.exp2((t - shift) * 1.4426950408889634)
        if MEAN:
            if start > 0:
                total_t += (shift_before - shift) * start
            total_t += tl.sum(tl.where(j < n, t - shift, 0.0), 0)
    tl.store(top + row, shift)
    tl.store(lse + row, tl.log(tl.sum(total, 0)))
    at = tl.load(target + row)
    here = (at >= 0) & (at < n)
    t = _capped(tl.load(logits + at, mask=here, other=0.0).to(tl.float32), softcap, CAPPED)
    tl.store(picked + row, tl.where(here, t - shift, 0.0))
    if MEAN:
        tl.store(mean + row, total_t / n)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits, target, top, lse, dlse, dpicked, dmean, dlogits, stride, stride_d, n, softcap,
    CAPPED: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    dlogits += row * stride_d
    columns = tl.arange(0, BLOCK)
    at = tl.load(target + row)
    top_row = tl.load(top + row)
    lse_row = tl.load(lse + row)
    dlse_row = tl.load(dlse + row)
    dpicked_row = tl.load(dpicked + row)
    even = 0.0
    if MEAN:
        even = tl.load(dmean + row) / n
    for start in range(0, n, BLOCK):
        j = start + columns
        t = _capped(tl.load(logits + j, mask=j < n, other=0.0).to(tl.float32), softcap, CAPPED)
        # A row whose lse has no gradient is left out altogether, whatever its logits are.
        grad = tl.where(dlse_row == 0, 0.0, dlse_row * tl.exp2((t - top_row - lse_row) * 1.4426950408889634))
        grad += tl.where(j == at, dpicked_row, 0.0) + even
        if CAPPED:
            ratio = t / softcap
            grad = tl.where(grad == 0, 0.0, grad * (1 - ratio * ratio))  # t may be NaN in a row that is left out
        tl.store(dlogits + j, grad.to(dlogits.dtype.element_ty), mask=j < n)


def config(n: int) -> Config:
    """At most 8,192 elements at a time, 32 for each thread."""
    block = min(8192, max(128, triton.next_power_of_2(n)))
    if _utils.interpreted():
        return Config({"BLOCK": min(block, 1024)}, 1, 1)
    return Config({"BLOCK": block}, max(1, block // 1024), 2)


def cross_entropy_fwd(
    top: Tensor,  # (N,) float32
    lse: Tensor,  # (N,) float32
    picked: Tensor,  # (N,) float32
    mean: Tensor | None,  # (N,) float32
    logits: Tensor,  # (N, V), last stride 1
    target: Tensor,  # (N,) int64
    softcap: float,
) -> None:
    rows, n = logits.shape
    _utils.launch(
        _cross_entropy_fwd_kernel, (rows,), config(n), fusion=softcap == 0, logits=logits, target=target, top=top,
        lse=lse, picked=picked, mean=mean, stride=logits.stride(0), n=n, softcap=float(softcap), CAPPED=softcap > 0,
        MEAN=mean is not None,
    )  # fmt: skip


def cross_entropy_bwd(
    dlogits: Tensor,  # (N, V), last stride 1; may be the logits
    dlse: Tensor,  # (N,) float32
    dpicked: Tensor,  # (N,) float32
    dmean: Tensor | None,  # (N,) float32
    logits: Tensor,  # (N, V), last stride 1
    target: Tensor,  # (N,) int64
    top: Tensor,  # (N,) float32
    lse: Tensor,  # (N,) float32
    softcap: float,
) -> None:
    rows, n = logits.shape
    _utils.launch(
        _cross_entropy_bwd_kernel, (rows,), config(n), fusion=softcap == 0, logits=logits, target=target, top=top,
        lse=lse, dlse=dlse, dpicked=dpicked, dmean=dmean, dlogits=dlogits, stride=logits.stride(0),
        stride_d=dlogits.stride(0), n=n, softcap=float(softcap), CAPPED=softcap > 0, MEAN=dmean is not None,
    )  # fmt: skip

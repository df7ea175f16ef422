"""linear_cross_entropy against the two stock steps, compiled and not; torch's own where it has one; Liger-Kernel's on a
GPU.

Operations: three products of (N, H), (H, V). Bytes: hidden states, classifier and their gradients; no logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm.benchmarks.harness import Case, dtype_name, rival
from fastllm.testing import make

PRODUCTS = "products alone"


def arguments(rows: int, hidden: int, classes: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(2))
    weight = make((classes, hidden), dtype, device, seed=1) / hidden**0.5
    return make((rows, hidden), dtype, device), weight, target.to(device)


def eager(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """What PyTorch users write."""
    return F.cross_entropy(F.linear(input, linear_weight), target)


def chunked() -> Callable:
    """Torch's own, from 2.13 on."""
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return functools.partial(F.linear_cross_entropy, options=options)  # type: ignore[attr-defined]


def liger() -> Callable:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def products(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """The three matrix products alone: a floor, not a loss."""
    return _Products.apply(input, linear_weight)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        ctx.logits = x @ w.t()
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return ctx.logits @ w, ctx.logits.t() @ x


def case(device: str, rows: int, hidden: int, classes: int, dtype: torch.dtype, target: str = "") -> Case:
    rivals: dict[str, Callable | str] = {"eager": eager, "torch chunked": rival(chunked)}
    if device == "cuda":
        rivals |= {PRODUCTS: products, "Liger": rival(liger)}
    elif dtype != torch.float32:
        rivals["torch chunked"] = "takes seconds a call with 16 bits on a CPU"
    return Case(
        op="linear_cross_entropy",
        name=f"{dtype_name(dtype)} {rows}x{hidden}x{classes} forward+backward",
        direction="forward+backward",
        args=functools.partial(arguments, rows, hidden, classes, dtype, device),
        check=functools.partial(arguments, min(rows, 300), min(hidden, 768), classes, dtype, device),
        rivals=rivals,
        bytes=2 * (rows + classes) * hidden * dtype.itemsize,
        flops=6 * rows * hidden * classes,
        products=dtype,
        target=target,
        rounds=(5, 15),
        compiled=device == "cuda",
    )


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        found = [case(device, 4096, 768, 50257, torch.float32, "0.95x eager's time")]
        # Where torch multiplies bfloat16 without oneDNN, below 0.01 TFLOP/s, a call of anybody's takes minutes.
        more = [case(device, 4096, 768, 50257, torch.bfloat16)] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
        return found if quick else [*found, case(device, 1024, 1024, 32000, torch.float32), *more]
    found = [case(device, 8192, 4096, 128256, torch.bfloat16, "within 15% of its products")]
    return found if quick else [*found, case(device, 16384, 768, 50257, torch.bfloat16)]

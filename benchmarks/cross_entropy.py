"""cross_entropy against the stock function, compiled and not; Liger-Kernel's on a GPU.

Bytes: the logits are read in the forward; in the backward they are read and their gradient is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm import ops
from fastllm.benchmarks.harness import Case, Direction, dtype_name, rival
from fastllm.testing import make


def arguments(rows: int, classes: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    return make((rows, classes), dtype, device), target.to(device)


class _Computed(torch.autograd.Function):
    """Passes on a leaf's memory as if it had just been computed: the timed call may then write into it."""

    @staticmethod
    def forward(ctx, x):
        return x.data

    @staticmethod
    def backward(ctx, grad):
        return grad


def in_place(input: Tensor, target: Tensor) -> Tensor:
    return ops.cross_entropy(_Computed.apply(input), target, inplace=True)


def liger() -> Callable:
    from liger_kernel.transformers.functional import liger_cross_entropy

    # It overwrites the logits. (What it finds there from its second turn on is its own gradient.)
    return lambda input, target: liger_cross_entropy(_Computed.apply(input), target)


def case(
    device: str,
    rows: int,
    classes: int,
    dtype: torch.dtype,
    direction: Direction = "forward+backward",
    target: str = "",
    overwrite: bool = False,
) -> Case:
    logits = rows * classes * dtype.itemsize
    rivals: dict[str, Callable | str] = {"eager": F.cross_entropy}
    if device == "cuda":
        rivals["Liger"] = rival(liger)
    return Case(
        op="cross_entropy",
        name=f"{dtype_name(dtype)} {rows}x{classes}{' in place' if overwrite else ''} {direction}",
        direction=direction,
        args=functools.partial(arguments, rows, classes, dtype, device),
        check=functools.partial(arguments, min(rows, 256), classes, dtype, device),
        rivals=rivals,
        bytes=logits * {"forward": 1, "backward": 2, "forward+backward": 3}[direction],
        flops=rows * classes * {"forward": 3, "backward": 4, "forward+backward": 7}[direction],
        target=target,
        call=in_place if overwrite else None,
        overwrites=overwrite,
    )


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        found = [
            case(device, 1024, 32000, torch.float32, target="1.5x eager"),
            case(device, 1024, 32000, torch.float32, target="2.5x eager, 1.5x torch.compile", overwrite=True),
            case(device, 1024, 32000, torch.bfloat16),
        ]
        return found[:1] if quick else found
    found = [
        case(device, 8192, 128256, torch.bfloat16, direction, target="80% of copy")
        for direction in ("forward", "backward")  # type: Direction
    ]
    found += [case(device, 8192, 128256, torch.bfloat16, overwrite=True), case(device, 16384, 50257, torch.bfloat16)]
    return found[:2] if quick else found

"""gelu with the bias of the projection before it, against its two steps, compiled and not.

Per element, forward: read x, write y. Backward: read dy and x, write dx. The bias and its gradient are a row each.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm import ops
from fastllm.benchmarks.harness import Case, Direction, dtype_name
from fastllm.testing import make


def arguments(rows: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return make((rows, n), dtype, device), make((n,), dtype, device, seed=1)


def fused(x: Tensor, bias: Tensor) -> Tensor:
    return ops.gelu(x, bias=bias)


def eager(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def case(device: str, shape: tuple[int, int], dtype: torch.dtype, direction: Direction, target: str = "") -> Case:
    rows, n = shape
    tensors = {"forward": 2, "backward": 3, "forward+backward": 5}[direction]
    return Case(
        op="gelu",
        name=f"{dtype_name(dtype)} {rows}x{n} {direction}",
        direction=direction,
        args=functools.partial(arguments, rows, n, dtype, device),
        check=functools.partial(arguments, min(rows, 1000), n, dtype, device),
        call=fused,
        rivals={"eager": eager},
        bytes=(tensors * rows + tensors - 1) * n * dtype.itemsize,
        flops={"forward": 5, "backward": 11, "forward+backward": 16}[direction] * rows * n,
        target=target,
    )


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        shapes, target = ((4096, 3072), (768, 1536), (1024, 512)), "1x eager, 1x torch.compile"
        found = [
            case(device, shape, dtype, "forward+backward", target)
            for shape in shapes
            for dtype in (torch.float32, torch.bfloat16)
        ]
        return found[:1] if quick else found
    directions: tuple[Direction, ...] = ("forward", "backward")
    return [
        case(device, shape, torch.bfloat16, direction, "85% of copy, 1x torch.compile")
        for shape in ([(8192, 12288)] if quick else [(8192, 12288), (16384, 3072)])
        for direction in directions
    ]

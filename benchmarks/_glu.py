"""The cases of swiglu and geglu.

Per element, forward: read gate and up, write y. Backward: read dy, gate and up, write the gradients of gate and up.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from fastllm.benchmarks.harness import Case, Direction, dtype_name, rival
from fastllm.testing import make


def arguments(rows: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return tuple(make((rows, n), dtype, device, seed=i) for i in range(2))


def liger(op: str, name: str) -> Callable:
    """Liger-Kernel's function of this name. It takes a GPU's tensors only."""
    return getattr(importlib.import_module(f"liger_kernel.ops.{op}"), name).apply


def case(
    op: str, eager: Callable, ligers: str, device: str, shape: tuple[int, int], dtype: torch.dtype,
    direction: Direction, target: str = "",
) -> Case:  # fmt: skip
    rows, n = shape
    rivals: dict[str, Callable | str] = {"eager": eager}
    if device == "cuda":
        rivals["Liger"] = rival(functools.partial(liger, op, ligers))
    tensors = {"forward": 3, "backward": 5, "forward+backward": 8}[direction]
    return Case(
        op=op,
        name=f"{dtype_name(dtype)} {rows}x{n} {direction}",
        direction=direction,
        args=functools.partial(arguments, rows, n, dtype, device),
        check=functools.partial(arguments, min(rows, 1000), n, dtype, device),
        rivals=rivals,
        bytes=tensors * rows * n * dtype.itemsize,
        flops={"forward": 6, "backward": 14, "forward+backward": 20}[direction] * rows * n,
        target=target,
    )


def cases(case: Callable[..., Case], device: str, quick: bool) -> list[Case]:
    """The cases of swiglu or geglu, made by its `case`."""
    make_case = functools.partial(case, device)
    if device == "cpu":
        main = make_case((2048, 2816), torch.float32, "forward+backward", target="1.3x eager, 1x torch.compile")
        return [main] if quick else [main, make_case((2048, 2816), torch.bfloat16, "forward+backward")]
    directions: tuple[Direction, ...] = ("forward", "backward")
    shapes = [(8192, 14336)] if quick else [(8192, 14336), (16384, 3072)]
    return [
        make_case(shape, torch.bfloat16, direction, target="85% of copy, 1x torch.compile")
        for shape in shapes
        for direction in directions
    ]

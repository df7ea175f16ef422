"""The cases of dropout_add_layer_norm and dropout_add_rms_norm.

Per element, forward: read x and the residual, write y and the sum. Backward: read dy, the sum and its gradient, write
the gradients of x and of the residual. Masks are drawn anew, not stored. Torch's dropout draws another mask, so
correctness is checked against its steps with ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F

from fastllm import ops
from fastllm.benchmarks import _norm
from fastllm.benchmarks.harness import Case, Direction, dtype_name
from fastllm.testing import dropout_factors, seeded

P = 0.1


def eager(x, residual, shape, *parameters, biased: bool, masked: bool = False):
    """What PyTorch users write. If `masked`, the dropout takes our mask."""
    branch = x * dropout_factors(x, P).to(x.dtype) if masked else F.dropout(x, P)
    total = branch + residual
    return (F.layer_norm if biased else F.rms_norm)(total, shape, *parameters), total


def case(
    op: str, device: str, shape: tuple[int, int], dtype: torch.dtype, direction: Direction, target: str = ""
) -> Case:
    biased = "layer" in op
    rows, n = shape
    tensors = {"forward": 4, "backward": 5, "forward+backward": 9}[direction]
    operations = {"forward": 7, "backward": 11, "forward+backward": 18}[direction] + (4 if biased else 0)
    call: Callable = functools.partial(getattr(ops, op), p=P)
    arguments = functools.partial(
        _norm.arguments, dtype=dtype, parameters=dtype, device=device, biased=biased, added=True
    )
    return Case(
        op=op,
        name=f"{dtype_name(dtype)} {rows}x{n} p={P} {direction}",
        direction=direction,
        args=functools.partial(arguments, shape),
        check=functools.partial(arguments, (min(rows, _norm.CHECKED_ROWS), n)),
        rivals={"eager": functools.partial(eager, biased=biased)},
        bytes=tensors * rows * n * dtype.itemsize,
        flops=operations * rows * n,
        target=target,
        kwargs={"p": P},
        checked=(seeded(call), functools.partial(eager, biased=biased, masked=True)),
    )


def cases(op: str, device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        main = case(op, device, (4096, 1024), torch.float32, "forward+backward")
        return [main] if quick else [main, case(op, device, (4096, 1024), torch.bfloat16, "forward+backward")]
    directions: tuple[Direction, ...] = ("forward", "backward")
    widths = (4096,) if quick else (1024, 4096, 8192)
    return [
        case(op, device, (8192, n), torch.bfloat16, d, target="1x torch.compile") for n in widths for d in directions
    ]

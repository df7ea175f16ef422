"""The cases of layer_norm, rms_norm, add_layer_norm and add_rms_norm.

Per element, forward: read x (and the residual), write y (and the sum). Backward: read dy, x (and the sum's gradient),
write dx, one tensor for x and the residual. Operations are counted from the formulas in `reference/_norm.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F

from fastllm.benchmarks.harness import Case, Direction, dtype_name, rival
from fastllm.testing import make

CHECKED_ROWS = 1000


def eager(*args, biased: bool, added: bool):
    """What PyTorch users write: the stock norm, after the addition where the op adds."""
    norm = F.layer_norm if biased else F.rms_norm
    if not added:
        return norm(*args)
    x, residual, shape, *parameters = args
    total = x + residual
    return norm(total, shape, *parameters), total


def liger(biased: bool, added: bool) -> Callable:
    """Liger-Kernel's function. It takes a GPU's tensors only."""
    eps = torch.finfo(torch.float32).eps  # RMSNorm's in torch
    if added:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as AddRMSNorm

        return lambda x, r, shape, weight: AddRMSNorm.apply(x, r, weight, eps)
    if biased:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction as LayerNorm

        return lambda x, shape, weight, bias: LayerNorm.apply(x, weight, bias, 1e-5)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction as RMSNorm

    return lambda x, shape, weight: RMSNorm.apply(x, weight, eps)


def arguments(
    shape: tuple[int, int], dtype: torch.dtype, parameters: torch.dtype, device: str, *, biased: bool, added: bool
) -> tuple:
    rows, n = shape
    activations = [make((rows, n), dtype, device, seed=i) for i in range(1 + added)]
    weights = [make((n,), parameters, device, seed=10 + i) for i in range(1 + biased)]
    return (*activations, (n,), *weights)


def case(
    op: str,
    device: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    direction: Direction,
    parameters: torch.dtype | None = None,
    target: str = "",
) -> Case:
    """One case of the norm `op`, whose name says what it computes."""
    biased, added = "layer" in op, op.startswith("add_")
    parameters = parameters or dtype
    rows, n = shape
    tensors = 2 + 2 * added, 3 + added  # of x's size, in the forward and the backward
    statistics = rows * 4 * (1 + biased)  # written in the forward, read in the backward
    weights = n * parameters.itemsize * (1 + biased)
    moved = (
        tensors[0] * rows * n * dtype.itemsize + statistics + weights,
        # The bias is not read in the backward; the gradients of weight and bias are written.
        tensors[1] * rows * n * dtype.itemsize + statistics + n * parameters.itemsize + weights,
    )
    operations = ((8 if biased else 4) + added, (13 if biased else 9) + added)
    chosen = [i for i, part in enumerate(("forward", "backward")) if part in direction]
    rivals: dict[str, Callable | str] = {"eager": functools.partial(eager, biased=biased, added=added)}
    if device == "cuda":
        has_one = not (biased and added)
        rivals["Liger"] = rival(functools.partial(liger, biased, added)) if has_one else f"Liger has no {op}"
    mixed = "" if parameters == dtype else f", {dtype_name(parameters)} weight"
    return Case(
        op=op,
        name=f"{dtype_name(dtype)} {rows}x{n}{mixed} {direction}",
        direction=direction,
        args=functools.partial(arguments, shape, dtype, parameters, device, biased=biased, added=added),
        check=functools.partial(
            arguments, (min(rows, CHECKED_ROWS), n), dtype, parameters, device, biased=biased, added=added
        ),
        rivals=rivals,
        bytes=sum(moved[i] for i in chosen),
        flops=sum(operations[i] for i in chosen) * rows * n,
        target=target,
    )


def cases(op: str, device: str, quick: bool, target: str = "") -> list[Case]:
    """The norm's cases; the main one first, and alone if `quick`. `target` is that of the main case on a CPU."""
    if device == "cpu":
        main = case(op, device, (4096, 1024), torch.float32, "forward+backward", target=target)
        if quick:
            return [main]
        return [
            main,
            case(op, device, (4096, 1024), torch.float32, "forward"),
            case(op, device, (4096, 1024), torch.bfloat16, "forward+backward"),
            case(op, device, (1024, 4096), torch.float32, "forward+backward"),
        ]
    goals: dict[Direction, str] = {"forward": "85% of copy", "backward": "75% of copy"}
    if op == "layer_norm":
        goals["backward"] += ", 1.5x eager"
    widths = (4096,) if quick else (1024, 4096, 8192, 16384)
    found = [
        case(op, device, (8192, n), torch.bfloat16, direction, target=goal)
        for n in widths
        for direction, goal in goals.items()
    ]
    if not quick:
        found += [case(op, device, (8192, 4096), torch.bfloat16, d, parameters=torch.float32) for d in goals]
    return found

"""What swiglu and geglu have in common: validation, fakes and backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastllm.backends import KERNEL_DTYPES, Backend, compiled
from fastllm.ops import _triton
from fastllm.ops._arguments import apart, check_dtype


def checked(name: str, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """gate and up, of one dtype and shape.

    Raises:
        TypeError, ValueError: for what does not fit.
    """
    for label, tensor in (("gate", gate), ("up", up)):
        if tensor is None and label == "up":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {label} must be a tensor, got {type(tensor).__name__}")
        check_dtype(name, label, tensor.dtype)
    if gate.dim() == 0:
        raise ValueError(f"{name}: gate must have at least one dimension, got ()")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"{name}: without up, gate's last size must be even (gate, then up), got {gate.shape[-1]}")
        return gate, None
    if up.shape != gate.shape:
        raise ValueError(f"{name}: up must have gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    if up.device != gate.device:
        raise ValueError(f"{name}: gate is on {gate.device}, up on {up.device}")
    dtype = torch.promote_types(gate.dtype, up.dtype)
    return apart(gate.to(dtype), up.to(dtype))  # type: ignore[return-value]


def halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return tuple(gate.chunk(2, -1)) if up is None else (gate, up)  # type: ignore[return-value]


def fwd_fake(gate: Tensor, up: Tensor, *rest) -> Tensor:
    return gate.new_empty(gate.shape)


def bwd_fake(dy: Tensor, gate: Tensor, up: Tensor, *rest) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1]))


def _supports(x: Tensor, *rest) -> str | None:
    return None if x.dtype in KERNEL_DTYPES else f"computes float32, bfloat16 and float16, not {x.dtype}"


def backends(fwd: Callable, bwd: Callable) -> tuple[tuple[Backend, ...], tuple[Backend, ...]]:
    """Those of both directions, from the launchers fwd(y, gate, up, *rest) and bwd(d, dy, gate, up, *rest)."""

    def run_fwd(gate: Tensor, up: Tensor, *rest) -> Tensor:
        y = fwd_fake(gate, up)
        if y.numel():
            fwd(y, gate, up, *rest)
        return y

    def run_bwd(dy: Tensor, gate: Tensor, up: Tensor, *rest) -> Tensor:
        d = bwd_fake(dy, gate, up)
        if d.numel():
            bwd(d, dy, gate, up, *rest)
        return d

    return tuple(
        (Backend("triton", _triton.supports(_supports), run), compiled("CPU", _supports)) for run in (run_fwd, run_bwd)
    )  # type: ignore[return-value]

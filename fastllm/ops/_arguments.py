"""What ops of every kind ask of their arguments."""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
from torch import Tensor

from fastllm.backends import KERNEL_DTYPES
from fastllm.tracing import host_values, unwrapped

DTYPES = (*KERNEL_DTYPES, torch.float64)
"""What ops compute, on one backend or another."""
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)


def check_dtype(name: str, label: str, dtype: Any) -> None:
    """Raises TypeError for all but `DTYPES`."""
    if dtype not in DTYPES:
        raise TypeError(f"{name}: {label} must be float32, bfloat16, float16 or float64, got {dtype!r}")


def number(name: str, label: str, value: Any) -> float:
    """`value` as a number. torch's functions take numpy's numbers and tensors of one element, too.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, _NUMBERS):
        return value  # type: ignore[return-value]
    if hasattr(value, "__float__"):  # which strings do not have
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            return float(value)
    raise TypeError(f"{name}: {label} must be a number, got {value!r}")


def integer(name: str, label: str, value: Any) -> int:
    """`value` as an int; numpy's and tensors' as `number`, but as for torch's functions True is none.

    Raises:
        TypeError: for anything else.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name}: {label} must be an int, got {value!r}")


def check_inside(name: str, label: str, indices: Tensor, size: int, what: str, ignored: int | None = None) -> None:
    """Raises IndexError for what is not in [0, size): at once on the CPU; on a GPU, and where the call is traced, by an
    assertion on the device (RuntimeError)."""
    indices = unwrapped(indices)
    wrong = (indices < 0) | (indices >= size)
    if ignored is not None:
        wrong = wrong & (indices != ignored)
    if host_values(indices) is None:
        torch._assert_async(~wrong.any(), f"{name}: a {label} is {what}")
    elif bool(wrong.any()):
        raise IndexError(f"{name}: {label} {int(indices[wrong][0])} is {what}")


def apart(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors; in a compiled graph a view of each that was there before, because Dynamo refuses one tensor twice
    among the arguments of an autograd.Function."""
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Tensor | None] = []
    for tensor in tensors:
        twice = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if twice else tensor)  # type: ignore[arg-type, union-attr]
    return tuple(found)

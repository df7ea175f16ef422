"""Whether Triton kernels can run on a tensor's device."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

MISSING = importlib.util.find_spec("triton") is None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def device_reason(x: Tensor) -> str | None:
    """Why they cannot, or None."""
    if MISSING:
        return "Triton is not installed"
    # torch calls AMD's devices cuda, too; the interpreter takes tensors on the CPU.
    if x.device.type != "cuda" and (x.device.type != "cpu" or not INTERPRETED):
        return f"runs on GPUs, the input is on {x.device.type}"
    return None


def supports(others: Callable[..., str | None]) -> Callable[..., str | None]:
    """`others`, a backend's `supports`, after the device's word."""

    def both(*args: Any) -> str | None:
        return device_reason(_first(args)) or others(*args)

    return both


def _first(args: Iterable[Any]) -> Tensor:
    return next(arg for arg in args if isinstance(arg, Tensor))

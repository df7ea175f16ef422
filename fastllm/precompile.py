"""Triton kernels compiled before they are launched, on any machine: what a call would launch, and its machine code.

    with recorded(("cuda", 90)) as launches:          # nothing is computed: tensors asked for on "cuda" have no data
        x = make((4096, 11008), torch.bfloat16, "cuda")
        ops.swiglu(x, x)
    for text in {launch.text() for launch in launches}:
        compile(text, ("cuda", 90))                   # into Triton's cache, where the launch on a GPU finds it

A launch's text is all that Triton's JIT looks at, and no more: two launches of one text share their machine code. It
goes from one process to another, so that several compile at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Chip = tuple[str, Any]
"""("cuda", 90) or ("hip", "gfx942")."""


@dataclass(frozen=True)
class Launch:
    """What a launcher hands to `kernels._utils.launch`."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    config: Any  # kernels._utils.Config
    args: dict[str, Any]
    fusion: bool

    def text(self) -> str:
        """What the JIT specialises on, as JSON: dtypes, alignment, which integers are 1, a multiple of 16 or long."""
        values = {**self.args, **self.config.blocks}
        args = {
            p.name: 3 if p.do_not_specialize else _specialised(values[p.name], p.is_constexpr)
            for p in self.kernel.params
        }
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": self.fusion}
        kernel = f"{self.kernel.fn.__module__}:{self.kernel.fn.__name__}"
        return json.dumps({"kernel": kernel, "args": args, "options": options})


def aligned(x: Tensor) -> bool:
    """Whether a tensor starts at a multiple of 16 bytes, its memory doing so."""
    return x.storage_offset() * x.element_size() % 16 == 0


def _specialised(value: Any, constant: bool) -> Any:
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "aligned": aligned(value)}
    if isinstance(value, float) and not constant:
        return 0.5
    if constant or value is None or isinstance(value, bool) or value == 1:
        return value
    return (0 if -(2**31) <= value < 2**31 else 2**32) + (16 if value % 16 == 0 else 3)


@dataclass(frozen=True)
class _Pointer:
    """What the JIT asks of a tensor."""

    dtype: torch.dtype
    aligned: bool

    def data_ptr(self) -> int:
        return 0 if self.aligned else 4

    def ptr_range(self) -> int:
        return 0


@dataclass(frozen=True)
class _Driver:
    """What the JIT asks of a GPU's driver until it launches. Its device has a cache of its own."""

    target: Any

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def find(text: str) -> Any:
    """The kernel that a launch's text names."""
    module, _, name = json.loads(text)["kernel"].partition(":")
    return getattr(importlib.import_module(module), name)


def fingerprint(text: str, chip: Chip) -> str:
    """Names the machine code of a launch: it changes with the kernel's source, Triton's version and the chip."""
    import triton

    known = (text, chip, triton.__version__, find(text).cache_key)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:32]


def compile(text: str, chip: Chip) -> None:
    """Compiles what a launch of this text runs on `chip`, or finds it in Triton's cache."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    launch, kernel = json.loads(text), find(text)
    args = [
        _Pointer(getattr(torch, value["dtype"]), value["aligned"]) if isinstance(value, dict) else value
        for value in launch["args"].values()
    ]
    with mock.patch.object(driver, "_active", _Driver(GPUTarget(*chip, 64 if chip[0] == "hip" else 32))):
        kernel.warmup(*args, grid=(1,), **launch["options"])


class _OnMeta(TorchFunctionMode):
    """Puts on the meta device what is asked for on "cuda"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def moved(value: Any) -> Any:
            if isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda":
                return torch.device("meta")
            return value

        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], "cuda")
        return func(*map(moved, args), **{key: moved(value) for key, value in (kwargs or {}).items()})


class _NoGenerator:
    """Stands for torch.Generator where nothing is drawn."""

    def __init__(self, device: Any = None):
        pass

    def manual_seed(self, seed: int) -> None:
        return None


@contextlib.contextmanager
def recorded(chip: Chip, multiprocessors: int = 132) -> Iterator[list[Launch]]:
    """Inside, tensors asked for on "cuda" are on the meta device, Triton's backends take them, and what launchers would
    launch on `chip` is taken down instead."""
    from fastllm.kernels import _utils
    from fastllm.ops import _triton

    launches: list[Launch] = []

    def take_down(kernel: Any, grid: tuple[int, ...], config: Any, *, fusion: bool = True, **args: Any) -> None:
        launches.append(Launch(kernel, grid, config, args, fusion))

    def device_reason(x: Tensor, original: Callable = _triton.device_reason) -> str | None:
        return None if x.is_meta else original(x)

    with contextlib.ExitStack() as stack:
        for place, name, value in (
            (_utils, "launch", take_down),
            (_utils, "chip", lambda device: chip),
            (_utils, "multiprocessors", lambda device: multiprocessors),
            (_triton, "device_reason", device_reason),
            (torch, "Generator", _NoGenerator),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(_OnMeta())
        yield launches


def handle(job: dict[str, Any], run: Callable[[], Any]) -> dict[str, Any]:
    """What a worker does ahead of time, each job naming its chip: "record" gives the texts that `run` would launch with
    their fingerprints, "compile" compiles one of them."""
    chip: Chip = tuple(job["chip"])
    if job["do"] == "compile":
        compile(job["text"], chip)
        return {}
    with recorded(chip) as launches:
        run()
    return {"launches": {text: fingerprint(text, chip) for text in {launch.text() for launch in launches}}}

"""What every launcher needs: which chip it launches on, which configuration, and the launch itself."""

from __future__ import annotations

import contextvars
import functools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Config:
    """How a kernel is cut and compiled: its block sizes (constexpr arguments) and the compiler's options.

    `specialised`: it runs the warp-specialised kernel, where there is one beside the other.
    """

    blocks: dict[str, int] = field(hash=False)
    warps: int = 4
    stages: int = 2
    specialised: bool = False

    def __str__(self) -> str:
        name = "x".join(map(str, self.blocks.values())) + f" w{self.warps} s{self.stages}"
        return f"{name} specialised" if self.specialised else name


@functools.cache
def _gpu(index: int) -> tuple[str, int | str]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return "hip", properties.gcnArchName.split(":")[0]
    return "cuda", properties.major * 10 + properties.minor


def chip(device: torch.device) -> tuple[str, int | str]:
    """("cuda", 90), ("hip", "gfx942"), or ("cpu", 0) in the interpreter."""
    return ("cpu", 0) if device.type == "cpu" else _gpu(device.index or 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def interpreted() -> bool:
    """Whether Triton was told to run kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def precision(dtype: torch.dtype) -> str:
    """How float32 matrices are multiplied: as torch was told to, by its old switch or its new one."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    try:
        return "tf32" if matmul.allow_tf32 else "ieee"
    except RuntimeError:  # the new one was used, and torch refuses to say what that is to the old one
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"


def rows(x: Tensor) -> Tensor:
    """(rows, n) with dense rows: a view, or a copy where there is none."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def launch(kernel, grid: tuple[int, ...], config: Config, *, fusion: Any = True, **args) -> None:
    """Starts `kernel` on the tensors' device, on its current stream. Floating-point fusion is said by name: Triton's
    default changes. Without it a product that is subtracted from its own rounding leaves zero."""

    def start() -> None:
        kernel[grid](**args, **config.blocks, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=fusion)

    with torch.cuda.device_of(next(arg for arg in args.values() if isinstance(arg, Tensor))):
        if config.specialised:
            contextvars.copy_context().run(_with_descriptors, start)
        else:
            start()


def _with_descriptors(start: Callable[[], None]) -> None:
    """Launches a kernel that makes tensor descriptors. Triton's allocator is the context's: the user's stays his."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    start()


# Tuning, on demand

_tuned: dict[str, Config] | None = None


def _cache_file() -> Path:
    return Path(os.environ.get("FASTLLM_CACHE") or Path.home() / ".cache/fastllm") / "autotune.json"


def _load_tuned() -> dict[str, Config]:
    global _tuned
    if _tuned is None:
        file = _cache_file()
        _tuned = {key: Config(**value) for key, value in json.loads(file.read_text()).items()} if file.exists() else {}
    return _tuned


def tuning() -> bool:
    return os.environ.get("FASTLLM_AUTOTUNE") == "1"


def choose(key: tuple, default: Config, candidates: Iterable[Config], run: Callable[[Config], Any]) -> Config:
    """The configuration for `key`: the table's, unless FASTLLM_AUTOTUNE=1.

    With it, every candidate is timed the first time that a key is met and the fastest is kept, in memory and in
    FASTLLM_CACHE (default ~/.cache/fastllm). `key` must hold all that the choice may depend on.
    """
    if not tuning():
        return default
    tuned, name = _load_tuned(), json.dumps([*key, triton.__version__])
    if name not in tuned:
        tuned[name] = min([default, *candidates], key=lambda config: _milliseconds(run, config))
        file = _cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({key: asdict(config) for key, config in tuned.items()}, indent=1))
        partial.rename(file)
    return tuned[name]


def _milliseconds(run: Callable[[Config], Any], config: Config) -> float:
    try:
        if interpreted():  # no clock worth reading: it must only be able to run
            run(config)
            return 0.0
        return triton.testing.do_bench(lambda: run(config), warmup=10, rep=50)
    except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
        return float("inf")
    except RuntimeError as error:
        if "PassManager" in str(error):  # a candidate that this Triton cannot compile is none
            return float("inf")
        raise

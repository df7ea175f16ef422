"""Loads the compiled kernels. Nothing else in the package does.

Loading an extension registers its kernels with torch's dispatcher; `fastllm.backends` then asks the dispatcher which
ops have one. An extension that was built and cannot be loaded is a warning, since everything would run on the
reference from there on.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import warnings
from pathlib import Path
from types import ModuleType

import torch

CUDA_LIBRARY = Path(__file__).parent / "_C_cuda.so"

C: ModuleType | None = None
"""The module `fastllm._C`, or None where it was not built or could not be loaded."""

STATUS: dict[str, str] = {}
"""For each dispatch key, CPU and CUDA: "loaded", or why its kernels are not there."""


def _load_cpu() -> str:
    global C
    # Of this package, and not of an editable installation of another copy of it.
    if importlib.machinery.PathFinder.find_spec("fastllm._C", [str(Path(__file__).parent)]) is None:
        return "not built: no C++ compiler when fastllm was installed"
    try:
        C = importlib.import_module("fastllm._C")
    except ImportError as error:
        warnings.warn(f"fastllm._C was built but cannot be loaded: {error}", stacklevel=2)
        return f"cannot be loaded: {error}"
    return "loaded"


def _load_cuda() -> str:
    if not CUDA_LIBRARY.exists():
        return "not built: no nvcc, or FASTLLM_CUDA=0, when fastllm was installed"
    if torch.version.cuda is None:
        return f"built, not loaded: torch {torch.__version__} has no CUDA"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        warnings.warn(f"{CUDA_LIBRARY.name} was built but cannot be loaded: {error}", stacklevel=2)
        return f"cannot be loaded: {error}"
    return "loaded"


STATUS["CPU"] = _load_cpu()
STATUS["CUDA"] = _load_cuda()


def _cuda_candidate(kernel: str, which: int) -> int:
    """Chooses one of the launches of a CUDA C++ kernel that only a GPU can decide between (csrc/cuda/candidates.h), for
    this process from now on; returns how many there are, 0 where the kernels are not loaded."""
    if STATUS["CUDA"] != "loaded":
        return 0
    return ctypes.CDLL(str(CUDA_LIBRARY)).fastllm_cuda_candidate(kernel.encode(), which)

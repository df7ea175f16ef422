"""add_rms_norm against the stock function, compiled and not; Liger-Kernel's on a GPU."""

from __future__ import annotations

from fastllm.benchmarks import _norm
from fastllm.benchmarks.harness import Case


def cases(device: str, quick: bool) -> list[Case]:
    return _norm.cases("add_rms_norm", device, quick, target="3x eager, 1.2x torch.compile")

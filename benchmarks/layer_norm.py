"""layer_norm against the stock function, compiled and not; Liger-Kernel's on a GPU."""

from __future__ import annotations

from fastllm.benchmarks import _norm
from fastllm.benchmarks.harness import Case


def cases(device: str, quick: bool) -> list[Case]:
    return _norm.cases("layer_norm", device, quick, target="1.15x eager")

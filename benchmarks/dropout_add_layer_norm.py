"""dropout_add_layer_norm against its three steps, compiled and not."""

from __future__ import annotations

from fastllm.benchmarks import _dropout_norm
from fastllm.benchmarks.harness import Case


def cases(device: str, quick: bool) -> list[Case]:
    return _dropout_norm.cases("dropout_add_layer_norm", device, quick)

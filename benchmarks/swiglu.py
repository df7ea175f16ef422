"""swiglu against its two steps, compiled and not; Liger-Kernel's on a GPU."""

from __future__ import annotations

import functools

from torch import Tensor
from torch.nn import functional as F

from fastllm.benchmarks import _glu
from fastllm.benchmarks.harness import Case


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


case = functools.partial(_glu.case, "swiglu", eager, "LigerSiLUMulFunction")


def cases(device: str, quick: bool) -> list[Case]:
    return _glu.cases(case, device, quick)

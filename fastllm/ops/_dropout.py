"""What the ops with dropout have in common: the rate's check and the seed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.ops._arguments import number


def check_rate(name: str, argument: str, rate: float) -> float:
    """The rate. Raises TypeError or ValueError unless it is a probability."""
    rate = number(name, argument, rate)
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"{name}: {argument} must be between 0 and 1, got {rate}")
    return rate


def dropout_seed(like: Tensor, rate: float) -> Tensor | None:
    """(1,) int64 from torch's generator of that device, which torch.manual_seed seeds; None at rate 0."""
    if rate == 0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=like.device)

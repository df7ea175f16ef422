"""Learning rates."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, steps: int, warmup: int, peak: float, floor: float) -> float:
    """The learning rate of step 0 <= step < steps: linear to `peak` over `warmup` steps, then half a cosine to `floor`.

    The first step is taken at peak / warmup, not at zero, and the last one at floor.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

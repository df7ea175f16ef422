"""Learning rates."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt", "inverse_time")


def learning_rate(
    step: int,
    *,
    schedule: str,
    steps: int,
    warmup: int,
    peak: float,
    floor: float = 0.0,
    decay: float = 0.0,
    decay_share: float = 0.1,
) -> float:
    """The learning rate of step 0 <= step < steps.

    It rises over `warmup` steps, peak (step + 1) / warmup: the first step is taken at peak / warmup, not at zero. Then,
    with x from 0 at step `warmup` to 1 at the last step,

        constant        peak
        linear          peak - (peak - floor) x
        cosine          floor + (peak - floor) (1 + cos(pi x)) / 2      Loshchilov and Hutter, 2017
        wsd             peak, and over the last n = decay_share * steps  Hu et al., "MiniCPM", 2024
                        steps peak - (peak - floor) i / n, i = 1, .., n
        inverse_sqrt    peak sqrt(warmup / (step + 1))                  Vaswani et al., 2017
        inverse_time    peak / (1 + decay (step - warmup))              Bottou, "SGD Tricks", 2012

    Args:
        step: of the optimizer, the first being 0.
        schedule: one of these names.
        steps: of the whole run.
        warmup: steps; 0 is none (inverse_sqrt then begins at peak, as with 1).
        peak: the highest rate.
        floor: the lowest one, of linear, cosine and wsd.
        decay: of inverse_time, per step.
        decay_share: of wsd, the part of all steps in which the rate falls; what is in the warm-up does not.

    Raises:
        ValueError: for another schedule, and a value out of range.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"learning_rate: schedule must be one of {SCHEDULES}, got {schedule!r}")
    if not 0 <= step < steps:
        raise ValueError(f"learning_rate: step must be at least 0 and less than steps={steps}, got {step}")
    if warmup < 0:
        raise ValueError(f"learning_rate: warmup must not be negative, got {warmup}")
    if not 0 <= peak < math.inf:
        raise ValueError(f"learning_rate: peak must be finite and not negative, got {peak}")
    if not 0 <= floor <= peak:
        raise ValueError(f"learning_rate: floor must be in [0, peak={peak}], got {floor}")
    if not 0 <= decay < math.inf:
        raise ValueError(f"learning_rate: decay must be finite and not negative, got {decay}")
    if not 0 <= decay_share <= 1:
        raise ValueError(f"learning_rate: decay_share must be in [0, 1], got {decay_share}")
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    if schedule == "linear":
        return floor + (peak - floor) * (1 - progress)
    if schedule == "cosine":
        return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "wsd":
        falling = min(round(decay_share * steps), steps - warmup)
        left = steps - 1 - step
        return peak if left >= falling else floor + (peak - floor) * left / falling
    if schedule == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup) / (step + 1))
    return peak / (1 + decay * (step - warmup)) if schedule == "inverse_time" else peak

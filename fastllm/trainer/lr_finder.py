"""The learning-rate range test (Smith, 2017): a few steps with a rate that grows, and the loss at each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch

from fastllm._extras import require
from fastllm.trainer.optimizers import local
from fastllm.trainer.trainer import Trainer

_SMOOTH = 0.9  # of the running mean of the loss
_DIVERGED = 4.0  # times the least loss


class Found(NamedTuple):
    """What `find_learning_rate` saw: rates, smoothed losses, and the rate to begin with."""

    rates: list[float]
    losses: list[float]
    suggestion: float


def find_learning_rate(trainer: Trainer, *, low: float = 1e-7, high: float = 1.0, steps: int = 100) -> Found:
    """Trains for `steps` steps with rates from `low` to `high`, each a constant factor above the one before, until the
    loss diverges.

    Suggests the rate at which the smoothed loss falls steepest over the logarithm of the rate. The trainer is left with
    the weights that it had, its optimizer is not to be used any more.

    Raises:
        ValueError: where the loss never falls.
    """
    if not 0 < low < high < math.inf or steps < 10:
        raise ValueError(f"0 < low < high and steps >= 10, got {low}, {high} and {steps}")
    weights = list(map(local, trainer.model.state_dict().values()))
    start = [weight.clone() for weight in weights]
    rates, losses, mean = [], [], 0.0
    config = trainer.config
    kept = config.lr, config.warmup, config.schedule, config.steps
    config.warmup, config.schedule, config.steps = 0, "constant", steps
    bar = require("tqdm", "train").tqdm(total=steps, desc="learning rates", unit="step", disable=None)
    try:
        with bar:
            for i in range(steps):
                config.lr = low * (high / low) ** (i / (steps - 1))
                try:
                    loss = trainer.train_step()["loss"]
                except FloatingPointError:
                    break
                mean = _SMOOTH * mean + (1 - _SMOOTH) * loss
                rates.append(config.lr)
                losses.append(mean / (1 - _SMOOTH ** (i + 1)))
                bar.update()
                if losses[-1] > _DIVERGED * min(losses):
                    break
    finally:
        config.lr, config.warmup, config.schedule, config.steps = kept
        with torch.no_grad():
            torch._foreach_copy_(weights, start)
    falls = [(losses[i + 1] - losses[i - 1], i) for i in range(1, len(losses) - 1)]
    fall, best = min(falls, default=(0.0, 0))
    if fall >= 0:
        raise ValueError(f"the loss never fell between the rates {low} and {high}: is there anything to learn?")
    return Found(rates, losses, rates[best])


def draw(found: Found, path: Path) -> None:
    """Draws losses over rates into a PNG."""
    require("matplotlib", "train").use("Agg")
    plt = require("matplotlib.pyplot", "train")
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes.plot(found.rates, found.losses, color="#08519c", linewidth=2)
    axes.axvline(found.suggestion, color="#d94801", linestyle="--", label=f"suggested: {found.suggestion:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, smoothed (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)

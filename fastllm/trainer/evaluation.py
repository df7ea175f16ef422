"""Validation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllm.models.layers import Model, evaluating
from fastllm.models.layout import to_device
from fastllm.trainer._files import writing
from fastllm.trainer.distributed import Ranks


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@dataclass
class Evaluation:
    """What a validation found.

    Attributes:
        loss: nats a target.
        count: targets.
        confusion: (labels, labels) int64 of a classifier, by true and by predicted label; else None.
    """

    loss: float
    count: int
    confusion: Tensor | None = None

    @property
    def accuracy(self) -> float | None:
        """The share of rows whose label is predicted, of a classifier."""
        return None if self.confusion is None else (self.confusion.trace() / self.confusion.sum()).item()

    def metrics(self) -> dict[str, float]:
        found = {"validation_loss": self.loss}
        return found if self.accuracy is None else {**found, "accuracy": self.accuracy}

    def write_confusion(self, path: Path, step: int, labels: list[str] | None) -> None:
        """Writes the counts as JSON."""
        assert self.confusion is not None
        names = labels or [str(label) for label in range(len(self.confusion))]
        with writing(path):
            text = json.dumps({"step": step, "labels": names, "counts": self.confusion.tolist()}, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def evaluate(
    model: Model,
    data: Any,
    batch_size: int = 16,
    *,
    max_batches: int = 0,
    precision: str = "float32",
    ranks: Ranks | None = None,
) -> Evaluation:
    """The mean loss over the data, without dropout; of a classifier, how often it is right, too.

    Args:
        model: on any device.
        data: what to validate on; has a `len`, its rows, and `batch` as the trainer's.
        batch_size, precision: as in `TrainConfig`.
        max_batches: how many batches at most; 0 takes all.
        ranks: those that share the work.

    Raises:
        ValueError: for a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be at least 1, got {batch_size}")
    ranks = ranks or Ranks()
    device = next(model.parameters()).device
    batches = -(-len(data) // batch_size)
    if max_batches:
        batches = min(batches, max_batches)
    config: Any = model.config
    classifier: Any = model
    classifies = getattr(config, "head", None) == "classification"
    confusion = torch.zeros(config.labels, config.labels, dtype=torch.int64) if classifies else None
    total, count = 0.0, 0
    with evaluating(model):
        for start in range(0, batches, ranks.size):
            index = start + ranks.rank
            # A sharded model's forward needs all ranks; one that has nothing left takes a batch that does not count.
            inputs, targets, *more = data.batch(index if index < batches else 0, batch_size)
            options = model.prepare(inputs, targets, **(more[0] if more else {}))
            moved = to_device((inputs, targets, options), device)
            with autocast(device, precision):
                if classifies:
                    logits = classifier(moved[0], **moved[2])
                    loss = classifier.loss(logits, moved[1], "sum")
                else:
                    loss = model(moved[0], moved[1], reduction="sum", **moved[2])
            if index >= batches:
                continue
            total += loss.item()
            count += model.count(targets)
            if confusion is not None:
                pairs = targets * len(confusion) + logits.argmax(-1).cpu()
                confusion += torch.bincount(pairs, minlength=confusion.numel()).view_as(confusion)
    total, count_ = ranks.sums(total, count)
    if not count_:
        raise ValueError("the data to validate on has no target that takes part in the loss")
    if confusion is not None:
        confusion = torch.tensor(ranks.sums(*confusion.flatten().tolist())).long().view_as(confusion)
    return Evaluation(total / count_, int(count_), confusion)

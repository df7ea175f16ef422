"""What the ranks of test_ranks.py do, each function in every rank: by forks.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forks
import torch
from test_checkpoint import TOKENS

from fastllm import data
from fastllm.models import GPT, GPTConfig
from fastllm.trainer import TrainConfig, Trainer, checkpoint
from fastllm.trainer.optimizers import gather


class Uneven:
    """Rows of 0 to 12 targets, dealt out in order: batch i of n rows is rows i * n and following."""

    def __init__(self, steps: int, rows: int):
        batches = [data.RandomWindows(TOKENS, 12, seed=7).batch(step, rows) for step in range(steps)]
        self.inputs, targets = map(torch.cat, zip(*batches, strict=True))
        lengths = torch.arange(len(targets)) ** 2 % 13
        self.targets = targets.masked_fill(torch.arange(12) >= lengths[:, None], -100)

    def batch(self, index: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(index * size, (index + 1) * size)
        return self.inputs[rows], self.targets[rows]


def make_trainer(out: str | Path, dataset: object = None, seed: int = 0, **changes) -> Trainer:
    torch.manual_seed(seed)
    # Three ranks do not share 53 rows evenly.
    model = GPT(GPTConfig.llama(vocab_size=53, context=12, layers=2, heads=2, width=32))
    options = {"steps": 6, "batch_size": 2, "warmup": 2, "checkpoint_every": 0, "lr": 1e-2, "ema": 0.9, "keep": 0}
    config = TrainConfig(**{**options, "out": str(out), "device": "cpu", **changes})
    return Trainer(model, dataset or data.RandomWindows(TOKENS, 12), config)


def losses(out: str, changes: dict, rows: int, ranks: int) -> None:
    """Writes loss, gradient norm and tokens of each step on uneven rows, `rows` of them a step over all ranks."""
    batch = rows // ranks // changes.get("accumulate", 1)
    trainer = make_trainer(out, Uneven(4, rows), batch_size=batch, **changes)
    assert trainer.ranks.size == ranks
    found = [trainer.train_step() for _ in range(4)]
    for metrics in found:
        del metrics["data_wait"]
    every = trainer.ranks.gathered(found)
    assert all(one == found for one in every)
    if trainer.ranks.first:
        Path(out).mkdir(parents=True)
        (Path(out) / "losses.json").write_text(json.dumps(found))


def train(out: str, changes: dict) -> None:
    """Trains to the end, from the newest checkpoint where there is one, whose state must be what was loaded."""
    trainer = make_trainer(out, seed=99, **changes)
    found = checkpoint.list_checkpoints(out)
    if found:
        trainer.load(out)
        assert trainer.step == checkpoint.step_of(found[-1])
        assert trainer._files().keys() == {"model", "state", "ema"}
        for stem, named in trainer._files().items():
            mine, saved = gather(named), checkpoint.load_tensors(found[-1], stem)
            assert saved.keys() == mine.keys()
            for name, tensor in saved.items():
                assert torch.equal(mine[name], tensor), (stem, name)
    trainer.run()


def fails_on_one(out: str, parallel: str, who: int, where: str) -> None:
    """One rank meets an error behind its third step, and the others wait for it in one place or another."""
    trainer = make_trainer(out, parallel=parallel, checkpoint_every=2)
    original = getattr(trainer, where)

    def failing(*args: object) -> object:
        if trainer.step >= 3 and trainer.ranks.rank == who:
            raise ValueError(f"rank {who} has a fault")
        return original(*args)

    setattr(trainer, where, failing)
    trainer.run()


if __name__ == "__main__":  # by torchrun
    sys.exit(forks.command(sys.argv[2:], sys.argv[1]))

"""Runs that are killed: python kills.py FOLDER RANKS PARALLEL KILLS SEED

Trains once without a stop in FOLDER/straight, and once in FOLDER/killed, where all ranks are killed (SIGKILL) KILLS
times, at random moments, and the run resumed each time. Each attempt is processes of its own, forked from this one,
which has imported everything.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

# What the runs import, once for all of them: it takes seconds.
import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.utils.tensorboard
import tqdm  # noqa: F401
from forks import fork

from fastllm.trainer import command  # noqa: F401

STEPS = 260


def arguments(folder: Path, out: str, parallel: str) -> list[str]:
    """Epochs of 40 steps and less, several batches a step, dropout, an average, validations: all that a state has."""
    settings = (
        f"--steps {STEPS} --checkpoint-every 4 --eval-every 20 --eval-batches 2 --keep 2 --seed 3 --accumulate 2 "
        f"--batch-size 4 --context 16 --layers 2 --heads 2 --width 32 --dropout 0.1 --vocab-size 300 --ema 0.9 "
        f"--skip-spikes 3 --device cpu --parallel {parallel} --resume auto"
    )
    return ["train", "--text", str(folder / "text.txt"), "--out", str(folder / out), *settings.split()]


def start(folder: Path, out: str, ranks: int, parallel: str) -> list[int]:
    """Forks the ranks of an attempt; returns their process ids."""
    return fork("forks:command", [arguments(folder, out, parallel)], folder / f"{out}.log", ranks)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at_random(children: list[int], metrics: Path, dice: random.Random) -> bool:
    """Lets the ranks take a few steps, then kills them, wherever they are; False where they had ended."""
    before, more = lines(metrics), dice.randint(1, 14)
    while lines(metrics) < before + more:
        if os.waitpid(children[0], os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(dice.random() * 0.02)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    return True


def main(folder: Path, ranks: int, parallel: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    dice = random.Random(seed)
    text = "".join(f"{n} squared is {n * n}, and {n} cubed is {n**3}.\n" for n in range(160))
    (folder / "text.txt").write_text(text)
    for child in start(folder, "straight", ranks, parallel):
        assert os.waitpid(child, 0)[1] == 0, (folder / "straight.log").read_text()
    for _ in range(kills):
        children = start(folder, "killed", ranks, parallel)
        assert kill_at_random(children, folder / "killed/metrics.csv", dice), (folder / "killed.log").read_text()
    for child in start(folder, "killed", ranks, parallel):
        assert os.waitpid(child, 0)[1] == 0, (folder / "killed.log").read_text()
    print("passed", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))

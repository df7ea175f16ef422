"""Several ranks, DDP and FSDP2: their loss is that of one process, and a run goes on with another number of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import Forks

from fastllm.trainer import checkpoint
from fastllm.trainer.log import read_metrics

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

HERE = Path(__file__).parent
WAYS = ["ddp", "fsdp"]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as found:
        yield found


def run(forks: Forks, case: str, out: Path, *args: object, ranks: int = 1) -> None:
    log = out.parent / f"{out.name}.log"
    codes = forks.run(f"distributed_trainer:{case}", str(out), *args, log=log, ranks=ranks)
    assert codes == [0] * ranks, log.read_text()


@pytest.mark.parametrize("parallel", WAYS)
@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (3, 2)])
def test_the_loss_is_the_mean_over_the_targets_of_all_ranks(parallel, ranks, accumulate, forks, tmp_path):
    """Ranks, and batches, with few or no targets have no more weight than their targets."""
    run(forks, "losses", tmp_path / "one", {"accumulate": 1}, 12, 1)
    run(forks, "losses", tmp_path / "more", {"accumulate": accumulate, "parallel": parallel}, 12, ranks, ranks=ranks)
    one, more = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one", "more"))
    for alone, together in zip(one, more, strict=True):
        assert together["tokens"] == alone["tokens"]
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    assert one[0]["loss"] > one[-1]["loss"]


@pytest.fixture(scope="module")
def begun(forks, tmp_path_factory) -> Path:
    """Runs of six steps on two ranks, for each way to share."""
    folder = tmp_path_factory.mktemp("begun")
    for parallel in WAYS:
        run(forks, "train", folder / parallel, {"parallel": parallel}, ranks=2)
    return folder


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.csv")]


@pytest.mark.parametrize(
    ("before", "ranks", "after"),
    [
        ("ddp", 1, "ddp"),
        ("fsdp", 1, "ddp"),
        ("fsdp", 3, "fsdp"),
        ("fsdp", 2, "ddp"),
        ("ddp", 3, "fsdp"),
        pytest.param("ddp", 3, "ddp", marks=pytest.mark.slow),
    ],
)
def test_goes_on_with_other_ranks(before, ranks, after, begun, forks, tmp_path):
    """All that was saved is loaded to the bit (that is seen by each rank), and training goes on."""
    out = Path(shutil.copytree(begun / before, tmp_path / "run"))
    run(forks, "train", out, {"steps": 40, "parallel": after}, ranks=ranks)
    checkpoint.verify(out / "checkpoint-40")
    assert json.loads((out / "checkpoint-40/state.json").read_text())["ranks"] == ranks
    found = losses(out)
    assert len(found) == 40
    assert sum(found[-5:]) < sum(found[:5]) - 1


@pytest.mark.parametrize("parallel", WAYS)
def test_one_rank_with_twice_the_batches_goes_on_alike(parallel, begun, forks, tmp_path):
    """2 ranks x 1 batch a step and 1 rank x 2 batches see the same rows."""
    out = Path(shutil.copytree(begun / parallel, tmp_path / "run"))
    run(forks, "train", out, {"steps": 12, "accumulate": 2, "schedule": "constant"})
    straight = Path(shutil.copytree(begun / parallel, tmp_path / "straight"))
    run(forks, "train", straight, {"steps": 12, "parallel": parallel, "schedule": "constant"}, ranks=2)
    assert losses(out) == pytest.approx(losses(straight), rel=1e-5)
    assert len(losses(out)) == 12


@pytest.mark.parametrize(("parallel", "who"), [("ddp", 0), ("fsdp", 1)])
@pytest.mark.parametrize("where", ["_load", "learning_rate", "_save"])
def test_an_error_on_one_rank_ends_all(parallel, who, where, forks, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    codes = forks.run("distributed_trainer:fails_on_one", str(out), parallel, who, where, log=log, ranks=2, timeout=30)
    assert codes == [1, 1], log.read_text()
    assert f"ValueError: rank {who} has a fault" in log.read_text()
    checkpoint.verify(checkpoint.find_checkpoint(out))


# By torchrun.

OPTIONS = (
    "--checkpoint-every 4 --eval-every 10 --batch-size 4 --context 12 --layers 1 --heads 2 --width 16 --dropout 0.1 "
    "--vocab-size 300 --device cpu --resume auto"
)
SLOWER = """
import time
from fastllm.trainer.trainer import Trainer
original = Trainer._begin_step
def slower(self, stop):
    time.sleep(0.02)
    {rest}
    return original(self, stop)
Trainer._begin_step = slower
"""


def torchrun(out: Path, steps: int, *more: str, rest: str = "pass", ranks: int = 2) -> subprocess.Popen:
    text = out.parent / "text.txt"
    text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(200)))
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    what = [str(HERE / "distributed_trainer.py"), SLOWER.format(rest=rest), "train", "--text", str(text)]
    options = ["--out", str(out), "--steps", str(steps), *OPTIONS.split(), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *launcher, *what, *options], env=environment, **pipes)


def wait_for_steps(process: subprocess.Popen, out: Path, count: int) -> None:
    while not (out / "metrics.csv").exists() or (out / "metrics.csv").read_bytes().count(b"\n") <= count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("to", "parallel"), [("ranks", "ddp"), ("launcher", "fsdp")])
def test_stopped_under_torchrun(to, parallel, tmp_path):
    out = tmp_path / "run"
    process = torchrun(out, 2000, "--parallel", parallel)
    wait_for_steps(process, out, 6)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    for child in [*map(int, children)] if to == "ranks" else [process.pid]:
        os.kill(child, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    if to == "ranks":
        assert process.returncode == 0, said
    assert "SIGTERM: finishing the step and saving" in said
    path = checkpoint.find_checkpoint(out)
    assert f"stopped by SIGTERM: {path}; --resume goes on" in said
    checkpoint.verify(path)
    steps = checkpoint.step_of(path) + 3
    process = torchrun(out, steps, "--parallel", parallel)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    checkpoint.verify(out / f"checkpoint-{steps}")
    assert len(losses(out)) == steps


@pytest.mark.slow
def test_an_error_on_one_rank_ends_torchrun(tmp_path):
    out = tmp_path / "run"
    rest = "if self.step == 5 and self.ranks.rank == 1: raise ValueError('it has a fault')"
    process = torchrun(out, 2000, rest=rest)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "fastllm: error: it has a fault\n" in said
    assert checkpoint.find_checkpoint(out).name == "checkpoint-4"
    checkpoint.verify(out / "checkpoint-4")

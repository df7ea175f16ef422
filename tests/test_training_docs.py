"""docs/training.md: every command of it runs, in its order, and what the page says of it is so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastllm.trainer.config import RunConfig
from fastllm.trainer.log import read_metrics

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
COMMANDS = {"fastllm": "-m fastllm", "torchrun": "-m torch.distributed.run", "python": ""}


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_all_that_looks_like_a_command_is_run():
    assert PAGE.count("```") == 2 * len(blocks())
    commands = [line for block in blocks() for line in block.splitlines()]
    assert sum(line.startswith(("fastllm", "torchrun")) for line in commands) > 15


def test_options_are_those_of_the_command():
    from fastllm import cli

    parser = cli.parser()
    (commands,) = (a for a in parser._actions if a.dest == "command")
    known = {option for name in ("train", "eval", "generate", "report") for a in commands.choices[name]._actions
             for option in a.option_strings}  # fmt: skip
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"--[a-z][a-z0-9-]*", prose)) <= known


@pytest.mark.slow
def test_every_command(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in COMMANDS.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    folder = tmp_path / "folder"
    folder.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    said = []
    for block in blocks():
        result = subprocess.run(
            ["bash", "-e", "-c", block], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, block + result.stdout + result.stderr
        said.append(result.stdout)
    dry, rate, first, _, resumed, *_ = said[1:]
    assert all(line in dry for line in ("memory of a rank, estimated:", "a step: ", "the run: 60 steps"))
    assert re.match(r"--lr [\d.e-]+: the loss fell steepest there\. runs/first/learning_rates\.png", rate)
    assert re.search(r"^runs/first/checkpoint-60\nThe", first, re.MULTILINE)
    assert re.search(r"^loss [\d.]+ nats/token, perplexity [\d.]+, [\d.]+ bits/byte", first, re.MULTILINE)
    assert "resumed at step 60" in resumed
    assert resumed.endswith("runs/first/checkpoint-80\n")

    runs = folder / "runs"
    table = re.findall(r"^\| (`.+?`) \|", PAGE.partition("In `runs/first` are")[2].partition("```")[0], re.MULTILINE)
    for name in re.findall(r"`([^`]+)`", " ".join(table)):
        path = runs / "first" / name
        # After the resumption, checkpoint-60 has made way for newer ones, or is the best.
        assert path.exists() or name == "checkpoint-60/", name
    assert sorted(path.name for path in (runs / "first/samples").iterdir()) == [
        f"step-{step}.txt" for step in (0, 20, 40, 60, 80)
    ]
    second = RunConfig.from_yaml(runs / "second/config.yaml")
    assert (second.train.optimizer, second.train.checkpoint_every, second.train.steps) == ("muon", 20, 40)
    assert [row["step"] for row in read_metrics(runs / "two/metrics.csv")] == list(range(1, 36))
    assert "2 x cpu (ddp)" in said[7]
    assert "2 x cpu (fsdp)" in said[7]
    assert "resumed at step 20" in said[7]
    assert "resumed at step 30" in said[7]
    assert "new weights: " in said[9]
    assert json.loads((runs / "classes/confusion.json").read_text())["labels"] == ["0", "1", "2"]
    assert re.search(r"accuracy 0\.\d+, 200 targets, 200 rows\n$", said[9])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "second" in page

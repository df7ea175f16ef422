"""metrics.csv, TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from fastllm.trainer.log import COLUMNS, MetricsLog, read_metrics

VALUES = {name: 0.125 * i for i, name in enumerate(COLUMNS[1:], start=1)}


class FakeRun:
    def __init__(self, **given):
        self.given, self.id, self.logged, self.finished = given, given["id"] or "abc123", [], False

    def log(self, values, step):
        self.logged.append((step, dict(values)))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module that keeps what runs were started in `runs`."""
    module = SimpleNamespace(runs=[], Error=type("Error", (Exception,), {}))
    module.init = lambda **given: module.runs.append(FakeRun(**given)) or module.runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def no_board(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_every_column_is_read_back(tmp_path, no_board):
    log = MetricsLog(tmp_path)
    log.write(1, VALUES)
    log.write(2, {"loss": math.nan, "accuracy": 0.1})
    log.close()
    first, second = read_metrics(tmp_path / "metrics.csv")
    assert first == {"step": 1, **VALUES}
    assert math.isnan(second.pop("loss"))
    assert second == {"step": 2, "accuracy": 0.1}


def test_columns_of_other_versions_are_kept(tmp_path, no_board):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,perplexity\n1,2.5,12\n2,2.25,\n", encoding="utf-8")
    log = MetricsLog(tmp_path, step=2)
    log.write(3, VALUES)
    log.close()
    assert read_metrics(path) == [
        {"step": 1, "loss": 2.5, "perplexity": 12},
        {"step": 2, "loss": 2.25},
        {"step": 3, **VALUES},
    ]


def test_a_name_that_is_no_column_is_an_error(tmp_path, no_board):
    log = MetricsLog(tmp_path)
    with pytest.raises(ValueError, match="perplexity"):
        log.write(1, {"perplexity": 12.0})
    log.close()


def test_what_was_logged_survives_a_kill(tmp_path):
    code = f"""
import os, pathlib
from fastllm.trainer.log import MetricsLog
log = MetricsLog(pathlib.Path({str(tmp_path)!r}))
for step in range(1, 8):
    log.write(step, {{"loss": 1 / step}})
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == list(range(1, 8))


def test_tensorboard_has_every_value_with_its_time(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    clock = iter(1_000 + 0.4 * i for i in range(10_000))
    monkeypatch.setattr("fastllm.trainer.log.time", SimpleNamespace(time=lambda: next(clock)))  # three steps at a time
    log = MetricsLog(tmp_path)
    for step in range(1, 9):
        log.write(step, {name: value * step for name, value in VALUES.items()})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(VALUES)
    for name, value in VALUES.items():
        found = [(event.step, event.value, event.wall_time) for event in events.Scalars(name)]
        expected = [(step, value * step, 1_000 + 0.4 * (step - 1)) for step in range(1, 9)]
        assert found == [pytest.approx(row) for row in expected]


def test_a_row_costs_little(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, VALUES)
    started = time.thread_time()
    for step in range(2, 1002):
        log.write(step, VALUES)
    spent = time.thread_time() - started
    log.close()
    assert spent / 1000 < 1e-3  # a tenth of it on a quiet machine


def test_wandb(tmp_path, wandb, no_board):
    out = tmp_path / "project?" / "a run"
    out.mkdir(parents=True)
    log = MetricsLog(out, wandb=True)
    log.write(1, {"loss": 2.0})
    log.write(2, VALUES)
    log.close()
    (run,) = wandb.runs
    assert run.given == {"project": "project-", "name": "a run", "dir": str(out), "id": None, "resume": None}
    assert run.logged == [(1, {"loss": 2.0}), (2, VALUES)]
    assert run.finished

    MetricsLog(out, step=2, wandb=True).close()
    assert (wandb.runs[1].given["id"], wandb.runs[1].given["resume"]) == ("abc123", "allow")
    MetricsLog(out, wandb=True).close()
    assert wandb.runs[2].given["id"] is None, "a run from the start is another one"


def test_without_wandb(tmp_path, wandb, monkeypatch, no_board):
    MetricsLog(tmp_path).close()
    assert not wandb.runs

    def refuse(**given):
        raise wandb.Error("no API key")

    wandb.init = refuse
    with pytest.raises(ValueError, match=f"cannot log {tmp_path}: no API key"):
        MetricsLog(tmp_path, wandb=True)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r'wandb is not installed; .*"fastllm-kernels\[wandb\]"'):
        MetricsLog(tmp_path, wandb=True)

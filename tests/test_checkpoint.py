"""Checkpoints: whole or not there, and a resumed run ends with the bits of one that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from fastllm import data
from fastllm.models import GPT, GPTConfig
from fastllm.trainer import TrainConfig, Trainer, checkpoint
from fastllm.trainer.evaluation import Evaluation
from fastllm.trainer.log import read_metrics

TOKENS = (torch.arange(3000) ** 2 + torch.arange(3000) // 7) % 53
TENSORS = ("model.safetensors", "ema.safetensors", "state.safetensors")
UNTIMED = dict.fromkeys(("tokens_per_second", "data_wait"), 0.0)


def make_trainer(out: Path, seed: int = 0, steps: int = 6, **changes) -> Trainer:
    torch.manual_seed(seed)
    model = GPT(GPTConfig.gpt2(vocab_size=53, context=12, layers=2, heads=2, width=32, dropout=0.2))
    config = TrainConfig(
        steps=steps,
        batch_size=4,
        accumulate=2,
        warmup=2,
        out=str(out),
        device="cpu",
        **{"checkpoint_every": 3, **changes},
    )
    validation = data.SequentialWindows(TOKENS[:200], 12)
    return Trainer(model, data.RandomWindows(TOKENS, 12), config, validation=validation)


def final_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {**trainer.model.state_dict(), **trainer.optimizer.state_tensors()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_is_straight_bit_for_bit(tmp_path, optimizer):
    options = {"ema": 0.9, "skip_spikes": 5.0, "eval_every": 2, "optimizer": optimizer}
    straight = make_trainer(tmp_path / "straight", **options)
    straight.run()
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoint-6")
    resumed = make_trainer(tmp_path / "resumed", seed=99, **options)
    resumed.load(tmp_path / "resumed")
    assert resumed.step == 3
    resumed.run()
    assert_same_bits(final_state(resumed), final_state(straight))
    for name in (*TENSORS, "state.json"):
        files = [tmp_path / run / "checkpoint-6" / name for run in ("straight", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    logs = [
        [{**row, **UNTIMED} for row in read_metrics(tmp_path / name / "metrics.csv")]
        for name in ("straight", "resumed")
    ]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0] if "validation_loss" in row] == [2, 4, 6]
    assert len(logs[0]) == 6


def test_other_random_numbers_would_be_noticed(tmp_path, monkeypatch):
    """The test above can fail: dropout makes the bits depend on the numbers that each step seeds anew."""
    straight = make_trainer(tmp_path)
    straight.run()
    resumed = make_trainer(tmp_path, seed=99)
    resumed.load(tmp_path / "checkpoint-3")
    monkeypatch.setattr(resumed, "_seed", lambda: None)
    for _ in range(3):
        resumed.train_step()
    assert any(
        not torch.equal(a, b) for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "moment", ["safetensors.torch.save_file", "fastllm.trainer.checkpoint._write_json", "os.fsync", "os.replace"]
)
def test_an_interrupted_write_leaves_the_checkpoint_before(tmp_path, monkeypatch, moment, asynchronous):
    trainer = make_trainer(tmp_path, async_checkpoint=asynchronous)
    for _ in range(2):
        trainer.train_step()
    good = trainer.save()
    trainer.train_step()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(moment, fail)
        with pytest.raises(OSError, match=f"disk full; {good} is whole, to be resumed from"):
            trainer.save()
    assert checkpoint.list_checkpoints(tmp_path) == [good]
    assert names(tmp_path) == ["checkpoint-2"]
    assert trainer.save().name == "checkpoint-3"  # what the failure left is no obstacle
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_what_a_killed_run_left_is_removed(tmp_path):
    """In the midst of writing one checkpoint, and of deleting another."""
    for name in (".checkpoint-7.partial", ".checkpoint-1.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert checkpoint.list_checkpoints(tmp_path) == []
    trainer = make_trainer(tmp_path)
    trainer.save()
    assert names(tmp_path) == ["checkpoint-0"]


def test_every_file_is_synced_before_the_name_appears(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, ema=0.9)
    events = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def spy_replace(source, target):
        events.append(f"-> {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    trainer.save()
    at = events.index("-> checkpoint-0")
    assert set(events[:at]) == {*TENSORS, "state.json", "config.json", "checksums.json", ".checkpoint-0.partial"}
    assert events[at + 1 :] == [tmp_path.name]


class Held:
    """A disk on which nothing is written until it is let go, or which then fails."""

    def __init__(self, monkeypatch, error: str = ""):
        self.free, self.original, self.error = threading.Event(), checkpoint._write, error
        monkeypatch.setattr(checkpoint, "_write", self)

    def __call__(self, *args):
        self.free.wait(30)
        if self.error:
            raise OSError(28, self.error)
        self.original(*args)


def test_training_goes_on_meanwhile(tmp_path, monkeypatch):
    """What is written is the state of the step that was saved, not of the one that training is at by then."""
    straight = make_trainer(tmp_path / "straight", async_checkpoint=False, ema=0.9)
    trainer = make_trainer(tmp_path / "held", ema=0.9)
    for one in (straight, trainer):
        one.train_step()
    straight.save()
    disk = Held(monkeypatch)
    trainer._save()
    for _ in range(3):
        trainer.train_step()
    assert not checkpoint.list_checkpoints(tmp_path / "held")
    disk.free.set()
    trainer._writer.wait()
    for name in TENSORS:
        files = [tmp_path / run / "checkpoint-1" / name for run in ("straight", "held")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


@pytest.mark.parametrize(("every", "last"), [(2, 4), (4, 6), (6, 6)])
def test_a_failure_while_training_goes_on_is_not_lost(tmp_path, monkeypatch, every, last):
    """The next save says it, or the end."""
    disk = Held(monkeypatch, "No space left on device")
    disk.free.set()
    trainer = make_trainer(tmp_path, checkpoint_every=every)
    with pytest.raises(OSError, match="No space left on device; the run has no whole checkpoint yet") as caught:
        trainer.run()
    assert caught.value.filename == str(tmp_path / f"checkpoint-{every}")
    assert trainer.step == last
    assert not checkpoint.list_checkpoints(tmp_path)


@pytest.mark.parametrize("full", [False, True])
def test_a_run_that_fails_meanwhile_ends_its_checkpoint(tmp_path, monkeypatch, capsys, full):
    trainer = make_trainer(tmp_path, checkpoint_every=2)
    disk = Held(monkeypatch, "No space left on device" if full else "")
    step = trainer._begin_step

    def fail(stop):
        if trainer.step == 3:
            threading.Timer(0.2, disk.free.set).start()
            raise FloatingPointError("loss nan")
        return step(stop)

    monkeypatch.setattr(trainer, "_begin_step", fail)
    with pytest.raises(FloatingPointError, match="loss nan"):
        trainer.run()
    assert ("the last checkpoint was not written: [Errno 28] No space left" in capsys.readouterr().err) == full
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ([] if full else ["checkpoint-2"])


def test_keeps_the_newest(tmp_path):
    make_trainer(tmp_path, steps=12, checkpoint_every=1, keep=3).run()
    kept = [f"checkpoint-{n}" for n in (10, 11, 12)]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == kept
    assert not list(tmp_path.glob(".*"))
    make_trainer(tmp_path / "all", steps=3, checkpoint_every=1, keep=0).run()
    assert len(checkpoint.list_checkpoints(tmp_path / "all")) == 3


def with_losses(trainer: Trainer, monkeypatch, losses: dict[int, float]) -> Trainer:
    """Whose validations find these losses, by step."""
    trainer.saved["labels"] = None
    monkeypatch.setattr("fastllm.trainer.trainer.evaluate", lambda *_, **__: Evaluation(losses[trainer.step], 1))
    return trainer


@pytest.mark.parametrize("keep", [1, 2])
def test_keeps_the_best(tmp_path, monkeypatch, keep):
    """And a resumed run keeps it, until there is a better one."""
    losses = {1: float("nan"), 2: 3.0, 3: 1.0, 4: 2.0, 5: 1.5, 6: 4.0, 7: 5.0, 8: 0.5, 9: 0.7, 10: 0.6}
    options = {"checkpoint_every": 1, "eval_every": 1, "keep": keep}
    with_losses(make_trainer(tmp_path, **options), monkeypatch, losses).run()
    newest = [f"checkpoint-{n}" for n in range(7 - keep, 7)]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-3", *newest]
    resumed = with_losses(make_trainer(tmp_path, steps=7, **options), monkeypatch, losses)
    resumed.load(tmp_path)
    resumed.run()
    newest = [f"checkpoint-{n}" for n in range(8 - keep, 8)]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-3", *newest]
    assert json.loads((tmp_path / "checkpoint-7/state.json").read_text())["best"] == 1.0
    resumed = with_losses(make_trainer(tmp_path, steps=10, **options), monkeypatch, losses)
    resumed.load(tmp_path)
    resumed.run()
    kept = [f"checkpoint-{n}" for n in sorted({8, *range(11 - keep, 11)})]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == kept


def test_patience_goes_over_a_resume(tmp_path, monkeypatch):
    losses = {n: 1.0 if n == 2 else 2.0 for n in range(1, 9)}
    options = {"checkpoint_every": 1, "eval_every": 1, "patience": 4, "steps": 8}
    straight = with_losses(make_trainer(tmp_path / "straight", **options), monkeypatch, losses)
    straight.run()
    first = with_losses(make_trainer(tmp_path / "resumed", **{**options, "steps": 4}), monkeypatch, losses)
    first.run()
    resumed = with_losses(make_trainer(tmp_path / "resumed", **options), monkeypatch, losses)
    resumed.load(tmp_path / "resumed")
    resumed.run()
    assert straight.step == resumed.step == 6
    assert resumed.stopped == "4 validations without a loss below 1.0000; more --patience"


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_load_model_gives_the_model_that_was_saved(tmp_path, ema):
    trainer = make_trainer(tmp_path, ema=ema)
    trainer.tokenizer = data.train_tokenizer(["some text"], 260)
    trainer.run()
    model, tokenizer = checkpoint.load_model(tmp_path)
    assert not model.training
    assert tokenizer.to_str() == trainer.tokenizer.to_str()
    assert model.config == trainer.model.config
    with trainer.averaged():
        assert_same_bits(model.state_dict(), trainer.model.state_dict())
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True)]
    assert all(same) == (not ema)


def test_weights_that_share_memory(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.b.weight = self.a.weight

    saved, loaded = Tied(), Tied()
    tensors = {"model": checkpoint.weights_of(saved), "state": {}}
    assert sorted(tensors["model"]) == ["a.bias", "a.weight", "b.bias"]
    path = checkpoint.save_checkpoint(tmp_path, 1, tensors, {}, {})
    checkpoint.load_weights(path, loaded)
    assert_same_bits(loaded.state_dict(), saved.state_dict())
    assert loaded.b.weight is loaded.a.weight


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        checkpoint.load_model(tmp_path / "nowhere")
    trainer = make_trainer(tmp_path)
    trainer.train_step()
    path = trainer.save()
    other = make_trainer(tmp_path)
    other.model = GPT(GPTConfig.gpt2(vocab_size=53, context=12, layers=2, heads=2, width=64))
    with pytest.raises(ValueError, match=r"model.safetensors cannot be loaded"):
        other.load(path)
    for name in ("state.safetensors", "model.safetensors"):
        (path / name).write_bytes((path / name).read_bytes()[:100])
        checkpoint.write_checksums(path)
        with pytest.raises(ValueError, match=f"{name} cannot be loaded"):
            make_trainer(tmp_path).load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged: it has 1 bytes, 1,\d\d\d were written"):
        checkpoint.load_model(path)
    checkpoint.write_checksums(path)
    with pytest.raises(ValueError, match=r"config.json is not a checkpoint's"):
        checkpoint.load_model(path)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"optimizer": "sgd"}, "the state is that of optimizer 'adamw', not of 'sgd'"),
        ({}, {"ema": 0.9}, "the run keeps no average of its weights: give ema=0"),
        ({"ema": 0.9}, {}, "the run keeps an average of its weights, which ema=0 would drop"),
        ({"optimizer": "sgd", "momentum": 0.5}, {}, "the state is that of optimizer 'sgd', not of 'adamw'"),
    ],
)
def test_what_a_resumed_run_cannot_change(tmp_path, before, after, message):
    trainer = make_trainer(tmp_path, **before)
    trainer.train_step()
    path = trainer.save()
    with pytest.raises(ValueError, match=f"{path}/state.json cannot be loaded: {message}"):
        make_trainer(tmp_path, **after).load(path)


def test_other_tokens_are_refused(tmp_path):
    path = make_trainer(tmp_path).save()
    other = make_trainer(tmp_path)
    other.data = data.RandomWindows(TOKENS.flip(0), 12)
    with pytest.raises(ValueError, match=f"{path} was trained on other tokens"):
        other.load(path)


def test_a_step_beyond_the_end_and_runs_in_the_way(tmp_path):
    make_trainer(tmp_path).run()
    with pytest.raises(FileExistsError, match="checkpoint-6 is there already: resume it"):
        make_trainer(tmp_path).run()
    older = make_trainer(tmp_path)
    older.load(tmp_path / "checkpoint-3")
    with pytest.raises(FileExistsError, match="checkpoint-6 is there already: resume it"):
        older.run()
    shorter = make_trainer(tmp_path, steps=4)
    shorter.load(tmp_path)
    before = final_state(shorter)
    shorter.run()  # has nothing to do
    assert shorter.step == 6
    assert_same_bits(final_state(shorter), before)
    assert len(read_metrics(tmp_path / "metrics.csv")) == 6

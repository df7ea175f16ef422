"""Checkpoints: whole or not there, and a resumed run ends with the bits of one that was never stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastllm import data
from fastllm.models import GPT, GPTConfig
from fastllm.trainer import TrainConfig, Trainer, checkpoint
from fastllm.trainer.log import read_metrics

ROOT = Path(__file__).parent.parent
TOKENS = (torch.arange(3000) ** 2 + torch.arange(3000) // 7) % 53


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
    moments = {
        f"{index}.{name}": value
        for index, state in trainer.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    return {**trainer.model.state_dict(), **moments}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_resumed_is_straight_bit_for_bit(tmp_path):
    straight = make_trainer(tmp_path / "straight")
    straight.run()
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoint-6")
    resumed = make_trainer(tmp_path / "resumed", seed=99)
    resumed.load(tmp_path / "resumed")
    assert resumed.step == 3
    resumed.run()
    assert_same_bits(final_state(resumed), final_state(straight))
    logs = [
        [{**row, "tokens_per_second": 0} for row in read_metrics(tmp_path / name / "metrics.csv")]
        for name in ("straight", "resumed")
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 6


def test_load_without_the_random_state_would_be_noticed(tmp_path):
    """The test above can fail: dropout makes the bits depend on torch's generator."""
    straight = make_trainer(tmp_path)
    straight.run()
    resumed = make_trainer(tmp_path, seed=99)
    resumed.load(tmp_path / "checkpoint-3")
    torch.manual_seed(5)
    for _ in range(3):
        resumed.train_step()
    assert any(
        not torch.equal(a, b) for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    )


@pytest.mark.slow
def test_killed_in_the_middle_then_resumed(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} squared is {n * n}, and {n} cubed is {n**3}.\n" for n in range(400)))

    def command(name: str, *more: str) -> list[str]:
        settings = "--steps 120 --checkpoint-every 4 --eval-every 50 --seed 3"
        shape = (
            "--context 16 --layers 2 --heads 2 --width 32 --dropout 0.1 --vocab-size 300 --batch-size 4 --device cpu"
        )
        return [
            *(sys.executable, "-m", "fastllm", "train", "--text", str(text), "--out", str(tmp_path / name)),
            *(more or f"{settings} {shape}".split()),
        ]

    options = {
        "env": {**os.environ, "PYTHONPATH": str(ROOT)},
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    subprocess.run(command("straight"), check=True, **options)
    process = subprocess.Popen(command("killed"), **options)
    deadline = time.monotonic() + 60
    while not checkpoint.list_checkpoints(tmp_path / "killed") and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    last = checkpoint.find_checkpoint(tmp_path / "killed")
    assert last.name != "checkpoint-120", "it was killed after it had ended"
    subprocess.run(command("killed", "--resume"), check=True, **options)
    straight, killed = (tmp_path / name / "checkpoint-120" for name in ("straight", "killed"))
    for name in ("model.safetensors", "tokenizer.json"):
        assert (straight / name).read_bytes() == (killed / name).read_bytes(), name
    states = [torch.load(path / "state.pt", weights_only=True)["optimizer"]["state"] for path in (straight, killed)]
    for index in states[0]:
        assert_same_bits(states[0][index], states[1][index])
    losses = [[row["loss"] for row in read_metrics(path.parent / "metrics.csv")] for path in (straight, killed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 120


@pytest.mark.parametrize("moment", ["save_model", "save", "replace"])
def test_an_interrupted_write_leaves_the_checkpoint_before(tmp_path, monkeypatch, moment):
    trainer = make_trainer(tmp_path)
    for _ in range(2):
        trainer.train_step()
    good = trainer.save()
    trainer.train_step()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if moment == "save_model":
            patch.setattr("safetensors.torch.save_model", fail)
        elif moment == "save":
            patch.setattr(torch, "save", fail)
        else:
            patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            trainer.save()
    assert checkpoint.list_checkpoints(tmp_path) == [good]
    assert trainer.save().name == "checkpoint-3"  # what the failure left is no obstacle
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_every_file_is_synced_before_the_name_appears(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
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
    assert set(events[:at]) == {"model.safetensors", "state.pt", "config.json", ".checkpoint-0.partial"}
    assert events[at + 1 :] == [tmp_path.name]


def test_keeps_the_newest(tmp_path):
    make_trainer(tmp_path, steps=12, checkpoint_every=1, keep=3).run()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (10, 11, 12)]
    assert not list(tmp_path.glob(".*"))
    make_trainer(tmp_path / "all", steps=3, checkpoint_every=1, keep=0).run()
    assert len(checkpoint.list_checkpoints(tmp_path / "all")) == 3


def test_load_model_gives_the_model_that_was_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.tokenizer = data.train_tokenizer(["some text"], 260)
    trainer.run()
    model, tokenizer = checkpoint.load_model(tmp_path)
    assert not model.training
    assert tokenizer.to_str() == trainer.tokenizer.to_str()
    assert model.config == trainer.model.config
    assert_same_bits(model.state_dict(), trainer.model.state_dict())


def test_weights_that_share_memory(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.b.weight = self.a.weight

    saved, loaded = Tied(), Tied()
    path = checkpoint.save_checkpoint(tmp_path, 1, saved, {}, {})
    checkpoint.load_weights(path, loaded)
    assert_same_bits(loaded.state_dict(), saved.state_dict())
    assert loaded.b.weight is loaded.a.weight


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        checkpoint.load_model(tmp_path / "nowhere")
    path = make_trainer(tmp_path).save()
    other = make_trainer(tmp_path)
    other.model = GPT(GPTConfig.gpt2(vocab_size=53, context=12, layers=2, heads=2, width=64))
    with pytest.raises(ValueError, match=r"model.safetensors cannot be loaded"):
        other.load(path)
    for name in ("state.pt", "model.safetensors"):
        (path / name).write_bytes((path / name).read_bytes()[:100])
        with pytest.raises(ValueError, match=f"{name} cannot be loaded"):
            make_trainer(tmp_path).load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not a checkpoint's"):
        checkpoint.load_model(path)

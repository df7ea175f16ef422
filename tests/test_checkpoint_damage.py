"""Disks that are full and files that are damaged: an error that names the file, and a checkpoint to go on from."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from test_checkpoint import TOKENS

from fastllm import cli, data
from fastllm.models import GPT, GPTConfig
from fastllm.trainer import TrainConfig, Trainer, check_memory, checkpoint, saved_config
from fastllm.trainer.log import MetricsLog, read_metrics
from fastllm.trainer.memory import count_parameters


def small_trainer(out: Path, width: int = 16) -> Trainer:
    torch.manual_seed(0)
    model = GPT(GPTConfig.gpt2(vocab_size=300, context=12, layers=1, heads=2, width=width))
    config = TrainConfig(steps=3, batch_size=2, checkpoint_every=1, keep=0, out=str(out), device="cpu")
    tokenizer = data.train_tokenizer(["the cat sat on the mat"], 300)
    return Trainer(model, data.RandomWindows(TOKENS, 12), config, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with checkpoints 1, 2 and 3."""
    out = tmp_path_factory.mktemp("run")
    small_trainer(out).run()
    return out


@contextlib.contextmanager
def files_up_to(size: int):
    """A disk that takes no more of a file: Python ignores the signal, and the system says "File too large"."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def sizes(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (run / "checkpoint-3").iterdir()}


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "config.json", "tokenizer.json"])
def test_a_full_disk(name, run, tmp_path, monkeypatch):
    """Whichever file meets it: one kind of error, with the system's word and the checkpoint that is left."""
    trainer = small_trainer(tmp_path)
    trainer.train_step()
    good = trainer.save()
    trainer.train_step()
    before = sorted(path.name for path in good.iterdir())
    original = checkpoint.writing

    @contextlib.contextmanager
    def full(path: Path):  # for this file alone
        limit = sizes(run)[name] // 2 if path.name == name else 1 << 40
        with original(path), files_up_to(limit):
            yield

    monkeypatch.setattr(checkpoint, "writing", full)
    with pytest.raises(OSError, match=f"File too large; {good} is whole, to be resumed from") as caught:
        trainer.save()
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert sorted(path.name for path in good.iterdir()) == before


def test_a_full_disk_before_the_first_checkpoint(tmp_path):
    trainer = small_trainer(tmp_path)
    with files_up_to(1000), pytest.raises(OSError, match="File too large; the run has no checkpoint yet"):
        trainer.save()
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small_trainer(tmp_path).save()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sample_every", [0, 1])
def test_logs_and_samples_on_a_full_disk(tmp_path, sample_every, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no TensorBoard
    trainer = small_trainer(tmp_path)
    trainer.config.checkpoint_every, trainer.config.steps = 0, 9
    trainer.config.sample_every, trainer.config.sample_tokens = sample_every, 4
    name = "samples/step-0.txt" if sample_every else "metrics.csv"
    with files_up_to(0 if sample_every else 100), pytest.raises(OSError, match="File too large") as caught:
        trainer.run()
    assert caught.value.filename == str(tmp_path / name)


def test_tensorboard_on_a_full_disk(tmp_path, capfd):
    pytest.importorskip("tensorboard")
    log = MetricsLog(tmp_path)

    def write() -> None:
        for step in range(1, 100):
            log.write(step, {"loss": 1.0})  # a few bytes in the table, many in TensorBoard's file
        log.close()

    with files_up_to(1500), pytest.raises(OSError, match="File too large") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "tensorboard")
    assert not capfd.readouterr().err, "no traceback of TensorBoard's thread"
    with contextlib.suppress(OSError):
        log.close()


def load(name: str, path: Path) -> None:
    """Reads the file of that name of the newest checkpoint."""
    if name == "state.pt":
        small_trainer(path).load(path)
    elif name == "tokenizer.json":
        checkpoint.load_checkpoint_tokenizer(checkpoint.find_checkpoint(path))
    else:
        checkpoint.load_model(path)


FILES = ["config.json", "model.safetensors", "state.pt", "tokenizer.json"]
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "noise": lambda path: path.write_bytes(b"x" + os.urandom(path.stat().st_size)),
    "all ones": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "brackets": lambda path: path.write_bytes(b"[" * 100_000),
    "a list": lambda path: path.write_bytes(b"[1]"),
    "an empty object": lambda path: path.write_bytes(b"{}"),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "UTF-16": lambda path: path.write_bytes("\ufeff{}".encode("UTF-16LE")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name, damage, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run/checkpoint-3" / name
    DAMAGES[damage](file)
    with pytest.raises((OSError, ValueError)) as caught:
        load(name, tmp_path / "run")
    message = cli._message(caught.value)
    assert message.startswith(str(file))
    assert f"; the checkpoint before it is {tmp_path / 'run/checkpoint-2'}: delete" in message
    assert len(message.replace(str(tmp_path), "")) < 500
    assert "weights_only" not in message


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"model": {"width": "wide"}}, "width"),
        ("config.json", {"model": {"dropout": "some"}}, "not supported between"),
        ("config.json", {"model": {"depth": 3}}, "unknown field depth"),
        ("config.json", {"model": {"layers": 10**9}}, "takes more than .* GiB"),
        ("config.json", {"model": 3}, 'it lacks "model"'),
        ("config.json", {"train": {"speed": 3}}, "unexpected keyword argument 'speed'"),
        ("config.json", {"train": {"steps": "many"}}, "not supported between"),
        ("config.json", {"train": 3}, "must be a mapping"),
        ("state.pt", {"step": -1}, "its step is -1"),
        ("state.pt", {"step": None}, "its step is None"),
        ("state.pt", {"optimizer": {}}, "it lacks"),
        ("state.pt", {"optimizer": 3}, "cannot be loaded"),
        ("state.pt", {"rng_cpu": torch.zeros(3)}, "cannot be loaded"),
    ],
)
def test_a_value_that_does_not_fit_is_named(name, change, message, run, tmp_path):
    shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
    file = tmp_path / "checkpoint-3" / name
    if name == "config.json":
        config = json.loads(file.read_text())
        for part, values in change.items():
            config[part] = {**config[part], **values} if isinstance(values, dict) else values
        file.write_text(json.dumps(config))
    else:
        torch.save({**torch.load(file, weights_only=True), **change}, file)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        saved_config(tmp_path / "checkpoint-3") if "train" in change else load(name, tmp_path)


def test_another_models_files_are_named(run, tmp_path):
    trainer = small_trainer(tmp_path / "other", width=32)
    trainer.train_step()
    other = trainer.save()
    for name, message in (("model.safetensors", "size mismatch"), ("state.pt", "it is another model's")):
        path = shutil.copytree(run / "checkpoint-3", tmp_path / name)
        state = torch.load(path / "state.pt", weights_only=True)
        shutil.copy(other / name, path / name)
        if name == "state.pt":
            torch.save({**torch.load(path / name, weights_only=True), "data": state["data"]}, path / name)
        with pytest.raises(ValueError, match=f"{name} cannot be loaded: .*{message}"):
            small_trainer(tmp_path / "new").load(path)


def test_weights_that_are_not_finite_are_named(run, tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.model.embedding.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be loaded: embedding.weight has values that are"):
        checkpoint.load_model(trainer.save())


def test_a_byte_order_mark_in_a_checkpoint(run, tmp_path):
    path = shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
    for name in ("config.json", "tokenizer.json"):
        (path / name).write_text((path / name).read_text(encoding="utf-8"), encoding="utf-8-sig")
    model, tokenizer = checkpoint.load_model(path)
    assert (model.config.width, tokenizer.get_vocab_size()) == (16, checkpoint.load_model(run)[1].get_vocab_size())


@pytest.mark.parametrize("content", ["step,loss\n1,2\nx,3\n", "step,loss\n1,2\n3\0,4\n", "a,b\n1,2\n1,2,3\n", "\ud800"])
def test_damaged_metrics_are_named(content, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    if content == "\ud800":
        path.write_bytes(b"step\n\xff\n")
    with pytest.raises(ValueError, match=r"metrics.csv is damaged at line \d"):
        MetricsLog(tmp_path, step=3)
    path.write_text("step,loss\r\n1,2.0\r\n", encoding="utf-8-sig")
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_memory_is_estimated_from_below():
    for config in (
        GPTConfig.gpt2(vocab_size=50, context=16, layers=2, heads=2, width=32, qk_norm=True),
        GPTConfig.llama(vocab_size=50, context=16, layers=3, heads=4, kv_heads=2, width=32, qk_norm=True),
        GPTConfig.gpt2(vocab_size=50, context=16, layers=1, heads=2, width=32, bias=False, hidden=7),
    ):
        assert count_parameters(config) == GPT(config).num_parameters()
        check_memory(config, torch.device("cpu"), batch_size=4, accumulate=4)
    for large in ({"layers": 10**9}, {"width": 10**9}, {"vocab_size": 10**12}, {"context": 10**12}):
        config = GPTConfig.llama(**{"vocab_size": 50, "context": 16, "layers": 1, "heads": 1, "width": 2, **large})
        with pytest.raises(ValueError, match=r"a model of [\d,]+ parameters .* takes more than [\d,]+ GiB"):
            check_memory(config, torch.device("cpu"), batch_size=1)
    config = GPTConfig.llama(vocab_size=50, context=16, layers=1, heads=1, width=2)
    for large in ({"batch_size": 10**12}, {"batch_size": 1, "accumulate": 10**12}):
        with pytest.raises(ValueError, match="to train by steps of"):
            check_memory(
                GPTConfig.llama(vocab_size=50, context=16, layers=1, heads=1, width=2), torch.device("cpu"), **large
            )


def test_the_newest_checkpoint_may_be_without_its_config(run, tmp_path):
    """It is damaged then, not missing."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/checkpoint-3/config.json").unlink()
    for path in ("run", "run/checkpoint-3"):
        assert checkpoint.find_checkpoint(tmp_path / path) == tmp_path / "run/checkpoint-3"

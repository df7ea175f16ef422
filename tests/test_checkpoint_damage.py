"""Disks that are full and files that are damaged: an error that names the file, and a checkpoint to go on from."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import TOKENS

from fastllm import cli, data
from fastllm.models import GPT, GPTConfig
from fastllm.trainer import TrainConfig, Trainer, check_memory, checkpoint, saved_config
from fastllm.trainer.log import MetricsLog, read_metrics


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


FILES = ["checksums.json", "config.json", "model.safetensors", "state.json", "state.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
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
    with files_up_to(1000), pytest.raises(OSError, match="File too large; the run has no whole checkpoint yet"):
        trainer.save()
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_checksums", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small_trainer(tmp_path).save()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sample_every", [0, 1])
def test_logs_and_samples_on_a_full_disk(tmp_path, sample_every, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no TensorBoard
    trainer = small_trainer(tmp_path)
    trainer.config.checkpoint_every, trainer.config.steps = 0, 9
    trainer.config.sample_every, trainer.config.sample_tokens = sample_every, 4
    name = "samples/step-0.txt" if sample_every else "metrics.csv"
    words = "File too large; the run has no whole checkpoint yet"
    with files_up_to(0 if sample_every else 100), pytest.raises(OSError, match=words) as caught:
        trainer.run()
    assert caught.value.filename == str(tmp_path / name)


def test_tensorboard_on_a_full_disk(tmp_path, capfd):
    pytest.importorskip("tensorboard")
    log = MetricsLog(tmp_path)

    def write() -> None:
        for step in range(1, 60):
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
    if name.startswith("state"):
        small_trainer(path).load(path)
    elif name == "checksums.json":
        checkpoint.verify(checkpoint.find_checkpoint(path))
    elif name == "tokenizer.json":
        checkpoint.load_checkpoint_tokenizer(checkpoint.find_checkpoint(path))
    else:
        checkpoint.load_model(path)


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
    """By what reads it, and by what only compares it with its checksum."""
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/checkpoint-3"
    DAMAGES[damage](path / name)
    for read in (lambda: load(name, path.parent), lambda: checkpoint.verify(path)):
        with pytest.raises((OSError, ValueError)) as caught:
            read()
        message = cli._message(caught.value)
        assert message.startswith(str(path / name))
        assert f"; the checkpoint before it is {tmp_path / 'run/checkpoint-2'}: delete" in message
        assert len(message.replace(str(tmp_path), "")) < 500
        assert "weights_only" not in message


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_is_named(name, run, tmp_path):
    """Wherever it is. Checksums that are changed themselves are those of some file, or name one that there is not."""
    path = shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
    dice, content = random.Random(name), (path / name).read_bytes()
    for _ in range(100 if name == "checksums.json" else 8):
        changed, bit = bytearray(content), dice.randrange(8 * len(content))
        changed[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(changed)
        with pytest.raises((OSError, ValueError)) as caught:
            checkpoint.verify(path)
        message = cli._message(caught.value)
        assert message.startswith(
            f"{path}/" if name == "checksums.json" else f"{path / name} is damaged: its bytes are"
        )
    with pytest.raises((OSError, ValueError), match=str(path)):
        small_trainer(tmp_path).load(path)
    (path / name).write_bytes(content)
    checkpoint.verify(path)


@pytest.mark.parametrize("name", sorted(checkpoint._PARTS))
def test_checksums_that_are_not_all_there(name, run, tmp_path):
    path = shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
    sums = json.loads((path / "checksums.json").read_text())
    del sums[name]
    (path / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(ValueError, match=f"checksums.json is damaged: it has no checksum of {name}"):
        checkpoint.verify(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"model": {"width": "wide"}}, "width"),
        ("config.json", {"model": {"dropout": "some"}}, "not supported between"),
        ("config.json", {"model": {"depth": 3}}, "unknown field depth"),
        ("config.json", {"model": {"layers": 10**9}}, "takes more than .* GiB"),
        ("config.json", {"model": {"architecture": "RNN"}}, "the architecture 'RNN' is none of GPT"),
        ("config.json", {"model": 3}, 'it lacks "model"'),
        ("config.json", {"train": {"speed": 3}}, "train has no key 'speed'; did you mean seed"),
        ("config.json", {"train": {"steps": "many"}}, "steps must be an int, got 'many'"),
        ("config.json", {"train": 3}, "train must be a mapping"),
        ("state.json", {"step": -1}, "its step is -1"),
        ("state.json", {"step": None}, "its step is None"),
        ("state.json", {"optimizer": {}}, "it lacks"),
        ("state.json", {"optimizer": 3}, "cannot be loaded"),
        ("state.json", {"best": "none"}, "cannot be loaded"),
    ],
)
def test_a_value_that_does_not_fit_is_named(name, change, message, run, tmp_path):
    shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
    file = tmp_path / "checkpoint-3" / name
    content = json.loads(file.read_text())
    for part, values in change.items():
        content[part] = {**content[part], **values} if isinstance(values, dict) and values else values
    file.write_text(json.dumps(content))
    checkpoint.write_checksums(file.parent)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        saved_config(tmp_path / "checkpoint-3") if "train" in change else load(name, tmp_path)


def test_a_tensor_too_few_or_of_another_shape_is_named(run, tmp_path):
    path = shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
    tensors = load_file(path / "state.safetensors")
    key = "optimizer.0.exp_avg.embedding.weight"
    for change, message in (
        ({key: tensors[key][:3].clone()}, r"exp_avg of embedding.weight has shape \(3, 16\)"),
        ({key: None}, "lacks exp_avg of embedding.weight"),
        ({"optimizer.0.exp_avg.nose": tensors[key].clone()}, "has exp_avg of nose, which is not among"),
        ({"loop.spikes": None}, "it lacks 'loop.spikes'"),
    ):
        changed = {name: x for name, x in {**tensors, **change}.items() if x is not None}
        save_file(changed, path / "state.safetensors")
        checkpoint.write_checksums(path)
        with pytest.raises(ValueError, match=f"{path}/state.* cannot be loaded: .*{message}"):
            small_trainer(tmp_path).load(path)


def test_another_models_files_are_named(run, tmp_path):
    trainer = small_trainer(tmp_path / "other", width=32)
    trainer.train_step()
    other = trainer.save()
    for name, message in (("model.safetensors", "size mismatch"), ("state.safetensors", r"has shape \(32,\)")):
        path = shutil.copytree(run / "checkpoint-3", tmp_path / name)
        shutil.copy(other / name, path / name)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            small_trainer(tmp_path / "new").load(path)
        checkpoint.write_checksums(path)
        with pytest.raises(ValueError, match=f"cannot be loaded: .*{message}"):
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
    checkpoint.write_checksums(path)
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
        assert config.num_parameters() == GPT(config).num_parameters()
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


# Runs of the command line.

SHAPE = "--context 12 --layers 1 --heads 2 --width 16 --dropout 0.1 --vocab-size 300"
OPTIONS = "--steps 6 --checkpoint-every 2 --eval-every 2 --keep 0 --batch-size 4 --device cpu --ema 0.9"


def train(out: Path, *more: str, options: str = f"{SHAPE} {OPTIONS}") -> int:
    text = out.parent / "text.txt"
    if not text.exists():
        text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(200)))
    return cli.main(["train", "--text", str(text), "--out", str(out), *options.split(), *more])


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run with checkpoints 2, 4 and 6."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train(out) == 0
    return out


def copied(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "run"))


def assert_same_end(straight: Path, out: Path, name: str = "checkpoint-6") -> None:
    for file in ("model.safetensors", "ema.safetensors", "state.safetensors", "state.json", "tokenizer.json"):
        assert (straight / name / file).read_bytes() == (out / name / file).read_bytes(), file
    checkpoint.verify(out / name)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


RUN_FILES = [*FILES, "ema.safetensors"]


@pytest.mark.parametrize("name", RUN_FILES)
def test_resume_names_what_is_damaged_and_auto_passes_over_it(name, straight, tmp_path, capsys):
    out = copied(straight, tmp_path)
    # Two in a row, each in its own way; the newest has the lowest validation loss.
    flip(out / "checkpoint-6" / name)
    (out / "checkpoint-4" / name).unlink()
    for how in ("newest", str(out), str(out / "checkpoint-6")):
        assert train(out, "--resume", *([] if how == "newest" else [how]), options="") == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert str(out / "checkpoint-6") in said
        assert f"; the checkpoint before it is {out / 'checkpoint-4'}: delete" in said
    assert train(out, "--resume", str(out / "checkpoint-4"), options="") == 1
    assert f"{out / 'checkpoint-4' / name}: No such file or directory" in capsys.readouterr().err
    assert len(checkpoint.list_checkpoints(out)) == 3, "nothing is put aside unless asked for"
    assert train(out, "--resume", "auto", options="") == 0
    said = capsys.readouterr().out
    assert "resumed at step 2" in said
    # Checksums that are damaged may be taken for a file that is.
    assert f"passed over: {out / 'checkpoint-6'}/{'' if name == 'checksums.json' else name}" in said
    assert f"passed over: {out / 'checkpoint-4' / name}: No such file or directory; it is" in said
    aside = sorted(path.name for path in out.glob("*.damaged"))
    assert aside == ["checkpoint-4.damaged", "checkpoint-6.damaged"]
    assert_same_end(straight, out)
    assert_same_end(straight, out, "checkpoint-4")
    rows = [row["validation_loss"] for row in read_metrics(out / "metrics.csv") if "validation_loss" in row]
    assert rows == [r["validation_loss"] for r in read_metrics(straight / "metrics.csv") if "validation_loss" in r]


def test_put_aside_twice(straight, tmp_path, capsys):
    out = copied(straight, tmp_path)
    for number in range(2):
        flip(out / "checkpoint-6/model.safetensors")
        assert train(out, "--resume", "auto", options="") == 0
        assert (out / f"checkpoint-6.damaged{'-1' * number}").is_dir()
    assert_same_end(straight, out)


def test_nothing_whole_and_nothing_at_all(straight, tmp_path, capsys):
    out = copied(straight, tmp_path)
    for number in (2, 4, 6):
        (out / f"checkpoint-{number}/model.safetensors").write_bytes(b"")
    assert train(out, "--resume", "auto", options="") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"fastllm: error: no checkpoint in {out} is whole: {out}/checkpoint-6/model.safetensors is")
    assert said.count("it has 0 bytes") == 3
    assert len(checkpoint.list_checkpoints(out)) == 3
    for how in ([], [str(tmp_path / "new")]):
        assert train(tmp_path / "new", "--resume", *how) == 1
        assert f"no checkpoint at {tmp_path / 'new'}" in capsys.readouterr().err
    assert train(tmp_path / "new", "--resume", "auto") == 0
    assert_same_end(straight, tmp_path / "new")


def test_auto_with_keep_1(straight, tmp_path, capsys):
    """The best is still there when the newest is damaged, whose loss was lower yet."""
    out = tmp_path / "run"
    assert train(out, "--keep", "1", "--steps", "5", "--eval-every", "4") == 0
    assert [path.name for path in checkpoint.list_checkpoints(out)] == ["checkpoint-5"]
    out = copied(straight, tmp_path / "kept")
    shutil.rmtree(out / "checkpoint-4")
    flip(out / "checkpoint-6/model.safetensors")
    assert train(out, "--resume", "auto", "--keep", "1", options="") == 0
    assert [path.name for path in checkpoint.list_checkpoints(out)] == ["checkpoint-6"]
    assert_same_end(straight, out)


def test_other_files_of_a_run_that_are_damaged(straight, tmp_path, capsys):
    out = copied(straight, tmp_path)
    shutil.rmtree(out / "checkpoint-6")
    (out / "config.yaml").write_bytes(b"\xff\x00{")  # is written anew
    metrics = (out / "metrics.csv").read_text()
    (out / "metrics.csv").write_text(metrics.replace("\n3,", "\nthree,"))
    assert train(out, "--resume", "auto", options="") == 1
    said = capsys.readouterr().err
    assert f"{out}/metrics.csv is damaged at line 4" in said
    assert "without the file, a run can be resumed" in said
    (out / "metrics.csv").unlink()
    assert train(out, "--resume", "auto", options="") == 0
    assert_same_end(straight, out)
    assert [row["step"] for row in read_metrics(out / "metrics.csv")] == [5, 6]
    configs = [(run / "config.yaml").read_text().replace(str(run.parent), "") for run in (straight, out)]
    assert configs[0] == configs[1]


def test_options_that_a_resumed_run_may_not_have(straight, tmp_path, capsys):
    out = copied(straight, tmp_path)
    for option, words in (
        ("--width 32", f"--width 32 differs from the 16 of {out / 'checkpoint-6'}"),
        ("--optimizer sgd", "the state is that of optimizer 'adamw', not of 'sgd'"),
        ("--ema 0", "the run keeps an average of its weights, which ema=0 would drop"),
        ("--vocab-size 400", "--vocab-size cannot be given with --resume"),
    ):
        assert train(out, "--resume", "auto", *option.split(), options="--steps 8") == 1, option
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert train(out, "--resume", "auto", "--steps", "3", options="") == 0
    assert "is finished: it has taken 6 of 3 steps" in capsys.readouterr().out
    assert_same_end(straight, out)


def test_from_a_path_into_another_folder(straight, tmp_path, capsys):
    out = tmp_path / "fork"
    assert train(out, "--resume", str(straight / "checkpoint-4"), options="") == 0
    assert_same_end(straight, out)
    assert train(out, "--resume", str(straight / "checkpoint-4"), options="") == 1
    assert f"{out / 'checkpoint-6'} is newer than {straight / 'checkpoint-4'}" in capsys.readouterr().err


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, as `disk(size)` mounts it anew or lets it grow."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        more = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{more}{options}", "none", str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode and not mounted:
            pytest.skip(f"mounting is not permitted: {result.stderr.strip()}")
        assert result.returncode == 0, result.stderr
        mounted = True
        return path

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_is_full(asynchronous, straight, disk, tmp_path, capsys):
    """Pages and not bytes are counted, so some place between the second and the third checkpoint."""
    pages = [sum(-(-file.stat().st_size // 4096) for file in path.iterdir()) for path in straight.glob("checkpoint-*")]
    out = disk(f"size={4 * int(2.5 * pages[0]) + 32}k") / "run"
    kind = "--async-checkpoint" if asynchronous else "--no-async-checkpoint"
    assert train(out, kind) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastllm: ")]
    whole = out / "checkpoint-4"
    words = f"fastllm: error: {out / 'checkpoint-6'}: No space left on device; {whole} is whole, to be resumed from"
    assert said == [words]
    assert checkpoint.list_checkpoints(out) == [out / "checkpoint-2", whole]
    assert not list(out.glob(".checkpoint*"))
    assert_same_end(straight, out, "checkpoint-4")
    assert train(out, "--resume", "auto", kind, options="") == 1  # as full as before
    assert words in capsys.readouterr().err
    disk("size=16m")
    assert train(out, "--resume", "auto", options="") == 0
    assert_same_end(straight, out)


def test_a_disk_that_others_have_filled(straight, disk, tmp_path, capsys, monkeypatch):
    """The log meets it first."""
    out = disk("size=16m") / "run"
    original = Trainer._begin_step

    def step(self, stop):
        if self.step == 4:
            self._writer.wait()
            with contextlib.suppress(OSError), open(out.parent / "filler", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return original(self, stop)

    monkeypatch.setattr("fastllm.trainer.log.EVERY", 0.0)  # TensorBoard's file grows with every step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_begin_step", step)
        assert train(out, "--eval-every", "1", "--checkpoint-every", "4", "--steps", "400") == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastllm: ")]
    assert len(said) == 1
    assert said[0].endswith(f"No space left on device; {out / 'checkpoint-4'} is whole, to be resumed from")
    (out.parent / "filler").unlink()
    assert train(out, "--resume", "auto", "--steps", "6", options="") == 0
    checkpoint.verify(out / "checkpoint-6")


def test_a_folder_that_is_read_only(straight, disk, capsys):
    out = copied(straight, disk("size=16m"))
    shutil.copy(straight.parent / "text.txt", out.parent)
    shutil.rmtree(out / "checkpoint-6")
    disk("ro")
    assert train(out, "--resume", "auto", options="") == 1
    said = capsys.readouterr().err
    assert said == f"fastllm: error: {out}: cannot be written to: Read-only file system\n"
    model, _ = checkpoint.load_model(out)  # reading is another matter
    assert model.config.width == 16
    disk("rw")
    assert train(out, "--resume", "auto", options="") == 0
    assert_same_end(straight, out)

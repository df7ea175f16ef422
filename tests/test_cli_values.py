"""Every option of every command with values that make no sense: one line on stderr, exit code 1 or 2, no traceback."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastllm import cli, data
from fastllm.benchmarks import suite
from fastllm.trainer import checkpoint

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--context", "16", "--layers", "1", "--heads", "2", "--width", "32", "--vocab-size", "300"),
    *("--batch-size", "4", "--warmup", "1", "--device", "cpu"),
]
HUGE = str(10**12)

# What is tried for every option of a type, and must be refused.
OF_TYPE = {
    "int": ["", "x", "1.5", "-1", "1e3", "0x10", str(2**64), str(10**30), "9" * 5000],
    "float": ["", "x", "nan", "inf", "-inf", "-1", "1e400", "0,5"],
}
FILES = ["", "nowhere", "folder", "text.txt/below", "\udcff", "a" * 5000]
TEXTS = [*FILES, "empty", "binary", "utf-16"]
FOLDERS = ["", "text.txt", "text.txt/below", "/dev/null", "/proc/none/below", "a" * 5000]
DEVICES = [
    "",
    "mps",
    "xpu",
    "meta",
    "hpu",
    "cuda:99",
    "cuda:-1",
    "cpu:1",
    "cpu:-1",
    "CPU",
    " cpu",
    "gpu",
    "0",
    "\udcff",
]
BACKENDS = ["", "CPU", "warp", "\udcff", "None"]
CHECKPOINTS = [*FILES, "empty", "text.txt", "damaged", "no-tokenizer"]

# More for an option, by command and name; None for one that takes no value.
VALUES: dict[tuple[str, str], list[str] | None] = {
    ("info", "json"): None,
    ("bench", "ops"): ["", "warp", "\udcff"],
    ("bench", "device"): ["", "mps", "cuda:99", "CPU"],
    ("bench", "threads"): ["0", HUGE],
    ("bench", "json"): ["", "text.txt/below", "/dev/null/below.json", "a" * 5000],
    ("bench", "report"): FOLDERS,
    ("bench", "quick"): None,
    ("bench", "text"): TEXTS,
    ("bench", "list"): None,
    ("patch", "model"): [*FILES, "text.txt", "damaged", "unknown", "no-weights", "bad-weights"],
    ("patch", "only"): ["", "warp", "\udcff"],
    ("patch", "exclude"): ["", "warp", "\udcff"],
    ("patch", "json"): None,
    ("patch", "device"): DEVICES,
    ("train", "config"): [*FILES, "empty", "binary", "text.txt"],
    ("train", "text"): TEXTS,
    ("train", "valid"): [*TEXTS, "short"],
    ("train", "columns"): ["", "text", "=", "=1", "text=", "\udcff=1", "text=body"],
    ("train", "objective"): ["", "causal", "\udcff"],
    ("train", "order"): ["", "sorted"],
    ("train", "preprocessing"): [*TEXTS, "text.txt", "holes.json", "steps.json"],
    ("train", "out"): [*FOLDERS, "run", "\udcff"],
    ("train", "resume"): CHECKPOINTS,
    ("train", "dry_run"): None,
    ("train", "find_lr"): None,
    ("train", "validation"): ["0", "1", "2", "1e-9", "0.9999999", "1e-320"],
    ("train", "tokenizer"): [*TEXTS, "text.txt", "holes.json"],
    ("train", "vocab_size"): ["0", "1", "256", HUGE],
    ("train", "document_mask"): None,
    ("train", "preset"): ["", "GPT2", "bert"],
    ("train", "init"): [*CHECKPOINTS, "classes"],
    ("train", "context"): ["0", "9999", HUGE],
    ("train", "layers"): ["0", HUGE],
    ("train", "heads"): ["0", "3", "32", HUGE],
    ("train", "kv_heads"): ["0", "3", "4", HUGE],
    ("train", "width"): ["0", "1", "33", HUGE],
    ("train", "dropout"): ["1", "2"],
    ("train", "label_smoothing"): ["1", "2"],
    ("train", "steps"): ["0"],
    ("train", "batch_size"): ["0", HUGE],
    ("train", "accumulate"): ["0", HUGE],
    ("train", "batch_tokens"): [str(10**17)],
    ("train", "optimizer"): ["", "adam", "AdamW"],
    ("train", "lr"): ["1e39"],
    ("train", "schedule"): ["", "Cosine"],
    ("train", "min_lr_ratio"): ["2"],
    ("train", "warmup"): [],
    ("train", "decay"): [],
    ("train", "decay_share"): ["2"],
    ("train", "weight_decay"): [],
    ("train", "beta1"): ["1", "2"],
    ("train", "beta2"): ["1", "2"],
    ("train", "eps"): [],
    ("train", "momentum"): ["1", "2"],
    ("train", "clip"): [],
    ("train", "layer_decay"): ["0", "2"],
    ("train", "head_lr_ratio"): ["0"],
    ("train", "moment_dtype"): ["", "float16"],
    ("train", "master_weights"): ["", "float32", "remainder", "None"],
    ("train", "ema"): ["1", "2"],
    ("train", "activation_checkpointing"): None,
    ("train", "skip_spikes"): [],
    ("train", "eval_every"): [],
    ("train", "eval_batches"): [],
    ("train", "patience"): [],
    ("train", "checkpoint_every"): [],
    ("train", "keep"): [],
    ("train", "async_checkpoint"): None,
    ("train", "sample_every"): [],
    ("train", "sample_prompt"): ["", "\udcff", "1 2 3 " * 30],
    ("train", "sample_tokens"): ["0", "16", HUGE],
    ("train", "seed"): [],
    ("train", "precision"): ["", "float16", "bf16"],
    ("train", "compile"): None,
    ("train", "parallel"): ["", "tp"],
    ("train", "wandb"): None,
    ("train", "device"): DEVICES,
    ("train", "backend"): [*BACKENDS, "cuda"],
    ("eval", "checkpoint"): CHECKPOINTS,
    ("eval", "text"): [*TEXTS, "short"],
    ("eval", "batch_size"): ["0"],
    ("eval", "device"): DEVICES,
    ("eval", "backend"): [*BACKENDS, "triton"],
    ("generate", "checkpoint"): CHECKPOINTS,
    ("generate", "prompt"): ["", "\udcff", "1 2 3 " * 30],
    ("generate", "max_new_tokens"): ["99", HUGE],
    ("generate", "temperature"): ["1e-45", "1e-320"],
    ("generate", "top_k"): ["0"],
    ("generate", "top_p"): ["0", "2"],
    ("generate", "seed"): [],
    ("generate", "device"): DEVICES,
    ("generate", "backend"): [*BACKENDS, "triton"],
    ("data inspect", "files"): [*TEXTS, "nothing-*.txt"],
    ("data inspect", "columns"): ["", "text", "=", "body=text", "text=body", "text=9", "\udcff=1"],
    ("data inspect", "kind"): ["", "rows", "\udcff"],
    ("data inspect", "lines"): [],
    ("data inspect", "tokenizer"): [*TEXTS, "text.txt"],
    ("data inspect", "steps"): [*TEXTS, "text.txt", "holes.json"],
    ("data inspect", "normalize"): ["", "nfc", "\udcff"],
    ("data inspect", "lower"): None,
    ("data inspect", "half_width"): None,
    ("data inspect", "segment"): ["", "words", "forward", "bidirectional"],
    ("data inspect", "dictionary"): [*TEXTS, "text.txt"],
    ("data inspect", "stop_words"): [*TEXTS, "text.txt", "en"],
    ("data inspect", "min_documents"): ["0", "1"],
    ("data inspect", "max_share"): ["0", "2", "0.5"],
    ("data inspect", "save_steps"): ["", "folder", "text.txt/below", "/proc/none/below", "a" * 5000],
    ("data tokenize", "files"): [*TEXTS, "nothing-*.txt"],
    ("data tokenize", "columns"): ["", "text", "body=text", "text=1", "\udcff=1"],
    ("data tokenize", "out"): ["", "folder", "text.txt/below", "/proc/none/below", "a" * 5000],
    ("data tokenize", "tokenizer"): [*TEXTS, "text.txt", "holes.json"],
    ("data tokenize", "vocab_size"): ["0", "256", HUGE],
    ("data tokenize", "tokenizer_kind"): ["", "words", "\udcff"],
    ("data tokenize", "end"): ["", "nowhere", "\udcff"],
    ("data tokenize", "processes"): ["0"],
    ("report", "runs"): [*FILES, "text.txt"],
    ("report", "out"): ["", "folder", "text.txt/below", "/dev/null/below.html", "/proc/none/below", "a" * 5000],
    ("demo", "steps"): ["0"],
    ("demo", "rounds"): ["0", "1"],
    ("demo", "out"): FOLDERS,
}
# A number may be as large as 64 bits allow where it only says how long or how often.
NEEDED = {
    "bench": [],
    "patch": ["--model", "model"],
    "train": ["--text", "text.txt", "--out", "new", "--steps", "2"],
    "eval": ["run", "--text", "text.txt"],
    "generate": ["run", "--prompt", "1 squared"],
    "data inspect": ["text.txt"],
    "data tokenize": ["text.txt", "--out", "new.tokens"],
    "report": ["run"],
    "demo": ["--out", "new"],
}


def commands() -> dict[str, argparse.ArgumentParser]:
    found = {**_subparsers(cli.parser()), "bench": suite._parser()}
    data_actions = _subparsers(found.pop("data"))
    return {**found, **{f"data {name}": parser for name, parser in data_actions.items()}}


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return subparsers.choices


def options() -> list[tuple[str, argparse.Action]]:
    return [
        (command, action)
        for command, parser in commands().items()
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    ]


def test_every_option_has_values_to_be_tried():
    assert {(command, action.dest) for command, action in options()} == set(VALUES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files that are no text, checkpoints that are none, and in run/ what `fastllm train` made of text.txt."""
    folder = tmp_path_factory.mktemp("values")
    (folder / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(300)))
    (folder / "folder").mkdir()
    (folder / "empty").write_bytes(b"")
    (folder / "short").write_bytes(b"ab")
    (folder / "binary").write_bytes(b"\xffbinary")
    (folder / "utf-16").write_bytes("text".encode("UTF-16"))
    (folder / "steps.json").write_text('{"format": 1, "steps": [{"step": "Warp"}]}')
    (folder / "holes.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "a"}}')
    cwd = os.getcwd()
    os.chdir(folder)
    try:
        assert cli.main(["train", "--text", "text.txt", "--out", "run", "--steps", "2", *SMALL]) == 0
        for name in ("damaged", "no-tokenizer"):
            (folder / name).mkdir()
        for file in (folder / "run/checkpoint-2").iterdir():
            if file.name != "tokenizer.json":
                (folder / "no-tokenizer" / file.name).write_bytes(file.read_bytes())
        (folder / "damaged/config.json").write_bytes(bytes(100))
        rows = "".join(f"{n % 2}\tNumber {n}.\n" for n in range(20))
        (folder / "rows.tsv").write_text(rows)
        classify = ["--text", "rows.tsv", "--objective", "classification", "--validation", "0.5"]
        assert cli.main(["train", *classify, "--out", "classes", "--steps", "2", *SMALL]) == 0
    finally:
        os.chdir(cwd)
    return folder


def outcome(arguments: list[str], capsys) -> tuple[int, str]:
    """Exit code and stderr, but for the progress bar."""
    capsys.readouterr()
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return code, "\n".join(line for line in lines if line and not line.startswith("train:"))


def refused(command: str, action: argparse.Action) -> list[str]:
    return [*OF_TYPE.get(getattr(action.type, "__name__", ""), []), *(VALUES[command, action.dest] or [])]


TRIED = [
    pytest.param(command, action, id=f"{command}-{action.dest}")
    for command, action in options()
    if VALUES.get((command, action.dest)) is not None and command != "patch"
]


@pytest.mark.parametrize(("command", "action"), TRIED)
def test_a_value_that_makes_no_sense_is_one_line(command, action, folder, monkeypatch, capsys):
    def begin(*args, **kwargs):
        raise AssertionError("long work has begun")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(suite.harness, "measure_ceilings", begin)
    monkeypatch.setattr(data, "topics_text", begin)  # the demo's
    try:
        check(command, action, capsys)
        assert not (folder / "new/checkpoint-2").exists()
    finally:
        shutil.rmtree(folder / "new", ignore_errors=True)


def check(command: str, action: argparse.Action, capsys) -> None:
    values = refused(command, action)
    assert values, "nothing is tried"
    for value in values:
        flag = next((option for option in action.option_strings if option.startswith("--")), None)
        needed = list(NEEDED[command])
        if command == "train":
            small = list(SMALL)
            if action.dest == "tokenizer":
                at = small.index("--vocab-size")
                del small[at : at + 2]
            if action.dest in ("sample_prompt", "sample_tokens"):
                needed += ["--sample-every", "1"]
            needed += small
        if flag is None:
            needed = [value, *needed[1:]]
        else:
            needed = [*needed, flag, value] if action.nargs == "+" else [*needed, f"{flag}={value}"]
        code, error = outcome([*command.split(), *needed], capsys)
        assert code in (1, 2), f"{flag} {value[:40]!r} is accepted"
        assert error.startswith("fastllm: error: "), f"{flag} {value[:40]!r}: {error}"
        assert "\n" not in error, f"{flag} {value[:40]!r}: {error}"


def test_patch_with_values_that_make_no_sense(folder, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from patch_models import model_of

    monkeypatch.chdir(folder)
    model = model_of("llama")
    model.save_pretrained("model")
    for name in ("unknown", "no-weights", "bad-weights"):
        model.save_pretrained(name)
    (folder / "unknown/config.json").write_text('{"model_type": "warp"}')
    (folder / "no-weights/model.safetensors").unlink()
    (folder / "bad-weights/model.safetensors").write_bytes(b"x" * 1000)
    capsys.readouterr()
    for action in commands()["patch"]._actions:
        if VALUES.get(("patch", action.dest)):
            check("patch", action, capsys)


def run(*arguments: str | bytes, cwd: Path, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-m", "fastllm", *arguments], env=environment, cwd=cwd, **options)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTLLM_BACKEND": "CPU"}, b"FASTLLM_BACKEND: unknown backend 'CPU'"),
        pytest.param(
            {"FASTLLM_BACKEND": "\udcff"}, b"FASTLLM_BACKEND: unknown backend '\\udcff'", marks=pytest.mark.slow
        ),
        pytest.param({"FASTLLM_CPU_CAPABILITY": "sse9"}, b"FASTLLM_CPU_CAPABILITY: ", marks=pytest.mark.slow),
    ],
)
def test_the_environment_makes_no_sense(environment, message, folder):
    from fastllm import _ext

    if "FASTLLM_CPU_CAPABILITY" in environment and _ext.C is None:
        pytest.skip("no compiled kernels, so nothing reads it")
    result = run("info", cwd=folder, env=environment)
    assert result.returncode == 1
    assert result.stderr.startswith(b"fastllm: error: " + message)
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(("reader", "message"), [("none", ""), ("full", "fastllm: error: No space left on device\n")])
def test_output_that_nobody_takes(reader, message, monkeypatch, capsys):
    if reader == "full":
        output = open("/dev/full", "w")  # noqa: SIM115
    else:
        read, write = os.pipe()
        os.close(read)
        output = open(write, "w")  # noqa: SIM115
    with output:
        monkeypatch.setattr(sys, "stdout", output)
        assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == message


@pytest.mark.slow
def test_a_second_interrupt_is_one_line(folder, tmp_path):
    """The first lets the step end, which here would take for ever."""
    arguments = ["train", "--text", "text.txt", "--out", str(tmp_path), *SMALL, "--accumulate", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastllm", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored behind a shell's &
    )
    lines = iter(process.stderr.readline, b"")
    deadline = time.monotonic() + 60
    while not (tmp_path / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert any(b"SIGINT: finishing the step and saving; once more stops at once" in line for line in lines)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1] == b"fastllm: interrupted"
    assert b"Traceback" not in error


def test_an_interrupt_that_became_another_error_is_one(monkeypatch, capsys):
    def run(argv):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 4096 vs 4052")

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "fastllm: interrupted\n"


def test_training_needs_no_stderr(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(train("text.txt", str(tmp_path / "run"))) == 0
    assert (tmp_path / "run/checkpoint-2").is_dir()


def test_an_architecture_that_is_no_model_is_named(capsys, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaConfig"]}')
    code, error = outcome(["patch", "--model", str(tmp_path)], capsys)
    assert code == 1
    assert f"{tmp_path} cannot be loaded" in error


def train(text: str, out: str, *more: str) -> list[str]:
    return ["train", "--text", text, "--out", out, "--steps", "2", *SMALL, *more]


def test_a_short_text_names_the_part_that_is_short(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(folder)
    (tmp_path / "short.txt").write_text((folder / "text.txt").read_text()[:500])
    code, error = outcome(train(str(tmp_path / "short.txt"), "new"), capsys)
    assert code == 1
    assert "to validate on (--validation 0.05)" in error
    code, error = outcome(train("text.txt", "new", "--context", "5000"), capsys)
    assert code == 1
    assert "to train on" in error


def test_samples_fit_into_a_small_context(folder, monkeypatch, tmp_path):
    """Unless they are given: nobody has chosen the default."""
    monkeypatch.chdir(folder)
    assert cli.main(train("text.txt", str(tmp_path), "--sample-every", "1", "--sample-prompt", "1 squared")) == 0
    assert (tmp_path / "samples/step-2.txt").read_text().startswith("1 squared")


def test_a_finished_run_says_so(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert cli.main(["train", "--text", "text.txt", "--out", "run", "--resume"]) == 0
    assert "run/checkpoint-2 is finished: it has taken 2 of 2 steps" in capsys.readouterr().out


def test_documents_need_a_token_between_them(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(folder)
    ours = data.train_tokenizer([(folder / "text.txt").read_text()], 300).to_str()
    (tmp_path / "other.json").write_text(ours.replace("<|endoftext|>", "</s>"))
    base = ["train", "--text", "text.txt", "text.txt", "--steps", "1", "--tokenizer", str(tmp_path / "other.json")]
    small = [value for value in SMALL if value not in ("--vocab-size", "300")]
    code, error = outcome([*base, "--out", str(tmp_path / "a"), *small], capsys)
    assert code == 1
    assert "other.json has no special token <|endoftext|>" in error
    assert cli.main([*base, "--out", str(tmp_path / "b"), *small, "--no-document-mask"]) == 0


def test_a_vocabulary_with_holes_trains(folder, monkeypatch, capsys, tmp_path):
    from tokenizers import Tokenizer

    monkeypatch.chdir(folder)
    tokenizer = data.train_tokenizer([(folder / "text.txt").read_text()], 300).to_str()
    (tmp_path / "holes.json").write_text(
        tokenizer.replace('"id": 0', '"id": 777').replace('endoftext|>":0', 'endoftext|>":777')
    )
    assert data.vocabulary_size(Tokenizer.from_file(str(tmp_path / "holes.json"))) == 778
    small = [value for value in SMALL if value not in ("--vocab-size", "300")]
    arguments = ["train", "--text", "text.txt", "text.txt", "--steps", "1", "--tokenizer", str(tmp_path / "holes.json")]
    assert cli.main([*arguments, "--out", str(tmp_path / "run"), *small]) == 0
    assert cli.main(["eval", str(tmp_path / "run"), "--text", "text.txt", "text.txt"]) == 0
    assert "bits/byte" in capsys.readouterr().out


def test_another_models_tokenizer_is_named(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(folder)
    path = shutil.copytree(folder / "run/checkpoint-2", tmp_path / "checkpoint-2")
    data.train_tokenizer([data.topics_text()[:20_000]], 600).save(str(path / "tokenizer.json"))
    checkpoint.write_checksums(path)
    for arguments in (["eval", str(path), "--text", "text.txt"], ["generate", str(path), "--prompt", "1"]):
        code, error = outcome(arguments, capsys)
        assert code == 1
        assert "is another model's: it has 600 tokens, the model 300" in error

"""The command line, end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastllm import cli, ops
from fastllm.trainer import checkpoint

ROOT = Path(__file__).parent.parent
SMALL = "--context 16 --layers 2 --heads 2 --width 32 --vocab-size 300 --steps 8 --batch-size 4 --warmup 2 --device cpu"


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastllm", *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Has text.txt, and in run/ what `fastllm train` made of it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(400)))
    result = run("train", "--text", "text.txt", "--out", "run", *SMALL.split(), cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "tokens to train on" in result.stdout
    assert result.stdout.splitlines()[-1] == "run/checkpoint-8"
    assert re.search(r"8/8 .*loss=\d", result.stderr), "the progress bar"
    return folder


def test_train_then_eval_then_generate(folder, capsys):
    result = run("eval", "run", "--text", "text.txt", cwd=folder)
    assert result.returncode == 0, result.stderr
    match = re.fullmatch(
        r"loss ([\d.]+) nats/token, perplexity ([\d.]+), ([\d.]+) bits/byte, ([\d,]+) tokens\n", result.stdout
    )
    assert 3 < float(match[1]) < 5.7
    generate = ["generate", str(folder / "run/checkpoint-8"), "--prompt", "12 squared", "--max-new-tokens", "8"]
    outputs = [run(*generate, "--seed", "1", cwd=folder).stdout]
    for seed in ("1", "2"):
        assert cli.main([*generate, "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("12 squared")
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(("more", "token"), [([], 0), (["--no-document-mask"], None)])
def test_files_are_documents(folder, tmp_path, more, token):
    """Attention stays inside a file, unless told otherwise; one file without an end in it is one document."""
    text = str(folder / "text.txt")
    for name, files, expected in (("two", [text, text], token), ("one", [text], None)):
        out = tmp_path / name
        assert cli.main(["train", "--text", *files, "--out", str(out), *SMALL.split(), *more]) == 0
        config = json.loads((checkpoint.find_checkpoint(out) / "config.json").read_text())
        assert config["model"]["document_token"] == expected


def test_resume_goes_on(folder, capsys):
    args = ["train", "--text", str(folder / "text.txt"), "--out", str(folder / "run"), "--resume"]
    assert cli.main([*args, "--steps", "10"]) == 0
    output = capsys.readouterr().out
    assert "resumed at step 8" in output
    assert output.rstrip().endswith("checkpoint-10")
    assert cli.main([*args, "--width", "64"]) == 1
    assert "--width 64 differs from the 32 of" in capsys.readouterr().err
    assert cli.main([*args, "--preset", "gpt2"]) == 1
    assert "--preset cannot be given with --resume" in capsys.readouterr().err
    (folder / "other.txt").write_text((folder / "text.txt").read_text()[1:])
    args[2] = str(folder / "other.txt")
    assert cli.main(args) == 1
    assert "was trained on other tokens" in capsys.readouterr().err


def test_resume_keeps_the_document_mask(folder, capsys, tmp_path):
    text = str(folder / "text.txt")
    for flag, other, how in (
        ("--document-mask", "--no-document-mask", "one with"),
        ("--no-document-mask", "--document-mask", "one without"),
    ):
        args = ["train", "--text", text, text, "--out", str(tmp_path / flag)]
        assert cli.main([*args, *SMALL.split(), flag]) == 0
        assert cli.main([*args, "--resume", other]) == 1
        error = capsys.readouterr().err
        assert f"{other} cannot be given with --resume" in error
        assert how in error
        assert cli.main([*args, "--resume", flag]) == 0


def test_backends_train_alike(folder, capsys, monkeypatch):
    from fastllm.backends import Op
    from fastllm.trainer.log import read_metrics

    forced = []
    run_forced = Op._run_forced
    monkeypatch.setattr(Op, "_run_forced", lambda op, *args: forced.append(op.name) or run_forced(op, *args))
    losses = []
    for name, more in (("fast", []), ("slow", ["--backend", "reference"])):
        out = folder / name
        args = [
            "train",
            "--text",
            str(folder / "text.txt"),
            "--out",
            str(out),
            *SMALL.split(),
            "--preset",
            "gpt2",
            *more,
        ]
        assert cli.main(args) == 0
        losses.append([row["loss"] for row in read_metrics(out / "metrics.csv")])
        assert bool(forced) == bool(more)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "add_layer_norm_bwd" in forced


def test_info(folder):
    result = run("info", "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["versions"]["torch"]
    assert set(report["extensions"]) == {"cpu", "cuda"}
    assert set(report["backends"]["cpu"]) == set(ops.__all__)
    for candidates in report["backends"]["cpu"].values():
        for step in {line["step"] for line in candidates}:
            lines = [line for line in candidates if line["step"] == step]
            assert sum(line["chosen"] for line in lines) == 1
            assert all(line["reason"] for line in lines if line["backend"] == "cuda")
    text = run("info", cwd=folder).stdout
    for word in ("versions", "cpu", "gpu", "on cpu, float32", *ops.__all__):
        assert word in text
    table = text.partition("on cpu, float32")[2].partition("\n\n")[0]
    columns = re.findall(r"^ {4}(\w+ +)(\w+ +)\S", table, re.MULTILINE)
    assert len(columns) == sum(len(candidates) for candidates in report["backends"]["cpu"].values())
    assert len({(len(step), len(backend)) for step, backend in columns}) == 1, "columns line up"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("", 2, "the following arguments are required: COMMAND"),
        ("fly", 2, "invalid choice: 'fly'"),
        ("train", 1, "--text must be given, or a --config that says it"),
        ("train --config none.yaml", 1, "none.yaml: No such file or directory"),
        ("train --text text.txt --layers two", 2, "argument --layers: invalid int value: 'two'"),
        ("train --text text.txt --speed 3", 2, "unrecognized arguments: --speed 3"),
        ("train --text nowhere.txt", 1, "nowhere.txt: No such file or directory"),
        ("train --text binary", 1, "binary:1 is not UTF-8 text: byte 0xff"),
        ("train --text text.txt --width 33 --out new", 1, "heads must divide width, got heads=4, width=33"),
        ("train --text text.txt --vocab-size 9 --out new", 1, "vocab_size must be at least 257"),
        ("train --text text.txt --context 9999 --out new", 1, "needs 10000 tokens, the text has only"),
        ("train --text text.txt --validation 2", 1, "must be in (0, 1), got 2.0"),
        ("train --text text.txt --out new --resume", 1, "no checkpoint at new"),
        ("train --text text.txt --backend warp", 1, "unknown backend 'warp'"),
        ("train --text text.txt --out run", 1, "is there already: resume it, or choose another directory"),
        ("train --text text.txt --lr inf --out new", 1, "lr must be finite"),
        ("train --text text.txt --device tpu9 --out new", 1, "unknown device 'tpu9'"),
        ("eval nowhere --text text.txt", 1, "no checkpoint at nowhere"),
        ("eval run --text text.txt --batch-size 0", 1, "batch_size must be at least 1, got 0"),
        ("generate run --prompt 1 --max-new-tokens 99", 1, "99 new ones do not fit into the context of 16"),
        ("generate run --prompt 1 --top-p 2", 1, "top_p must be in (0, 1], got 2.0"),
        ("generate run --prompt 1 --backend triton", 1, "has no backend 'triton'"),
    ],
)
def test_errors_are_one_line(folder, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(folder)
    (folder / "binary").write_bytes(b"\xff\xfe")
    try:
        result = cli.main(arguments.split())
    except SystemExit as exit:
        result = exit.code
    error = capsys.readouterr().err
    assert result == code
    assert error.startswith("fastllm: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "new").exists()


def test_long_prompts_are_an_error(folder, capsys):
    assert cli.main(["generate", str(folder / "run"), "--prompt", "1 2 3 " * 30]) == 1
    assert "tokens fill the context of 16" in capsys.readouterr().err
    assert cli.main(["generate", str(folder / "run"), "--prompt", ""]) == 1
    assert "--prompt must not be empty" in capsys.readouterr().err


def test_a_missing_extra_names_the_command(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert cli.main(["train", "--text", str(folder / "text.txt"), "--out", str(folder / "new")]) == 1
    assert (
        'tokenizers is not installed; this installs it: pip install "fastllm-kernels[train]"' in capsys.readouterr().err
    )


def test_help_is_light(folder):
    code = (
        "import sys, torch; before = set(sys.modules); from fastllm import cli; sys.argv = ['fastllm', '--help']\n"
        "extras = {'tokenizers', 'safetensors', 'tqdm', 'matplotlib', 'tensorboard'}\n"
        "try: cli.main()\n"
        "except SystemExit: print(sorted(extras & (set(sys.modules) - before)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.stdout.endswith("[]\n"), result.stdout + result.stderr
    for command in ("info", "bench", "train", "eval", "generate", "demo"):
        assert command in result.stdout


def test_patch_shows_what_it_would_replace(tmp_path, capsys):
    pytest.importorskip("transformers")
    from patch_models import model_of

    model_of("llama").save_pretrained(tmp_path)
    assert cli.main(["patch", "--model", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "model.layers.*.mlp" in out
    assert "swiglu (" in out
    assert cli.main(["patch", "--model", str(tmp_path), "--json", "--only", "rms_norm"]) == 0
    entries = json.loads(capsys.readouterr().out)["entries"]
    assert {entry["now"] for entry in entries} == {"rms_norm"}
    assert cli.main(["patch", "--model", str(tmp_path / "no")]) == 1
    assert "has no config.json" in capsys.readouterr().err

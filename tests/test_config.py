"""A run's configuration: YAML, flags, defaults, and what is wrong with them."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from fastllm import cli
from fastllm.models import GPTConfig
from fastllm.trainer import checkpoint, tasks
from fastllm.trainer.config import DataConfig, RunConfig, TrainConfig
from fastllm.trainer.log import read_metrics

yaml = pytest.importorskip("yaml")
SMALL = [
    *("--context", "16", "--layers", "1", "--heads", "2", "--width", "32", "--vocab-size", "300"),
    *("--batch-size", "4", "--warmup", "2", "--device", "cpu"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(300)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def losses(run: str) -> list[float]:
    return [row["loss"] for row in read_metrics(f"{run}/metrics.csv")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {batchsize: 4}", "train has no key 'batchsize'; did you mean batch_size?"),
        ("data: {txt: a}", "data has no key 'txt'; did you mean text?"),
        ("trian: {steps: 4}", "a configuration has no section 'trian'; did you mean train?"),
        ("train: {qqq: 4}", "train has no key 'qqq'$"),
        ("train: {1: 4}", "train has no key 1$"),
        ("train: {steps: many}", "train: steps must be an int, got 'many'"),
        ("train: {steps: 1.0}", "train: steps must be an int, got 1.0"),
        ("train: {steps: true}", "train: steps must be an int, got True"),
        ("train: {lr: true}", "train: lr must be a float, got True"),
        ("train: {lr: fast}", "train: lr must be a float, got 'fast'"),
        ("train: {lr: null}", "train: lr must be a float, got None"),
        ("train: {out: 3}", "train: out must be a str, got 3"),
        ("train: {compile: 1}", "train: compile must be a bool, got 1"),
        ("data: {text: {a: b}}", "data: text must be a list, got {'a': 'b'}"),
        ("data: {text: [1]}", r"data: text must be a list of str, got \[1\]"),
        ("data: {columns: {text: 1.5}}", "data: columns must be a dict of str, got {'text': 1.5}"),
        ("train: {steps: 0}", "steps must be at least 1, got 0"),
        ("train: {lr: .nan}", "lr must be finite and not negative, got nan"),
        ("train: {min_lr_ratio: 1.5}", r"min_lr_ratio must be in \[0, 1\], got 1.5"),
        ("train: {ema: 1}", "ema must be less than 1, got 1.0"),
        ("train: {optimizer: adam}", "optimizer must be one of adamw, torch_adamw"),
        ("train: {accumulate: 2, batch_tokens: 512}", "only one of them can be given"),
        ("train: {master_weights: float32}", "master_weights are for precision=pure_bfloat16, got 'float32'"),
        ("data: {preprocessing: steps.json}", "a language model learns text as it is written"),
        ("[1, 2]", r"a configuration must be a mapping of data, model, train, got \[1, 2\]"),
        ("train: 3", "train must be a mapping, got 3"),
        ("model: [gpt2]", "model must be a mapping"),
        ("", "is empty"),
        ("train: {steps: 4", "while parsing a flow mapping"),
    ],
)
def test_a_configuration_that_makes_no_sense(text, message, capsys):
    Path("run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        RunConfig.from_yaml("run.yaml")
    assert str(error.value).startswith("run.yaml")
    assert cli.main(["train", "--config", "run.yaml", "--text", "text.txt"]) == 1
    assert re.fullmatch(r"fastllm: error: run\.yaml.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {layer: 2}", "model has no key 'layer'; did you mean layers?"),
        ("model: {dropout: 1e-1x}", "model: dropout must be a float, got '1e-1x'"),
        ("model: {layers: '2'}", "model: layers must be an int, got '2'"),
        ("model: {norm: batch_norm}", "norm must be one of"),
        ("model: {PRESETS: {}}", "model has no key 'PRESETS'"),
        ("model: {preset: gpt3}", "there is no preset 'gpt3'"),
        ("model: {vocab_size: 280}\ndata: {vocab_size: 300}", "vocab_size 280 is less than the tokenizer's 300 tokens"),
    ],
)
def test_a_model_that_makes_no_sense(text, message, capsys):
    Path("run.yaml").write_text(text, encoding="utf-8")
    assert cli.main(["train", "--config", "run.yaml", "--text", "text.txt", "--out", "new", "--context", "16"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("new").exists()


def test_types_of_yaml():
    """1e-3 is a string in YAML, 1 an int; a single file is a list of one."""
    Path("run.yaml").write_text(
        "data: {text: a.txt}\nmodel: {dropout: 1e-1}\ntrain: {lr: 1e-3, clip: 1, ema: 0, moment_dtype: null}\n"
    )
    config = RunConfig.from_yaml("run.yaml")
    assert config.data.text == ["a.txt"]
    assert (config.train.lr, config.train.clip, config.train.moment_dtype) == (0.001, 1.0, None)
    assert type(config.train.clip) is float
    assert tasks.model_config(config).dropout == 0.1
    Path("columns.yaml").write_text("data: {columns: {text: 1, label: kind}}")
    assert RunConfig.from_yaml("columns.yaml").data.columns == {"text": "1", "label": "kind"}
    Path("none.yaml").write_text("data:\ntrain:\n")
    assert RunConfig.from_yaml("none.yaml") == RunConfig(given={"data": {}, "model": {}, "train": {}})


def test_to_yaml_and_back():
    config = RunConfig(
        DataConfig(text=["a.txt", "ü\n"], columns={"text": "1"}, objective="classification", validation=0.25),
        {"preset": "bert-mini", "dropout": 0.1},
        TrainConfig(lr=1e-7, sample_prompt='a: "b"\n#', moment_dtype="uint8", eps=3e-20, seed=2**64 - 1, compile=True),
    )
    Path("run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    again = RunConfig.from_yaml("run.yaml")
    assert (again.data, again.model, again.train) == (config.data, config.model, config.train)


def test_a_saved_configuration_repeats_its_run():
    assert cli.main(["train", "--text", "text.txt", "--out", "a", "--steps", "5", "--preset", "gpt2", *SMALL]) == 0
    assert cli.main(["train", "--config", "a/config.yaml", "--out", "b"]) == 0
    assert losses("a") == losses("b")
    one, other = (RunConfig.from_yaml(f"{run}/config.yaml") for run in "ab")
    assert dataclasses.replace(other.train, out="a") == one.train
    assert (one.model, one.data) == (other.model, other.data)
    assert one.model["norm"] == "layer_norm", "GPT-2's"
    model = checkpoint.saved_config(Path("a/checkpoint-5")).model
    assert {name: value for name, value in one.model.items() if name != "preset"} == {
        name: value for name, value in model.items() if name != "architecture"
    }
    # A run goes on with its own configuration, too, and no other.
    assert cli.main(["train", "--config", "a/config.yaml", "--resume", "--steps", "6"]) == 0
    assert len(losses("a")) == 6


def test_resuming_refuses_what_a_run_cannot_change(capsys):
    assert cli.main(["train", "--text", "text.txt", "--out", "a", "--steps", "2", *SMALL]) == 0
    for flags, message in (
        ("--order random", "--order cannot be given with --resume"),
        ("--objective masked_lm", "--objective cannot be given with --resume"),
        ("--vocab-size 301", "--vocab-size cannot be given with --resume"),
        ("--dropout 0.5", "--dropout 0.5 differs from the 0.0 of a/checkpoint-2"),
        ("--config odd.yaml", "model has no key 'layer'; did you mean layers?"),
    ):
        Path("odd.yaml").write_text("model: {layer: 3}")
        capsys.readouterr()
        assert cli.main(["train", "--resume", "--out", "a", "--steps", "3", *flags.split()]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--out", "a", "--steps", "3", "--order", "shuffled"]) == 0


def test_flags_win_over_yaml():
    Path("run.yaml").write_text(
        "data: {text: [nowhere.txt], order: random}\n"
        "model: {layers: 3, dropout: 0.5, window: 9}\n"
        "train: {steps: 9, lr: 1e-2, ema: 0.5, compile: true}\n"
    )
    flags = ["--text", "text.txt", "--steps", "2", "--no-compile", "--dropout", "0", "--out", "a", "--bf16"]
    assert cli.main(["train", "--config", "run.yaml", *SMALL, *flags]) == 0
    config = RunConfig.from_yaml("a/config.yaml")
    assert (config.data.text, config.data.order) == (["text.txt"], "random")
    assert [config.model[name] for name in ("layers", "dropout", "window")] == [1, 0.0, 9]
    train = config.train
    assert (train.steps, train.lr, train.ema, train.compile, train.precision) == (2, 0.01, 0.5, False, "bfloat16")


def train_parser() -> argparse.ArgumentParser:
    (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices["train"]


def test_help_prints_the_defaults():
    actions = {action.dest: action for action in train_parser()._actions if action.const is None}
    for kind in (TrainConfig, DataConfig):
        for field in dataclasses.fields(kind):
            action = actions[field.name]
            assert action.default is None, "so that what was given is told from what was not"
            assert action.nargs == "+" or action.help.startswith(field.metadata["text"])
            printed = re.search(r"\(default (.+)\)$", action.help.replace("%%", "%"))
            if field.default is not dataclasses.MISSING and field.default is not None:
                assert printed, field.name
                assert printed[1] == repr(field.default)
    for name, default in tasks.SMALL.items():
        assert actions[name].help.endswith(f"(default {default})")
    assert actions["vocab_size"].help.endswith(f"(default {tasks.VOCAB_SIZE})")
    assert "default remainder" in actions["master_weights"].help
    assert TrainConfig(precision="pure_bfloat16").master_weights == "remainder"
    assert TrainConfig(precision="pure_bfloat16", optimizer="sgd").master_weights is None


def test_the_shape_of_a_model_of_which_nothing_is_said():
    config = RunConfig()
    shape = tasks.model_config(config, vocab_size=300)
    assert shape == GPTConfig.llama(**tasks.SMALL, vocab_size=300)
    config.model = {"preset": "gpt2", "width": 64}
    assert tasks.model_config(config) == GPTConfig.gpt2(**{**tasks.SMALL, "width": 64})

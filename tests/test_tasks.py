"""Each objective from files to a trained model, and what `fastllm train` can do beside training."""

from __future__ import annotations

import json
import math
import random
import re
import struct
from pathlib import Path

import pytest
import torch

from fastllm import cli, data
from fastllm.data import END_OF_TEXT
from fastllm.trainer import Trainer, checkpoint, tasks
from fastllm.trainer.config import DataConfig, RunConfig, TrainConfig
from fastllm.trainer.log import read_metrics
from fastllm.trainer.lr_finder import find_learning_rate

TINY = ["--context", "16", "--layers", "1", "--heads", "2", "--width", "32", "--warmup", "2", "--device", "cpu"]
VOCAB = ["--vocab-size", "300"]
SQUARES = "".join(f"{n} squared is {n * n}.\n" for n in range(300))
SENTIMENTS = {
    "good": ("fine", "great", "lovely"),
    "bad": ("awful", "poor", "dull"),
    "so-so": ("plain", "fair", "usual"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "text.txt").write_text(SQUARES)
    draw = random.Random(0)
    rows = [(label, f"the film was {draw.choice(SENTIMENTS[label])}") for label in SENTIMENTS for _ in range(60)]
    (tmp_path / "films.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fastllm(*arguments: str) -> None:
    assert cli.main([*arguments]) == 0


def train(out: str, *more: str, steps: int = 6, rows: int = 4) -> list[dict[str, float]]:
    """Trains and returns the metrics."""
    fastllm("train", "--out", out, "--steps", str(steps), "--batch-size", str(rows), *TINY, *more)
    return read_metrics(f"{out}/metrics.csv")


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in rows]


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(["train", *TINY, "--out", "new", *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("fastllm: error: ")
    assert "\n" not in error
    assert not Path("new").exists()
    return error


# Text


def test_text_in_any_layout_is_the_same_text():
    """A file, a folder of files, rows and a glob, of two documents."""
    first, second = SQUARES[:3000], SQUARES[3000:]
    Path("folder").mkdir()
    Path("folder/a.txt").write_text(first)
    Path("folder/b.txt").write_text(second)
    Path("rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in (first, second)))
    Path("whole.txt").write_text(first + END_OF_TEXT + second)
    found = {
        "files": train("files", "--text", "folder/a.txt", "folder/b.txt", *VOCAB),
        "folder": train("folder_", "--text", "folder", *VOCAB),
        "glob": train("glob", "--text", "folder/*.txt", *VOCAB),
        "jsonl": train("jsonl", "--text", "rows.jsonl", "--columns", "text=body", *VOCAB),
        "whole": train("whole", "--text", "whole.txt", *VOCAB),
    }
    for name, rows in found.items():
        assert losses(rows) == losses(found["files"]), name
    shape = json.loads(Path("glob/checkpoint-6/config.json").read_text())["model"]
    assert shape["document_token"] is not None, "attention stays inside a document"


def test_files_of_tokens(capsys):
    """The same tokens as from text give the same losses; eval and generate take such a run, too."""
    data.train_tokenizer([SQUARES], 300).save("own.json")
    fastllm("data", "tokenize", "text.txt", "--tokenizer", "own.json", "--out", "squares.tokens")
    Path("text.txt").write_text(SQUARES)  # without the token that ends a document in a file of tokens
    options = ["--no-document-mask", "--tokenizer", "own.json"]
    tokens = train("tokens", "--text", "squares.tokens", "--valid", "squares.tokens", *options)
    text = train("text", "--text", "text.txt", "--valid", "text.txt", *options)
    assert losses(tokens) == pytest.approx(losses(text), rel=0.02)
    assert tokens[-1]["validation_loss"] == pytest.approx(text[-1]["validation_loss"], rel=0.01)
    capsys.readouterr()
    fastllm("eval", "tokens", "--text", "squares.tokens")
    fastllm("eval", "text", "--text", "text.txt")
    one, other = capsys.readouterr().out.splitlines()
    assert "bits/byte" not in one
    one, other = (float(line.split()[1]) for line in (one, other))
    assert one == pytest.approx(other, rel=0.01)
    data.train_tokenizer([SQUARES[:500]], 290).save("other.json")
    arguments = ("--text", "squares.tokens", "--tokenizer", "other.json")
    assert "squares.tokens was written with another tokenizer than other.json" in refused(capsys, *arguments)


def test_shards_of_llm_c_without_a_tokenizer(capsys):
    tokens = [n % 7 for n in range(2000)]
    head = struct.pack("<3i", 20240520, 1, len(tokens)).ljust(1024, b"\0")
    for name in ("a", "b"):
        Path(f"{name}.bin").write_bytes(head + struct.pack(f"<{len(tokens)}H", *tokens))
    assert "a.bin has no tokenizer beside it: give --tokenizer, or --vocab-size" in refused(capsys, "--text", "a.bin")
    rows = train("run", "--text", "a.bin", "b.bin", "--vocab-size", "11", "--lr", "0.01", steps=60)
    assert rows[0]["loss"] == pytest.approx(math.log(11), abs=0.2)
    assert rows[-1]["loss"] < 0.3, "what comes next is known"
    assert not Path("run/checkpoint-60/tokenizer.json").exists()
    assert cli.main(["generate", "run", "--prompt", "1"]) == 1
    assert "run has no tokenizer.json" in capsys.readouterr().err
    train("run", "--resume", "--text", "a.bin", "b.bin", steps=61)
    error = refused(capsys, "--text", "a.bin", "--objective", "masked_lm")
    assert "a.bin: masked_lm needs a tokenizer that has [PAD] and [MASK]" in error


def test_masked_lm_then_classification(capsys):
    """A classifier begins with the weights of a masked model; what is new is said."""
    rows = train("bert", "--objective", "masked_lm", "--text", "text.txt", *VOCAB, "--lr", "0.01", steps=40, rows=16)
    assert rows[0]["loss"] == pytest.approx(math.log(304), abs=0.3)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.5
    capsys.readouterr()
    classify = ["--objective", "classification", "--text", "films.tsv", "--init", "bert"]
    train("films", *classify, steps=2)
    said = capsys.readouterr().out
    assert "new weights: pooler.dense.weight, pooler.dense.bias, head.weight, head.bias\n" in said
    assert "weights of bert that are not taken: masked_head" in said
    begun, kept = (checkpoint.load_tensors(checkpoint.find_checkpoint(run), "model") for run in ("bert", "films"))
    for name in begun.keys() & kept.keys():
        torch.testing.assert_close(kept[name], begun[name], atol=5e-3, rtol=0)
    train("gpt", "--text", "text.txt", *VOCAB, steps=1)
    assert "init: gpt is a GPT, which does not learn classification" in refused(capsys, *classify[:-1], "gpt")
    wrong = refused(capsys, *classify, "--width", "64")
    assert re.search(r"init: \S+ has shape \(\d+, 64\), in bert \(\d+, 32\)|init: \S+ has shape \(64,\)", wrong)


# Rows


def test_classification(capsys):
    arguments = [
        "--objective",
        "classification",
        "--text",
        "films.tsv",
        "--validation",
        "0.2",
        *VOCAB,
        "--lr",
        "0.01",
        "--dropout",
        "0",
    ]
    rows = train("run", *arguments, steps=120, rows=16)
    assert rows[-1]["accuracy"] > 0.9
    saved = json.loads(Path("run/checkpoint-120/config.json").read_text())
    assert saved["labels"] == ["bad", "good", "so-so"]
    found = json.loads(Path("run/confusion.json").read_text())
    assert (found["step"], found["labels"]) == (120, saved["labels"])
    counts = torch.tensor(found["counts"])
    assert counts.sum() == 36
    assert counts.trace() / 36 == pytest.approx(rows[-1]["accuracy"])
    capsys.readouterr()
    Path("some.tsv").write_text("good\tthe film was lovely\nbad\tthe film was dull\ngood\tthe film was poor\n")
    fastllm("eval", "run", "--text", "some.tsv")
    assert "accuracy 0.6667, 3 targets, 3 rows" in capsys.readouterr().out
    Path("odd.tsv").write_text("good\tthe film was lovely\nodd\tthe film was dull\n")
    assert cli.main(["eval", "run", "--text", "odd.tsv"]) == 1
    assert "odd.tsv:2: the label 'odd' is none of those trained on" in capsys.readouterr().err


def test_rows_true_columns_predicted():
    """One that always says the first label."""
    config = RunConfig(
        DataConfig(text=["films.tsv"], objective="classification", vocab_size=300),
        {"layers": 1, "heads": 2, "width": 32, "context": 16},
        TrainConfig(device="cpu"),
    )
    task = tasks.build(config, torch.device("cpu"))
    with torch.no_grad():
        task.model.head.weight.zero_()
        task.model.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    from fastllm.trainer.evaluation import evaluate

    found = evaluate(task.model, task.validation, 4)
    labels = torch.cat([task.validation.batch(i, 4)[1] for i in range(-(-len(task.validation) // 4))])
    assert found.confusion[:, 0].tolist() == labels.bincount(minlength=3).tolist()
    assert found.confusion[:, 1:].sum() == 0


def test_preprocessing_is_saved_and_run_again(capsys):
    """In a checkpoint, by eval: with neither the steps' file nor the corpus they were fitted on."""
    steps = ["--lower", "--segment", "whitespace", "--stop-words", "en", "--min-documents", "2"]
    fastllm("data", "inspect", "films.tsv", "--kind", "labelled", *steps, "--save-steps", "steps.json")
    arguments = ["--objective", "classification", "--text", "films.tsv", "--preprocessing", "steps.json", *VOCAB]
    train("run", *arguments, "--lr", "0.01", steps=40, rows=16)
    Path("steps.json").unlink()
    config = json.loads(Path("run/checkpoint-40/config.json").read_text())
    assert [step["step"] for step in config["preprocessing"]["steps"]] == [
        "normalize",
        "segment",
        "stop_words",
        "document_frequency",
    ]
    model, tokenizer = checkpoint.load_model("run")
    rows = tasks.held_out("classification", ["films.tsv"], config, tokenizer, model.config)
    tokens, _ = rows.batch(0, 1)
    assert data.decode(tokenizer, tokens[0][1:]).strip() in {f"film {word}" for word in SENTIMENTS["good"]}
    Path("upper.tsv").write_text("good\tTHE FILM WAS LOVELY\n")
    shouted = tasks.held_out("classification", ["upper.tsv"], config, tokenizer, model.config)
    assert data.decode(tokenizer, shouted.batch(0, 1)[0][0][1:]).strip() == "film lovely"
    Path("none.tsv").write_text("good\tthe film was lovely\nbad\tthe the\n")
    with pytest.warns(UserWarning, match="preprocessing leaves nothing of 1 of 2 texts, none.tsv:2 first"):
        fastllm("eval", "run", "--text", "none.tsv")


def test_seq2seq():
    """Words that come back in reverse."""
    draw = random.Random(1)
    pairs = [[draw.choice("abcd") for _ in range(draw.randint(1, 4))] for _ in range(400)]
    Path("pairs.tsv").write_text("".join(f"{' '.join(p)}\t{' '.join(reversed(p))}\n" for p in pairs))
    rows = train("run", "--objective", "seq2seq", "--text", "pairs.tsv", *VOCAB, "--lr", "0.01", steps=300, rows=16)
    assert rows[0]["loss"] > 5
    assert rows[-1]["validation_loss"] < 0.7
    model, tokenizer = checkpoint.load_model("run")
    found = model.generate(data.encode(tokenizer, "a b")[None], 8).tokens[0, 0]
    assert data.decode(tokenizer, found).replace(END_OF_TEXT, "").strip() in ("b a", "a b")


ANSWERS = {"What is the capital of France?": "Paris", "What is two and two?": "four", "Who wrote Faust?": "Goethe"}


def test_question_answering(capsys):
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in ANSWERS.items()]
    Path("qa.jsonl").write_text("\n".join(lines * 8) + "\n")
    arguments = ["--objective", "question_answering", "--text", "qa.jsonl", *VOCAB, "--context", "24", "--lr", "0.01"]
    train("run", *arguments, steps=60, rows=4)
    capsys.readouterr()
    for question, answer in ANSWERS.items():
        fastllm("generate", "run", "--prompt", question, "--temperature", "0")
        assert capsys.readouterr().out == f"{question}\n{answer}\n"
    fastllm("eval", "run", "--text", "qa.jsonl")
    assert float(re.match(r"loss ([\d.]+) nats/target", capsys.readouterr().out)[1]) < 0.1


def test_the_loss_of_answers_is_on_answers_alone():
    Path("qa.jsonl").write_text(
        "".join(json.dumps({"context": "One.", "question": f"{n}?", "answer": f"so {n}"}) + "\n" for n in range(9))
    )
    config = RunConfig(
        DataConfig(text=["qa.jsonl"], objective="question_answering", vocab_size=300, validation=0.4),
        {"layers": 1, "heads": 2, "width": 32, "context": 40},
        TrainConfig(device="cpu"),
    )
    task = tasks.build(config, torch.device("cpu"))
    inputs, targets = task.validation.batch(0, 9)
    end = data.document_token(task.tokenizer)
    learned = targets[targets >= 0]
    assert set(data.decode(task.tokenizer, learned).split(END_OF_TEXT)[:-1]) <= {f"so {n}" for n in range(9)}
    assert (learned == end).sum() == 4, "an end for each row"
    rows = data.decode(task.tokenizer, inputs.flatten()).split(END_OF_TEXT)
    assert all(re.fullmatch(r"One\.\n(\d)\?\nso \1", row) for row in rows if row)
    assert task.model.config.document_token == end, "attention stays inside a row"


def test_rows_that_do_not_fit(capsys):
    Path("odd.tsv").write_text("good\ta b\nbad\n")
    assert "odd.tsv:2" in refused(capsys, "--objective", "classification", "--text", "odd.tsv")
    Path("one.tsv").write_text("good\ta b\n")
    error = refused(capsys, "--objective", "classification", "--text", "one.tsv")
    assert "one.tsv: 0 rows to train on, 1 to validate on" in error


# Before training


def test_a_dry_run_says_what_would_be_and_writes_nothing(capsys):
    before = sorted(Path().rglob("*"))
    arguments = ["--text", "text.txt", "--steps", "50", "--batch-size", "3", "--accumulate", "2", *TINY, *VOCAB]
    fastllm("train", "--dry-run", "--ema", "0.9", "--precision", "pure_bfloat16", *arguments)
    out = capsys.readouterr().out
    assert sorted(Path().rglob("*")) == before
    config, plan = out.rsplit("\n\n", 1)
    Path("plan.yaml").write_text(config + "\n")
    assert RunConfig.from_yaml("plan.yaml").train.steps == 50
    parameters, tokens = (
        int(n.replace(",", "")) for n in re.match(r"([\d,]+) parameters, ([\d,]+) tokens", plan).groups()
    )
    shape = checkpoint.models.GPTConfig.from_dict(RunConfig.from_yaml("plan.yaml").model)
    assert parameters == shape.num_parameters() == checkpoint.models.GPT(shape).num_parameters()
    sizes = {name: float(size) for name, size in re.findall(r"^  ([\w ]+?) +([\d.]+) MiB$", plan, re.MULTILINE)}
    assert set(sizes) == {"weights", "gradients", "optimizer", "master weights", "ema", "activations", "loss", "sum"}
    assert sizes["weights"] == sizes["gradients"] == sizes["master weights"] == round(2 * parameters / 2**20, 1)
    assert sizes["ema"] == round(4 * parameters / 2**20, 1)
    assert sizes["sum"] == pytest.approx(sum(sizes.values()) / 2, abs=0.4)
    assert "a step: 6 rows, 96 targets, " in plan
    epochs = 50 * 6 / (tokens // 16 - 1)
    assert f"the run: 50 steps, about 4,800 targets, {epochs:.2f} epochs, 0 min " in plan


def test_find_lr(capsys):
    """A rate between the extremes, and one that trains; the weights are as they were."""
    fastllm("train", "--find-lr", "--text", "text.txt", "--out", "run", "--batch-size", "8", *TINY, *VOCAB)
    rate = re.match(r"--lr ([\d.e-]+): the loss fell steepest there. run/learning_rates.png", capsys.readouterr().out)[
        1
    ]
    assert 1e-4 < float(rate) < 0.3
    assert [path.name for path in Path("run").iterdir()] == ["learning_rates.png"]
    assert Path("run/learning_rates.png").read_bytes().startswith(b"\x89PNG")
    found = train("run", "--text", "text.txt", *VOCAB, "--lr", rate, steps=40, rows=8)
    slow = train("slow", "--text", "text.txt", *VOCAB, "--lr", str(float(rate) / 1000), steps=40, rows=8)
    assert found[-1]["loss"] < slow[-1]["loss"] - 1


def test_finding_a_rate_leaves_the_weights():
    config = RunConfig(
        DataConfig(text=["text.txt"], vocab_size=300),
        {"layers": 1, "heads": 2, "width": 32, "context": 16},
        TrainConfig(device="cpu", steps=7, lr=0.5),
    )
    task = tasks.build(config, torch.device("cpu"))
    trainer = Trainer(task.model, task.train, config.train)
    before = {name: weight.clone() for name, weight in task.model.state_dict().items()}
    found = find_learning_rate(trainer, steps=30)
    assert found.rates[0] == pytest.approx(1e-7)
    assert found.suggestion in found.rates
    assert found.rates == sorted(found.rates)
    for name, weight in task.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert (config.train.lr, config.train.steps) == (0.5, 7)


# How to train


def test_batch_tokens_set_accumulate(capsys):
    """192 tokens of 3 x 16 are 4 passes: the run is that of --accumulate 4."""
    text = ["--text", "text.txt", *VOCAB]
    one = train("one", *text, "--batch-tokens", "192", rows=3)
    other = train("other", *text, "--accumulate", "4", rows=3)
    assert losses(one) == losses(other)
    saved = RunConfig.from_yaml("one/config.yaml").train
    assert (saved.batch_tokens, saved.accumulate) == (192, 1), "which other ranks divide in another way"
    train("one", "--resume", *text, "--batch-tokens", "192", rows=3)
    train("one", "--resume", *text, "--accumulate", "4", rows=3)
    assert "only one of them can be given" in refused(capsys, *text, "--batch-tokens", "64", "--accumulate", "2")


def test_patience_stops_and_says_so(capsys):
    """A rate of nothing learns nothing: the second validation is no better, and so is the third."""
    rows = train("run", "--text", "text.txt", *VOCAB, "--lr", "0", "--eval-every", "2", "--patience", "2", steps=50)
    assert len(rows) == 6
    said = capsys.readouterr().out.splitlines()[-1]
    loss = rows[1]["validation_loss"]
    assert said == (f"stopped by 2 validations without a loss below {loss:.4f}; more --patience: run/checkpoint-6")
    assert Path("run/checkpoint-6").is_dir()


def test_the_average_is_what_is_validated_and_loaded():
    rows = train("run", "--text", "text.txt", *VOCAB, "--ema", "0.9", "--lr", "0.01", steps=20)
    path = Path("run/checkpoint-20")
    model, _ = checkpoint.load_model(path)
    average, last = (checkpoint.load_tensors(path, stem) for stem in ("ema", "model"))
    name = "blocks.0.mlp.down_proj.weight"
    name = name if name in last else next(n for n in last if n.endswith("weight"))
    assert not torch.equal(average[name], last[name])
    assert torch.equal(model.state_dict()[name], average[name])
    assert rows[-1]["validation_loss"] > 0


def test_activation_checkpointing_changes_no_loss():
    text = ["--text", "text.txt", *VOCAB, "--dropout", "0.1", "--preset", "gpt2"]
    assert losses(train("one", *text)) == losses(train("two", *text, "--activation-checkpointing"))


@pytest.mark.parametrize(
    "options",
    [
        "--optimizer adamw --moment-dtype uint8",
        "--optimizer torch_adamw --schedule linear",
        "--optimizer sgd --lr 0.5 --schedule constant",
        "--optimizer adafactor --lr 0.05 --schedule inverse_sqrt",
        "--optimizer muon --schedule wsd",
        "--schedule inverse_time --decay 0.01",
        "--precision bfloat16",
        "--precision pure_bfloat16",
        "--precision pure_bfloat16 --master-weights float32 --moment-dtype bfloat16",
        "--precision pure_bfloat16 --optimizer sgd --lr 0.5",
        "--order random --clip 0 --skip-spikes 8 --no-async-checkpoint --label-smoothing 0.1",
    ],
)
def test_each_way_to_train_learns(options):
    rows = train("run", "--text", "text.txt", *VOCAB, "--lr", "0.01", *options.split(), steps=40, rows=8)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert math.isfinite(rows[-1]["validation_loss"])
    more = train("run", "--resume", "--text", "text.txt", steps=41, rows=8)
    assert more[-1]["loss"] < rows[0]["loss"] - 1, "and goes on"

"""The training loop: its arithmetic, its logs and its errors."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

from fastllm import data
from fastllm.models import GPT, GPTConfig
from fastllm.trainer import TrainConfig, Trainer, evaluate, make_optimizer, resolve_device, warmup_cosine
from fastllm.trainer.log import MetricsLog, read_metrics

VOCAB, CONTEXT = 53, 12
TOKENS = (torch.arange(3000) ** 2 + torch.arange(3000) // 7) % VOCAB


def make_model(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig.llama(vocab_size=VOCAB, context=CONTEXT, layers=2, heads=2, width=32, **changes))


def make_trainer(tmp_path, *, model=None, dataset=None, validation=None, tokenizer=None, **changes) -> Trainer:
    config = TrainConfig(
        **{
            "steps": 4,
            "batch_size": 4,
            "warmup": 2,
            "checkpoint_every": 0,
            "out": str(tmp_path),
            "device": "cpu",
            **changes,
        }
    )
    return Trainer(
        model or make_model(),
        dataset or data.RandomWindows(TOKENS, CONTEXT),
        config,
        validation=validation,
        tokenizer=tokenizer,
    )


class Rows:
    """One list of rows, dealt out in order: batch i of n rows is rows i * n and following."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor):
        self.inputs, self.targets = inputs, targets

    def batch(self, index: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(index * size, (index + 1) * size)
        return self.inputs[rows], self.targets[rows]


def uneven_rows(count: int) -> Rows:
    inputs, targets = data.RandomWindows(TOKENS, CONTEXT).batch(0, count)
    lengths = torch.arange(count) * 5 % (CONTEXT + 1)  # 0 among them: a row without any target
    return Rows(inputs, targets.masked_fill(torch.arange(CONTEXT) >= lengths[:, None], -100))


def test_schedule():
    def rate(step: int) -> float:
        return warmup_cosine(step, steps=101, warmup=10, peak=2.0, floor=0.2)

    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(10) == pytest.approx(2.0)
    assert rate(55) == pytest.approx(1.1)  # half way
    assert rate(100) == pytest.approx(0.2)
    rates = [rate(step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    assert warmup_cosine(0, steps=1, warmup=0, peak=2.0, floor=0.2) == 2.0


def test_accumulation_is_one_big_batch(tmp_path):
    rows = uneven_rows(24)
    trainers = [
        make_trainer(tmp_path, model=make_model(), dataset=rows, batch_size=12 // n, accumulate=n) for n in (1, 3, 12)
    ]
    for _ in range(2):
        whole, *parts = [trainer.train_step() for trainer in trainers]
        for part in parts:
            assert part["tokens"] == whole["tokens"]
            assert part["loss"] == pytest.approx(whole["loss"], rel=1e-6)
            assert part["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


def test_gradients_of_an_accumulated_step_are_those_of_the_mean(tmp_path):
    rows = uneven_rows(6)
    trainer = make_trainer(tmp_path, dataset=rows, batch_size=2, accumulate=3, clip=0.0)
    seen = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
    )
    trainer.train_step()
    model = make_model()
    logits = model(rows.inputs)
    valid = rows.targets != -100
    F.cross_entropy(logits[valid], rows.targets[valid]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_clipping(tmp_path):
    """The norm that is reported is the one before clipping; the moments have seen the clipped gradient."""
    for clip, optimizer in ((0.0, "fastllm"), (0.01, "fastllm"), (0.01, "torch")):
        trainer = make_trainer(tmp_path, clip=clip, optimizer=optimizer, beta1=0.9)
        grads = {}
        trainer.optimizer.register_step_pre_hook(
            lambda _, *__, trainer=trainer, grads=grads: grads.update(
                {p: p.grad.clone() for p in trainer.model.parameters()}
            )
        )
        reported = trainer.train_step()["grad_norm"]
        assert reported > 0.1
        seen = torch.stack([trainer.optimizer.state[p]["exp_avg"].norm() for p in grads]).norm().item()
        assert seen == pytest.approx(0.1 * (clip or reported), rel=1e-3)
        if optimizer == "fastllm":
            assert reported == pytest.approx(torch.stack([g.norm() for g in grads.values()]).norm().item(), rel=1e-5)


def test_both_optimizers_take_the_same_step(tmp_path):
    trainers = [make_trainer(tmp_path, optimizer=name) for name in ("fastllm", "torch")]
    for _ in range(4):
        ours, theirs = (trainer.train_step() for trainer in trainers)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_only_matrices_decay():
    model = make_model()
    decayed, plain = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert {id(p) for p in plain["params"]} == {id(p) for name, p in model.named_parameters() if "norm" in name}


def test_a_step_is_adamw(tmp_path):
    trainer = make_trainer(tmp_path, lr=0.01, min_lr_ratio=0.5, clip=0.0)
    model = make_model()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        foreach=False,
    )
    for step, rate in enumerate((0.005, 0.01, 0.01, 0.005)):
        assert trainer.train_step()["learning_rate"] == pytest.approx(rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model(*data.RandomWindows(TOKENS, CONTEXT).batch(step, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, expected in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_learns_and_logs(tmp_path, precision):
    period = torch.arange(7).repeat(300)
    validation = data.SequentialWindows(period[:100], CONTEXT)
    trainer = make_trainer(
        tmp_path,
        dataset=data.RandomWindows(period, CONTEXT),
        validation=validation,
        precision=precision,
        steps=40,
        lr=1e-2,
        eval_every=15,
    )
    trainer.run()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["step"] for row in rows if "validation_loss" in row] == [15, 30, 40]
    assert rows[0]["loss"] == pytest.approx(math.log(VOCAB), abs=0.2)
    assert rows[-1]["loss"] < 0.5
    assert rows[-1]["validation_loss"] == pytest.approx(
        evaluate(trainer.model, validation, 4, precision=precision)[0], rel=1e-6
    )
    assert all(row["tokens_per_second"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-40"]


def test_evaluate_is_the_mean_over_tokens_without_dropout():
    model = make_model(dropout=0.5).train()
    windows = data.SequentialWindows(TOKENS[:100], CONTEXT)
    total = 0.0
    model.eval()
    with torch.no_grad():
        for index in range(len(windows)):
            inputs, targets = windows.batch(index, 1)
            total += model(inputs, targets, reduction="sum").item()
    model.train()
    loss, tokens = evaluate(model, windows, 4)
    assert (loss, tokens) == (pytest.approx(total / 99, rel=1e-5), 99)
    assert model.training
    assert evaluate(model, windows, 4, max_batches=1)[1] == 4 * CONTEXT


def test_a_loss_that_is_not_finite_stops(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_step()
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]

    def poison(module, args, output):
        return output * math.nan

    handle = trainer.model.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match="step 2: loss nan"):
        trainer.run()
    handle.remove()
    assert trainer.step == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer.train_step()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_batches_without_targets_stop(tmp_path):
    inputs, targets = data.RandomWindows(TOKENS, CONTEXT).batch(0, 4)
    trainer = make_trainer(tmp_path, dataset=Rows(inputs, torch.full_like(targets, -100)))
    with pytest.raises(ValueError, match="step 1: no batch has a valid target"):
        trainer.train_step()


def test_a_new_run_leaves_checkpoints_alone(tmp_path):
    make_trainer(tmp_path).run()
    with pytest.raises(FileExistsError, match="checkpoint-4 is there already"):
        make_trainer(tmp_path).run()


def test_samples(tmp_path):
    tokenizer = data.train_tokenizer(["the cat sat on the mat"], 280)
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size()
    model = GPT(GPTConfig.llama(vocab_size=size, context=CONTEXT, layers=1, heads=2, width=16))
    trainer = make_trainer(
        tmp_path, model=model, tokenizer=tokenizer, sample_every=2, sample_prompt="the", sample_tokens=5
    )
    trainer.run()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-0.txt", "step-2.txt", "step-4.txt"]
    assert (tmp_path / "samples/step-4.txt").read_text().startswith("the")
    assert (tmp_path / "samples/step-4.txt").read_text() == trainer.sample("the", 5, top_k=50, seed=0) + "\n"
    long = {"model": model, "tokenizer": tokenizer, "sample_every": 2, "sample_tokens": CONTEXT}
    with pytest.raises(ValueError, match="do not fit into the context of 12"):
        make_trainer(tmp_path / "long", **long).run()
    trainer.tokenizer = None
    with pytest.raises(ValueError, match="needs a tokenizer"):
        trainer.sample("the", 5)


def test_compiled_training_is_the_same(tmp_path):
    torch._dynamo.reset()
    plain, compiled = make_trainer(tmp_path), make_trainer(tmp_path, compile=True)
    compiled.forward = torch.compile(compiled.model, backend="aot_eager")  # the default needs a C++ compiler, and time
    for _ in range(3):
        assert compiled.train_step()["loss"] == pytest.approx(plain.train_step()["loss"], rel=1e-5)


def test_log_drops_what_a_resumed_run_repeats(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 2})
    log.close()
    assert capsys.readouterr().out.count("TensorBoard is not installed") == 1
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,0.")  # a line that a killed process left
    log = MetricsLog(tmp_path, step=2)
    log.write(3, {"loss": 7.0, "validation_loss": 8.0})
    log.close()
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 7.0, "validation_loss": 8.0},
    ]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_trainer(tmp_path).run()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in read_metrics(tmp_path / "metrics.csv")]
    assert losses == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": math.nan}, "lr must be finite and not negative, got nan"),
        ({"beta2": 1.5}, r"beta2 must be in \[0, 1\], got 1.5"),
        ({"precision": "float16"}, "precision must be .* got 'float16'"),
    ],
)
def test_config_names_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="unknown device 'gpu9'"):
        resolve_device("gpu9")

"""The training loop: its arithmetic, its logs and its errors."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastllm import data
from fastllm.models import GPT, GPTConfig
from fastllm.trainer import TrainConfig, Trainer, evaluate, make_optimizer, resolve_device
from fastllm.trainer.distributed import Ranks
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
    (adamw,) = trainer.optimizer.optimizers
    adamw.register_step_pre_hook(
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
    for clip, optimizer in ((0.0, "adamw"), (0.01, "adamw"), (0.01, "torch_adamw")):
        trainer = make_trainer(tmp_path, clip=clip, optimizer=optimizer, beta1=0.9)
        grads = {}
        (one,) = trainer.optimizer.optimizers
        one.register_step_pre_hook(
            lambda _, *__, trainer=trainer, grads=grads: grads.update(
                {p: p.grad.clone() for p in trainer.model.parameters()}
            )
        )
        reported = trainer.train_step()["grad_norm"]
        assert reported > 0.1
        seen = torch.stack([one.state[p]["exp_avg"].norm() for p in grads]).norm().item()
        assert seen == pytest.approx(0.1 * (clip or reported), rel=1e-3)
        if optimizer == "adamw":
            assert reported == pytest.approx(torch.stack([g.norm() for g in grads.values()]).norm().item(), rel=1e-5)


def test_both_optimizers_take_the_same_step(tmp_path):
    trainers = [make_trainer(tmp_path, optimizer=name) for name in ("adamw", "torch_adamw")]
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
        evaluate(trainer.model, validation, 4, precision=precision).loss, rel=1e-6
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
    found = evaluate(model, windows, 4)
    assert (found.loss, found.count) == (pytest.approx(total / 99, rel=1e-5), 99)
    assert found.confusion is None
    assert model.training
    assert evaluate(model, windows, 4, max_batches=1).count == 4 * CONTEXT


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


@contextlib.contextmanager
def poisoned(module: torch.nn.Module, calls: set[int] | None = None):
    """Meanwhile, a module gives NaN, or does so at these calls alone, the first being 0."""
    count = itertools.count()

    def poison(module, args, output):
        here = calls is None or next(count) in calls
        return torch.utils._pytree.tree_map(lambda x: x * math.nan, output) if here else output

    handle = module.register_forward_hook(poison)
    try:
        yield
    finally:
        handle.remove()


def test_the_first_module_that_is_not_finite_is_named(tmp_path):
    trainer = make_trainer(tmp_path, accumulate=2, batch_size=2)
    trainer.train_step()
    with (
        poisoned(trainer.model.blocks[1].mlp, calls={1, 3}),
        pytest.raises(
            FloatingPointError, match=r"step 2: loss nan.*first in batch 1, in the output of blocks\.1\.mlp;"
        ),
    ):
        trainer.train_step()
    with torch.no_grad():
        trainer.model.blocks[0].mlp.down_proj.weight[3, 3] = math.inf
    with pytest.raises(FloatingPointError, match=r"in batch 0, in the weights blocks\.0\.mlp\.down_proj\.weight"):
        trainer.train_step()


def test_a_gradient_that_is_not_finite_is_named(tmp_path):
    trainer = make_trainer(tmp_path)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    handle = trainer.model.blocks[0].attention.out_proj.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(
        FloatingPointError, match=r"gradient norm (nan|inf), first in batch 0, in the gradient of blocks"
    ):
        trainer.train_step()
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert math.isfinite(trainer.train_step()["loss"])


def test_nothing_changes_behind_a_bad_step_before_the_host_knows(tmp_path, monkeypatch):
    """On a GPU losses are read a step later; meanwhile steps with a finite loss change nothing either."""
    monkeypatch.setattr(Trainer, "lag", 3)
    trainer = make_trainer(tmp_path, ema=0.5, steps=9)
    trainer._begin_step(False)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    averages = {name: tensor.clone() for name, tensor in trainer.ema.tensors().items()}
    with poisoned(trainer.model):
        trainer._begin_step(False)
    for _ in range(2):
        trainer._begin_step(False)
    assert [step for step, _ in trainer._read(3)] == [1]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert all(torch.equal(averages[name], tensor) for name, tensor in trainer.ema.tensors().items())
    with pytest.raises(FloatingPointError, match="step 2: loss nan"):
        trainer._read(0)
    assert trainer.step == 1
    straight = make_trainer(tmp_path, ema=0.5, steps=9)
    for _ in range(3):
        straight.train_step()
    for _ in range(2):
        trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), trainer.model.parameters(), strict=True))


class Spiky:
    """Batches whose targets are random at some steps: their loss is far above what the model has learned."""

    def __init__(self, spikes: set[int]):
        self.spikes, self.windows = spikes, data.RandomWindows(torch.arange(7).repeat(300), CONTEXT)

    def batch(self, index: int, size: int):
        inputs, targets = self.windows.batch(index, size)
        return inputs, (targets * 5 + 11) % VOCAB if index in self.spikes else targets


def test_spikes_are_passed_over_and_counted(tmp_path):
    options = {"steps": 60, "lr": 1e-2, "warmup": 0, "schedule": "constant"}
    trainer = make_trainer(tmp_path, dataset=Spiky({40, 55}), skip_spikes=6, **options)
    for step in range(60):
        before = trainer.model.embedding.weight.detach().clone()
        metrics = trainer.train_step()
        assert torch.equal(before, trainer.model.embedding.weight) == (step in (40, 55)), step
    assert metrics["skipped"] == 2
    without = make_trainer(tmp_path, dataset=Spiky({40}), **options)
    for _ in range(60):
        metrics = without.train_step()
    assert "skipped" not in metrics


def test_bits_do_not_depend_on_what_was_drawn_before(tmp_path):
    """Dropout is a function of seed, step and rank; nobody else's random numbers matter."""
    trainers = [make_trainer(tmp_path, model=make_model(dropout=0.3)) for _ in range(2)]
    for step in range(3):
        torch.manual_seed(step)
        first = trainers[0].train_step()
        torch.rand(17)
        assert trainers[1].train_step() | {"data_wait": 0} == first | {"data_wait": 0}
    other = make_trainer(tmp_path, model=make_model(dropout=0.3), seed=1)
    assert other.train_step()["loss"] != make_trainer(tmp_path, model=make_model(dropout=0.3)).train_step()["loss"]


def test_every_rank_takes_its_own_batches(tmp_path):
    asked = []

    class Asked(Rows):
        def batch(self, index: int, size: int):
            asked.append(index)
            return super().batch(0, size)

    rows = Asked(*data.RandomWindows(TOKENS, CONTEXT).batch(0, 4))
    for rank in range(3):
        trainer = make_trainer(tmp_path, dataset=rows, accumulate=2)
        trainer.ranks = Ranks(rank, 3)
        for step in range(2):
            trainer._load(step)
    assert asked == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]


def test_batches_that_are_loaded_ahead_are_the_same(tmp_path):
    """As it is beside a GPU; also where somebody takes a step back."""
    plain, ahead = (make_trainer(tmp_path, model=make_model(dropout=0.3), steps=6) for _ in range(2))
    ahead.loads_ahead = True
    for step in range(6):
        if step == 3:
            plain.step = ahead.step = 1
        assert plain.train_step() | {"data_wait": 0} == ahead.train_step() | {"data_wait": 0}


@pytest.mark.parametrize("ahead", [True, False])
def test_an_error_of_the_data_is_raised(tmp_path, ahead):
    class Short(Rows):
        def batch(self, index: int, size: int):
            if index == 2:
                raise IndexError("there are only 2 batches")
            return super().batch(0, size)

    trainer = make_trainer(tmp_path, dataset=Short(*data.RandomWindows(TOKENS, CONTEXT).batch(0, 4)))
    trainer.loads_ahead = ahead
    with pytest.raises(IndexError, match="only 2 batches"):
        trainer.run()
    assert trainer.step == 2


def test_validation_takes_the_average_and_patience_ends(tmp_path):
    validation = data.SequentialWindows((torch.arange(120) * 31 + 7) % VOCAB, CONTEXT)  # other text: it gets worse
    trainer = make_trainer(
        tmp_path, validation=validation, steps=200, lr=1e-2, eval_every=5, patience=3, ema=0.5, checkpoint_every=5
    )
    trainer.run()
    losses = {
        row["step"]: row["validation_loss"]
        for row in read_metrics(tmp_path / "metrics.csv")
        if "validation_loss" in row
    }
    best = min(losses, key=losses.get)
    assert trainer.step == best + 15 < 200
    assert "3 validations without a loss below" in trainer.stopped
    assert {path.name for path in tmp_path.glob("checkpoint-*")} >= {
        f"checkpoint-{best:.0f}",
        f"checkpoint-{trainer.step}",
    }
    plain = evaluate(trainer.model, validation, 4).loss
    with trainer.averaged():
        assert evaluate(trainer.model, validation, 4).loss == pytest.approx(losses[trainer.step], rel=1e-6)
    assert evaluate(trainer.model, validation, 4).loss == plain != pytest.approx(losses[trainer.step], rel=1e-6)


@pytest.mark.parametrize(
    "changes", [{"precision": "pure_bfloat16"}, {"precision": "pure_bfloat16", "master_weights": "remainder"}]
)
def test_pure_bfloat16_learns(tmp_path, changes):
    period = torch.arange(7).repeat(300)
    trainer = make_trainer(tmp_path, dataset=data.RandomWindows(period, CONTEXT), steps=60, lr=1e-2, **changes)
    trainer.run()
    assert all(parameter.dtype == torch.bfloat16 for parameter in trainer.model.parameters())
    assert read_metrics(tmp_path / "metrics.csv")[-1]["loss"] < 0.6


def test_a_model_whose_activations_are_recomputed_is_the_same(tmp_path):
    models = [make_model(dropout=0.3) for _ in range(2)]
    plain, recomputed = (
        make_trainer(tmp_path, model=model, activation_checkpointing=on)
        for model, on in zip(models, (False, True), strict=True)
    )
    for _ in range(3):
        assert plain.train_step() | {"data_wait": 0} == recomputed.train_step() | {"data_wait": 0}
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_a_loss_that_stays_up_is_no_spike_for_long(tmp_path):
    trainer = make_trainer(tmp_path, dataset=Spiky(set(range(40, 140))), skip_spikes=6, steps=140, lr=1e-2, warmup=0)
    for _ in range(140):
        metrics = trainer.train_step()
    assert 1 <= metrics["skipped"] < 60
    assert metrics["loss"] < 1.5, "what came later was learned"


def test_the_best_validation_is_saved_with_patience(tmp_path):
    validation = data.SequentialWindows((torch.arange(120) * 31 + 7) % VOCAB, CONTEXT)
    trainer = make_trainer(tmp_path, validation=validation, steps=200, lr=1e-2, eval_every=5, patience=3, ema=0.5)
    trainer.run()
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "validation_loss" in row]
    best = min(rows, key=lambda row: row["validation_loss"])["step"]
    assert (tmp_path / f"checkpoint-{best:.0f}").is_dir()


def test_validation_without_targets_is_named(tmp_path):
    inputs, targets = data.RandomWindows(TOKENS, CONTEXT).batch(0, 4)

    class None_(Rows):
        def __len__(self):
            return 4

    with pytest.raises(ValueError, match="the data to validate on has no target"):
        evaluate(make_model(), None_(inputs, torch.full_like(targets, -100)), 4)


def test_losses_that_are_read_later_are_logged_and_saved_alike(tmp_path, monkeypatch):
    """As on a GPU, where a step's loss is read during the next."""
    validation = data.SequentialWindows(TOKENS[:200], CONTEXT)
    options = {"validation": validation, "steps": 13, "eval_every": 5, "patience": 50, "checkpoint_every": 4, "keep": 0}
    make_trainer(tmp_path / "now", **options).run()
    monkeypatch.setattr(Trainer, "lag", 1)
    make_trainer(tmp_path / "later", **options).run()
    timed = ("tokens_per_second", "data_wait")
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("now", "later")]
    now, later = ([{k: v for k, v in row.items() if k not in timed} for row in some] for some in rows)
    assert now == later
    names = [{path.name for path in (tmp_path / name).glob("checkpoint-*")} for name in ("now", "later")]
    assert names[0] == names[1] <= {f"checkpoint-{step}" for step in (4, 5, 8, 10, 12, 13)}

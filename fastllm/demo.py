"""What `make demo` runs: trains a small GPT on real text, then times its training step against PyTorch's."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fastllm import data
from fastllm._command import check_folder
from fastllm._extras import require
from fastllm.backends import use_backend
from fastllm.models import GPT, GPTConfig
from fastllm.trainer import TrainConfig, Trainer, checkpoint, evaluate
from fastllm.trainer.log import read_metrics

VOCAB_SIZE = 2048
MODEL = GPTConfig.llama(context=128, layers=8, heads=2, width=128, hidden=256, qk_norm=True)
STEPS = 600
BATCH_SIZE = 8
ROUNDS = 40
WARMUP = 2  # rounds that are not timed; the first one compiles
COMPARE_LR = 1e-4  # small: at a large one, differences in rounding grow from step to step
EAGER = "PyTorch eager"
PROMPTS = ("The", "A class", "If an exception")  # no space at the end: it belongs to the next token


@dataclass
class Contender:
    """One way to run the training step.

    Attributes:
        name: in the table.
        trainer: whose step it is.
        backend: the backend that is forced meanwhile, if any.
        losses: one a step, from the same weights and batches for all contenders.
        seconds: one a step that was timed.
        failure: why it cannot run, if so.
    """

    name: str
    trainer: Trainer
    backend: str | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None

    def step(self, timed: bool) -> None:
        if self.failure is not None:
            return
        started = time.perf_counter()
        try:
            with use_backend(self.backend):
                self.losses.append(self.trainer.train_step()["loss"])
        except Exception as error:
            if self.losses:
                raise
            # The first step compiles; where that cannot be, the table says why.
            self.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        else:
            if timed:
                self.seconds.append(time.perf_counter() - started)


def compare(weights: dict[str, Tensor], config: GPTConfig, batches: data.Dataset, rounds: int) -> list[Contender]:
    """Takes the same training steps (forward, backward, clipping, AdamW) in five ways, one step of each a round."""

    def contender(name: str, ops: str, backend: str | None = None, compile: bool = False) -> Contender:
        model = GPT(replace(config, ops=ops))
        model.load_state_dict(weights)
        train = TrainConfig(
            steps=WARMUP + rounds,
            batch_size=BATCH_SIZE,
            lr=COMPARE_LR,
            warmup=0,
            optimizer="adamw" if ops == "fastllm" else "torch_adamw",
            compile=compile,
            device="cpu",
        )
        return Contender(name, Trainer(model, batches, train), backend)

    contenders = [
        contender("fastllm", "fastllm"),
        contender("fastllm, torch.compile", "fastllm", compile=True),
        contender("fastllm, forced to its reference", "fastllm", backend="reference"),
        contender(EAGER, "torch"),
        contender("torch.compile", "torch", compile=True),
    ]
    tqdm = require("tqdm", "train").tqdm
    bar = tqdm(range(WARMUP + rounds), desc="compare", unit="round")
    for index in bar:
        first = index // 2 % len(contenders)  # none always follows the same one
        order = contenders[first:] + contenders[:first]
        for one in order if index % 2 else order[::-1]:
            bar.set_postfix_str(one.name)  # the first step of one is to be compiled
            one.step(timed=index >= WARMUP)
    return contenders


def comparison_table(contenders: list[Contender], tokens: int) -> str:
    """The rows of `compare` as text; `tokens` is how many a step takes.

    Speed is the median over rounds of eager's time by this one's in the same round, so that a machine that slows down
    meanwhile slows both.
    """
    eager = next(contender for contender in contenders if contender.name == EAGER)
    lines = [f"{'':<33}{'ms/step':>8}  {'quartiles':<15}{'tokens/s':>9}  {'speed':>7}  largest difference in loss"]
    for contender in contenders:
        if contender.failure is not None:
            lines.append(f"{contender.name:<33}cannot run here: {contender.failure}")
            continue
        low, median, high = (1e3 * q for q in statistics.quantiles(contender.seconds, n=4, method="inclusive"))
        speed = statistics.median(e / s for e, s in zip(eager.seconds, contender.seconds, strict=True))
        difference = max(abs(e - c) for e, c in zip(eager.losses, contender.losses, strict=True))
        lines.append(
            f"{contender.name:<33}{median:>8.1f}  {f'{low:.1f} .. {high:.1f}':<15}{1e3 * tokens / median:>9,.0f}"
            f"  {f'{speed:.2f}x':>7}  " + ("" if contender is eager else f"{difference:.1e}")
        )
    return "\n".join(lines)


def draw_losses(rows: list[dict[str, float]], path: Path, title: str) -> None:
    """Draws the loss curves of a `metrics.csv` into a PNG."""
    require("matplotlib", "train").use("Agg")
    plt = require("matplotlib.pyplot", "train")
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["loss"] for row in rows], color="#9ecae1", linewidth=1, label="training, each step")
    half = len(rows) // 40
    smooth = [statistics.fmean(row["loss"] for row in rows[max(0, i - half) : i + half + 1]) for i in range(len(rows))]
    axes.plot(steps, smooth, color="#08519c", linewidth=2, label=f"training, mean of {2 * half + 1} steps")
    checks = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    axes.plot(*zip(*checks, strict=True), color="#d94801", marker="o", markersize=4, linewidth=2, label="validation")
    last_step, last_loss = checks[-1]
    axes.text(last_step * 1.01, last_loss, f"{last_loss:.2f}", color="#d94801", va="center")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title, xlim=(0, last_step * 1.06))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main(steps: int = STEPS, out: str = "runs/demo", rounds: int = ROUNDS) -> int:
    """Trains, samples, compares and draws. Results of an earlier demo in `out` are replaced.

    Args:
        steps: optimizer steps of the training.
        out: directory for checkpoints, metrics and loss.png.
        rounds: how many steps of each kind to time, at least 2.

    Raises:
        ImportError: without the extra [train].
        OSError: for an `out` that cannot be written to.
        ValueError: for too few steps or rounds.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}")
    train = TrainConfig(
        steps=steps,
        batch_size=BATCH_SIZE,
        lr=1e-3,
        warmup=min(20, steps),
        eval_every=max(1, steps // 12),
        checkpoint_every=0,
        out=out,
        device="cpu",
    )
    check_folder(out, "out")
    started = time.perf_counter()
    folder = Path(out)
    text, held_out = data.split_text(data.topics_text(), validation=0.05)
    tokenizer = data.train_tokenizer([text], VOCAB_SIZE)
    tokens, held_out_tokens = data.encode(tokenizer, text), data.encode(tokenizer, held_out)
    config = replace(MODEL, vocab_size=data.vocabulary_size(tokenizer))
    torch.manual_seed(train.seed)
    model = GPT(config)
    label = (
        f"{config.layers} layers, width {config.width}, {config.heads} heads, RMSNorm, also of queries and keys, "
        f"rotary, SwiGLU, vocabulary {config.vocab_size}"
    )
    print(f"Text: Python's own help topics, {len(text):,} characters = {len(tokens):,} tokens to train on.")
    print(f"Model: {label}: {model.num_parameters():,} parameters. {torch.get_num_threads()} CPU threads, float32.")
    checkpoint.delete_checkpoints(folder)
    batches = data.RandomWindows(tokens, config.context, train.seed)
    validation = data.SequentialWindows(held_out_tokens, config.context)
    trainer = Trainer(model, batches, train, validation=validation, tokenizer=tokenizer)
    trainer.run()
    found = evaluate(model, validation, BATCH_SIZE)
    bits = found.loss * found.count / math.log(2) / len(held_out.encode())
    print(f"Trained in {time.perf_counter() - started:.0f} s. On {found.count:,} tokens of text it has not seen:")
    print(f"  validation loss {found.loss:.3f}, perplexity {math.exp(found.loss):.1f}, {bits:.2f} bits per byte")
    print("Three samples (temperature 0.6, top-k 50):")
    for prompt in PROMPTS:
        print("  > " + " ".join(trainer.sample(prompt, 40, temperature=0.6, top_k=50, seed=train.seed).split()))
    draw_losses(
        read_metrics(folder / "metrics.csv"),
        folder / "loss.png",
        f"Trained on Python's help topics: {model.num_parameters():,} parameters",
    )

    contenders = compare(model.state_dict(), config, batches, rounds)
    print(
        f"One training step (forward, backward, clipping, AdamW) of this model, batch {BATCH_SIZE} x {config.context}:"
    )
    print(comparison_table(contenders, BATCH_SIZE * config.context))
    print(
        f"Medians of {rounds} rounds that take turns; speed is against PyTorch eager; differences over "
        f"{WARMUP + rounds} steps from the same weights and batches."
    )
    print(f"Loss curve: {folder / 'loss.png'}. Checkpoint: {trainer.out / f'checkpoint-{trainer.step}'}.")
    return 0

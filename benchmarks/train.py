"""`fastllm train` on characters, beside nanoGPT's loop; its loop beside a bare one; and `write_tokens`.

Models and options are those of nanoGPT (github.com/karpathy/nanoGPT): of its README for a computer without a GPU, 4
layers of 128 channels, 12 rows of 64 characters a step, and of config/train_shakespeare_char.py, the "baby GPT", 6
layers of 384, 64 rows of 256, dropout 0.2. GPT-2 without biases, in float32 on a CPU and bfloat16 by autocast on a GPU.
Each contender trains in a process of its own, with the system's allocator as it is, and waits while others have their
turn of a few steps; they begin with the same weights and the same three batches, on which the losses must agree (of the
baby, without dropout, in processes that end before).

    fastllm               Trainer.run, as `fastllm train` calls it, with its log, TensorBoard and progress bar
    fastllm, compiled     the same with --compile
    fastllm, token file   the same with tokens from the disk
    bare loop             fastllm's model and AdamW on batches that are there: forward, backward, step
    eager, torch.compile  nanoGPT's loop around its model, written anew: batches as it draws them, clipping, torch's
                          AdamW as it chooses it, the loss read as often

No validation and no checkpoints are timed.

python -m fastllm.benchmarks.train runs/bench/cpu.json    # the results as a table of docs/performance.md
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import string
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastllm
from fastllm import data, ops
from fastllm._extras import require
from fastllm.benchmarks._process import Worker
from fastllm.benchmarks._training_step import OURS_COMPILED
from fastllm.benchmarks.harness import COMPILED, Case, Ready
from fastllm.data.text import topics_text
from fastllm.models import GPT, GPTConfig
from fastllm.testing import make
from fastllm.trainer import TrainConfig, Trainer, make_optimizer

STEPS = 3  # on which the losses are compared
TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}
BARE, TOKEN_FILE, TWO = "bare loop", "fastllm, token file", "fastllm, 2 processes"
BATCHES = 64  # that the bare loop takes in turn
TRAIN = TrainConfig(steps=5000, lr=1e-3, warmup=100, beta2=0.99, eval_every=0, checkpoint_every=0, keep=0)
TEXT_BYTES = 50_000_000  # that are tokenized


class Shape(NamedTuple):
    layers: int
    heads: int
    width: int
    context: int
    batch: int
    dropout: float
    log_interval: int  # steps between losses that nanoGPT's loop reads
    turn: int  # steps
    rounds: tuple[int, int]


SMALL = Shape(4, 4, 128, 64, 12, 0.0, 1, 20, (15, 60))
BABY = Shape(6, 6, 384, 256, 64, 0.2, 10, 1, (7, 7))


class Job(NamedTuple):
    """What a contender trains, and where."""

    shape: Shape
    tokens: Tensor
    device: str
    folder: str

    def config(self) -> GPTConfig:
        layers, heads, width, context, _, dropout, *_ = self.shape
        vocabulary = int(self.tokens.max()) + 1
        sizes = {"vocab_size": vocabulary, "context": context, "layers": layers, "heads": heads, "width": width}
        return GPTConfig.gpt2(**sizes, dropout=dropout, bias=False, mlp="gelu_erf")

    def model(self) -> GPT:
        torch.manual_seed(0)
        return GPT(self.config()).to(self.device)

    def windows(self, tokens: Any = None) -> data.ShuffledWindows:
        return data.ShuffledWindows(self.tokens if tokens is None else tokens, self.shape.context)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")


def rate(step: int) -> float:
    """Warm-up and cosine."""
    if step < TRAIN.warmup:
        return TRAIN.lr * (step + 1) / TRAIN.warmup
    progress = (step - TRAIN.warmup) / (TRAIN.steps - 1 - TRAIN.warmup)
    return TRAIN.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


class Turns:
    """Called before each step: after as many as it was asked for, answers (the losses of the first ones, the seconds
    that others than a turn's first waited for data), and waits for the next order."""

    def __init__(self, pipe: Any, device: str):
        self.pipe, self.device = pipe, device
        self.left: int | None = None
        self.losses: list[float] = []
        self.waits: list[float] = []

    def __call__(self) -> None:
        while not self.left:
            if self.left == 0:
                if self.device == "cuda":
                    torch.cuda.synchronize()
                self.pipe.send((self.losses[:STEPS], sum(self.waits[1:])))
            self.left = self.pipe.recv()
            self.waits.clear()
        self.left -= 1


# nanoGPT's model and loop. Names of parameters are fastllm's.


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.qkv_proj = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.heads, self.dropout, self.residual = shape.heads, shape.dropout, nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.qkv_proj(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.residual(self.out_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class MLP(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.up_proj = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.down_proj = nn.Linear(4 * shape.width, shape.width, bias=False)
        self.gelu, self.dropout = nn.GELU(), nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(self.gelu(self.up_proj(x))))


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.attention_norm, self.attention = Norm(shape.width), Attention(shape)
        self.mlp_norm, self.mlp = Norm(shape.width), MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Plain(nn.Module):
    def __init__(self, shape: Shape, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.embedding(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)


def nanogpt(job: Job, turns: Turns, compiled: bool) -> None:
    np = require("numpy", "train")
    shape, first, tokens = job.shape, job.windows(), job.tokens.numpy().astype(np.uint16)
    weights = job.model()
    model = Plain(shape, weights.config.vocab_size).to(job.device)
    model.load_state_dict(weights.state_dict())
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=TRAIN.lr, betas=(0.9, 0.99), **({"fused": True} if job.device == "cuda" else {}),
    )  # fmt: skip
    forward = torch.compile(model) if compiled else model

    def batch(step: int) -> tuple[Tensor, Tensor]:
        if step < STEPS:
            x, y = (z.contiguous() for z in first.batch(step, shape.batch))
        else:
            starts = torch.randint(len(tokens) - shape.context, (shape.batch,))
            x = torch.stack([torch.from_numpy(tokens[i : i + shape.context].astype(np.int64)) for i in starts])
            y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + shape.context].astype(np.int64)) for i in starts])
        if job.device == "cuda":
            return x.pin_memory().to("cuda", non_blocking=True), y.pin_memory().to("cuda", non_blocking=True)
        return x, y

    x, y = batch(0)
    for step in itertools.count():
        turns()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        with job.autocast():
            loss = forward(x, y)
        x, y = batch(step + 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step < STEPS or step % shape.log_interval == 0:
            turns.losses.append(loss.item())


# fastllm's


def bare(job: Job, turns: Turns) -> None:
    model, windows = job.model(), job.windows()
    optimizer = make_optimizer(model, TRAIN)
    batches = [tuple(x.to(job.device) for x in windows.batch(i, job.shape.batch)) for i in range(BATCHES)]
    for step, batch in enumerate(itertools.cycle(batches)):
        turns()
        optimizer.set_rate(rate(step))
        with job.autocast():
            loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step < STEPS:
            turns.losses.append(loss.item())


class TakingTurns(Trainer):
    turns: Turns

    def _begin_step(self, stop: bool) -> bool:
        self.turns()
        return super()._begin_step(stop)

    def _read(self, lag: int) -> list[tuple[int, dict[str, float]]]:
        found = super()._read(lag)
        self.turns.losses += [metrics["loss"] for step, metrics in found if step <= STEPS]
        self.turns.waits += [metrics["data_wait"] for _, metrics in found]
        return found


def ours(job: Job, turns: Turns, compiled: bool, on_disk: bool = False) -> None:
    windows = job.windows()
    if on_disk:
        np = require("numpy", "train")
        path = Path(job.folder) / "tokens.bin"  # llm.c's format
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(job.tokens)
        path.write_bytes(header.tobytes() + job.tokens.numpy().astype("<u2").tobytes())
        windows = job.windows(data.open_tokens(path))
    changes: dict[str, Any] = {"batch_size": job.shape.batch, "device": job.device, "compile": compiled}
    changes["precision"] = "bfloat16" if job.device == "cuda" else "float32"
    trainer = TakingTurns(job.model(), windows, TrainConfig(**{**vars(TRAIN), **changes, "out": job.folder}))
    trainer.turns = turns
    trainer.run()


LOOPS: dict[str, Callable[[Job, Turns], None]] = {
    "fastllm": functools.partial(ours, compiled=False),
    "eager": functools.partial(nanogpt, compiled=False),
    COMPILED: functools.partial(nanogpt, compiled=True),
    OURS_COMPILED: functools.partial(ours, compiled=True),
    BARE: bare,
    TOKEN_FILE: functools.partial(ours, compiled=False, on_disk=True),
}


def _work(pipe: Any, name: str, job: Job, threads: int) -> None:
    """A contender's process."""
    warnings.simplefilter("ignore")
    if job.device == "cuda":
        warnings.simplefilter("error", fastllm.FallbackWarning)
    torch.set_num_threads(threads)
    sys.stderr = open(Path(job.folder) / "stderr", "w", encoding="utf-8")  # for the progress bar  # noqa: SIM115
    try:
        LOOPS[name](job, Turns(pipe, job.device))
    except EOFError:  # the benchmark is over
        pass
    except Exception as error:
        pipe.send(error)


def check(name: str, losses: list[float], expected: list[float], device: str) -> None:
    """Raises AssertionError for losses that differ."""
    if max(abs(a - b) for a, b in zip(losses, expected, strict=True)) > TOLERANCE[device]:
        raise AssertionError(f"the first losses of {name} are {losses}, of nanoGPT's loop {expected}")


def setup(shape: Shape, text: str, device: str, names: tuple[str, ...]) -> dict[str, Callable[[], Ready] | str]:
    tokens, temporary = characters(text), tempfile.TemporaryDirectory()

    def start(name: str, shape: Shape) -> tuple[Callable[[int], Any], list[float]]:
        folder = tempfile.mkdtemp(dir=temporary.name)
        ask = Worker(_work, name, Job(shape, tokens, device, folder), torch.get_num_threads()).ask
        return ask, ask(STEPS + 1)[0]

    plain = shape._replace(dropout=0.0, batch=12) if shape.dropout else shape
    eager, expected = start("eager", plain)

    def ready(name: str) -> Ready:
        if plain != shape:  # whose masks are each contender's own
            check(name, start(name, plain)[1], expected, device)
        ask, losses = (eager, expected) if (name, plain) == ("eager", shape) else start(name, shape)
        if plain == shape:
            check(name, losses, expected, device)
        spent = waited = 0.0

        def call() -> None:
            nonlocal spent, waited
            started = time.perf_counter()
            waited += ask(shape.turn)[1]
            spent += (time.perf_counter() - started) * (shape.turn - 1) / shape.turn

        def facts() -> dict[str, float]:
            measured = name in ("fastllm", OURS_COMPILED, TOKEN_FILE) and shape.turn > 1
            return {"data_wait": round(waited / spent, 5)} if measured else {}

        return Ready(lambda: temporary.name, call, facts=facts)

    return {name: functools.partial(ready, name) for name in names}


def characters(text: str) -> Tensor:
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([numbers[character] for character in text])


def case(label: str, shape: Shape, text: str, device: str, names: tuple[str, ...] = tuple(LOOPS)) -> Case:
    bf16 = device == "cuda"
    config = Job(shape, torch.tensor([len(set(text)) - 1]), device, "").config()
    tokens = shape.turn * shape.batch * shape.context
    return Case(
        op="train",
        name=f"{label} {'bf16' if bf16 else 'fp32'}, steps of {shape.batch}x{shape.context}: {shape.turn}",
        direction="forward+backward",
        args=lambda: (make((2, 8), device=device), (8,), make((8,), device=device)),
        rivals={},
        bytes=28 * config.num_parameters() * shape.turn,
        flops=config.flops_per_token(shape.context) * tokens,
        products=torch.bfloat16 if bf16 else torch.float32,
        tokens=tokens,
        target="1.15x eager and torch.compile",
        call=ops.rms_norm,  # for the name of the backend alone
        setup=functools.partial(setup, shape, text, device, names),
        rounds=shape.rounds,
    )


# Tokenizing


def documents(text: str, size: int) -> list[data.Document]:
    """Documents of some 4 kB of the text, a word in ten replaced by letters, `size` characters in all."""
    draw, words, found = random.Random(0), text.split(" "), []
    while size > 0:
        start = draw.randrange(max(1, len(words) - 700))
        some = words[start : start + 700]
        for i in draw.sample(range(len(some)), len(some) // 10):
            some[i] = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9)))
        found.append(data.Document(" ".join(some), True, f"{len(found)}"))
        size -= len(found[-1].text)
    return found


def tokenizing(text: str, size: int) -> dict[str, Callable[[], Ready] | str]:
    tokenizer, found, folder = data.train_tokenizer([text], 2048), documents(text, size), tempfile.TemporaryDirectory()
    texts = [document.text for document in found]

    def write(number: int, count: int | None = None, processes: int | None = None) -> data.TokenFile:
        path = Path(folder.name) / f"{number}.tokens"
        return data.write_tokens(path, found[:count], tokenizer, end=None, processes=processes)

    expected = [token for one in tokenizer.encode_batch(texts[:100], add_special_tokens=False) for token in one.ids]
    if write(0, 100).tokens.tolist() != expected:
        raise AssertionError("write_tokens writes other tokens than encode_batch gives")

    def encode(encode_batch: Callable[..., Any]) -> None:
        encode_batch(texts, add_special_tokens=False)

    calls: dict[str, Callable[[], Any]] = {
        "fastllm": functools.partial(write, 1),
        "encode_batch": functools.partial(encode, tokenizer.encode_batch),
        "encode_batch_fast": functools.partial(encode, tokenizer.encode_batch_fast),
        TWO: functools.partial(write, 2, processes=2),
    }
    return {name: functools.partial(Ready, lambda: None, call) for name, call in calls.items()}


def tokenizing_case(text: str, size: int = TEXT_BYTES) -> Case:
    return Case(
        op="train",
        name=f"write_tokens, {size / 1e6:g} MB",
        direction="forward",
        args=lambda: (make((2, 8)), (8,), make((8,))),
        rivals={},
        bytes=size,
        flops=0,
        target="1.2x the time of encode_batch",
        call=ops.rms_norm,
        fallback=True,
        setup=functools.partial(tokenizing, text, size),
        rounds=(5, 5),
    )


def cases(device: str, quick: bool, text: str | None = None) -> list[Case]:
    text = topics_text() if text is None else text
    small, baby = (SMALL, BABY) if device == "cpu" else (SMALL._replace(turn=100), BABY._replace(turn=50))
    found = [case("GPT-2 4x128", small, text, device)]
    if quick:
        return found
    names = tuple(name for name in LOOPS if name != TOKEN_FILE or baby.turn > 1)
    return [*found, case("GPT-2 6x384, dropout 0.2", baby, text, device, names), tokenizing_case(text)]


def markdown(results: list[dict[str, Any]]) -> str:
    """The table of docs/performance.md."""
    lines = ["| | tokens/s, or MB/s | spread | fastllm's speed against it | waits for data |", "|---|---|---|---|---|"]
    for result in results:
        lines.append(f"| **{result['case']}**, {result['rounds']} rounds | | | | |")
        contenders = result["contenders"]
        for name, figures in contenders.items():
            milliseconds = figures["median_ms"]
            amount = 1e3 * result["tokens"] / milliseconds or result["bytes"] / milliseconds / 1e3
            speed = milliseconds / contenders["fastllm"]["median_ms"]
            wait = f"{figures['data_wait']:.2%}" if "data_wait" in figures else ""
            lines.append(f"| {name} | {amount:,.0f} | {figures['noise']:.1%} | {speed:.3f} | {wait} |")
    return "\n".join(lines)


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["results"]
    print(markdown([result for result in found if result["op"] == "train"]))

"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastllm._extras import require
from fastllm.data import Dataset, SequentialWindows, decode, encode
from fastllm.models import GPT
from fastllm.models.layers import IGNORE, evaluating
from fastllm.optim import AdamW
from fastllm.trainer import checkpoint
from fastllm.trainer._files import reading, writing
from fastllm.trainer.log import MetricsLog
from fastllm.trainer.schedule import warmup_cosine

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimizer steps in all, those of a resumed run included.
        batch_size: rows a forward pass.
        accumulate: forward passes an optimizer step.
        lr, min_lr_ratio, warmup: the learning rate rises to lr over warmup steps and falls to lr * min_lr_ratio.
        weight_decay: of matrices; vectors (norms and biases) are not decayed.
        beta1, beta2, eps: AdamW's.
        clip: largest norm of all gradients together; 0 does not clip.
        optimizer: "fastllm" for fastllm.optim.AdamW, "torch" for torch.optim.AdamW and clip_grad_norm_.
        precision: "float32", or "bfloat16" by autocast, weights staying in float32.
        eval_every, checkpoint_every, sample_every: in steps; 0 is never. Validation and a checkpoint also come last.
        eval_batches: batches a validation; 0 takes all.
        keep: how many checkpoints to keep, the newest; 0 keeps all.
        sample_prompt, sample_tokens: what a sample continues, and how far.
        seed: of the samples, from 0 to 2^64 - 1. Weights, dropout and data have their own: torch.manual_seed, and the
            data set's.
        out: directory of checkpoints, metrics.csv, tensorboard/ and samples/.
        compile: run the model through torch.compile.
        device: as torch.device; "auto" is "cuda" where there is one, else "cpu".

    Raises:
        ValueError: for a value out of range, naming it.
    """

    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    optimizer: str = "fastllm"
    precision: str = "float32"
    eval_every: int = 100
    eval_batches: int = 0
    checkpoint_every: int = 500
    keep: int = 2
    sample_every: int = 0
    sample_prompt: str = "\n"
    sample_tokens: int = 64
    seed: int = 0
    out: str = "runs/train"
    compile: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        at_least = {"steps": 1, "batch_size": 1, "accumulate": 1, "warmup": 0, "sample_tokens": 1}
        for name in ("eval_every", "eval_batches", "checkpoint_every", "keep", "sample_every"):
            at_least[name] = 0
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"TrainConfig: {name} must be at least {least}, got {getattr(self, name)}")
            if getattr(self, name) >= 2**63:
                raise ValueError(f"TrainConfig: {name} must be less than 2^63, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"TrainConfig: seed must be at least 0 and less than 2^64, got {self.seed}")
        if not self.out:
            raise ValueError("TrainConfig: out must not be empty")
        for name in ("lr", "weight_decay", "clip", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"TrainConfig: {name} must be finite and not negative, got {getattr(self, name)}")
        for name in ("min_lr_ratio", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"TrainConfig: {name} must be in [0, 1], got {getattr(self, name)}")
        if self.optimizer not in ("fastllm", "torch"):
            raise ValueError(f"TrainConfig: optimizer must be 'fastllm' or 'torch', got {self.optimizer!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"TrainConfig: precision must be 'float32' or 'bfloat16', got {self.precision!r}")


def saved_config(path: Path) -> TrainConfig:
    """The TrainConfig of the checkpoint at `path`.

    Raises:
        OSError: where its config.json cannot be read.
        ValueError: where it is damaged.
    """
    with reading(path / "config.json"):
        return TrainConfig(**checkpoint.load_config(path)["train"])


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is "cuda" where there is one, else "cpu".

    Raises:
        ValueError: for a name that torch does not know, a device that fastllm does not run on, and a GPU that is not
            there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"unknown device {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r}: fastllm trains on cpu and cuda")
    count = 1
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r}: torch {torch.__version__} sees no GPU")
        count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ValueError(f"device {name!r}: there is only {device.type}:0" + (f" to {count - 1}" if count > 1 else ""))
    return device


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only: fastllm's, which also clips, or torch's fused one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "torch":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    return AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
        max_norm=config.clip or math.inf,
        skip_nonfinite=True,
    )


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@torch.no_grad()
def evaluate(
    model: GPT, data: SequentialWindows, batch_size: int = 16, *, max_batches: int = 0, precision: str = "float32"
) -> tuple[float, int]:
    """The mean loss over the data, without dropout.

    Args:
        model: on any device.
        data: what to validate on.
        batch_size, precision: as in `TrainConfig`.
        max_batches: how many batches at most; 0 takes all.

    Returns:
        (nats a token, number of tokens).

    Raises:
        ValueError: for a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be at least 1, got {batch_size}")
    device = next(model.parameters()).device
    batches = -(-len(data) // batch_size)
    if max_batches:
        batches = min(batches, max_batches)
    total, tokens = 0.0, 0
    with evaluating(model):
        for index in range(batches):
            inputs, targets = data.batch(index, batch_size)
            tokens += int((targets != IGNORE).sum())
            with _autocast(device, precision):
                total += model(inputs.to(device), targets.to(device), reduction="sum").item()
    return total / tokens, tokens


class Trainer:
    """Trains a `GPT`.

        trainer = Trainer(model, RandomWindows(tokens, context), TrainConfig(steps=1000))
        trainer.run()

    The same seeds give the same bits, and so does a run that was stopped and resumed (on one machine, with the same
    number of threads).

    Args:
        model: is moved to the device.
        data: the batches to train on; step s takes those numbered s * accumulate and following.
        config: see `TrainConfig`.
        validation: what to validate on, if anything.
        tokenizer: for samples; saved with each checkpoint.

    Raises:
        ImportError: without the extra [train].
        ValueError: for an unknown device.
    """

    def __init__(
        self,
        model: GPT,
        data: Dataset,
        config: TrainConfig,
        *,
        validation: SequentialWindows | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        self.device = resolve_device(config.device)
        self.model = model.to(self.device)
        self.forward = torch.compile(model) if config.compile else model
        self.data, self.validation, self.tokenizer, self.config = data, validation, tokenizer, config
        self.out = Path(config.out)
        self.optimizer = make_optimizer(model, config)
        self.step = 0
        """Optimizer steps taken so far."""

    @functools.cached_property
    def _data_digest(self) -> str | None:
        """Of a data set's tokens, if it keeps them as ours do."""
        tokens = getattr(self.data, "tokens", None)
        if not isinstance(tokens, Tensor):
            return None
        return hashlib.sha256(tokens.cpu().contiguous().numpy().data).hexdigest()

    def learning_rate(self) -> float:
        """Of the step to come."""
        config = self.config
        return warmup_cosine(
            self.step, steps=config.steps, warmup=config.warmup, peak=config.lr, floor=config.lr * config.min_lr_ratio
        )

    def train_step(self) -> dict[str, float]:
        """Takes one optimizer step and returns its loss, learning rate, gradient norm (before clipping) and tokens.

        The loss is the mean over the valid targets of all `accumulate` batches, whatever their number in each, so that
        n batches of b rows give the step of one batch of n * b rows.

        Raises:
            FloatingPointError: for a loss or a gradient that is not finite; the weights are those before the step.
            ValueError: for batches without a valid target.
        """
        config = self.config
        first = self.step * config.accumulate
        batches = [self.data.batch(first + i, config.batch_size) for i in range(config.accumulate)]
        tokens = sum(int((targets != IGNORE).sum()) for _, targets in batches)
        if tokens == 0:
            raise ValueError(f"step {self.step + 1}: no batch has a valid target")
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        total = torch.zeros((), device=self.device)
        for inputs, targets in batches:
            inputs, targets = self._to_device(inputs), self._to_device(targets)
            documents = self.model.documents(inputs)
            with _autocast(self.device, config.precision):
                loss = self.forward(inputs, targets, reduction="sum", documents=documents) / tokens
            loss.backward()
            total += loss.detach()
        fused = isinstance(self.optimizer, AdamW)
        if isinstance(self.optimizer, AdamW):
            # Clips on the way, and does nothing for a norm or a loss that is not finite: no wait for them before it.
            self.optimizer.found_inf = (~total.isfinite()).float()  # as a GradScaler would say it
            try:
                self.optimizer.step()
            finally:
                del self.optimizer.found_inf
            norm = self.optimizer.grad_norm
            assert norm is not None
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        loss_value, norm_value = torch.stack((total, norm)).tolist()
        if not math.isfinite(loss_value) or not math.isfinite(norm_value):
            self.optimizer.zero_grad()
            raise FloatingPointError(
                f"step {self.step + 1}: loss {loss_value}, gradient norm {norm_value}; training stopped with the "
                f"weights of step {self.step}. A lower learning rate ({rate:.3g} here) or a longer warm-up may help."
            )
        if not fused:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {"loss": loss_value, "learning_rate": rate, "grad_norm": norm_value, "tokens": tokens}

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def run(self) -> None:
        """Trains up to `config.steps`, with a progress bar on stderr.

        Raises:
            FileExistsError: for a new run into a directory that has checkpoints.
            FloatingPointError: as `train_step`.
            OSError: for what the disk says, naming the file; a checkpoint that was written before is named too.
            ValueError: for samples that do not fit into the model's context, or lack a tokenizer.
        """
        config = self.config
        if any("\ud800" <= character <= "\udfff" for character in config.out):
            raise ValueError(f"the directory {config.out!r} cannot be used: its name is not UTF-8")
        found = checkpoint.list_checkpoints(self.out)
        if self.step == 0 and found:
            raise FileExistsError(f"{found[-1]} is there already: resume it, or choose another directory")
        tqdm = require("tqdm", "train").tqdm
        require("safetensors.torch", "train")  # now, not when the first checkpoint is due
        self.out.mkdir(parents=True, exist_ok=True)
        if config.sample_every:
            self._write_sample()  # of the weights so far; a prompt that does not fit fails here, not after an hour
        log = MetricsLog(self.out, self.step)
        # In a file, a line every few seconds would bury everything else.
        interval = 0.2 if sys.stderr is not None and sys.stderr.isatty() else 15.0
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc="train",
            unit="step",
            mininterval=interval,
            dynamic_ncols=True,
            disable=sys.stderr is None,
        )
        shown: dict[str, str] = {}
        speed = 0.0
        try:
            while self.step < config.steps:
                started = time.perf_counter()
                metrics = self.train_step()
                current = metrics.pop("tokens") / (time.perf_counter() - started)
                speed = 0.9 * speed + 0.1 * current if speed else current
                metrics["tokens_per_second"] = current
                if self.validation is not None and self._due(config.eval_every, last=True):
                    metrics["validation_loss"], _ = evaluate(
                        self.model,
                        self.validation,
                        config.batch_size,
                        max_batches=config.eval_batches,
                        precision=config.precision,
                    )
                    shown["val"] = f"{metrics['validation_loss']:.3f}"
                log.write(self.step, metrics)
                if self._due(config.sample_every):
                    self._write_sample()
                if self._due(config.checkpoint_every, last=True):
                    self.save()
                bar.set_postfix({"loss": f"{metrics['loss']:.3f}", **shown, "tok/s": f"{speed:,.0f}"}, refresh=False)
                bar.update()
        except BaseException:
            bar.close()
            with contextlib.suppress(OSError):  # a disk that is full is so for the log as well
                log.close()
            raise
        bar.close()
        log.close()

    def _due(self, every: int, last: bool = False) -> bool:
        return (last and self.step == self.config.steps) or (every > 0 and self.step % every == 0)

    def sample(self, prompt: str, max_new_tokens: int, **sampling: Any) -> str:
        """Prompt and continuation; `sampling` as `GPT.generate`.

        Raises:
            ValueError: without a tokenizer, and as `GPT.generate`.
        """
        if self.tokenizer is None:
            raise ValueError("a sample needs a tokenizer")
        tokens_BT = encode(self.tokenizer, prompt)[None].to(self.device)
        if tokens_BT.numel() == 0:
            raise ValueError(f"a sample cannot continue {prompt!r}: the tokenizer has no tokens for it")
        return decode(self.tokenizer, self.model.generate(tokens_BT, max_new_tokens, **sampling)[0])

    def _write_sample(self) -> None:
        # A file a step: a resumed run writes what is there already once more, the same.
        config = self.config
        text = self.sample(config.sample_prompt, config.sample_tokens, top_k=50, seed=config.seed)
        path = self.out / "samples" / f"step-{self.step}.txt"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")

    def save(self) -> Path:
        """Writes the checkpoint of this step and returns its path."""
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "data": self._data_digest,
        }
        config = {"model": dataclasses.asdict(self.model.config), "train": dataclasses.asdict(self.config)}
        return checkpoint.save_checkpoint(
            self.out, self.step, self.model, state, config, self.tokenizer, self.config.keep
        )

    def load(self, path: str | Path) -> None:
        """Takes up the run whose checkpoint is at `path`, or the newest one in it.

        Raises:
            FileNotFoundError: where there is none.
            OSError: where a file cannot be read.
            ValueError: where it is damaged, another model's, or was trained on other tokens.
        """
        path = checkpoint.find_checkpoint(path)
        checkpoint.load_weights(path, self.model)
        state = checkpoint.load_state(path)
        if state.get("data") != self._data_digest:
            raise ValueError(f"{path} was trained on other tokens than those given, so it cannot be resumed with them")
        with reading(path / "state.pt"):
            step = state["step"]
            if not isinstance(step, int) or step < 0:
                raise ValueError(f"its step is {step!r}")
            self.optimizer.load_state_dict(state["optimizer"])
            for parameter, values in self.optimizer.state.items():
                for name, value in values.items():
                    if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                        raise ValueError(
                            f"{name} has shape {tuple(value.shape)} for weights of {tuple(parameter.shape)}: it is "
                            "another model's"
                        )
            torch.set_rng_state(state["rng_cpu"])
            if self.device.type == "cuda" and state["rng_cuda"] is not None:
                torch.cuda.set_rng_state(state["rng_cuda"], self.device)
        self.step = step

"""The training loop."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastllm._extras import require
from fastllm.data import decode, encode
from fastllm.models.layers import Model
from fastllm.models.layout import to_device
from fastllm.trainer import checkpoint
from fastllm.trainer._files import reading, writing
from fastllm.trainer.config import TrainConfig
from fastllm.trainer.distributed import Ranks, local_device, resolve_device, shard
from fastllm.trainer.ema import EMA
from fastllm.trainer.evaluation import autocast, evaluate
from fastllm.trainer.faults import first_fault
from fastllm.trainer.flops import peak_flops
from fastllm.trainer.log import MetricsLog
from fastllm.trainer.optimizers import gather, make_optimizer
from fastllm.trainer.schedule import learning_rate
from fastllm.trainer.signals import stop_requests

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPIKE_WARMUP = 20  # steps before a loss can be a spike
_SPIKE_DECAY = 0.98  # of the running mean and variance of the loss


class Micro(NamedTuple):
    """A forward pass's batch, on the CPU."""

    inputs: Tensor
    targets: Tensor
    options: dict[str, Any]  # further arguments of the model
    valid: int  # targets that take part in the loss
    positions: int  # that the model computes
    flops: int  # that it takes for them, forward and backward


class _Pending(NamedTuple):
    """A step's numbers, on their way from the device."""

    step: int
    rate: float
    tokens: float  # targets that took part in the loss
    positions: float  # that were computed
    flops: float
    wait: float  # seconds that the step waited for its data
    numbers: Tensor  # loss, gradient norm, bad, skipped
    arrived: Any  # an event, or None


class Trainer:
    """Trains a model of `fastllm.models`.

        trainer = Trainer(model, RandomWindows(tokens, context), TrainConfig(steps=1000))
        trainer.run()

    Batches and dropout are functions of (seed, step, rank, number of ranks) alone, so that the same seed gives the same
    bits, and so does a run that was killed and resumed (on one machine, with as many threads and ranks). Each step
    seeds torch's global generators.

    Under `torchrun`, each rank takes its own batches; the loss is the mean over the valid targets of all of them.

    Args:
        model: is moved to the device; with FSDP2, its weights must be the same on all ranks.
        data: the batches to train on, `batch(index, size) -> (inputs, targets)` or with further arguments of the model
            as a third; step s of rank r takes those numbered (s * accumulate + i) * ranks + r.
        config: see `TrainConfig`.
        validation: what to validate on, if anything; with a `len`, its rows.
        tokenizer: for samples; saved with each checkpoint.
        saved: what else a checkpoint's config.json shall hold, by name.
        ranks: those that train together; found unless given.

    Raises:
        ImportError: without the extra [train].
        ValueError: for an unknown device, or options that do not go together.
    """

    def __init__(
        self,
        model: Model,
        data: Any,
        config: TrainConfig,
        *,
        validation: Any = None,
        tokenizer: Tokenizer | None = None,
        saved: dict[str, Any] | None = None,
        ranks: Ranks | None = None,
    ):
        self.device = local_device(resolve_device(config.device))
        self.ranks = Ranks.join(self.device) if ranks is None else ranks
        self.data, self.validation, self.tokenizer, self.config = data, validation, tokenizer, config
        self.saved = saved or {}
        self._architecture = type(model).__name__  # which FSDP2 changes
        self.out = Path(config.out)
        self.accumulate = config.accumulate
        """Forward passes an optimizer step."""
        if config.batch_tokens:
            tokens = config.batch_size * self.ranks.size * model.config.context
            self.accumulate = max(1, round(config.batch_tokens / tokens))
        self.model = model.to(self.device, torch.bfloat16 if config.precision == "pure_bfloat16" else None)
        if config.activation_checkpointing:
            model.checkpoint_activations()
        sharded = self.ranks.size > 1 and config.parallel == "fsdp"
        if sharded:
            shard(model)
        self.forward: Any = torch.compile(model) if config.compile else model
        if self.ranks.size > 1 and not sharded:
            ids = [self.device] if self.device.type == "cuda" else None
            self.forward = torch.nn.parallel.DistributedDataParallel(self.forward, ids, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(model, config)
        self.ema = EMA(model, config.ema) if config.ema else None
        self.step = 0
        """Optimizer steps taken so far."""
        self.stopped: str | None = None
        """Why training ended before its last step, if it did."""
        self._best, self._waited = math.inf, 0  # validation loss, and validations since
        self._validated: float | None = None  # the loss of the newest validation, of this step
        self._bad = torch.zeros((), device=self.device)  # > 0 from the first loss or norm on that is not finite
        self._spikes = torch.zeros(4, device=self.device)  # steps, mean and variance of the loss, and how many skipped
        self._pending: collections.deque[_Pending] = collections.deque()
        self._flops: dict[int, int] = {}  # of a token, by length of the rows
        self.loads_ahead = self.device.type == "cuda"
        self._loader = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[list[Micro]]] | None = None
        self._writer = checkpoint.Writer(config.async_checkpoint)

    @property
    def lag(self) -> int:
        """How many steps later a step's loss is read: on a GPU one, so that the host is never behind."""
        return 1 if self.device.type == "cuda" and not self.optimizer.waits else 0

    @functools.cached_property
    def _data_digest(self) -> str | None:
        """Of what is trained on, if the data set has one."""
        digest = getattr(self.data, "digest", None)
        return None if digest is None else digest()

    def learning_rate(self) -> float:
        """Of the step to come."""
        config = self.config
        return learning_rate(
            self.step,
            schedule=config.schedule,
            steps=config.steps,
            warmup=config.warmup,
            peak=config.lr,
            floor=config.lr * config.min_lr_ratio,
            decay=config.decay,
            decay_share=config.decay_share,
        )

    def _load(self, step: int) -> list[Micro]:
        """This rank's batches of a step."""
        config, found = self.config, []
        for i in range(self.accumulate):
            index = (step * self.accumulate + i) * self.ranks.size + self.ranks.rank
            inputs, targets, *more = self.data.batch(index, config.batch_size)
            options = self.model.prepare(inputs, targets, **(more[0] if more else {}))
            positions = self.model.positions_computed(inputs, options)
            length = inputs.shape[-1]
            if length not in self._flops:  # which takes longer to find than the batch
                self._flops[length] = self.model.config.flops_per_token(length)
            flops = positions * self._flops[length]
            found.append(Micro(inputs, targets, options, self.model.count(targets), positions, flops))
        return found

    def _batches(self) -> list[Micro]:
        """The batches of the step to come. While a GPU computes, a thread loads those of the next; on a CPU it would
        only take the time of the threads that compute."""
        due = self._next
        if due is not None and due[0] == self.step:
            batches = due[1].result()
        else:
            batches = self._load(self.step)
        self._next = None
        if self.loads_ahead and self.step + 1 < self.config.steps:
            self._next = self.step + 1, self._loader.submit(self._load, self.step + 1)
        return batches

    def _seed(self) -> None:
        # A hash, which mixes the numbers soundly: torch's CPU generator drops all but the lowest 32 bits of its seed.
        numbers = f"{self.config.seed} {self.step} {self.ranks.rank}".encode()
        seed = int.from_bytes(hashlib.blake2b(numbers, digest_size=4).digest(), "little")
        # Not torch.manual_seed: for each kind of device that is not in use it takes down the stack, 1.6 ms in all.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def train_step(self) -> dict[str, float]:
        """Takes one optimizer step and returns its loss, learning rate, gradient norm (before clipping), tokens (those
        that took part in the loss), positions (those that were computed), and the seconds that it waited for data.

        The loss is the mean over the valid targets of all `accumulate` batches of all ranks, whatever their number in
        each, so that n batches of b rows give the step of one batch of n * b rows.

        Raises:
            FloatingPointError: for a loss or a gradient that is not finite; the weights are those before the step.
            ValueError: for batches without a valid target.
        """
        self._begin_step(False)
        return self._read(0)[-1][1]

    def _begin_step(self, stop: bool) -> bool:
        """Takes a step, but for reading its numbers; returns whether any rank wants to `stop`."""
        config, ranks = self.config, self.ranks
        started = time.perf_counter()
        batches = self._batches()
        wait = time.perf_counter() - started
        counts = (sum(numbers) for numbers in zip(*((b.valid, b.positions, b.flops) for b in batches), strict=True))
        tokens, positions, flops, stops = ranks.sums(*counts, float(stop))
        if tokens == 0:
            raise ValueError(f"step {self.step + 1}: no batch has a valid target")
        rate = self.learning_rate()
        self.optimizer.set_rate(rate)
        if not self.model.training:  # setting it on every module of a small model takes 1% of its step
            self.model.train()
        self._seed()
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            with self._synchronized(i + 1 == len(batches)):
                loss = self._loss(self.forward, batch) / (tokens / ranks.size)
                loss.backward()
            total += loss.detach()
        if ranks.size > 1:
            total = ranks.sum_(total) / ranks.size
        skip = self._bad + (~total.isfinite()).float()
        if config.skip_spikes:
            skip = skip + self._spike(total, skip)
        norm = self.optimizer.step(skip)
        # Behind a step that is not finite, no other changes anything, until the host has read of it.
        self._bad = self._bad + (~(total + norm).isfinite()).float()
        if self.ema is not None:
            self.ema.update(skip + self._bad)
        self.optimizer.zero_grad()
        self.step += 1
        numbers, arrived = torch.stack((total, norm.float(), self._bad, self._spikes[3])), None
        if self.lag:
            numbers = numbers.to("cpu", non_blocking=True)
            if self.device.type == "cuda":
                arrived = torch.cuda.Event()
                arrived.record()
        self._pending.append(_Pending(self.step, rate, tokens, positions, flops, wait, numbers, arrived))
        return stops > 0

    def _synchronized(self, last: bool) -> contextlib.AbstractContextManager:
        """DDP exchanges gradients once a step, FSDP2, which keeps a part of them only, with each batch."""
        ddp = isinstance(self.forward, torch.nn.parallel.DistributedDataParallel)
        return contextlib.nullcontext() if last or not ddp else self.forward.no_sync()

    def _loss(self, forward: Any, batch: Micro) -> Tensor:
        inputs, targets, options = to_device((batch.inputs, batch.targets, batch.options), self.device)
        with autocast(self.device, self.config.precision):
            return forward(inputs, targets, reduction="sum", **options)

    def _spike(self, loss: Tensor, bad: Tensor) -> Tensor:
        """1 for a loss that is `skip_spikes` standard deviations above the running mean. It moves mean and variance as
        one at that limit would: a loss that stays up is no spike for long."""
        steps, mean, variance, skipped = self._spikes
        most = mean + self.config.skip_spikes * variance.sqrt()
        spike = (steps >= _SPIKE_WARMUP) & (loss > most)
        weight = torch.maximum(1 / (steps + 1), torch.full_like(steps, 1 - _SPIKE_DECAY))
        away = torch.where(spike, most, loss) - mean
        after = torch.stack(
            (steps + 1, mean + weight * away, (1 - weight) * (variance + weight * away * away), skipped + spike)
        )
        self._spikes = torch.where(bad > 0, self._spikes, after)
        return spike.float()

    def _read(self, lag: int) -> list[tuple[int, dict[str, float]]]:
        """The numbers of all steps but the last `lag` that were not read before, each with its step."""
        found = []
        while len(self._pending) > lag:
            one = self._pending.popleft()
            if one.arrived is not None:
                one.arrived.synchronize()
            loss, norm, bad, skipped = one.numbers.tolist()
            if bad:
                self._fail(one.step, one.rate, loss, norm)
            metrics = {"loss": loss, "learning_rate": one.rate, "grad_norm": norm}
            metrics |= {"tokens": one.tokens, "positions": one.positions, "flops": one.flops, "data_wait": one.wait}
            if self.config.skip_spikes:
                metrics["skipped"] = skipped
            found.append((one.step, metrics))
        return found

    def _fail(self, step: int, rate: float, loss: float, norm: float) -> None:
        """Raises what is to be said of a step that was not finite; takes it once more to find where it began."""
        self.step = step - 1
        self._pending.clear()
        self._seed()
        self.model.train()
        fault = None
        for number, batch in enumerate(self._load(self.step)):
            # All ranks search as long as any does: a sharded model's forward needs them all.
            faults = self.ranks.gathered(first_fault(self.model, functools.partial(self._loss, self.model, batch)))
            # What the forward of a rank found is its own; gradients may be of all ranks together.
            found = [(one.gradient, rank, one.what) for rank, one in enumerate(faults) if one is not None]
            if found:
                gradient, rank, what = min(found)
                on = f" of rank {rank}" if self.ranks.size > 1 and not gradient else ""
                fault = f"first in batch {number}{on}, in {what}"
                break
        self.optimizer.zero_grad()
        self._bad.zero_()
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {norm}"
            + (f", {fault}" if fault else "")
            + f"; training stopped with the weights of step {step - 1}. A lower learning rate ({rate:.3g} here) or a "
            "longer warm-up may help."
        )

    @contextlib.contextmanager
    def averaged(self) -> Any:
        """Meanwhile, the model has the average of its weights, where the run has one."""
        with self.ema.swapped() if self.ema is not None else contextlib.nullcontext():
            yield

    @property
    def finished(self) -> str | None:
        """Why there is nothing left to do, if so, and what would change that."""
        if self.step >= self.config.steps:
            return f"it has taken {self.step} of {self.config.steps} steps; more --steps"
        if 0 < self.config.patience <= self._waited:
            return f"{self._waited} validations had no loss below {self._best:.4f}; more --patience"
        return None

    def write_config(self, text: str) -> None:
        """Writes config.yaml into the run's directory."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "config.yaml"
        partial = path.with_suffix(".tmp")  # a full disk leaves what was there
        with writing(path):
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)

    def run(self) -> None:
        """Trains up to `config.steps`, with a progress bar on stderr. SIGTERM and SIGINT end it behind the step, with a
        checkpoint; `stopped` then says so.

        Raises:
            FileExistsError: for a new run into a directory that has checkpoints.
            FloatingPointError: as `train_step`.
            OSError: for what the disk says, naming the file; a checkpoint that was written before is named too.
            ValueError: for samples that do not fit into the model's context, or lack a tokenizer.
        """
        config = self.config
        there = checkpoint.list_checkpoints(self.out)
        if there and (self.step == 0 or checkpoint.step_of(there[-1]) > self.step):
            raise FileExistsError(f"{there[-1]} is there already: resume it, or choose another directory")
        require("safetensors.torch", "train")  # now, not when the first checkpoint is due
        self.stopped = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(checkpoint.naming_newest(self.out))
            log = None
            if self.ranks.first:
                self.out.mkdir(parents=True, exist_ok=True)
            if config.sample_every:
                self._write_sample()  # of the weights so far; a prompt that does not fit fails here, not after an hour
            if self.ranks.first:
                log = MetricsLog(self.out, self.step, wandb=config.wandb)
            bar = self._bar()
            requests = stack.enter_context(stop_requests())
            try:
                self._run(bar, log, requests)
                self._writer.wait()
            except BaseException as error:
                bar.close()
                if not isinstance(error, KeyboardInterrupt):
                    self._end_writing(error)
                with contextlib.suppress(OSError):  # a disk that is full is so for the log as well
                    if log is not None:
                        log.close()
                raise
            bar.close()
            if log is not None:
                log.close()

    def _end_writing(self, error: BaseException) -> None:
        """Waits for a checkpoint that is being written while the run ends with an error."""
        try:
            self._writer.wait()
        except Exception as other:
            if not isinstance(error, OSError):  # else the disk has been heard already
                print(f"the last checkpoint was not written: {other}", file=sys.stderr)

    def _bar(self) -> Any:
        # In a file, a line every few seconds would bury everything else.
        interval = 0.2 if sys.stderr is not None and sys.stderr.isatty() else 15.0
        return require("tqdm", "train").tqdm(
            total=self.config.steps,
            initial=self.step,
            desc="train",
            unit="step",
            mininterval=interval,
            dynamic_ncols=True,
            disable=sys.stderr is None or not self.ranks.first,
        )

    def _run(self, bar: Any, log: MetricsLog | None, requests: list[str]) -> None:
        config = self.config
        shown: dict[str, str] = {}
        speed, ended = 0.0, time.perf_counter()
        peak = peak_flops(self.device, torch.float32 if config.precision == "float32" else torch.bfloat16)
        while self.step < config.steps and self.stopped is None:
            stop = self._begin_step(bool(requests))
            stop = (bool(requests) if self.ranks.size == 1 else stop) and self.step < config.steps
            ends = self.step == config.steps or stop
            due = [
                config.eval_every > 0 and self._due(config.eval_every, ends),
                self._due(config.checkpoint_every, ends),
            ]
            samples = self._due(config.sample_every)
            pauses = samples or any(due)
            rows = self._read(0 if pauses else self.lag)
            now = time.perf_counter()
            self._validated = None
            for step, metrics in rows:
                del metrics["tokens"]
                flops = metrics.pop("flops")
                current = metrics.pop("positions") * len(rows) / (now - ended)
                speed = 0.9 * speed + 0.1 * current if speed else current
                metrics["tokens_per_second"] = current
                metrics["data_wait"] *= len(rows) / (now - ended)  # as a share
                if peak is not None:
                    metrics["mfu"] = flops * len(rows) / (now - ended) / (peak[0] * self.ranks.size)
                validates = self._due(config.eval_every) if stop else due[0]
                if step == self.step and validates and self.validation is not None:
                    metrics.update(self._validate())
                    shown["val"] = f"{metrics['validation_loss']:.3f}"
                if log is not None:
                    log.write(step, metrics)
                shown["loss"] = f"{metrics['loss']:.3f}"
                if "mfu" in metrics:
                    shown["mfu"] = f"{metrics['mfu']:.1%}"
                if metrics.get("skipped"):
                    shown["skipped"] = f"{metrics['skipped']:.0f}"
            bar.set_postfix({**shown, "tok/s": f"{speed:,.0f}"}, refresh=False)
            bar.update()
            if stop:
                self.stopped = requests[0] if requests else "another rank"
            if samples and not stop:
                self._write_sample()
            if due[1] or self.stopped or (config.patience and self._validated is not None and self._waited == 0):
                self._save()
            ended = time.perf_counter() if pauses else now

    def _due(self, every: int, last: bool = False) -> bool:
        return last or (every > 0 and self.step % every == 0)

    def _validate(self) -> dict[str, float]:
        """The metrics of a validation; asks for an end where it was the last of too many without a better loss."""
        config = self.config
        with self.averaged():
            found = evaluate(
                self.model,
                self.validation,
                config.batch_size,
                max_batches=config.eval_batches,
                precision=config.precision,
                ranks=self.ranks,
            )
        self._validated = found.loss
        self._best, self._waited = (found.loss, 0) if found.loss < self._best else (self._best, self._waited + 1)
        if config.patience and self._waited >= config.patience:
            self.stopped = f"{self._waited} validations without a loss below {self._best:.4f}; more --patience"
        if found.confusion is not None and self.ranks.first:
            found.write_confusion(self.out / "confusion.json", self.step, self.saved.get("labels"))
        return found.metrics()

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
        generate: Any = self.model.generate
        return decode(self.tokenizer, generate(tokens_BT, max_new_tokens, **sampling)[0])

    def _write_sample(self) -> None:
        # A file a step: a resumed run writes what is there already once more, the same.
        config = self.config
        with self.averaged():
            text = self.sample(config.sample_prompt, config.sample_tokens, top_k=50, seed=config.seed)
        path = self.out / "samples" / f"step-{self.step}.txt"
        if self.ranks.first:
            with writing(path):
                path.parent.mkdir(exist_ok=True)
                path.write_text(text + "\n", encoding="utf-8")

    def save(self) -> Path:
        """Writes the checkpoint of this step and returns its path."""
        with checkpoint.naming_newest(self.out):
            self._save()
            self._writer.wait()
        return self.out / f"checkpoint-{self.step}"

    def _files(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by file: the tensors that training goes on with."""
        files = {
            "model": checkpoint.weights_of(self.model),
            "state": {**self.optimizer.state_tensors(), "loop.spikes": self._spikes},
        }
        if self.ema is not None:
            averages = self.ema.tensors()
            files["state"]["ema.updates"] = averages.pop("ema.updates")
            files["ema"] = {**files["model"], **{name.removeprefix("ema."): x for name, x in averages.items()}}
        return files

    def _save(self) -> None:
        """Copies what a checkpoint holds (all ranks take part where they share it), and has it written."""
        self._read(0)
        tensors = {stem: gather(named, keep=self.ranks.first) for stem, named in self._files().items()}
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_values(),
            "best": None if math.isinf(self._best) else self._best,
            "waited": self._waited,
            "validation_loss": self._validated,
            "data": self._data_digest,
            "ranks": self.ranks.size,
        }
        model = {"architecture": self._architecture, **dataclasses.asdict(self.model.config)}
        config = {"model": model, "train": dataclasses.asdict(self.config), **self.saved}
        if self.ranks.first:
            self._writer.save(self.out, self.step, tensors, state, config, self.tokenizer, self.config.keep)

    def load(self, path: str | Path, *, verified: bool = False) -> None:
        """Takes up the run whose checkpoint is at `path`, or the newest one in it, written by any number of ranks.

        Args:
            path: of a checkpoint, or of a directory with some.
            verified: whether the checkpoint has been compared with its checksums already, which takes a while.

        Raises:
            FileNotFoundError: where there is none.
            OSError: where a file cannot be read.
            ValueError: where it is damaged, another model's, or was trained on other tokens.
        """
        path = checkpoint.find_checkpoint(path)
        if not verified:
            checkpoint.verify(path)
        state = checkpoint.load_state(path)
        if state.get("data") != self._data_digest:
            raise ValueError(f"{path} was trained on other tokens than those given, so it cannot be resumed with them")
        checkpoint.load_weights(path, self.model)
        tensors = checkpoint.load_tensors(path, "state")
        with reading(path / "state.json"):
            step = state["step"]
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                raise ValueError(f"its step is {step!r}")
            self._spikes.copy_(tensors.pop("loop.spikes"))
            updates = tensors.pop("ema.updates", None)
            self.optimizer.load(tensors, state["optimizer"])
            if self.ema is None and updates is not None:
                raise ValueError("the run keeps an average of its weights, which ema=0 would drop")
            if self.ema is not None:
                if updates is None:
                    raise ValueError("the run keeps no average of its weights: give ema=0")
                known = self.ema.tensors()  # the file has the buffers, too
                averages = {f"ema.{name}": x for name, x in checkpoint.load_tensors(path, "ema").items()}
                averages = {name: x for name, x in averages.items() if name in known}
                self.ema.load({**averages, "ema.updates": updates})
            self._best = math.inf if state["best"] is None else float(state["best"])
            self._waited, self._validated = int(state["waited"]), state["validation_loss"]
        self.step, self._next = step, None
        self._pending.clear()

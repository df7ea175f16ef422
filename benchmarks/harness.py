"""Measures one case: checks fastllm's result, then times it and its rivals in alternation.

What the numbers are:
- Time of one call, forward in training mode (what the backward needs is saved). On a CPU by the clock; on a GPU between
  two events on the stream, the L2 cache flushed before, and the call's launches queued while the GPU is still busy, so
  that it is the GPU's time and not Python's. The head start is about 1 ms; a longer call, such as a training step, goes
  on queueing while it runs. Where Python takes longer than the head start and more than half of the time measured, the
  GPU may have waited for it: the contender is marked as host-bound.
- The contenders take turns. Each order is run forwards and then backwards, and the next one starts one further on: a
  change of the machine's speed meets all of them, and none always follows the same one. The figure is the median over
  the rounds; the quartiles tell the noise.
- A GPU's cache is flushed by reading memory several times its size. What ran before is written back then, and the lines
  that stay are clean: they cost the call nothing. (Flushed by writing, the cache is full of lines that the call would
  have to write back first.)
- On a CPU the allocator keeps freed memory. By default glibc returns large blocks and faults them in again, depending
  on what ran before: that alone made eager's rms_norm take 17 ms or 40 ms, which would count for fastllm.
- GB/s and TFLOP/s are the bytes that must move (each input read once, each output written once) and the operations that
  must be done, over the time. What a contender moves beyond that counts against it. A case says which of the two it is
  measured by: TFLOP/s where matrix products take most of the time, GB/s elsewhere.
- The ceiling beside them is what the same machine reached in the same run: a large copy, counted as read and written,
  and a large matrix product of the same dtype. They are timed by what times the contenders, and are medians as well,
  taken before and after the cases; the ceiling is the mean of the two. A case whose tensors, or whose outputs, fit in
  the cache can pass the copy.
- On a GPU fastllm must run on its kernels: where it would fall back to stock PyTorch, the case fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import gc
import importlib.metadata
import math
import multiprocessing
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fastllm
from fastllm import backends, ops
from fastllm.testing import check_op, check_outputs, make, outputs_of

Direction = Literal["forward", "backward", "forward+backward"]

FORMAT = 2  # of the results
WARMUP_ROUNDS = 3
MIN_ROUNDS, MAX_ROUNDS = 15, 300
CEILING_ROUNDS = 15
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the products that the ceilings are made of
MUCH = 0.05  # of the CPUs for other processes: figures measured beside them are not to be relied on
# GPU cycles that a stream is kept busy for before a timed call, while Python queues the call, and the milliseconds that
# they take at 2 GHz: a lower clock makes them more.
GPU_HEAD_START, GPU_HEAD_START_MS = 2_000_000, 1.0
# Dense bfloat16 products of the tensor cores, in TFLOP/s: half of what NVIDIA's data sheets of H100 (SXM) and H200 give
# for matrices of which half is zeros, 1,979.
DATA_SHEET = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4}
HOST_BOUND = (
    "(host-bound): Python took longer than the GPU's head start and more than half of the time: "
    "the GPU may have waited for it."
)
NOT_COMPILED = "nothing is compiled in a rehearsal"
COMPILED, AUTOTUNED = "torch.compile", "torch.compile max-autotune"
# Tries more kernels for each operation, products among them. The mode with CUDA graphs would copy the arguments into
# buffers of its own within the timed call, for a saving in Python's time that is not timed here.
AUTOTUNE = "max-autotune-no-cudagraphs"


class Ready(NamedTuple):
    """A contender that needs no arguments: `prepare` is not timed."""

    prepare: Callable[[], Any]
    call: Callable[[], Any]
    peak_bytes: Callable[[], int] | None = None  # the most memory that it has held so far, where that can be told
    facts: Callable[[], dict[str, float]] | None = None  # further figures, by name


@dataclass(frozen=True)
class Case:
    """What one line of the results measures.

    Attributes:
        op: name of the function in `fastllm.ops`, or of what `setup` sets up.
        name: what tells it from the op's other cases: dtype, shape, direction.
        direction: what is timed.
        args: draws the arguments; every floating tensor among them is differentiated.
        rivals: functions of the same arguments by name; for one that is not there, the reason. "eager" must be among
            them: it is also what torch.compile gets, and fastllm's error is compared with its.
        bytes: that must move.
        flops: that must be done.
        products: dtype of the matrix products that take most of the time; None where moving bytes does.
        tokens: that a training step takes, where the case is one.
        target: for the reader: what is aimed at.
        kwargs: fastllm's keyword arguments; the rivals know theirs.
        call: what is timed as fastllm, where that is not the op itself.
        checked: what is compared instead of the op and eager: with dropout they draw different masks.
        check: draws the arguments that correctness is checked on, where those of `args` are too large for float64.
        inference: the op has no gradient.
        overwrites: `call` writes into its arguments, which are restored before each turn.
        rounds: how many are timed at the least and at the most; fewer where one takes seconds.
        compiled: whether torch.compile of eager is among the rivals, too.
        slow: names of rivals that take minutes to compile. They are timed only where `timed` names them.
        timed: the rivals to time; None for all but the slow ones.
        fallback: fastllm may run on stock PyTorch on a GPU.
        setup: for what is not a function of tensors: checks correctness and returns, by name, what makes a contender,
            or the reason why it is not there, with "fastllm" and "eager" among them. `args` are then for
            `fastllm.explain` only.
    """

    op: str
    name: str
    direction: Direction
    args: Callable[[], tuple]
    rivals: dict[str, Callable | str]
    bytes: int
    flops: int
    products: torch.dtype | None = None
    tokens: int = 0
    target: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)
    call: Callable | None = None
    checked: tuple[Callable, Callable] | None = None
    check: Callable[[], tuple] | None = None
    inference: bool = False
    overwrites: bool = False
    rounds: tuple[int, int] = (MIN_ROUNDS, MAX_ROUNDS)
    compiled: bool = True
    slow: tuple[str, ...] = ()
    timed: tuple[str, ...] | None = None
    fallback: bool = False
    setup: Callable[[], dict[str, Callable[[], Ready] | str]] | None = None


@dataclass
class Contender:
    """A contender of a case: `call` is timed; it takes what `prepare` returns, which is not timed."""

    name: str
    prepare: Callable[[], Any]
    call: Callable[[Any], Any]
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)  # until the call returned, where `seconds` is a GPU's
    peak_bytes: Callable[[], int] | None = None
    facts: Callable[[], dict[str, float]] | None = None


def _contender(name: str, fn: Callable, case: Case, args: tuple) -> Contender:
    # Own leaves and gradients for each contender, since a rival may write into the gradient it is given.
    args = tuple(arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args)
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_(not case.inference)

    def forward(_: Any = None) -> tuple[Tensor, ...]:
        return outputs_of(fn(*args))

    outputs = forward()
    if case.inference:
        return Contender(name, lambda: None, forward)
    cotangents = [make(out.shape, out.dtype, out.device, 1000 + i) for i, out in enumerate(outputs)]

    def backward(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves, cotangents)

    backward(outputs)  # compiles, and shows now rather than later what cannot run
    if case.overwrites and name == "fastllm":
        kept = [leaf.detach().clone() for leaf in leaves]

        def restore() -> None:
            for leaf, original in zip(leaves, kept, strict=True):
                leaf.data.copy_(original)

        return Contender(name, restore, lambda _: backward(forward()))
    if case.direction == "forward":
        return Contender(name, lambda: None, forward)
    if case.direction == "backward":
        return Contender(name, forward, backward)
    return Contender(name, lambda: None, lambda _: backward(forward()))


def _on_copies(op: Callable) -> Callable:
    """`op`, which may write into its arguments, on copies: others are to see them, too."""

    @functools.wraps(op)
    def on_copies(*args):
        return op(*(arg.clone() if isinstance(arg, Tensor) else arg for arg in args))

    return on_copies


class Stopwatch:
    """Times calls on a device: those of contenders, and those that the ceilings are made of."""

    def __init__(self, device: str):
        self._scratch: Tensor | None = None
        if device == "cuda":
            self._scratch, self._total = flush_memory(torch.cuda.get_device_properties().L2_cache_size)

    def round(self, order: list[Contender]) -> None:
        """Times every contender once."""
        self._on_cpu(order) if self._scratch is None else self._on_gpu(order, self._scratch)

    def _on_cpu(self, order: list[Contender]) -> None:
        for contender in order:
            prepared = contender.prepare()
            started = time.perf_counter()
            result = contender.call(prepared)
            contender.seconds.append(time.perf_counter() - started)
            del result  # here, so that freeing it is not timed

    def _on_gpu(self, order: list[Contender], scratch: Tensor) -> None:
        events = []
        for contender in order:
            prepared = contender.prepare()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush(scratch, self._total)
            torch.cuda._sleep(GPU_HEAD_START)
            start.record()
            called = time.perf_counter()
            contender.call(prepared)
            contender.host_seconds.append(time.perf_counter() - called)
            end.record()
            events.append((contender, start, end))
        torch.cuda.synchronize()
        for contender, start, end in events:
            contender.seconds.append(start.elapsed_time(end) / 1e3)


def flush_memory(cache_bytes: int, device: str = "cuda") -> tuple[Tensor, Tensor]:
    """What `flush` takes: memory more than four times as large as the cache, and a place for its sum."""
    elements = max(256 * 2**20, 5 * cache_bytes) // 4
    return torch.zeros(elements, device=device), torch.zeros((), device=device)


def flush(scratch: Tensor, total: Tensor) -> None:
    """Reads the scratch, so that nothing else is left in the cache, and writes one number."""
    torch.sum(scratch, 0, out=total)


def free_memory(device: str) -> None:
    """Gives back what earlier cases have held, in cycles too."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def assert_kernels(explanation: backends.Explanation) -> None:
    """Asserts that every op that the call makes has a kernel of ours.

    Raises:
        AssertionError: naming those that run on stock PyTorch.
    """
    stock = [line for line in explanation if line.chosen and line.backend in ("torch", "reference")]
    if stock:
        names = ", ".join(f"{line.op} on {line.backend}" for line in stock)
        raise AssertionError(f"fastllm would run {names}:\n{explanation}")


def fallbacks(caught: list[warnings.WarningMessage]) -> list[str]:
    """The messages of those warnings that say that an op fell back."""
    return [str(warning.message) for warning in caught if issubclass(warning.category, fastllm.FallbackWarning)]


@contextlib.contextmanager
def no_fallback() -> Iterator[None]:
    """Asserts that no op falls back inside, not even one whose warning was given before.

    Raises:
        AssertionError: with the warning, at the end. (Raised where it is given, it would be lost in C++.)
    """
    backends.warn_again()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    if found := fallbacks(caught):
        raise AssertionError("; ".join(found))
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class Race:
    """A race of fastllm and its rivals on one case. `measure` runs one from start to end.

    Raises:
        AssertionError: if fastllm's outputs or gradients are not within the error budget, or it would not run on its
            kernels on a GPU; nothing was timed then.
    """

    def __init__(self, case: Case, device: str, seconds: float):
        self.case, self.device = case, device
        self.skipped: dict[str, str] = {}
        self.contenders: list[Contender] = []
        free_memory(device)
        torch.compiler.reset()  # a function compiled for another case would be compiled again with dynamic shapes
        self._strict = device == "cuda" and not case.fallback
        with no_fallback() if self._strict else contextlib.nullcontext():
            args = case.args()
            explanation = fastllm.explain(case.call or getattr(ops, case.op), *args, **case.kwargs)
            self.backend = explanation.backend
            if self._strict:
                assert_kernels(explanation)
            if case.setup is not None:
                self._add_ready(case.setup())
            else:
                self._add_functions(case, args)
            del args
            self._turn = 0
            self._watch = Stopwatch(device)
            self._settle()
        started = time.perf_counter()
        self.round()
        self.round()
        least, most = case.rounds
        self.rounds = min(most, max(least, int(2 * seconds / (time.perf_counter() - started))))

    def _try(self, name: str, run: Callable[[], Any]) -> Any:
        """What a rival's `run` returns. It may fail in any way; then the rival is skipped with the reason."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")  # torch warns of why a backend cannot run, and raises without the reason
            try:
                result = run()
                if self._strict and (found := fallbacks(caught)):
                    raise AssertionError("; ".join(found))
                return result
            except Exception as error:
                message = "; ".join(map(str, [error, *(warning.message for warning in caught)]))
                self.skipped[name] = " ".join(f"{type(error).__name__}: {message}".split())[:300]
        free_memory(self.device)
        return None

    def _add(self, name: str, make_contender: Callable[[], Contender] | str) -> None:
        timed = self.case.timed
        if name in self.case.slow if timed is None else name not in timed:
            return
        if isinstance(make_contender, str):
            self.skipped[name] = make_contender
        elif contender := self._try(name, make_contender):
            self.contenders.append(contender)

    def _add_ready(self, found: dict[str, Callable[[], Ready] | str]) -> None:
        def contender(name: str, make_ready: Callable[[], Ready]) -> Contender:
            ready = make_ready()
            ready.prepare()
            ready.call()  # compiles, and shows now rather than later what cannot run
            return Contender(
                name, ready.prepare, lambda _: ready.call(), peak_bytes=ready.peak_bytes, facts=ready.facts
            )

        ours = found.pop("fastllm")
        assert not isinstance(ours, str)
        self.contenders.append(contender("fastllm", ours))
        for name, rival in found.items():
            self._add(name, rival if isinstance(rival, str) else functools.partial(contender, name, rival))

    def _add_functions(self, case: Case, args: tuple) -> None:
        op = case.call or getattr(ops, case.op)
        op = functools.partial(op, **case.kwargs) if case.kwargs else op
        check = check_outputs if case.inference else check_op
        eager = case.rivals["eager"]
        assert not isinstance(eager, str)
        ours, stock = case.checked or (op, eager)
        check(_on_copies(ours), stock, args if case.check is None else case.check())
        rivals = dict(case.rivals)
        if case.compiled:
            rivals[COMPILED] = torch.compile(eager, fullgraph=True, dynamic=False)
            if AUTOTUNED in case.slow:
                rivals[AUTOTUNED] = torch.compile(eager, fullgraph=True, dynamic=False, mode=AUTOTUNE)
        self.contenders.append(_contender("fastllm", op, case, args))
        for name, rival in rivals.items():
            self._add(name, rival if isinstance(rival, str) else functools.partial(_contender, name, rival, case, args))

    def _settle(self) -> None:
        """A first turn for each, with all others' memory held: a rival that does not fit beside them is skipped."""
        ours, *rivals = self.contenders
        self._watch.round([ours])
        for rival in rivals:
            self._try(rival.name, functools.partial(self._watch.round, [rival]))
        self.contenders = [ours, *(rival for rival in rivals if rival.name not in self.skipped)]

    def round(self) -> None:
        """Times every contender once."""
        first = self._turn // 2 % len(self.contenders)
        order = self.contenders[first:] + self.contenders[:first]
        self._watch.round(order[::-1] if self._turn % 2 else order)
        self._turn += 1

    def close(self) -> None:
        """Lets go of the contenders and what they hold; there is no result from then on."""
        self.contenders = []

    def result(self, others: float) -> dict[str, Any]:
        """The figures of the last `rounds` rounds, as what `json.dumps` takes; `others` is a `Disturbance`'s share."""
        case = self.case
        return {
            "op": case.op,
            "case": case.name,
            "direction": case.direction,
            "backend": self.backend,
            "bytes": case.bytes,
            "flops": case.flops,
            "products": case.products and dtype_name(case.products),
            "tokens": case.tokens,
            "target": case.target,
            "rounds": self.rounds,
            "others": None if math.isnan(others) else round(others, 3),
            "contenders": {c.name: self._figures(c) for c in self.contenders},
            "skipped": self.skipped,
        }

    def _figures(self, contender: Contender) -> dict[str, float]:
        figures = summary(contender.seconds[-self.rounds :])
        if contender.host_seconds:
            figures["host_ms"] = summary(contender.host_seconds[-self.rounds :])["median_ms"]
            figures["host_bound"] = figures["host_ms"] > max(GPU_HEAD_START_MS, figures["median_ms"] / 2)
        if contender.peak_bytes is not None:
            figures["peak_mb"] = round(contender.peak_bytes() / 1e6)
        return {**figures, **(contender.facts() if contender.facts is not None else {})}


def measure(case: Case, device: str, seconds: float) -> dict[str, Any]:
    """The result of a race from start to end; what it raises, and how long it takes, are `Race`'s. Nothing is kept."""
    race = Race(case, device, seconds)
    with Disturbance() as others:
        for _ in range(WARMUP_ROUNDS + race.rounds):
            race.round()
    result = race.result(others.share)
    race.close()
    return result


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, quartiles and minimum in milliseconds, and the noise: half the quartiles' distance over the median."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    milliseconds = {"median_ms": median, "q1_ms": low, "q3_ms": high, "min_ms": min(seconds)}
    rounded = {key: round(value * 1e3, 6) for key, value in milliseconds.items()}
    return {**rounded, "noise": round((high - low) / 2 / median, 4)}


def rates(result: dict[str, Any], contender: str, ceilings: dict[str, float]) -> dict[str, float]:
    """What a contender of a result achieved: gb_s, tflop_s, tokens_s (0 where there are none), fastllm's speedup over
    it, and its share of what the case is measured by: the copy, or the products of its dtype."""
    median = result["contenders"][contender]["median_ms"]
    gb_s, tflop_s = result["bytes"] / median / 1e6, result["flops"] / median / 1e9
    products = result["products"]
    return {
        "gb_s": gb_s,
        "tflop_s": tflop_s,
        "tokens_s": 1e3 * result["tokens"] / median,
        "share": tflop_s / ceilings[f"matmul_{products}_tflop_s"] if products else gb_s / ceilings["copy_gb_s"],
        "speedup": median / result["contenders"]["fastllm"]["median_ms"],
    }


def achieved(data: dict[str, Any], result: dict[str, Any], contender: str) -> tuple[str, str]:
    """The rate that a case of a run's `data` is measured by, and its share of the ceiling, for readers.

    ("2712 GB/s", "91% of copy"), ("412 TFLOP/s", "60% of bf16 matmul"), or, for a training step, ("401,234 tokens/s",
    "50% of bf16 matmul"). There the first has the model FLOPs utilization of Chowdhery et al. (2022), too, where the
    data sheet's peak that it divides by is known: "401,234 tokens/s, MFU 35%".
    """
    rate, products = rates(result, contender, data["ceilings"]), result["products"]
    if not products:
        return f"{rate['gb_s']:.4g} GB/s", f"{rate['share']:.0%} of copy"
    share = f"{rate['share']:.0%} of {products} matmul"
    if not result["tokens"]:
        return f"{rate['tflop_s']:.3g} TFLOP/s", share
    peak = DATA_SHEET.get(data.get("machine", {}).get("gpu")) if products == "bf16" else None
    utilization = f", MFU {rate['tflop_s'] / peak:.0%}" if peak else ""
    return f"{rate['tokens_s']:,.0f} tokens/s{utilization}", share


def label(result: dict[str, Any], contender: str) -> str:
    """A contender's name for readers, with fastllm's backend, and marked where it is host-bound."""
    backend = f" ({result['backend']})" if contender == "fastllm" else ""
    return f"{contender}{backend}{mark(result['contenders'][contender])}"


def mark(figures: dict[str, float]) -> str:
    """What follows a contender's figures where it is host-bound; `HOST_BOUND` explains it."""
    return " (host-bound)" if figures.get("host_bound") else ""


def any_host_bound(data: dict[str, Any]) -> bool:
    """Whether a contender of a run's results is host-bound."""
    return any(mark(figures) for result in data["results"] for figures in result["contenders"].values())


def rival(find: Callable[[], Callable]) -> Callable | str:
    """What `find` imports and returns; where this machine does not have it, the reason."""
    try:
        return find()
    except ModuleNotFoundError as error:
        return f"no module {error.name!r} is installed"
    except (ImportError, AttributeError) as error:
        return str(error)


class Disturbance:
    """What other processes take of the CPUs inside a `with` block, in `share`: 0 on a quiet machine, 1 on a full one.

    NaN where the operating system does not tell.
    """

    share = math.nan

    def _read(self) -> tuple[float, float, float]:
        stat = Path("/proc/stat")
        if not stat.exists():
            return math.nan, math.nan, math.nan
        user, nice, system, idle, iowait, *more = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
        busy = user + nice + system + sum(more)
        own = time.process_time() * os.sysconf("SC_CLK_TCK")
        for child in multiprocessing.active_children():  # contenders in processes of their own
            after_name = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            own += int(after_name[11]) + int(after_name[12])
        return busy, busy + idle + iowait, own

    def __enter__(self) -> Disturbance:
        self._before = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        busy, total, own = (after - before for after, before in zip(self._read(), self._before, strict=True))
        self.share = max(0.0, (busy - own) / total) if total else math.nan


# Ceilings and facts of the machine


def measure_ceilings(device: str) -> dict[str, float]:
    """What the machine reaches, timed as contenders are: `copy_gb_s`, read and written; `matmul_<dtype>_tflop_s`."""
    elements = (2**30 if device == "cuda" else 2**28) // 4  # far more than any cache
    source = make((elements,), torch.float32, device)
    calls: dict[str, Callable[[], Any]] = {"copy_gb_s": functools.partial(torch.empty_like(source).copy_, source)}
    work = {"copy_gb_s": 2 * 4 * elements / 1e9}
    size = PRODUCT_SIZE[device]
    for dtype in (torch.float32, torch.bfloat16):
        name = f"matmul_{dtype_name(dtype)}_tflop_s"
        a, b = make((size, size), dtype, device), make((size, size), dtype, device, seed=1)
        calls[name] = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        work[name] = 2 * size**3 / 1e12
    contenders = [Contender(name, lambda: None, lambda _, call=call: call()) for name, call in calls.items()]  # type: ignore[misc]
    watch = Stopwatch(device)
    for _ in range(WARMUP_ROUNDS + CEILING_ROUNDS):
        watch.round(contenders)
    return {c.name: _rounded(work[c.name] / statistics.median(c.seconds[-CEILING_ROUNDS:])) for c in contenders}


def mean_ceilings(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The ceilings of a run, from those measured before and after its cases: neither the better nor the worse."""
    return {key: _rounded((value + after[key]) / 2) for key, value in before.items()}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, bf16, fp16 or fp64."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def cpu_name() -> str:
    """As the operating system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def environment(device: str) -> dict[str, Any]:
    """What a result depends on: the machine, the versions and the date."""
    versions = {"fastllm": fastllm.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "liger_kernel", "pytest-benchmark"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    machine: dict[str, Any] = {"device": device, "cpu": cpu_name(), "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        machine["gpu"] = properties.name
        machine["capability"] = f"{properties.major}.{properties.minor}"
        versions["cuda"] = torch.version.cuda or ""
    machine["name"] = machine.get("gpu", machine["cpu"])
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"date": today, "machine": machine, "versions": versions}


def keep_freed_memory() -> None:
    """Tells glibc, for the rest of the process, to reuse freed blocks rather than return them to the system."""
    trim_threshold, mmap_max = -1, -4  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def quiet_machine(threads: int | None) -> Iterator[None]:
    """No garbage collection but between cases, freed memory kept, and `threads` CPU threads where given."""
    keep_freed_memory()
    before, collects = torch.get_num_threads(), gc.isenabled()
    if threads is not None:
        torch.set_num_threads(threads)
    gc.disable()
    gc.freeze()  # what is there by now stays: a collection need not look at it
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)
        if collects:
            gc.enable()

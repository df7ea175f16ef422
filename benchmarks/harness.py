"""Measures one case: checks fastllm's result, then times it and its rivals in alternation.

What the numbers are:
- Time of one call, forward in training mode (what the backward needs is saved). On a CPU by the clock; on a GPU between
  two events on the stream, the L2 cache flushed before, and the call's launches queued while the GPU is still busy, so
  that it is the GPU's time and not Python's.
- The contenders take turns, in an order that rotates from round to round, so that a change of the machine's speed meets
  all of them. The figure is the median over the rounds; the quartiles tell the noise.
- On a CPU the allocator keeps freed memory. By default glibc returns large blocks and faults them in again, depending
  on what ran before: that alone made eager's rms_norm take 17 ms or 40 ms, which would count for fastllm.
- GB/s and TFLOP/s are the bytes that must move (each input read once, each output written once) and the operations that
  must be done, over the time. What a contender moves beyond that counts against it.
- The ceiling beside them is the best that the same machine did in the same run: a large copy, counted as read and
  written, and a large matrix product. A case whose tensors fit in a CPU's cache can pass the copy.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fastllm
from fastllm import ops
from fastllm.testing import check_op, check_outputs, make, outputs_of

Direction = Literal["forward", "backward", "forward+backward"]

WARMUP_ROUNDS = 3
MIN_ROUNDS, MAX_ROUNDS = 15, 300
MUCH = 0.05  # of the CPUs for other processes: figures measured beside them are not to be relied on
# GPU cycles that a stream is kept busy for before a timed call, while Python queues the call: about 0.3 ms.
GPU_HEAD_START = 500_000


class Ready(NamedTuple):
    """A contender that needs no arguments: `prepare` is not timed."""

    prepare: Callable[[], Any]
    call: Callable[[], Any]
    peak_bytes: Callable[[], int] | None = None  # the most memory that it has held so far, where that can be told


@dataclass(frozen=True)
class Case:
    """What one line of the results measures.

    Attributes:
        op: name of the function in `fastllm.ops`.
        name: what tells it from the op's other cases: dtype, shape, direction.
        direction: what is timed.
        args: draws the arguments; every floating tensor among them is differentiated.
        rivals: functions of the same arguments by name. "eager" must be among them: it is also what torch.compile gets,
            and fastllm's error is compared with its.
        bytes: that must move.
        flops: that must be done.
        target: for the reader: what is aimed at.
        kwargs: fastllm's keyword arguments; the rivals know theirs.
        call: what is timed as fastllm, where that is not the op itself.
        checked: what is compared instead of the op and eager: with dropout they draw different masks.
        check: draws the arguments that correctness is checked on, where those of `args` are too large for float64.
        inference: the op has no gradient.
        overwrites: `call` writes into its arguments, which are restored before each turn.
        rounds: how many are timed at the least and at the most; fewer where one takes seconds.
        compiled: whether torch.compile of eager is timed, too.
        setup: for what is not a function of tensors: checks correctness and returns, by name, what to call before a
            timed call and what to time, with "fastllm" and "eager" among them. `args` are then for `fastllm.explain`
            only.
    """

    op: str
    name: str
    direction: Direction
    args: Callable[[], tuple]
    rivals: dict[str, Callable]
    bytes: int
    flops: int
    target: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)
    call: Callable | None = None
    checked: tuple[Callable, Callable] | None = None
    check: Callable[[], tuple] | None = None
    inference: bool = False
    overwrites: bool = False
    rounds: tuple[int, int] = (MIN_ROUNDS, MAX_ROUNDS)
    compiled: bool = True
    setup: Callable[[], dict[str, Ready]] | None = None


@dataclass
class Contender:
    """One of those that a case times: `call` takes what `prepare` returns, which is not timed."""

    name: str
    prepare: Callable[[], Any]
    call: Callable[[Any], Any]
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)  # until the call returned, where `seconds` is a GPU's
    peak_bytes: Callable[[], int] | None = None


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


class Race:
    """Fastllm and its rivals on one case.

    Raises:
        AssertionError: if fastllm's outputs or gradients are not within the error budget; nothing was timed then.
    """

    def __init__(self, case: Case, device: str, seconds: float):
        self.case, self.device = case, device
        self.skipped: dict[str, str] = {}
        self.contenders: list[Contender] = []
        args = case.args()
        self.backend = fastllm.explain(case.call or getattr(ops, case.op), *args, **case.kwargs).backend
        torch.compiler.reset()  # a function compiled for another case would be compiled again with dynamic shapes
        if case.setup is not None:
            self._add_ready(case.setup())
        else:
            self._add_functions(case, args)
        self._turn = 0
        self._scratch = torch.empty(_flush_bytes(), dtype=torch.int8, device=device) if device == "cuda" else None
        started = time.perf_counter()
        self.round()
        self.round()
        least, most = case.rounds
        self.rounds = min(most, max(least, int(2 * seconds / (time.perf_counter() - started))))

    def _try(self, name: str, make_contender: Callable[[], Contender]) -> None:
        try:
            self.contenders.append(make_contender())
        except Exception as error:  # a rival may fail in any way; say so and go on
            self.skipped[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]

    def _add_ready(self, found: dict[str, Ready]) -> None:
        def contender(name: str, ready: Ready) -> Contender:
            ready.prepare()
            ready.call()  # compiles, and shows now rather than later what cannot run
            return Contender(name, ready.prepare, lambda _: ready.call(), peak_bytes=ready.peak_bytes)

        self.contenders.append(contender("fastllm", found.pop("fastllm")))
        for name, ready in found.items():
            self._try(name, functools.partial(contender, name, ready))

    def _add_functions(self, case: Case, args: tuple) -> None:
        op = case.call or getattr(ops, case.op)
        op = functools.partial(op, **case.kwargs) if case.kwargs else op
        check = check_outputs if case.inference else check_op
        ours, stock = case.checked or (op, case.rivals["eager"])
        check(_on_copies(ours), stock, args if case.check is None else case.check())
        rivals = dict(case.rivals)
        if case.compiled:
            rivals["torch.compile"] = torch.compile(case.rivals["eager"], fullgraph=True, dynamic=False)
        self.contenders.append(_contender("fastllm", op, case, args))
        for name, fn in rivals.items():
            self._try(name, functools.partial(_contender, name, fn, case, args))

    def round(self) -> None:
        """Times every contender once."""
        first = self._turn % len(self.contenders)
        order = self.contenders[first:] + self.contenders[:first]
        self._turn += 1
        self._round_gpu(order) if self._scratch is not None else self._round_cpu(order)

    def _round_cpu(self, order: list[Contender]) -> None:
        for contender in order:
            prepared = contender.prepare()
            started = time.perf_counter()
            result = contender.call(prepared)
            contender.seconds.append(time.perf_counter() - started)
            del result  # here, so that freeing it is not timed

    def _round_gpu(self, order: list[Contender]) -> None:
        assert self._scratch is not None
        events = []
        for contender in order:
            prepared = contender.prepare()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._scratch.zero_()
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
        if contender.peak_bytes is not None:
            figures["peak_mb"] = round(contender.peak_bytes() / 1e6)
        return figures


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, quartiles and minimum in milliseconds, and the noise: half the quartiles' distance over the median."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    milliseconds = {"median_ms": median, "q1_ms": low, "q3_ms": high, "min_ms": min(seconds)}
    rounded = {key: round(value * 1e3, 6) for key, value in milliseconds.items()}
    return {**rounded, "noise": round((high - low) / 2 / median, 4)}


def rates(result: dict[str, Any], contender: str, ceilings: dict[str, float]) -> dict[str, float]:
    """What a contender of a result achieved: gb_s, copy_share (of the copy's GB/s), tflop_s and fastllm's speed-up."""
    median = result["contenders"][contender]["median_ms"]
    gb_s = result["bytes"] / median / 1e6
    return {
        "gb_s": gb_s,
        "copy_share": gb_s / ceilings["copy_gb_s"],
        "tflop_s": result["flops"] / median / 1e9,
        "speedup": median / result["contenders"]["fastllm"]["median_ms"],
    }


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


def _flush_bytes() -> int:
    return max(256 * 2**20, 4 * torch.cuda.get_device_properties().L2_cache_size)


def _best_seconds(call: Callable[[], Any], device: str) -> float:
    samples = []
    for _ in range(15):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(GPU_HEAD_START)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            call()
            samples.append(time.perf_counter() - started)
    return min(samples)


def measure_ceilings(device: str) -> dict[str, float]:
    """What the machine reaches at its best: `copy_gb_s`, read and written, and `matmul_<dtype>_tflop_s`."""
    elements = (2**30 if device == "cuda" else 2**28) // 4  # far more than any cache
    source = make((elements,), torch.float32, device)
    target = torch.empty_like(source)
    found = {"copy_gb_s": 2 * 4 * elements / _best_seconds(lambda: target.copy_(source), device) / 1e9}
    size = 8192 if device == "cuda" else 1024
    for dtype in (torch.float32, torch.bfloat16):
        a, b = make((size, size), dtype, device), make((size, size), dtype, device, seed=1)
        out = torch.empty_like(a)
        seconds = _best_seconds(functools.partial(torch.mm, a, b, out=out), device)
        found[f"matmul_{dtype_name(dtype)}_tflop_s"] = 2 * size**3 / seconds / 1e12
    return {key: float(f"{value:.4g}") for key, value in found.items()}


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
    """No garbage collection, freed memory kept, and `threads` CPU threads where given."""
    keep_freed_memory()
    before, collects = torch.get_num_threads(), gc.isenabled()
    if threads is not None:
        torch.set_num_threads(threads)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collects:
            gc.enable()

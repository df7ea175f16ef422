"""Worker processes: they read jobs from their input and write answers to their output, JSON line by line.

A job that crashes its worker, or takes longer than it may, takes nothing with it: the worker is ended with all that it
started, and the next job goes to a fresh one. The standard library is all that is imported here.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Job = dict[str, Any]
DAMAGED = (
    "CUDA error", "AcceleratorError", "illegal memory access", "device-side assert",
    "Triton Error [CUDA]", "CUDA driver error", "CUDNN_STATUS", "CUBLAS_STATUS",
)  # fmt: skip
"""What an error says that leaves its process without a usable GPU."""
RESULTS = "FASTLLM_GPU_RUN_RESULTS"
"""The environment variable that names the results to processes that append to them themselves."""
SHORT = 300  # characters of an error in the results
PATIENCE = 5.0  # seconds that a killed process gets to end: one that hangs in the driver never does


def damaged(text: str) -> bool:
    """Whether an error leaves its process without a usable GPU."""
    return any(word in text for word in DAMAGED)


def shorten(text: str) -> str:
    """One line of at most `SHORT` characters."""
    text = " ".join(text.split())
    return text if len(text) <= SHORT else f"{text[: SHORT - 3]}..."


def cpu_seconds() -> float:
    """The CPU time of this process and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def append(path: Path, line: dict[str, Any]) -> None:
    """Appends a line of JSON, and has it on the disk before anything else is done."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def serve(handle: Callable[[Job], dict[str, Any]]) -> None:
    """A worker's life: answers each job of its input with a line of JSON on its output. Prints go to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        started, cpu = time.perf_counter(), cpu_seconds()
        try:
            answer = {"ok": True, **handle(job)}
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            answer = {"ok": False, "error": shorten(text), "damaged": damaged(text)}
            print(f"{job}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        answer |= {"seconds": round(time.perf_counter() - started, 3), "cpu_seconds": round(cpu_seconds() - cpu, 3)}
        answers.write(json.dumps(answer) + "\n")


class Worker:
    """A process that answers jobs, in a process group of its own."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path):
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0,
                env=environment, cwd=Path(__file__).resolve().parent.parent, start_new_session=True,
            )  # fmt: skip

    def answer(self, job: Job, seconds: float) -> dict[str, Any]:
        """The answer; {"ok": False, "died": True} if the process ends instead, or takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
        output, line = self.process.stdout.fileno(), b""
        while not line.endswith(b"\n"):
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return _died(f"no answer in {seconds:.0f} s")
            part = os.read(output, 1 << 16)
            if not part:
                return _died(f"its process ended: {self._reason()}" + (" in the middle of an answer" if line else ""))
            line += part
        try:
            return json.loads(line)
        except ValueError:
            return _died(f"no answer but {shorten(line.decode(errors='replace'))!r}")

    def _reason(self) -> str:
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """Closes the pipes, which the thread that asks does: no other is to close what it reads."""
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


def _died(reason: str) -> dict[str, Any]:
    return {"ok": False, "died": True, "error": reason}


def end_group(process: subprocess.Popen) -> bool:
    """Ends a process that leads its group, with the group; returns False if it does not end, and abandons it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    return process.poll() is not None


@dataclass
class Tally:
    """How many jobs were answered, how many were left at the deadline, and what went wrong beside the jobs."""

    answered: int = 0
    left: int = 0
    trouble: list[str] = field(default_factory=list)


def run_jobs(
    jobs: Iterable[Job],
    start: Callable[[], Worker],
    workers: int,
    deadline: float,
    done: Callable[[Job, dict[str, Any]], Iterable[Job] | None],
    job_seconds: float | Callable[[Job], float] = 120.0,
) -> Tally:
    """Hands the jobs out to at most `workers` workers and calls `done` with each answer as it comes, one at a time;
    what that returns are further jobs. Stops at `deadline` (of time.monotonic), or ends a worker whose job takes
    `job_seconds`. A worker starts with its first job."""
    waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    tally, lock, running, stopped = Tally(), threading.Lock(), set[Worker](), False
    for job in jobs:
        waiting.put(job)
        tally.left += 1

    def end(worker: Worker) -> None:
        if end_group(worker.process):
            with lock:
                running.discard(worker)
        worker.close()

    def ask(worker: Worker | None, job: Job) -> tuple[Worker | None, dict[str, Any]]:
        try:
            if worker is None:
                worker = start()
                with lock:
                    running.add(worker)
                    if stopped:
                        return worker, _died("out of time")
            return worker, worker.answer(job, job_seconds(job) if callable(job_seconds) else job_seconds)
        except Exception as error:
            return worker, _died(f"{type(error).__name__}: {error}")

    def take(job: Job, answer: dict[str, Any]) -> None:
        tally.answered += 1
        tally.left -= 1
        try:
            for further in done(job, answer) or ():
                waiting.put(further)
                tally.left += 1
        except Exception as error:  # a full disk
            tally.trouble.append(shorten(f"{type(error).__name__}: {error}"))
        if tally.left == 0:
            for _ in threads:
                waiting.put(None)

    def work() -> None:
        worker = None
        while (job := waiting.get()) is not None and not stopped:
            worker, answer = ask(worker, job)
            with lock:
                if stopped:
                    break
                take(job, answer)
            if worker is not None and (answer.get("died") or answer.get("damaged")):
                end(worker)
                worker = None
        if worker is not None:
            end(worker)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers if tally.left else 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    with lock:
        stopped = True
        ending = list(running)
    for worker in ending:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
    for _ in threads:
        waiting.put(None)
    until = time.monotonic() + PATIENCE + 1
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    with lock:
        pids = [worker.process.pid for worker in running]
    tally.trouble += [f"process {pid} did not end when it was killed: abandoned" for pid in pids]
    return tally

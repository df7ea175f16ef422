"""Everything that needs a GPU, in stages, the most valuable first: a quarter of an hour with one is enough for all.

    python3 benchmarks/gpu_run.py --out DIR [--minutes 5] [--stages 1,2,headline]
    python3 benchmarks/gpu_run.py --out DIR --rehearse      # without a GPU: compiles all of it, and estimates the time

It uses the Python that it is given, and needs no make, network or installation. What is measured is appended to
DIR/results.jsonl at once, so that whatever ends the run loses nothing; DIR/summary.txt says what was reached.
A `fastllm/_C_cuda.so` that was built elsewhere (FASTLLM_CUDA_ARCHS=90) is used if it was built from these sources.

A stage is a list of jobs for workers, which are processes that read jobs from their input and write results to their
output, JSON line by line. A job that crashes its worker, or outlives the stage, takes nothing with it: the worker is
ended with all it started, and the next job goes to a fresh one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Job = dict[str, Any]
CHIP = ("cuda", 90)  # what a rehearsal compiles for
DAMAGED = ("CUDA error", "AcceleratorError", "illegal memory access", "device-side assert")
"""What an error says that leaves its process without a usable GPU."""
SHORT = 300  # characters of an error in the results


SHARES = {"facts": 0.2, "smoke": 0.5, "headline": 0.85, "tuning": 0.6, "tests": 0.7, "sanitize": 1.0}
"""The stages in order, and how much of the time that is left each may take. One that ends early leaves the rest."""


# Workers


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
            answer = {"ok": False, "error": shorten(text), "damaged": any(word in text for word in DAMAGED)}
            print(f"{job}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        answer |= {"seconds": round(time.perf_counter() - started, 3), "cpu_seconds": round(cpu_seconds() - cpu, 3)}
        answers.write(json.dumps(answer) + "\n")


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHORT else f"{text[: SHORT - 3]}..."


class Worker:
    """A process that answers jobs, in a process group of its own."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path):
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
                env=environment, cwd=ROOT, start_new_session=True,
            )  # fmt: skip

    def answer(self, job: Job, seconds: float) -> dict[str, Any]:
        """The answer; {"ok": False, "died": True} if the process ends instead, or takes longer than that."""
        stdin, stdout, line = self.process.stdin, self.process.stdout, ""
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            stdin.write(json.dumps(job) + "\n")
            if not select.select([stdout], [], [], seconds)[0]:
                return {"ok": False, "died": True, "error": f"no answer in {seconds:.0f} s"}
            line = stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return {"ok": False, "died": True, "error": f"its process ended: {reason}"}

    def end(self) -> None:
        """Ends the process and all that it started."""
        end_group(self.process)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


def end_group(process: subprocess.Popen) -> None:
    """Ends a process that leads its group, with the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_jobs(
    jobs: Iterable[Job],
    start: Callable[[], Worker],
    workers: int,
    deadline: float,
    done: Callable[[Job, dict[str, Any]], Iterable[Job] | None],
    job_seconds: float = 120.0,
) -> int:
    """Hands the jobs out to `workers` workers and calls `done` with each answer as it comes, one at a time; what that
    returns are further jobs. Stops at `deadline` (of time.monotonic), or ends a worker that takes `job_seconds`.

    Returns:
        How many jobs were answered; one that was cut off by the deadline is not.
    """
    waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    left = answered = 0
    for job in jobs:
        waiting.put(job)
        left += 1
    lock, running, stopped = threading.Lock(), set[Worker](), False

    def work() -> None:
        nonlocal left, answered
        worker = None
        while (job := waiting.get()) is not None:
            with lock:
                if stopped:
                    break
                if worker is None:
                    worker = start()
                    running.add(worker)
            answer = worker.answer(job, job_seconds)
            with lock:
                if stopped:
                    break
                answered += 1
                left -= 1
                for further in done(job, answer) or ():
                    waiting.put(further)
                    left += 1
                if left == 0:
                    for _ in threads:
                        waiting.put(None)
                if answer.get("died") or answer.get("damaged"):
                    running.discard(worker)
                    worker.end()
                    worker = None

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, left))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    with lock:
        stopped = True
        for worker in running:
            worker.end()
        for _ in threads:
            waiting.put(None)
    for thread in threads:
        thread.join()
    return answered


# The run


@dataclass
class Outcome:
    """What became of a stage."""

    jobs: int = 0
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0
    compiled: int = 0
    compile_seconds: float = 0.0  # of one core
    longest_compile: float = 0.0

    def line(self, name: str) -> str:
        reached = f"{self.answered} of {self.jobs}" if self.jobs else "-"
        compiled = f", {self.compiled} kernels compiled ahead" if self.compiled else ""
        failed = f", {len(self.failed)} FAILED" if self.failed else ""
        note = f"; {self.note}" if self.note else ""
        return f"{name:<9} {reached:>10} in {self.seconds:.0f} s{compiled}{failed}{note}"


class Run:
    """One run: where its results go, how long it may take, and what its children are started with."""

    def __init__(self, out: Path, minutes: float, rehearse: bool = False):
        self.out, self.rehearse = out, rehearse
        self.device = "cpu" if rehearse else "cuda"
        self.cores = len(os.sched_getaffinity(0))
        self.started = time.monotonic()
        self.deadline = self.started + 60 * minutes
        self.log = out / "workers.log"
        self.results = out / "results.jsonl"
        self.outcomes: dict[str, Outcome] = {}
        self.facts: dict[str, Any] = {}
        self.cases: list[str] = []  # of the headline
        self.calls: dict[str, Any] = {"ok": False, "error": "the calls of every op were not listed"}
        self.measured: list[dict[str, Any]] = []
        self.unmeasured: list[dict[str, str]] = []
        self.build: Build | None = None
        self.lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        for name in ("results.jsonl", "workers.log", "build.log", "tests.log", "summary.txt"):
            (out / name).unlink(missing_ok=True)

    def write(self, stage: str, **fields: Any) -> None:
        """Appends a line to the results, and has it on the disk before anything else is done."""
        at = round(time.monotonic() - self.started, 2)
        with self.lock, self.results.open("a") as file:
            file.write(json.dumps({"stage": stage, "at": at, **fields}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def environment(self, **more: str) -> dict[str, str]:
        """The user's, with this project in front of his PYTHONPATH."""
        paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Threads that spin while they wait would take the other workers' cores.
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_WAIT_POLICY": "passive", **more}

    def worker(self, script: str = "benchmarks/gpu_run.py", **environment: str) -> Callable[[], Worker]:
        command = [sys.executable, str(ROOT / script), "serve"]
        return lambda: Worker(command, self.environment(**environment), self.log)

    def ask(self, job: Job, seconds: float, script: str = "benchmarks/gpu_run.py") -> dict[str, Any]:
        """One answer of a fresh worker."""
        answers: list[dict[str, Any]] = []
        run_jobs([job], self.worker(script), 1, time.monotonic() + seconds, lambda _, answer: answers.append(answer),
                 seconds)  # fmt: skip
        return answers[0] if answers else {"ok": False, "error": f"no answer in {seconds:.0f} s"}

    def jobs(
        self,
        outcome: Outcome,
        stage: str,
        jobs: Sequence[Job],
        start: Callable[[], Worker],
        workers: int,
        deadline: float,
        job_seconds: float = 120.0,
        keep: Callable[[Job, dict[str, Any]], None] = lambda job, answer: None,
    ) -> None:
        """Runs a stage's jobs, a line of the results each."""

        def done(job: Job, answer: dict[str, Any]) -> None:
            shown = {key: value for key, value in job.items() if key not in ("do", "device", "chip")}
            self.write(stage, **shown, **answer)
            if not answer["ok"]:
                outcome.failed.append(f"{' '.join(map(str, shown.values()))}: {answer['error']}")
            keep(job, answer)

        outcome.jobs += len(jobs)
        answered = run_jobs(jobs, start, workers, deadline, done, job_seconds)
        outcome.answered += answered
        if answered < len(jobs):
            outcome.note = f"out of time after {outcome.answered} of {outcome.jobs}"

    def precompile(self, outcome: Outcome, stage: str, jobs: Sequence[Job], script: str, deadline: float) -> None:
        """Compiles what the jobs will launch, each kernel once, on all cores.

        A rehearsal compiles with an empty cache and keeps the seconds that each kernel took, by its source and
        compiler, so that the next one need not.
        """
        chip = self.facts.get("chip", CHIP)
        known = _Seconds() if self.rehearse else None
        seconds: dict[str, float] = {}  # by text

        def done(job: Job, answer: dict[str, Any]) -> Iterable[Job]:
            if not answer["ok"]:
                self.write(stage, **{job["do"]: job}, **answer)
                outcome.failed.append(f"{job['do']} {job.get('text', job)}"[:100] + f": {answer['error']}")
            if job["do"] == "compile":
                seconds[job["text"]] = answer.get("cpu_seconds", 0.0)
                if known is not None and answer["ok"]:
                    known.add(job["fingerprint"], answer["cpu_seconds"])
                return
            for text, fingerprint in answer.get("launches", {}).items():
                if text not in seconds:
                    seconds[text] = known.seconds.get(fingerprint, -1.0) if known is not None else -1.0
                    if seconds[text] < 0:
                        yield {"do": "compile", "text": text, "fingerprint": fingerprint, "chip": chip}

        with tempfile.TemporaryDirectory() as fresh:
            start = self.worker(script, **({"TRITON_CACHE_DIR": fresh} if self.rehearse else {}))
            run_jobs([{**job, "do": "record", "chip": chip} for job in jobs], start, self.cores, deadline, done)
        compiled = [each for each in seconds.values() if each >= 0]
        outcome.compiled += len(compiled)
        outcome.compile_seconds += sum(compiled)
        outcome.longest_compile = max([outcome.longest_compile, *compiled])
        self.write(stage, compiled=len(compiled), of=len(seconds), compile_cpu_seconds=round(sum(compiled), 1))


class _Seconds:
    """How long kernels took to compile in earlier rehearsals, by fingerprint."""

    def __init__(self) -> None:
        self.file = Path(os.environ.get("FASTLLM_CACHE") or Path.home() / ".cache/fastllm") / "compile-seconds.json"
        self.seconds: dict[str, float] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def add(self, fingerprint: str, seconds: float) -> None:
        self.seconds[fingerprint] = seconds
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(self.seconds))
        partial.replace(self.file)


# The compiled libraries


def source_digest() -> str:
    """Names the state of csrc/, as setup.py writes it into the CUDA library."""
    digest = hashlib.sha256()
    for name in sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()


def library_state(library: Path) -> str:
    """ "matches", or why a CUDA library is not to be used."""
    if not library.exists():
        return "not built"
    found = re.search(rb"fastllm-sources:([0-9a-f]{64})", library.read_bytes())
    if found is None:
        return "does not say which sources it was built from"
    return "matches" if found[1].decode() == source_digest() else "was built from other sources"


class Build:
    """setup.py in the background, into a folder of its own: nobody loads a library that is half written."""

    def __init__(self, run: Run, cuda: bool):
        self.cuda, self.log, self.note = cuda, run.out / "build.log", ""
        self.folder = Path(tempfile.mkdtemp(prefix="fastllm-build-"))
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(self.folder / "lib")]
        command += ["--build-temp", str(self.folder / "temp")]
        archs = os.environ.get("FASTLLM_CUDA_ARCHS") or (str(CHIP[1]) if run.rehearse else "native")
        chosen = {"FASTLLM_CUDA_ARCHS": archs} if cuda else {"FASTLLM_CUDA": "0"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
                env=run.environment(**chosen),
            )  # fmt: skip

    def wait(self, seconds: float) -> None:
        """Takes over what was built; ends the build if it takes longer."""
        if self.note:
            return
        try:
            code = self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            end_group(self.process)
            self.note = "the build was out of time"
        else:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            self.note = "built" if code == 0 else f"the build failed: {shorten(' '.join(last))}"
            if code == 0:
                for built in (self.folder / "lib/fastllm").glob("_C*.so"):
                    partial = ROOT / "fastllm" / f"{built.name}.{os.getpid()}"
                    shutil.copyfile(built, partial)
                    partial.replace(partial.with_name(built.name))
        shutil.rmtree(self.folder, ignore_errors=True)


def start_build(run: Run) -> None:
    """Starts to build what is not there for this Python and these sources."""
    library = ROOT / "fastllm/_C_cuda.so"
    state = library_state(library)
    extension = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    have_cpu = (ROOT / "fastllm" / extension).exists()
    run.facts["cuda_library"], run.facts["cpu_library"] = state, "there" if have_cpu else f"no {extension}"
    if state != "matches" or not have_cpu:
        if state not in ("matches", "not built"):
            library.unlink()  # nobody is to load it meanwhile
        run.build = Build(run, cuda=state != "matches")


# Stages: (run, outcome, deadline)

EVERY_OP = "tests/every_op.py"
SECONDS = {"cuda": 0.5, "cpu": 0.1}  # of timing a headline case
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZED = ("adamw", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
TUNED = [
    {"size": size, "causal": causal, "dtype": "bfloat16", "batch": 2, "heads": 16, "kv_heads": 4, "rows": 4096}
    for size, causal in ((128, True), (64, True), (128, False), (256, True))
]
"""Attention calls whose tiles are tuned."""


def facts(run: Run, outcome: Outcome, deadline: float) -> None:
    answers: dict[str, dict[str, Any]] = {}
    names = ["facts", "list", *(["compiled"] if run.rehearse else [])]
    jobs = [{"do": name, "device": run.device} for name in names]
    libraries = {key: run.facts[key] for key in ("cuda_library", "cpu_library") if key in run.facts}

    def done(job: Job, answer: dict[str, Any]) -> None:
        answers[job["do"]] = answer
        run.write("facts", **libraries, **answer)
        if not answer["ok"]:
            outcome.failed.append(f"{job['do']}: {answer['error']}")

    def list_calls() -> None:  # beside the rest, since the smoke stage would wait for it
        run.calls = run.ask({"do": "list"}, deadline - time.monotonic(), EVERY_OP)

    listing = threading.Thread(target=list_calls)
    listing.start()
    outcome.jobs, outcome.answered = len(jobs), run_jobs(jobs, run.worker(), 1, deadline, done)
    listing.join()
    run.facts |= answers.get("facts", {}).get("facts", {})
    run.cases = answers.get("list", {}).get("cases", [])
    run.facts |= {"compiled_cases": answers.get("compiled", {}).get("compiled", [])}


def smoke(run: Run, outcome: Outcome, deadline: float) -> None:
    if not run.calls["ok"]:
        outcome.failed.append(run.calls["error"])
        return
    run.facts["start_seconds"] = run.calls["start_seconds"]  # in which a process imports torch and fastllm
    run.precompile(outcome, "smoke", run.calls["jobs"], EVERY_OP, deadline)

    def keep(job: Job, answer: dict[str, Any]) -> None:
        if job["op"] == "adamw":
            run.facts["adamw_seconds"] = run.facts.get("adamw_seconds", 0.0) + answer.get("cpu_seconds", 0.0)

    jobs = [{"do": "check", "device": run.device, **job} for job in run.calls["jobs"]]
    parts = [jobs]
    if run.build is not None and run.build.cuda:  # what needs the library comes after it, in fresh processes
        parts = [[job for job in jobs if job["backend"] != "cuda"], [job for job in jobs if job["backend"] == "cuda"]]
    for part in parts:
        if part is not parts[0] and run.build is not None:
            run.build.wait(deadline - time.monotonic())
        # One thread each: the references of AdamW run on the CPU.
        start = run.worker(EVERY_OP, OMP_NUM_THREADS="1")
        run.jobs(outcome, "smoke", part, start, run.cores, deadline, keep=keep)


def headline(run: Run, outcome: Outcome, deadline: float) -> None:
    cases = [{"index": index, "case": name} for index, name in enumerate(run.cases)]
    run.precompile(outcome, "headline", cases, "benchmarks/gpu_run.py", deadline)

    def keep(job: Job, answer: dict[str, Any]) -> None:
        if answer["ok"] and answer["result"] is not None:
            run.measured.append(answer["result"])
            second.append({**job, "first": answer["result"]})
        elif not answer["ok"]:
            op, _, name = job["case"].partition(" ")
            run.unmeasured.append({"op": op, "case": name, "reason": answer["error"]})

    second: list[Job] = []
    first = [{"do": "measure", "device": run.device, **case} for case in cases]
    run.jobs(outcome, "headline", first, run.worker(), 1, deadline, 90, keep)
    again, second = second, []
    if not outcome.note and not run.rehearse:  # the rivals that compile for minutes
        run.jobs(outcome, "headline", again, run.worker(), 1, deadline, 180, keep)


def tuning(run: Run, outcome: Outcome, deadline: float) -> None:
    run.precompile(outcome, "tuning", [{"tune": shape} for shape in TUNED], "benchmarks/gpu_run.py", deadline)
    if run.rehearse:
        outcome.note = "compiled only"
        return
    with tempfile.TemporaryDirectory() as cache:
        start = run.worker(FASTLLM_AUTOTUNE="1", FASTLLM_CACHE=cache)
        run.jobs(outcome, "tuning", [{"do": "tune", "tune": shape} for shape in TUNED], start, 1, deadline)


def tests(run: Run, outcome: Outcome, deadline: float) -> None:
    if importlib.util.find_spec("pytest") is None:
        outcome.note = "pytest is not installed"
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "fastllm.benchmarks.gpu_run"]
    command += ["--continue-on-collection-errors"]
    if run.rehearse:
        command += ["tests/test_gpu.py", "-k", "cpu and float32 and small"]
        with (run.out / "tests.log").open("wb") as log:
            collect = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider"]
            subprocess.run(collect, stdout=log, stderr=log, cwd=ROOT, env=run.environment(), check=False)
        found = re.search(r"(\d+)/\d+ tests collected|(\d+) tests collected", (run.out / "tests.log").read_text())
        run.facts["gpu_tests"] = int(found[1] or found[2]) if found else 0
        outcome.note = f"{run.facts['gpu_tests']} tests are marked gpu"
        if found is None:
            outcome.failed.append("the tests marked gpu cannot be collected: see tests.log")
    else:
        command += ["-m", "gpu"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(max(1, run.cores // 2)), "--maxschedchunk", "1"]
    before = run.results.stat().st_size
    with (run.out / "tests.log").open("ab") as log:
        environment = run.environment(FASTLLM_GPU_RUN_RESULTS=str(run.results))
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            outcome.note, code = "out of time", 0
        end_group(process)
    with run.results.open() as lines:
        lines.seek(before)
        found_lines = [json.loads(line) for line in lines]
    verdicts = Counter(line["outcome"] for line in found_lines)
    outcome.jobs = outcome.answered = len(found_lines)
    outcome.failed += [f"{line['test']}: {line['error']}" for line in found_lines if line["outcome"] == "failed"]
    if outcome.note == "out of time":
        outcome.note += f" after {len(found_lines)} tests"
    if code not in (0, 1) or (code == 1 and not outcome.failed):
        outcome.failed.append(f"pytest ended with {code}: see tests.log")
    outcome.note = "; ".join(filter(None, [outcome.note, ", ".join(f"{n} {name}" for name, n in verdicts.items())]))


def pytest_runtest_logreport(report: Any) -> None:
    """This module as a pytest plugin: a line for each test as it ends."""
    path = os.environ.get("FASTLLM_GPU_RUN_RESULTS")
    if path is None or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    error = shorten(crash.message if crash is not None else str(report.longrepr)) if report.failed else ""
    line = {"stage": "tests", "test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    with open(path, "a") as file:
        file.write(json.dumps(line | ({"error": error} if report.failed else {})) + "\n")
        file.flush()
        os.fsync(file.fileno())


def sanitize(run: Run, outcome: Outcome, deadline: float) -> None:
    tools: Sequence[str] = TOOLS
    if run.rehearse:
        outcome.note, tools = "without compute-sanitizer, on the CPU", ("",)
    elif find_sanitizer() is None:
        outcome.note = "compute-sanitizer is not installed"
        return
    jobs = [{"do": "sanitize", "device": run.device, "tool": tool, "op": op} for tool in tools for op in SANITIZED]
    # torch's caching allocator would hide reads beyond a tensor's end.
    start = run.worker(PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="2")
    run.jobs(outcome, "sanitize", jobs, start, max(1, run.cores // 4), deadline, 600)


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


STAGES: dict[str, Callable[[Run, Outcome, float], None]] = {
    "facts": facts,
    "smoke": smoke,
    "headline": headline,
    "tuning": tuning,
    "tests": tests,
    "sanitize": sanitize,
}


# What workers do: everything below that imports torch


def handle(job: Job) -> dict[str, Any]:
    return {
        "facts": find_facts,
        "list": list_cases,
        "compiled": list_compiled,
        "record": record,
        "compile": compile_kernel,
        "measure": measure,
        "tune": tune,
        "table": table,
        "sanitize": run_sanitizer,
    }[job["do"]](job)


def find_facts(job: Job) -> dict[str, Any]:
    import torch

    from fastllm import _ext
    from fastllm.benchmarks import harness
    from fastllm.kernels import _utils

    if job["device"] == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    found: dict[str, Any] = {**harness.environment(job["device"]), "loaded": dict(_ext.STATUS)}
    found["versions"]["numpy"] = _version("numpy")
    found["versions"]["nvcc"] = next((line for line in _output("nvcc", "--version") if "release" in line), None)
    if job["device"] == "cuda":
        found["chip"] = _utils.chip(torch.device("cuda"))
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.total"
        found["nvidia_smi"] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv")
    found["ceilings"] = harness.measure_ceilings(job["device"])
    return {"facts": found}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> list[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _cases(device: str) -> list:
    from fastllm.benchmarks import headline

    return headline.cases(device, small=device == "cpu")


def _name(case: Any) -> str:
    return f"{case.op} {case.name}"


def list_cases(job: Job) -> dict[str, Any]:
    return {"cases": [_name(case) for case in _cases(job["device"])]}


def list_compiled(job: Job) -> dict[str, Any]:
    """The headline cases in which a rival is compiled."""
    from fastllm.benchmarks import _attention

    return {"compiled": [_name(case) for case in _cases("cuda") if case.compiled or _attention.FLEX in case.rivals]}


def record(job: Job) -> dict[str, Any]:
    """What a headline case, or the tuning of an attention call, would launch: {text: fingerprint}."""
    from fastllm.precompile import fingerprint, recorded

    chip = tuple(job["chip"])
    with recorded(chip) as launches:
        if "tune" in job:
            _attention(job["tune"], _try_all)
        else:
            _launches_of(_cases("cuda")[job["index"]])
    return {"launches": {text: fingerprint(text, chip) for text in {launch.text() for launch in launches}}}


def _launches_of(case: Any) -> None:
    """Runs a case's op, forward and backward, on the Triton kernels that it has."""
    import fastllm
    from fastllm import ops
    from fastllm.backends import BackendUnavailable
    from fastllm.testing import outputs_of

    if case.setup is not None:
        return
    call = case.call or getattr(ops, case.op)
    for draw in filter(None, (case.args, case.check)):
        args = draw()
        leaves = [x for x in args if hasattr(x, "requires_grad_") and x.is_floating_point()]
        for leaf in leaves:
            leaf.requires_grad_(not case.inference)
        with fastllm.use_backend("triton"), contextlib.suppress(BackendUnavailable):
            outputs = outputs_of(call(*args, **case.kwargs))
            if not case.inference:
                import torch

                torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs], allow_unused=True)


def compile_kernel(job: Job) -> dict[str, Any]:
    from fastllm.precompile import compile

    compile(job["text"], tuple(job["chip"]))
    return {}


def measure(job: Job) -> dict[str, Any]:
    """A headline case, or, where the first pass has its result, what the second pass adds."""
    from fastllm.benchmarks import harness, headline

    case = _cases(job["device"])[job["index"]]
    if "first" in job:
        case = headline.second_pass(case, job["first"])
    if case is None:
        return {"result": None}
    with harness.quiet_machine(None):
        return {"result": harness.measure(case, job["device"], SECONDS[job["device"]])}


def _attention(shape: dict[str, Any], choose: Callable) -> None:
    """Forward and backward of an attention call, its tiles chosen by `choose` in place of `kernels._utils.choose`."""
    from unittest import mock

    import torch

    import fastllm
    from fastllm import ops
    from fastllm.kernels import _utils
    from fastllm.testing import make

    sizes = (shape["batch"], shape["rows"], shape["size"])
    heads = (shape["heads"], shape["kv_heads"], shape["kv_heads"])
    q, k, v = (
        make((sizes[0], sizes[1], h, sizes[2]), getattr(torch, shape["dtype"]), "cuda", seed=seed)
        .transpose(1, 2)
        .requires_grad_()
        for seed, h in enumerate(heads)
    )

    with fastllm.use_backend("triton"), mock.patch.object(_utils, "choose", choose):
        out = ops.attention(q, k, v, is_causal=shape["causal"], enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def _try_all(key: tuple, default: Any, candidates: Iterable, run: Callable) -> Any:
    for config in candidates:
        run(config)
    return default


def tune(job: Job) -> dict[str, Any]:
    """Times every candidate of the call's three kernels, as FASTLLM_AUTOTUNE=1 does, which it is run with."""
    from unittest import mock

    from fastllm.kernels import _utils

    choose, milliseconds, found = _utils.choose, _utils._milliseconds, {}

    def listening(key: tuple, default: Any, candidates: Iterable, run: Callable) -> Any:
        times: dict[str, float | str] = {}

        def timed(run: Callable, config: Any) -> float:
            try:
                times[str(config)] = round(milliseconds(run, config), 4)
            except Exception as error:  # one that cannot be compiled is none
                times[str(config)] = shorten(f"{type(error).__name__}: {error}")
                return float("inf")
            return float(times[str(config)])

        with mock.patch.object(_utils, "_milliseconds", timed):
            winner = choose(key, default, candidates, run)
        kernel = key[0] if key[0] not in found else f"{key[0]}, second pass"  # dk and dv apart
        found[kernel] = {"default": str(default), "winner": str(winner), "milliseconds": times}
        return winner

    _attention(job["tune"], listening)
    return {"kernels": found}


def table(job: Job) -> dict[str, Any]:
    from fastllm.benchmarks import suite

    return {"text": suite.table(job["data"])}


def run_sanitizer(job: Job) -> dict[str, Any]:
    command = [sys.executable, EVERY_OP, job["device"], job["op"]]
    if job["tool"]:
        command = [find_sanitizer() or "", "--tool", job["tool"], "--error-exitcode", "1", *command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, file=sys.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(done.stdout.strip()[-SHORT:])
    return {"said": shorten(done.stdout.strip()[-SHORT:])}


# The last page


ASSUMED = {
    "context": 4.0,  # a process's CUDA context and first kernels
    "check": 0.4,  # a call, its reference in float64 and eager, kernels that torch loads when they are first used
    "first torch.compile": 10.0,  # of a process: Inductor's own imports and processes
    "torch.compile": 4.0,  # of a case's eager function, forward and backward
    "torch.compile again": 1.5,  # of what is in Inductor's cache: the same function for another direction
    "training step": 60.0,  # of a whole model, compiled twice
    "timing": 2.0,  # a case: its data, its check, and half a second of rounds
    "candidate": 0.15,  # of the tuning
    "test": 1.0,
    "sanitized": 60.0,  # an op under a tool
}
"""Seconds on a machine with a GPU, of what a rehearsal cannot measure."""
CORES = 16  # of that machine


@dataclass
class Estimate:
    """A line of the plan: how long a stage takes on a machine with a GPU."""

    stage: str
    jobs: int
    compilations: int
    cpu_seconds: float  # of compiling
    seconds: float


def estimate(run: Run, name: str, outcome: Outcome) -> Estimate:
    start, jobs = run.facts.get("start_seconds", 0.0), outcome.jobs
    context = start + ASSUMED["context"]
    # The kernel that takes longest may be the last to be begun.
    compiling = start + outcome.compile_seconds / CORES + outcome.longest_compile if outcome.compiled else 0.0
    if name == "facts":
        work = context + ASSUMED["timing"]
    elif name == "smoke":  # the references of AdamW are those that run on the CPU there, too
        work = context + (jobs * ASSUMED["check"] + run.facts.get("adamw_seconds", 0.0)) / CORES
    elif name == "headline":
        names: list[str] = run.facts.get("compiled_cases", [])
        alone = {re.sub(r" (forward|backward)$", "", case) for case in names}
        work = context + jobs * ASSUMED["timing"] + ASSUMED["first torch.compile"] + ASSUMED["training step"]
        work += len(alone) * ASSUMED["torch.compile"] + (len(names) - len(alone)) * ASSUMED["torch.compile again"]
    elif name == "tuning":
        work = context + outcome.compiled * ASSUMED["candidate"]
    elif name == "tests":
        jobs = run.facts.get("gpu_tests", 0)
        work = context + jobs * ASSUMED["test"] / (CORES // 2)
    else:
        jobs = len(TOOLS) * len(SANITIZED)
        work = start + jobs * ASSUMED["sanitized"] / (CORES // 4)
    return Estimate(name, jobs, outcome.compiled, outcome.compile_seconds, compiling + work)


def plan(run: Run) -> list[str]:
    """What the rehearsed stages would take on a machine with a GPU."""
    rows = [estimate(run, name, outcome) for name, outcome in run.outcomes.items()]
    lines = ["", f"With a GPU and {CORES} cores, estimated:"]
    lines.append("stage        jobs  compilations  CPU-seconds  estimated seconds")
    sums = {key: sum(getattr(row, key) for row in rows) for key in ("jobs", "compilations", "cpu_seconds", "seconds")}
    for row in (*rows, Estimate("total", **sums)):
        lines.append(
            f"{row.stage:<9} {row.jobs:>7} {row.compilations:>13} {row.cpu_seconds:>12.0f} {row.seconds:>18.0f}"
        )
    first = sum(row.seconds for row in rows if row.stage in ("facts", "smoke", "headline"))
    start, adamw = run.facts.get("start_seconds", 0.0), run.facts.get("adamw_seconds", 0.0)
    return [
        *lines,
        f"The first three stages: {first:.0f} seconds.",
        f"Measured here, on one core: compiling, {start:.1f} s to import torch, {adamw:.0f} s for AdamW's references.",
        "Assumed, in seconds: " + ", ".join(f"{name} {value:g}" for name, value in ASSUMED.items()) + ".",
    ]


def summary(run: Run, chosen: Sequence[str]) -> str:
    """What was reached, what was not and why, and the headline numbers."""
    versions = run.facts.get("versions", {})
    machine = run.facts.get("machine", {})
    lines = [", ".join([machine.get("name", "unknown machine"), *(f"{k} {v}" for k, v in versions.items() if v)])]
    lines += [f"{key}: {run.facts[key]}" for key in ("loaded", "cuda_library", "cpu_library") if key in run.facts]
    if run.build is not None:
        lines.append(f"build: {run.build.note or 'still running'}")
    lines += run.facts.get("nvidia_smi", [])
    ceilings = run.facts.get("ceilings", {})
    lines += [", ".join(f"{key} {value:g}" for key, value in ceilings.items()), ""]
    for name in chosen:
        outcome = run.outcomes.get(name)
        why = "no time left" if "ceilings" in run.facts else "the facts are not known"
        lines.append(outcome.line(name) if outcome else f"{name:<9} not started: {why}")
        lines += [f"    {text}" for text in (outcome.failed[:40] if outcome else [])]
        if outcome and len(outcome.failed) > 40:
            lines.append(f"    ... and {len(outcome.failed) - 40} more, in results.jsonl")
    if run.measured and ceilings:
        data = {"results": run.measured, "failed": run.unmeasured, "ceilings": ceilings}
        answer = run.ask({"do": "table", "data": data}, 60)
        lines += ["", answer.get("text") or f"no table: {answer['error']}"]
    return "\n".join([*lines, *(plan(run) if run.rehearse else [])]) + "\n"


def choose_stages(given: str) -> list[str]:
    """The names of the stages in a comma-separated list of names and numbers, in their order.

    Raises:
        ValueError: for what is neither; the message names it.
    """
    names = list(STAGES)
    chosen = set()
    for word in given.split(","):
        if word in names:
            chosen.add(word)
        elif word.isdigit() and 1 <= int(word) <= len(names):
            chosen.add(names[int(word) - 1])
        else:
            known = ", ".join(f"{i} {name}" for i, name in enumerate(names, 1))
            raise ValueError(f"unknown stage {word!r}; known are {known}")
    return [name for name in names if name in chosen]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; returns 0, 1 if something failed, or 2 for arguments that make no sense."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) == ["serve"]:
        serve(handle)
        return 0
    parser = argparse.ArgumentParser(prog="gpu_run.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="where results go")
    parser.add_argument("--minutes", type=float, help="for everything (default: 5; a rehearsal: 60)")
    parser.add_argument("--stages", default=",".join(STAGES), help="names or numbers (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: compile, run small, estimate the time")
    args = parser.parse_args(argv)
    try:
        chosen = choose_stages(args.stages)
    except ValueError as error:
        print(f"gpu_run.py: error: {error}", file=sys.stderr)
        return 2
    run = Run(args.out, args.minutes or (60 if args.rehearse else 5), args.rehearse)
    try:
        return perform(run, chosen)
    finally:
        if run.build is not None:
            run.build.wait(0)


def perform(run: Run, chosen: Sequence[str]) -> int:
    start_build(run)
    for name in ("facts", *(name for name in chosen if name != "facts")):  # what the others need to know
        left = run.deadline - time.monotonic()
        if left <= 0:
            break
        outcome = run.outcomes[name] = Outcome()
        started = time.monotonic()
        print(f"{name} ...", flush=True)
        try:
            STAGES[name](run, outcome, started + left * SHARES[name])
        except Exception as error:  # the other stages are worth as much without it
            outcome.failed.append(shorten(f"{type(error).__name__}: {error}"))
            traceback.print_exc()
        outcome.seconds = time.monotonic() - started
        run.write(name, done=dataclasses.asdict(outcome))
        print(outcome.line(name), flush=True)
        if name == "facts" and "ceilings" not in run.facts:
            break  # no GPU, or not in time
    if run.build is not None:
        run.build.wait(run.deadline - time.monotonic() if run.rehearse else 0)
    page = summary(run, list(dict.fromkeys(("facts", *chosen))))
    (run.out / "summary.txt").write_text(page)
    print(f"\n{page}")
    unbuilt = run.build is not None and run.build.note != "built" and (run.build.cuda or run.rehearse)
    return int(unbuilt or any(outcome.failed for outcome in run.outcomes.values()))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of benchmarks/, whose modules have common names
    raise SystemExit(main())

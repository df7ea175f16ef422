"""Runs everything that needs a GPU, in stages, the most valuable first, for as long as there is time.

    python3 benchmarks/gpu_run.py --out DIR [--minutes 5] [--stages 1,2,headline]
    python3 benchmarks/gpu_run.py --out DIR --rehearse      # without a GPU: compiles all of it, and estimates the time

It uses the Python that it is given, and needs no make, network or installation. What is measured is appended to
DIR/results.jsonl at once, so that whatever ends the run loses nothing; DIR/summary.txt says what was reached, and
DIR/<gpu>.json has the headline numbers as `fastllm bench --json` writes them. A DIR with results is refused.
A `fastllm/_C_cuda.so` that was built elsewhere (FASTLLM_CUDA_ARCHS=90) is used if it was built from these sources.

A stage is a list of jobs (`_jobs.py`) for workers (`_workers.py`), each of which may crash or hang without taking
anything with it; `_build.py` compiles what is missing meanwhile, and `_plan.py` writes the last page.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # not as fastllm.benchmarks, which imports torch: this process does without
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of benchmarks/, whose modules have common names

from _build import Build, library_state  # noqa: E402
from _plan import NO_GPU, SANITIZED, TOOLS, Outcome, find_sanitizer, summary  # noqa: E402
from _workers import RESULTS, Job, Worker, append, end_group, run_jobs, shorten  # noqa: E402

JOBS, EVERY_OP = "benchmarks/_jobs.py", "tests/every_op.py"  # what workers run
CHIP = ("cuda", 90)  # what a rehearsal compiles for
SHARES = {
    "facts": 0.25, "smoke": 0.6, "headline": 0.97, "tuning": 0.5, "tests": 0.6, "sanitize": 0.7, "autotuned": 1.0
}  # fmt: skip
"""The stages in order, and how much of the time that is left each may take. One that ends early leaves the rest."""
COMPILING = 0.4
"""How much of a stage's time may go to compiling ahead."""


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
        self.no_gpu = False
        self.ceilings: dict[str, float] = {}
        self.measured: list[dict[str, Any]] = []
        self.unmeasured: list[dict[str, str]] = []
        self.build: Build | None = None
        self.lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)

    def write(self, stage: str, **fields: Any) -> None:
        """Appends a line to the results."""
        at = round(time.monotonic() - self.started, 2)
        with self.lock:
            append(self.results, {"stage": stage, "at": at, **fields})

    def environment(self, **more: str) -> dict[str, str]:
        """The user's, with this project in front of his PYTHONPATH."""
        paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        given = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
        # Threads that spin while they wait would take the other workers' cores.
        return {**given, "PYTHONPATH": os.pathsep.join(paths), "OMP_WAIT_POLICY": "passive", **more}

    def worker(self, script: str = JOBS, **environment: str) -> Callable[[], Worker]:
        command = [sys.executable, str(ROOT / script), "serve"]
        return lambda: Worker(command, self.environment(**environment), self.log)

    def ask(self, job: Job, seconds: float, script: str = JOBS) -> dict[str, Any]:
        """One answer of a fresh worker."""
        answers: list[dict[str, Any]] = []
        run_jobs([job], self.worker(script), 1, time.monotonic() + seconds, lambda _, answer: answers.append(answer),
                 seconds)  # fmt: skip
        return answers[0] if answers else {"ok": False, "error": f"no answer in {seconds:.0f} s"}

    def need_library(self, outcome: Outcome, deadline: float) -> bool:
        """Waits for the build: beside it nothing is timed, and without it other kernels would be tested."""
        if self.build is None or self.build.wait(deadline - time.monotonic()):
            return True
        outcome.note = "the build was not ready in time"
        return False

    def benchmark(self) -> dict[str, Any]:
        """What was measured, as `fastllm bench --json` writes it."""
        names = ("format", "date", "machine", "versions")
        known = {name: self.facts[name] for name in names if name in self.facts}
        return {**known, "ceilings": self.ceilings, "results": self.measured, "failed": self.unmeasured}

    def keep_benchmark(self) -> None:
        """Writes it to a file that can be committed to benchmarks/results/ as it is."""
        if "file" in self.facts and self.ceilings and self.measured:
            partial = self.out / "partial"
            partial.write_text(json.dumps(self.benchmark(), indent=1) + "\n")
            partial.replace(self.out / self.facts["file"])

    def jobs(
        self,
        outcome: Outcome,
        stage: str,
        jobs: Sequence[Job],
        start: Callable[[], Worker],
        workers: int,
        deadline: float,
        job_seconds: float | Callable[[Job], float] = 120.0,
        keep: Callable[[Job, dict[str, Any]], None] = lambda job, answer: None,
    ) -> None:
        """Runs a stage's jobs, a line of the results each."""

        def done(job: Job, answer: dict[str, Any]) -> None:
            shown = {key: value for key, value in job.items() if key not in ("do", "device", "chip", "first")}
            self.write(stage, **shown, **answer)
            if not answer["ok"]:
                outcome.failed.append(f"{' '.join(map(str, shown.values()))}: {answer['error']}")
            keep(job, answer)

        outcome.jobs += len(jobs)
        tally = run_jobs(jobs, start, workers, deadline, done, job_seconds)
        outcome.answered += tally.answered
        outcome.failed += tally.trouble
        if tally.left:
            outcome.note = f"out of time after {outcome.answered} of {outcome.jobs}"

    def precompile(self, outcome: Outcome, stage: str, jobs: Sequence[Job], script: str, deadline: float) -> None:
        """Compiles what the jobs will launch, each kernel once, on all cores.

        A rehearsal compiles with an empty cache and keeps the seconds that each kernel took, by its source and
        compiler, so that the next one need not. Elsewhere it may take a part of the stage's time: what is missing then
        compiles when it is launched.
        """
        if not self.rehearse:
            deadline -= (1 - COMPILING) * max(0.0, deadline - time.monotonic())
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
            records = [{**job, "do": "record", "chip": chip} for job in jobs]
            outcome.failed += run_jobs(records, start, self.cores, deadline, done).trouble
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


def start_build(run: Run) -> None:
    """Starts to build what is not there for this Python and these sources."""
    state = library_state(ROOT / "fastllm/_C_cuda.so")
    extension = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    have_cpu = (ROOT / "fastllm" / extension).exists()
    run.facts["cuda_library"], run.facts["cpu_library"] = state, "there" if have_cpu else f"no {extension}"
    cuda = state != "matches"
    if cuda or not have_cpu:
        archs = os.environ.get("FASTLLM_CUDA_ARCHS") or (str(CHIP[1]) if run.rehearse else "native")
        chosen = {"FASTLLM_CUDA_ARCHS": archs} if cuda else {"FASTLLM_CUDA": "0"}
        run.build = Build(run.out / "build.log", run.environment(**chosen), cuda)


# Stages: (run, outcome, deadline)

TUNED = [
    {"size": size, "causal": causal, "dtype": "bfloat16", "batch": 2, "heads": 16, "kv_heads": 4, "rows": 4096}
    for size, causal in ((128, True), (64, True), (128, False), (256, True))
]
"""Attention calls whose tiles are tuned."""
TUNED_ROWS = [
    {"op": "cross_entropy", "sizes": (8192, 128256)},
    {"op": "cross_entropy", "sizes": (8192, 50257)},
    {"op": "linear_cross_entropy", "sizes": (8192, 4096, 128256)},
    {"op": "linear_cross_entropy", "sizes": (16384, 768, 50257)},
    {"op": "swiglu", "sizes": (8192, 14336)},
    {"op": "rotary", "sizes": (4, 4096, 32, 8, 128)},
    {"op": "dropout_add_rms_norm", "sizes": (8192, 4096)},
]
"""Calls of ops over rows whose blocks are."""
CUDA_TUNED = [
    *(
        {"kernel": "adamw", "dtype": dtype, "moments": moments, "shape": [10**8]}
        for dtype, moments in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "uint8"))
    ),
    *(
        {"kernel": kernel, "dtype": "bfloat16", "shape": [8192, n]}
        for kernel in ("norm_fwd", "norm_bwd")
        for n in (4096, 16384)
    ),
]
"""Calls of CUDA C++ kernels whose candidates (csrc/cuda/candidates.h) are timed."""


def facts(run: Run, outcome: Outcome, deadline: float) -> None:
    answers: dict[str, dict[str, Any]] = {}
    names = ["facts", "list", "ceilings", *(["compiled"] if run.rehearse else [])]
    jobs = [{"do": name, "device": run.device} for name in names]
    libraries = {key: run.facts[key] for key in ("cuda_library", "cpu_library") if key in run.facts}

    def done(job: Job, answer: dict[str, Any]) -> None:
        answers[job["do"]] = answer
        run.write("facts", **libraries, **answer)
        if not answer["ok"]:
            outcome.failed.append(f"{job['do']}: {answer['error']}")

    def list_calls() -> None:  # beside the rest, since the smoke stage would wait for it
        run.calls = run.ask({"do": "list"}, deadline - time.monotonic(), EVERY_OP)

    listing = threading.Thread(target=list_calls, daemon=True)
    listing.start()
    tally = run_jobs(jobs, run.worker(), 1, deadline, done)
    outcome.jobs, outcome.answered = len(jobs), tally.answered
    outcome.failed += tally.trouble
    listing.join(max(0.0, deadline - time.monotonic()) + 10)
    run.facts |= answers.get("facts", {}).get("facts", {})
    run.no_gpu = NO_GPU in answers.get("facts", {}).get("error", "")
    run.cases = answers.get("list", {}).get("cases", [])
    run.ceilings = answers.get("ceilings", {}).get("ceilings", {})
    run.facts |= {f"{name}_cases": answers.get("compiled", {}).get(name, []) for name in ("compiled", "slow")}


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
    if run.build is not None and not run.build.note:  # what needs the library comes after it, in fresh processes
        parts = [[job for job in jobs if job["backend"] != "cuda"], [job for job in jobs if job["backend"] == "cuda"]]
    for part in parts:
        if part is not parts[0] and not run.need_library(outcome, deadline):
            return
        # One thread each: the references of AdamW run on the CPU.
        start = run.worker(EVERY_OP, OMP_NUM_THREADS="1")
        run.jobs(outcome, "smoke", part, start, run.cores, deadline, keep=keep)


def measure_cases(run: Run, outcome: Outcome, stage: str, jobs: Sequence[Job], deadline: float, seconds: Any) -> None:
    """Measures cases one after the other, each result in the benchmark's file at once."""

    def keep(job: Job, answer: dict[str, Any]) -> None:
        run.facts |= {key: answer[key] for key in ("loaded", "layout") if key in answer}
        if answer["ok"] and answer["result"] is not None:
            run.measured.append(answer["result"])
        elif not answer["ok"]:
            op, _, name = job["case"].partition(" ")
            run.unmeasured.append({"op": op, "case": name, "reason": answer["error"]})
        run.keep_benchmark()

    run.jobs(outcome, stage, jobs, run.worker(), 1, deadline, seconds, keep)


def headline(run: Run, outcome: Outcome, deadline: float) -> None:
    cases = [{"index": index, "case": name} for index, name in enumerate(run.cases)]
    run.precompile(outcome, "headline", cases, JOBS, deadline)
    if not run.need_library(outcome, deadline):
        return
    jobs = [{"do": "measure", "device": run.device, **case} for case in cases]
    measure_cases(run, outcome, "headline", jobs, deadline, lambda job: 180 if "training_step" in job["case"] else 90)
    left = run.deadline - time.monotonic()
    limit = left if run.rehearse else min(30.0, left)  # products of 16 bits take seconds on some CPUs
    again = run.ask({"do": "ceilings", "device": run.device, "before": run.ceilings}, limit)
    run.write("headline", **again)
    if again["ok"]:
        run.ceilings = again["ceilings"]
        run.keep_benchmark()
    else:
        outcome.failed.append(f"ceilings: {again['error']}")


def autotuned(run: Run, outcome: Outcome, deadline: float) -> None:
    """The headline cases once more, beside the rivals that compile for minutes."""
    if run.rehearse:
        outcome.note = "nothing is compiled for minutes on a CPU"
        return
    if not run.need_library(outcome, deadline):
        return
    results = {f"{result['op']} {result['case']}": result for result in run.measured}
    jobs = [
        {"do": "measure", "device": run.device, "index": index, "case": name, "first": results[name]}
        for index, name in enumerate(run.cases)
        if name in results
    ]
    measure_cases(run, outcome, "autotuned", jobs, deadline, 180.0)


def tuning(run: Run, outcome: Outcome, deadline: float) -> None:
    calls = [{"tune": call} for call in (*TUNED, *TUNED_ROWS)]
    run.precompile(outcome, "tuning", calls, JOBS, deadline)
    if not run.need_library(outcome, deadline):
        return
    jobs = [{"do": "candidates", "device": run.device, **call} for call in CUDA_TUNED]
    run.jobs(outcome, "tuning", jobs, run.worker(**{RESULTS: str(run.results)}), 1, deadline)
    if run.rehearse:
        outcome.note = "Triton's candidates are compiled only"
        return
    with tempfile.TemporaryDirectory() as cache:
        start = run.worker(FASTLLM_AUTOTUNE="1", FASTLLM_CACHE=cache, **{RESULTS: str(run.results)})
        run.jobs(outcome, "tuning", [{"do": "tune", **call} for call in calls], start, 1, deadline)


def tests(run: Run, outcome: Outcome, deadline: float) -> None:
    if importlib.util.find_spec("pytest") is None:
        outcome.note = "pytest is not installed"
        return
    if not run.need_library(outcome, deadline):
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "fastllm.benchmarks._report_plugin", "--continue-on-collection-errors"]
    workers = 1
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
            workers = max(1, run.cores // 2)
            command += ["-n", str(workers), "--maxschedchunk", "1"]
    before = run.results.stat().st_size
    with (run.out / "tests.log").open("ab") as log:
        threads = str(max(1, run.cores // workers))
        environment = run.environment(OMP_NUM_THREADS=threads, **{RESULTS: str(run.results)})
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            outcome.note, code = "out of time", 0
        if not end_group(process):
            outcome.failed.append(f"pytest, process {process.pid}, did not end when it was killed: abandoned")
    with run.results.open() as lines:
        lines.seek(before)
        found_lines = list(filter(None, map(_line, lines)))
    verdicts = Counter(line["outcome"] for line in found_lines)
    outcome.jobs = outcome.answered = len(found_lines)
    outcome.failed += [f"{line['test']}: {line['error']}" for line in found_lines if line["outcome"] == "failed"]
    if outcome.note == "out of time":
        outcome.note += f" after {len(found_lines)} tests"
    if code not in (0, 1) or (code == 1 and not outcome.failed):
        outcome.failed.append(f"pytest ended with {code}: see tests.log")
    outcome.note = "; ".join(filter(None, [outcome.note, ", ".join(f"{n} {name}" for name, n in verdicts.items())]))


def _line(text: str) -> dict[str, Any] | None:
    """A line of the results; None for one that was cut off."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def sanitize(run: Run, outcome: Outcome, deadline: float) -> None:
    tools: Sequence[str] = TOOLS
    if run.rehearse:
        outcome.note, tools = "without compute-sanitizer, on the CPU", ("",)
    elif find_sanitizer() is None:
        outcome.note = "compute-sanitizer is not installed"
        return
    if not run.need_library(outcome, deadline):
        return
    jobs = [{"do": "sanitize", "device": run.device, "tool": tool, "op": op} for tool in tools for op in SANITIZED]
    # torch's caching allocator would hide reads beyond a tensor's end.
    start = run.worker(PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="2")
    run.jobs(outcome, "sanitize", jobs, start, max(1, run.cores // 4), deadline, 600)


STAGES: dict[str, Callable[[Run, Outcome, float], None]] = {
    "facts": facts,
    "smoke": smoke,
    "headline": headline,
    "tuning": tuning,
    "tests": tests,
    "sanitize": sanitize,
    "autotuned": autotuned,
}


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
    if (args.out / "results.jsonl").exists():
        print(f"gpu_run.py: error: {args.out}/results.jsonl is of an earlier run: take another --out", file=sys.stderr)
        return 2
    run = Run(args.out, args.minutes or (60 if args.rehearse else 5), args.rehearse)
    try:
        return perform(run, chosen)
    finally:
        if run.build is not None:
            run.build.end()


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
        if run.no_gpu:
            break
    if run.build is not None and not run.build.wait(run.deadline - time.monotonic() if run.rehearse else 0):
        run.build.end()
    names, file = list(dict.fromkeys(("facts", *chosen))), run.out / "summary.txt"
    file.write_text(summary(run, names))
    if run.measured and run.ceilings:  # it takes a process that imports torch, and the page is there without it
        answer = run.ask({"do": "table", "data": run.benchmark()}, 60)
        file.write_text(summary(run, names, answer.get("text") or f"no table: {answer['error']}"))
    print(f"\n{file.read_text()}")
    unbuilt = run.build is not None and run.build.note != "built" and (run.build.cuda or run.rehearse)
    return int(unbuilt or any(outcome.failed for outcome in run.outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())

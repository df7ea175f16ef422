"""The last page of a GPU run: what its stages reached, and, after a rehearsal, how long they would take on a GPU."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastllm.benchmarks.gpu_run import Run

NO_GPU = "torch sees no GPU"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZED = ("adamw", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


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
    "max-autotune": 45.0,  # of a case's eager function, forward and backward, its matrix products' tiles tried out
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
        work = context + outcome.compiled * ASSUMED["candidate"] + jobs * ASSUMED["timing"]
    elif name == "tests":
        jobs = run.facts.get("gpu_tests", 0)
        work = context + jobs * ASSUMED["test"] / (CORES // 2)
    elif name == "autotuned":
        jobs = len(run.facts.get("slow_cases", []))
        work = context + jobs * (ASSUMED["timing"] + ASSUMED["max-autotune"])
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


def summary(run: Run, chosen: Sequence[str], table: str = "") -> str:
    """What was reached, what was not and why, and the headline numbers as a table."""
    versions = run.facts.get("versions", {})
    machine = run.facts.get("machine", {})
    lines = [", ".join([machine.get("name", "unknown machine"), *(f"{k} {v}" for k, v in versions.items() if v)])]
    known = ("loaded", "layout", "cuda_library", "cpu_library")
    lines += [f"{key}: {run.facts[key]}" for key in known if key in run.facts]
    if run.build is not None:
        lines.append(f"build: {run.build.note or 'still running'}")
    lines += run.facts.get("nvidia_smi", [])
    lines += [", ".join(f"{key} {value:g}" for key, value in run.ceilings.items()), ""]
    for name in chosen:
        outcome = run.outcomes.get(name)
        why = NO_GPU if run.no_gpu else "no time left"
        lines.append(outcome.line(name) if outcome else f"{name:<9} not started: {why}")
        lines += [f"    {text}" for text in (outcome.failed[:40] if outcome else [])]
        if outcome and len(outcome.failed) > 40:
            lines.append(f"    ... and {len(outcome.failed) - 40} more, in results.jsonl")
    if table:
        lines += ["", table]
    return "\n".join([*lines, *(plan(run) if run.rehearse else [])]) + "\n"

"""`fastllm bench`: runs cases under pytest-benchmark, prints a table, writes the results.

fastllm bench rms_norm --quick
python -m fastllm.benchmarks.suite --json runs/bench/ --report runs/bench
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import pkgutil
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastllm import benchmarks
from fastllm._command import Parser, check_folder, integer
from fastllm._extras import require
from fastllm.benchmarks import harness
from fastllm.benchmarks.harness import FORMAT, Case, Race
from fastllm.data import read_text

SECONDS = {"cpu": 8.0, "cuda": 1.0}  # of timing a case
MOST_THREADS = 1024


def discover() -> dict[str, Callable[[str, bool], list[Case]]]:
    """The `cases` of every module of this package that has them, by the module's name.

    All but `headline`: its cases are chosen from the others' for a short run on a GPU.
    """
    found = {}
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if not module.name.startswith("_") and module.name != "headline":
            cases = getattr(importlib.import_module(f"fastllm.benchmarks.{module.name}"), "cases", None)
            if cases is not None:
                found[module.name] = cases
    return found


class Progress:
    """Prints what happens while the cases run."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self._started = 0.0

    def start(self, case: Case) -> None:
        self.done += 1
        self._started = time.perf_counter()
        print(f"[{self.done}/{self.total}] {case.op} {case.name}", flush=True)

    def checked(self, race: Race) -> None:
        for name, reason in race.skipped.items():
            print(f"    {name} is not timed: {reason}", flush=True)
        taken = time.perf_counter() - self._started
        print(f"    within the error budget on {race.backend} ({taken:.0f} s); timing {race.rounds} rounds", flush=True)

    def finished(self, result: dict[str, Any]) -> None:
        figures = ", ".join(
            f"{name} {c['median_ms']:.3f} ms"
            + (f" ({c['peak_mb']:,} MB)" if "peak_mb" in c else "")
            + (f" (waits for data {c['data_wait']:.2%})" if "data_wait" in c else "")
            for name, c in result["contenders"].items()
        )
        print(f"    {figures}", flush=True)
        if (result["others"] or 0) > harness.MUCH:
            print(f"    unreliable: other processes took {result['others']:.0%} of the CPUs", flush=True)


def _plugin(cases: list[Case], device: str, seconds: float, failed: list[dict[str, str]]) -> object:
    """Gives `_pytest.test_case` its arguments, and takes down what failed."""
    pytest = require("pytest", "bench")
    progress = Progress(len(cases))

    class Plugin:
        @pytest.fixture
        def device(self) -> str:
            return device

        @pytest.fixture
        def seconds(self) -> float:
            return seconds

        @pytest.fixture
        def progress(self) -> Progress:
            return progress

        def pytest_generate_tests(self, metafunc: Any) -> None:
            metafunc.parametrize("case", cases, ids=[f"{case.op} {case.name}" for case in cases])

        @pytest.hookimpl(hookwrapper=True)
        def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
            yield
            if call.excinfo is not None:
                case, error = item.callspec.params["case"], call.excinfo.value
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                failed.append({"op": case.op, "case": case.name, "reason": reason})
                print(f"    FAILED, not timed: {reason}", file=sys.stderr, flush=True)

    return Plugin()


def run(cases: list[Case], device: str, seconds: float) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Measures the cases under pytest-benchmark; returns the results, and the cases that failed with the reason.

    An interrupt ends it early: what it did not reach is among those that failed.
    """
    pytest = require("pytest", "bench")
    pytest_benchmark = require("pytest_benchmark", "bench")
    require("pytest_benchmark.logger", "bench")
    failed: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "benchmark.json"
        # Neither the user's pytest configuration nor his plugins: pytest-xdist alone would spoil every time, and in one
        # of its workers, as our own tests are run, pytest-benchmark measures nothing.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST_")}
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
        options = ["-c", os.devnull, "--rootdir", folder, "-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider"]
        options += ["-p", "no:terminal", "-p", "no:warnings", "-s", "--import-mode=importlib"]
        options += [f"--benchmark-json={data}", f"--benchmark-storage={folder}", "--benchmark-quiet"]
        plugin = _plugin(cases, device, seconds, failed)
        with mock.patch.dict(os.environ, environment, clear=True), warnings.catch_warnings():
            # That a failed case measured nothing is no news.
            warnings.simplefilter("ignore", pytest_benchmark.logger.PytestBenchmarkWarning)
            code = pytest.main(["--pyargs", "fastllm.benchmarks._pytest", *options], plugins=[plugin])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
            raise RuntimeError(f"pytest ended with {code!r}")
        text = data.read_text() if data.exists() else ""
    # Not written where every case failed.
    results = [entry["extra_info"] for entry in json.loads(text)["benchmarks"]] if text else []
    if code == pytest.ExitCode.INTERRUPTED:
        reached = {(found["op"], found["case"]) for found in (*results, *failed)}
        left = [case for case in cases if (case.op, case.name) not in reached]
        failed += [{"op": case.op, "case": case.name, "reason": "not reached: interrupted"} for case in left]
        print(f"interrupted: {len(left)} of {len(cases)} cases were not reached", file=sys.stderr)
    return results, failed


def table(data: dict[str, Any]) -> str:
    """The results as text, one line a contender."""
    rows = [("op", "case", "contender", "ms", "noise", "rate", "of ceiling", "fastllm's speed-up")]
    for result in data["results"]:
        for name, figures in result["contenders"].items():
            speedup = harness.rates(result, name, data["ceilings"])["speedup"]
            ours = name == "fastllm"
            rows.append(
                (
                    result["op"] if ours else "",
                    result["case"] if ours else "",
                    harness.label(result, name),
                    f"{figures['median_ms']:.3f}",
                    f"±{figures['noise']:.1%}",
                    *harness.achieved(data, result, name),
                    "" if ours else f"{speedup:.2f}x",
                )
            )
        for name, reason in result["skipped"].items():
            rows.append(("", "", name, "-", "", "", "", f"not timed: {reason[:100]}"))
    for failure in data["failed"]:
        rows.append((failure["op"], failure["case"], "fastllm", "-", "", "", "", "FAILED, not timed"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust, str.ljust)
    lines = ["  ".join(a(cell, w) for a, cell, w in zip(align, row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(["", harness.HOST_BOUND] if harness.any_host_bound(data) else [])])


def json_path(given: str, machine: str) -> Path:
    """A file as it is given; in a directory, one named after the machine."""
    path = Path(given)
    if path.suffix == ".json" and not path.is_dir():
        return path
    return path / (re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") + ".json")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fastllm bench",
        description="Times fastllm's ops against PyTorch eager, torch.compile and what else is installed. Each case is "
        "checked against a float64 truth first; one that fails is not timed, and the exit code is 1.",
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=integer, help="of the CPU; default: torch's choice")
    parser.add_argument(
        "--json", metavar="PATH", help="write the results to a file, or to <machine>.json in a directory"
    )
    parser.add_argument("--report", metavar="DIR", help="write a page with plots")
    parser.add_argument("--quick", action="store_true", help="the main case of each op only")
    parser.add_argument("--text", metavar="FILE", help="what train trains on; default: Python's help texts")
    parser.add_argument("--list", action="store_true", help="list the cases and run none")
    return parser


def _usage_error(message: str) -> int:
    print(f"fastllm: error: {message}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if a case failed, or 2 for arguments that make no sense.

    Raises:
        ImportError: where the extra "bench" is not installed; the message has the command that installs it.
    """
    args = _parser().parse_args(argv)
    known = discover()
    for op in args.ops:
        if op not in known:
            return _usage_error(f"unknown op {op!r}; known are {', '.join(sorted(known))}")
    if args.threads is not None and not 1 <= args.threads <= MOST_THREADS:
        return _usage_error(f"--threads must be at least 1 and at most {MOST_THREADS}, got {args.threads}")
    if args.text is not None:
        known["train"] = functools.partial(known["train"], text=read_text(args.text))  # type: ignore[call-arg]
    cases = [case for op in args.ops or sorted(known) for case in known[op](args.device, args.quick)]
    if args.list:
        print("\n".join(f"{case.op:<16} {case.name}" for case in cases))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        return _usage_error("--device cuda: torch sees no GPU")
    for module in ("pytest", "pytest_benchmark", *(("matplotlib",) if args.report else ())):
        require(module, "bench")

    if args.report is not None:
        check_folder(args.report, "--report")
    if args.json is not None:
        path = json_path(args.json, "machine")
        check_folder(path.parent if args.json else "", "--json")
        if path.exists():
            path.open("a").close()

    with harness.quiet_machine(args.threads):
        data = {"format": FORMAT, **harness.environment(args.device)}
        print(f"{data['machine']['name']}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
        data["ceilings"] = harness.measure_ceilings(args.device)
        print(", ".join(f"{key} {value:g}" for key, value in data["ceilings"].items()), flush=True)
        data["results"], data["failed"] = run(cases, args.device, SECONDS[args.device])
        data["ceilings"] = harness.mean_ceilings(data["ceilings"], harness.measure_ceilings(args.device))
    print(f"\n{table(data)}")
    if args.json:
        path = json_path(args.json, data["machine"]["name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")
        print(f"\n{path}")
    if args.report:
        from fastllm.benchmarks import report

        print(report.write(data, Path(args.report)))
    return 1 if data["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

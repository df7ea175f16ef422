"""A pytest plugin: a line in a GPU run's results for each test, at once, and a fresh process after a GPU is lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastllm.benchmarks._workers import RESULTS, append, damaged, shorten


def pytest_runtest_logreport(report: Any) -> None:
    """Keeps a line for each test as it ends; a worker of pytest-xdist whose GPU is lost is noted."""
    if report.when == "call" or report.outcome != "passed":
        _keep_report(report)
    if "PYTEST_XDIST_WORKER" in os.environ and report.failed and damaged(_error_of(report)):
        _lost.append(report.nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Ends a worker of pytest-xdist whose GPU is lost: the controller has the report by now, and starts another."""
    if nodeid in _lost:
        os._exit(1)


def pytest_collectreport(report: Any) -> None:
    """Keeps a line for each file that cannot be collected."""
    if report.failed:
        _keep_report(report)


_lost: list[str] = []
"""The tests after which this worker has no usable GPU."""


def _error_of(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else str(report.longrepr).strip().rpartition("\n")[2]


def _keep_report(report: Any) -> None:
    path = os.environ.get(RESULTS)
    if path is None or "PYTEST_XDIST_WORKER" in os.environ:  # the controller hears of it
        return
    seconds = round(getattr(report, "duration", 0.0), 2)
    line = {"stage": "tests", "test": report.nodeid, "outcome": report.outcome, "seconds": seconds}
    append(Path(path), line | ({"error": shorten(_error_of(report))} if report.failed else {}))

"""What a run on a GPU measures first, at sizes for a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bindings
import pytest

from fastllm import ops
from fastllm.models import GPTConfig

pytest.importorskip("pytest_benchmark")
from fastllm.benchmarks import _training_step, harness, headline, suite

ROOT = Path(__file__).parent.parent


def test_headline_rehearsal():
    """Every case of a GPU run at its smallest, from drawing to table."""
    cases, full = headline.cases("cpu", small=True), headline.cases("cuda")
    assert [(c.op, c.direction, c.products, c.slow) for c in cases] == [
        (c.op, c.direction, c.products, c.slow) for c in full
    ]
    assert len({(c.op, c.name) for c in full}) == len(full)
    with harness.quiet_machine(None):
        results = [harness.measure(case, "cpu", 0.001) for case in cases]
        again = {case.op: headline.second_pass(case, r) for case, r in zip(cases, results, strict=True) if case.slow}
        seconds = [harness.measure(case, "cpu", 0.001) for case in again.values()]
    assert "training_step" in again
    assert all("fastllm" in result["contenders"] for result in results + seconds)
    by_op = {result["op"]: result for result in results}
    assert set(by_op["attention"]["contenders"]) | set(by_op["attention"]["skipped"]) == {
        *("fastllm", "SDPA cuDNN", "SDPA flash", "FlexAttention")
    }
    assert by_op["rms_norm"]["skipped"]["torch.compile"] == harness.NOT_COMPILED
    assert by_op["training_step"]["tokens"] == 32
    ceilings = {"copy_gb_s": 10.0, "matmul_bf16_tflop_s": 0.1}
    table = suite.table({"results": results + seconds, "failed": [], "ceilings": ceilings})
    assert table.count("tokens/s") >= 2


def test_operations_of_gpt2():
    """124,439,808 parameters, 786,432 of them positions: 6 N + 12 L H Q T."""
    parameters, flops = _training_step.counts(GPTConfig.gpt2())
    assert parameters == 124_439_808
    assert flops == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 12 * 64 * 1024


def test_a_model_that_learns_otherwise_is_not_timed(monkeypatch):
    step = headline.cases("cpu", small=True)[-2]
    right = ops.linear_cross_entropy
    monkeypatch.setattr(ops, "linear_cross_entropy", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    with pytest.raises(AssertionError, match="the losses on fastllm are"):
        harness.Race(step, "cpu", 0.01)


@pytest.mark.slow
@bindings.needs_compiler
def test_with_torch_compile_in_a_process_of_its_own(tmp_path):
    """The real thing on the real entry point: pytest, pytest-benchmark and Inductor."""
    code = """
import sys, torch
from fastllm.benchmarks import _norm, harness, rms_norm, suite

rms_norm.cases = lambda device, quick: [_norm.case("rms_norm", device, (64, 256), torch.bfloat16, "forward")]
harness.measure_ceilings = lambda device: {"copy_gb_s": 10.0}
suite.SECONDS["cpu"] = 0.1
sys.exit(suite.main(["rms_norm", "--threads", "1", "--json", sys.argv[1]]))
"""
    path = tmp_path / "deep" / "er.json"
    # A user's pytest options must not reach it, nor that the tests may run in a worker of pytest-xdist.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "--no-such-option"}
    environment |= {"PYTEST_XDIST_WORKER": "gw0", "PYTEST_XDIST_WORKER_COUNT": "2"}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # starts no pool of processes
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(path.read_text())
    assert data["machine"]["threads"] == 1
    assert data["results"][0]["skipped"] == {}
    assert set(data["results"][0]["contenders"]) == {"fastllm", "eager", "torch.compile"}
    assert {p.name for p in tmp_path.iterdir()} == {"deep"}, "leaves nothing behind"

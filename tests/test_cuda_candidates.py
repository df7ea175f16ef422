"""Launches of CUDA C++ kernels that a GPU is to choose between: each computes what is asked for."""

from __future__ import annotations

import json

import bindings
import pytest
import torch
from adamw_suite import assert_same, beside_the_reference

from fastllm import _ext, ops
from fastllm.benchmarks import _jobs
from fastllm.testing import check_op, make

pytestmark = bindings.needs_compiler


@pytest.fixture
def choose():
    """fastllm_cuda_candidate of the emulation, undone afterwards."""
    call = bindings.emulation().fastllm_cuda_candidate
    yield call
    for kernel in (b"adamw", b"norm_fwd", b"norm_bwd"):
        call(kernel, 0)


def test_what_there_is(choose):
    assert [choose(kernel, 0) for kernel in (b"adamw", b"norm_fwd", b"norm_bwd", b"other")] == [5, 3, 3, 0]
    if _ext.STATUS["CUDA"] != "loaded":
        assert _ext._cuda_candidate("adamw", 0) == 0


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("moments", [None, torch.uint8])
def test_adamw(choose, which, moments):
    choose(b"adamw", which)
    with bindings.bound("cuda-emulated") as device:
        shapes = ((17001,), (2048,), (3,))
        assert_same(*beside_the_reference(device, 2, dtype=torch.bfloat16, moment_dtype=moments, shapes=shapes))


@pytest.mark.parametrize("kernel", [b"norm_fwd", b"norm_bwd"])
@pytest.mark.parametrize("which", range(3))
def test_norms(choose, kernel, which):
    choose(kernel, which)
    for shape in ((130, 96), (40, 2048), (31, 1001)):
        for dtype in (torch.float32, torch.bfloat16):
            with bindings.bound("cuda-emulated") as device:
                x, weight, bias = (make(size, dtype, device) for size in (shape, shape[1:], shape[1:]))
                check_op(ops.layer_norm, torch.nn.functional.layer_norm, (x, shape[1:], weight, bias))


def test_they_are_timed_in_turn(monkeypatch, tmp_path):
    testing = pytest.importorskip("triton.testing")
    told = []
    monkeypatch.setattr(_ext, "_cuda_candidate", lambda kernel, which: (told.append(which), 3)[1])
    monkeypatch.setattr(_jobs, "_cuda_call", lambda job: lambda: None)
    monkeypatch.setattr(testing, "do_bench", lambda run, **_: 1.0 + told[-1])
    monkeypatch.setenv(_jobs.RESULTS, str(tmp_path / "results.jsonl"))
    job = {"kernel": "norm_fwd", "dtype": "bfloat16", "shape": [8192, 4096], "device": "cuda"}
    assert _jobs.time_candidates(job) == {"milliseconds": {0: 1.0, 1: 2.0, 2: 3.0}}
    assert told == [0, *(0, 1, 2) * 5, 0], "the default again at the end"
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["candidate"], line["milliseconds"]) for line in lines] == [(0, 1.0), (1, 2.0), (2, 3.0)]

"""What is compiled ahead is what a launch looks for: the same entries of Triton's cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import fastllm
from fastllm import ops
from fastllm.precompile import find, fingerprint, recorded
from fastllm.testing import make

CHIP = ("cuda", 90)


def texts(n: int, layout: str = "contiguous", dtype: torch.dtype = torch.bfloat16, rows: int = 3) -> list[str]:
    with recorded(CHIP) as launches, fastllm.use_backend("triton"):
        gate, up = (make((rows, n), dtype, "cuda", layout=layout).requires_grad_() for _ in range(2))
        assert gate.is_meta
        y = ops.swiglu(gate, up)
        torch.autograd.grad(y, (gate, up), torch.ones_like(y))
    return [launch.text() for launch in launches]


def test_one_text_for_one_machine_code():
    forward, backward = texts(100)
    assert [json.loads(text)["kernel"].partition(":")[2] for text in (forward, backward)] == [
        "_glu_fwd_kernel",
        "_glu_bwd_kernel",
    ]
    assert texts(100, rows=7) == texts(108) == [forward, backward], "the JIT does not tell them apart"
    others = [texts(100, "misaligned"), texts(112), texts(100, dtype=torch.float32), texts(300)]
    assert len({forward, *(other[0] for other in others)}) == 5
    assert find(forward).fn.__name__ == "_glu_fwd_kernel"
    assert fingerprint(forward, CHIP) != fingerprint(forward, ("cuda", 80))


def test_nothing_is_changed_behind_it():
    texts(100)
    assert make((3,), torch.float32).device.type == "cpu"
    gate = torch.randn(3, 8)
    torch.testing.assert_close(ops.swiglu(gate, gate), torch.nn.functional.silu(gate) * gate)


REAL = """
import json, os, sys, torch
from unittest import mock
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from fastllm import precompile

def entries():
    return {name for name in os.listdir(os.environ["TRITON_CACHE_DIR"])}

for text in json.loads(sys.argv[1]):
    precompile.compile(text, ("cuda", 90))
    before = entries()
    launch = json.loads(text)
    offset = {True: 0, False: 1}
    tensors = [
        torch.empty(9, dtype=getattr(torch, x["dtype"]))[offset[x["aligned"]]:] if isinstance(x, dict) else x
        for x in launch["args"].values()
    ]
    with mock.patch.object(driver, "_active", precompile._Driver(GPUTarget("cuda", 90, 32))):
        kernel = precompile.find(text)
        kernel.device_caches.clear()
        kernel.warmup(*tensors, grid=(1,), **launch["options"])
    assert entries() == before, entries() - before
    print(len(before))
"""


def test_a_launch_with_tensors_finds_it(tmp_path):
    given = json.dumps(texts(100) + texts(100, "misaligned"))
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", REAL, given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = [int(line) for line in done.stdout.split()]
    assert counts == sorted(set(counts)), "each text is an entry of its own"

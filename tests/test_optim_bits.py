"""What is claimed of the bits of fastllm.optim.AdamW beside torch.optim.AdamW(fused=True), for every length."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bindings
import pytest
import torch
from optim_suite import LANES, parameters, set_grads

from fastllm.optim import AdamW

OPTIONS = (
    {},
    {"weight_decay": 0.1, "amsgrad": True},
    {"weight_decay": 0.0, "maximize": True},
    {"betas": (0.3, 0.7), "lr": 0.1},
    {"betas": (0.0, 0.99), "eps": 1e-4},
)
LENGTHS = (*range(1, 67), *range(100, 1026, 37), 127, 128, 129, 1023, 1024, 1025)
HERE = Path(__file__).parent


def check(options: dict) -> None:
    """Three steps on parameters of every length. In whole vectors the bits are torch's, step after step, if its kernel
    has vectors; in what is left, a step from the same state differs in the last bits alone."""
    shapes = [(n,) for n in LENGTHS]
    ours, theirs, fresh = (parameters(shapes=shapes) for _ in range(3))
    kinds = (AdamW, torch.optim.AdamW, AdamW)
    mine, stock, again = (kind(p, fused=True, **options) for kind, p in zip(kinds, (ours, theirs, fresh), strict=True))
    for seed in range(3):
        set_grads(seed, ours, theirs, fresh)
        for p, q in zip(theirs, fresh, strict=True):
            q.data.copy_(p.data)
            for key, value in stock.state[p].items():
                again.state[q][key].copy_(value)
        for optimizer in (mine, stock, again):
            optimizer.step()
        for n, p, q, r in zip(LENGTHS, ours, theirs, fresh, strict=True):
            whole = n // LANES * LANES if LANES else 0
            for key, b in {"param": q.detach(), **stock.state[q]}.items():
                a, c = (p.detach(), r.detach()) if key == "param" else (mine.state[p][key], again.state[r][key])
                where = f"{key} of {n} elements, step {seed}: "
                if key != "step":
                    assert torch.equal(a[:whole], b[:whole]), where
                torch.testing.assert_close(c, b, rtol=1e-5, atol=2e-6, msg=lambda m, where=where: where + m)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_length(options):
    check(options)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", *(isa for isa in bindings.ISAS if isa != "baseline")])
def test_every_length_and_instruction_set_of_torch(capability):
    code = "import test_optim_bits as bits; [bits.check(options) for options in bits.OPTIONS]; print(bits.LANES)"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == (0 if capability == "default" else 16)

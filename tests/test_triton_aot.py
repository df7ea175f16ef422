"""Registers, spills and shared memory of the losses' and pointwise ops' Triton kernels, compiled with no GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from aot import SHARED_LIMIT, TARGETS, compile, record


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cross_entropy() -> None:
    from fastllm.kernels import cross_entropy as kernels

    for classes in (127, 1000, 50257, 128256):
        for dtype in (torch.float32, torch.bfloat16):
            logits, target = _empty(4096, classes, dtype=dtype), _empty(4096, dtype=torch.int64)
            row = _empty(4096, dtype=torch.float32)
            for softcap, mean in ((0.0, None), (30.0, row)):
                kernels.cross_entropy_fwd(row, row, row, mean, logits, target, softcap)
                kernels.cross_entropy_bwd(logits, row, row, mean, logits, target, row, row, softcap)
                kernels.cross_entropy_loss(row, row, row, mean, logits, target, row, 0.1, 1e-4, softcap)
            kernels.cross_entropy_loss(row, row, row, row, logits, target, row, 0.1, 1e-4, 0.0)


def gated_activations() -> None:
    from fastllm.kernels import geglu, swiglu

    for dtype in (torch.float32, torch.bfloat16):
        packed, y = _empty(4096, 2 * 11008, dtype=dtype), _empty(4096, 11008, dtype=dtype)
        gate, up = packed.chunk(2, -1)
        swiglu.swiglu_fwd(y, gate, up)
        swiglu.swiglu_bwd(packed, y, gate, up)
        for tanh in (True, False):
            geglu.geglu_fwd(y, gate, up, tanh)
            geglu.geglu_bwd(packed, y, gate, up, tanh)


def gelu() -> None:
    from fastllm.kernels import gelu as kernels

    for dtype in (torch.float32, torch.bfloat16):
        x, bias = _empty(4096, 11008, dtype=dtype), _empty(11008, dtype=dtype)
        for tanh in (True, False):
            kernels.gelu_fwd(x, x, bias, tanh)
            kernels.gelu_bwd(x, bias, x, x, bias, tanh)
        kernels.gelu_bwd(x, bias[:0], x, x, None, False)


def dropout_norms() -> None:
    from fastllm.kernels import _dropout_norm as kernels

    for n, dtype in itertools.product((1000, 2048, 8192), (torch.float32, torch.bfloat16)):
        x, parameter, statistic = _empty(4096, n, dtype=dtype), _empty(n), _empty(4096, dtype=torch.float32)
        seed = _empty(1, dtype=torch.int64)
        for mean, bias in ((statistic, parameter), (None, None)):
            kernels.fwd(x, x, mean, statistic, x, x, parameter, bias, seed, 0.1, 1e-5)
            dbias = parameter[:0] if bias is None else bias
            kernels.bwd(x, x, parameter, dbias, x, x, x, mean, statistic, parameter, seed, 0.1)


def rotary() -> None:
    from fastllm.kernels import rotary as kernels

    for size, half in ((128, 64), (256, 128), (80, 16)):
        q, k = (_empty(2, 1024, heads, size).transpose(1, 2) for heads in (32, 8))
        outs = [x.clone() for x in (q, k)]
        table, positions = _empty(4096, half, dtype=torch.float32), _empty(2, 1024, dtype=torch.int64)
        for interleaved in (False, True):
            kernels.rotary(q, k, *outs, table, table, None, interleaved, False)
            kernels.rotary(q, k, q, k, table, table, positions, interleaved, True)


# In bytes. A LayerNorm's row of 8,192 beside its parts of dw and db fills all 128 registers of 16 warps; with 32 warps
# of 64 registers 8 to 40 bytes are spilled, and in any other order of the loads as many as now. sm_100: Triton 3.9 in
# bfloat16; the others: Triton 3.6 in float32. On sm_80, Triton 3.6 gives a loss of 32 warps 32 registers of the 64.
SPILLS = {(target, "_dropout_norm_bwd_kernel", "8192x1 w16 s1"): 8 for target in ("sm_90", "sm_100", "sm_120")}
SPILLS["sm_80", "_cross_entropy_loss_kernel", "2x1x1024 w32 s1"] = 16


QUICK = ("sm_90", gated_activations)


@pytest.mark.parametrize(
    ("target", "launcher"),
    [
        pytest.param(target, launcher, marks=() if (target, launcher) == QUICK else pytest.mark.slow)
        for target in TARGETS
        for launcher in (cross_entropy, dropout_norms, gated_activations, gelu, rotary)
    ],
)
def test_resources(launcher, target, capsys):
    seen = set()
    for launch in record(target, launcher):
        found = compile(launch, target)
        line = f"{target:<7} {launch.kernel.__name__:<32} {launch.config!s:<14} registers {found.registers:>3}"
        assert found.spills <= SPILLS.get((target, launch.kernel.__name__, str(launch.config)), 0), line
        assert found.shared <= SHARED_LIMIT[target], line
        seen.add(line)
    assert len(seen) > 3
    with capsys.disabled():
        print("", *sorted(seen), sep="\n")

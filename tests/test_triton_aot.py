"""Registers, spills and shared memory of the losses' and pointwise ops' Triton kernels, compiled with no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from aot import SHARED_LIMIT, TARGETS, compile, record


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cross_entropy() -> None:
    from fastllm.kernels import cross_entropy as kernels

    for classes in (127, 50257, 128256):
        for dtype in (torch.float32, torch.bfloat16):
            logits, target = _empty(4096, classes, dtype=dtype), _empty(4096, dtype=torch.int64)
            row = _empty(4096, dtype=torch.float32)
            for softcap, mean in ((0.0, None), (30.0, row)):
                kernels.cross_entropy_fwd(row, row, mean, logits, target, softcap)
                kernels.cross_entropy_bwd(logits, row, row, mean, logits, target, row, softcap)


@pytest.mark.parametrize("launcher", [cross_entropy])
@pytest.mark.parametrize("target", TARGETS)
def test_resources(launcher, target, capsys):
    seen = set()
    for launch in record(target, launcher):
        found = compile(launch, target)
        line = f"{target:<7} {launch.kernel.__name__:<32} {launch.config!s:<14} registers {found.registers:>3}"
        assert found.spills == 0, line
        assert found.shared <= SHARED_LIMIT[target], line
        seen.add(line)
    with capsys.disabled():
        print("", *sorted(seen), sep="\n")

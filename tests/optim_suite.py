"""Parameters and helpers that the optimizer's tests share."""

from __future__ import annotations

import io

import torch

SHAPES = ((37, 5), (3,), (1000,), (), (2, 3, 4, 5))


def parameters(dtype: torch.dtype = torch.float32, shapes=SHAPES, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(seed: int, *lists: list[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(seed)
    for params in zip(*lists, strict=True):
        grad = torch.randn(params[0].shape, generator=generator)
        for param in params:
            param.grad = grad.to(param.dtype, copy=True)


def run(optimizer: torch.optim.Optimizer, steps: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in steps:
        set_grads(seed, params)
        optimizer.step()


def assert_equal(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


LANES = 16 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else 0
"""A multiple of the elements that torch's fused kernel takes at a time; 0 where it has no such instructions."""


def assert_as_torchs_fused(ours, stock) -> None:
    """The same bits in whole vectors; in the elements left at a tensor's end torch's compiler may round v otherwise."""
    for a, b in zip(ours, stock, strict=True):
        a, b = a.detach().flatten(), b.detach().flatten()
        whole = a.numel() // LANES * LANES if LANES else 0
        assert torch.equal(a[:whole], b[:whole])
        torch.testing.assert_close(a[whole:], b[whole:], rtol=1e-6, atol=1e-7)


def through_disk(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)

"""A step of fastllm.optim.AdamW against torch.optim.AdamW: its default, fused, and compiled.

Per parameter: read p, g, m and v, write p, m and v. Clipping reads g once more. Operations are counted from the formula
in `reference/adamw.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllm.backends import use_backend
from fastllm.benchmarks.harness import COMPILED, NOT_COMPILED, Case, Ready, dtype_name
from fastllm.optim import AdamW
from fastllm.testing import assert_within_budget, make, sample

FLOPS = 15
CONTENDERS = 4
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 1e-2, "eps": 1e-8}  # torch's defaults


def parameters(count: int, size: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    found = []
    for i in range(count):
        param = make((size,), dtype, device, seed=i).requires_grad_()
        param.grad = make((size,), dtype, device, seed=10_000 + i)
        found.append(param)
    return found


def check(dtype: torch.dtype, device: str, max_norm: float | None, options: dict[str, Any]) -> None:
    """Asserts that three steps are right.

    With torch's options they are within the error budget of torch's step against float64; with any others they are what
    the reference computes (which the tests compare with more).
    """

    def run(exact: bool, make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer], clip: bool) -> list[Tensor]:
        params = parameters(3, 1001, dtype, device)
        if exact:
            params = [p.detach().double().requires_grad_() for p in params]
        optimizer = make_optimizer(params)
        for seed in range(3):
            for i, p in enumerate(params):
                p.grad = make(p.shape, dtype, device, seed=100 * seed + i).to(p.dtype)
            if clip and max_norm is not None:
                torch.nn.utils.clip_grad_norm_(params, max_norm)
            optimizer.step()
        return [p.detach() for p in params]

    def mine(params: list[Tensor]) -> AdamW:
        return AdamW(params, max_norm=max_norm, **options)

    ours = run(False, mine, False)
    if options:
        with use_backend("reference"):
            expected = run(False, mine, False)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=0)
    else:
        truth, eager = run(True, torch.optim.AdamW, True), run(False, torch.optim.AdamW, True)
        for parts in zip(ours, truth, eager, strict=True):
            assert_within_budget(*parts, name="parameter")


def setup(
    count: int,
    size: int,
    dtype: torch.dtype,
    device: str,
    max_norm: float | None,
    kept: bool,
    compiles: bool,
    options: dict[str, Any],
) -> dict[str, Callable[[], Ready] | str]:
    check(dtype, device, max_norm, options)

    def ready(make_step: Callable[[list[Tensor]], Callable[[], Any]]) -> Ready:
        params = parameters(count, size, dtype, device)
        grads = [p.grad for p in params]

        def prepare() -> None:
            # As after zero_grad() and a backward: every gradient is a new tensor at each step.
            for p, grad in zip(params, grads, strict=True):
                p.grad = None
                p.grad = grad.clone()

        return Ready((lambda: None) if kept else prepare, make_step(params))

    def stock(compiled: bool = False, **kwargs) -> Ready:
        def make_step(params: list[Tensor]) -> Callable[[], Any]:
            optimizer = torch.optim.AdamW(params, **kwargs)

            def step() -> None:
                if max_norm is not None:
                    torch.nn.utils.clip_grad_norm_(params, max_norm)
                optimizer.step()

            return torch.compile(step) if compiled else step

        return ready(make_step)

    def mine(params: list[Tensor]) -> Callable[[], Any]:
        return AdamW(params, fused=device == "cuda", max_norm=max_norm, **options).step

    found: dict[str, Callable[[], Ready] | str] = {
        "fastllm": lambda: ready(mine),
        "eager": stock,
        "torch fused": lambda: stock(fused=True),
    }
    if count > 1:
        found[COMPILED] = "takes minutes to compile for many tensors"
    elif not compiles:
        found[COMPILED] = NOT_COMPILED
    else:
        found[COMPILED] = lambda: stock(compiled=True, **({"capturable": True} if device == "cuda" else {}))
    return found


def case(
    device: str,
    count: int,
    size: int,
    dtype: torch.dtype,
    *,
    max_norm: float | None = None,
    label: str = "",
    kept: bool = False,
    compiles: bool = True,
    extra_bytes: float = 0,
    target: str = "",
    **options: Any,
) -> Case:
    """The case of one step.

    If `kept`, the gradients stay the same tensors, as with zero_grad(set_to_none=False). `extra_bytes` is what the
    options move, for each parameter, beyond weight, gradient and moments of the weight's dtype.
    """
    moved = 7 * dtype.itemsize + extra_bytes + (dtype.itemsize if max_norm is not None else 0)
    shape = f"{count}x{size:,}".replace(",", "") if size < 2**20 else f"{count}x{size >> 20}M"
    return Case(
        op="adamw",
        name=f"{dtype_name(dtype)} {shape}"
        + (" clipped" if max_norm is not None else "")
        + (" kept gradients" if kept else "")
        + label,
        direction="forward",
        args=lambda: sample("adamw", device, dtype)[0],
        kwargs=HYPER,
        rivals={},
        bytes=int(moved * count * size),
        flops=FLOPS * count * size,
        target=target,
        inference=True,
        setup=functools.partial(setup, count, size, dtype, device, max_norm, kept, compiles, options),
    )


def elements(dtype: torch.dtype) -> int:
    """2^30, or the largest smaller power of two with which all contenders fit on the GPU side by side: each has the
    parameters, two moments, gradients and those that it is given anew, and a third is left for what eager makes."""
    memory = torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else 80 * 2**30
    return 2 ** min(30, int(math.log2(memory * 2 / 3 / (5 * dtype.itemsize * CONTENDERS))))


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        million = 2**20
        found = [
            case("cpu", 1, 32 * million, torch.float32, target="0.95x torch fused, 4x eager"),
            case("cpu", 1, 32 * million, torch.bfloat16, target="1.25x torch fused"),
            case("cpu", 2000, 1024, torch.float32, kept=True, target="3x torch fused"),
            case("cpu", 2000, 1024, torch.float32),
            case("cpu", 1, 32 * million, torch.float32, max_norm=1.0, target="1.25x torch fused"),
        ]
        return found[:1] if quick else found
    single, half = elements(torch.float32), elements(torch.bfloat16)
    goal = "85% of copy"
    found = [
        case(device, 1, single, torch.float32, target=f"{goal}, 1x torch fused"),
        case(device, 1, half, torch.bfloat16, target=f"{goal}, 1.3x torch fused"),
        case(
            device,
            1,
            single,
            torch.bfloat16,
            label=" fp32 moments",
            extra_bytes=8,
            target=goal,
            moment_dtype=torch.float32,
        ),
        case(
            device,
            1,
            single,
            torch.bfloat16,
            label=" remainder, fp32 moments",
            extra_bytes=12,
            target=goal,
            master_weights="remainder",
        ),
        case(device, 1, single, torch.bfloat16, label=" 8-bit moments", extra_bytes=-4, moment_dtype=torch.uint8),
        case(device, 2000, 1024, torch.float32, kept=True, target="2x torch fused"),
        case(device, 2000, 1024, torch.float32),
        case(device, 1, single, torch.float32, max_norm=1.0),
    ]
    return found[:1] if quick else found

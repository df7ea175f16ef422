"""A training step of `fastllm.models.GPT`: on fastllm's ops and AdamW, on stock PyTorch, and that compiled.

All train the same weights on the same batch as `fastllm train` does: bfloat16 by autocast, gradients clipped to a norm
of 1, AdamW on float32 weights. The losses of the first steps are compared.

Operations are counted as in PaLM (Chowdhery et al., 2022, appendix B): a token takes 6 N + 12 L H Q T, with N
parameters, L layers, H heads of width Q, and T positions, whether or not a causal mask hides half of them. The table of
positions is in no product and not in N. The ceiling is what the machine's matrix product reaches; over the peak in the
GPU's data sheet, the same operations make PaLM's model FLOPs utilization (MFU). Bytes: parameters, gradients and
moments as AdamW moves them.

Stock PyTorch takes the fastest attention it has: its own order tries flash attention before cuDNN's, which is faster on
Hopper, so the order is set. A step of eager launches many small kernels; where it waits for Python, it is
marked as host-bound like any other contender.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastllm import ops
from fastllm.benchmarks.harness import COMPILED, NOT_COMPILED, Case, Ready
from fastllm.models import GPT, GPTConfig
from fastllm.models.config import ModelConfig
from fastllm.testing import sample
from fastllm.trainer import TrainConfig, make_optimizer

STEPS = 3  # on which the losses are compared
TOLERANCE = 2e-2
OURS_COMPILED = "fastllm, compiled"
ATTENTION = [  # the stock model's, the fastest on Hopper first
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
TRAIN = TrainConfig(lr=1e-4)  # small: at a large rate, differences in rounding grow from step to step


def counts(config: GPTConfig) -> tuple[int, int]:
    """The model's parameters, and the operations of a token."""
    with torch.device("meta"):
        model = GPT(config)
    parameters = model.num_parameters()
    positions = 0 if model.positions is None else model.positions.weight.numel()
    attention = 12 * config.layers * config.heads * config.head_dim * config.context
    return parameters, 6 * (parameters - positions) + attention


def ready(
    build: Callable[[Any], torch.nn.Module],
    config: ModelConfig,
    batches: Sequence[tuple[Tensor, ...]],
    device: str,
    *,
    bf16: bool = True,
    compiled: bool = False,
    layout: Callable[..., dict[str, Any]] = lambda model, *batch: {},
) -> Ready:
    """A contender: forward, backward, clipping and AdamW of one model.

    Args:
        build: the model's class.
        config: its `ops` say which AdamW it has, too.
        batches: arguments of its forward; steps take them in turn.
        device: of batches and model.
        bf16: by autocast.
        compiled: the model through torch.compile.
        layout: what a model finds of its batch outside of its graph, in each step.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = build(config).train()
    kind = "adamw" if config.ops == "fastllm" else "torch_adamw"
    (optimizer,) = make_optimizer(model, replace(TRAIN, optimizer=kind)).optimizers
    forward = torch.compile(model, dynamic=False if len(batches) == 1 else None) if compiled else model
    turn = itertools.cycle(batches)

    def step() -> Tensor:
        batch = next(turn)
        with sdpa_kernel(ATTENTION, set_priority=True), torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = forward(*batch, **layout(model, *batch))
        loss.backward()
        if config.ops == "torch":  # ours clips in its step
            torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.clip)
        optimizer.step()
        return loss.detach()

    return Ready(optimizer.zero_grad, step)


def first_losses(contender: Ready) -> list[float]:
    return [float((contender.prepare(), contender.call())[1]) for _ in range(STEPS)]


def setup(config: GPTConfig, batch: int, device: str, compiles: bool) -> dict[str, Callable[[], Ready] | str]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (batch, config.context + 1), generator=generator).to(device)
    batches = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]
    stock = replace(config, ops="torch")
    ours, eager = ready(GPT, config, batches, device), ready(GPT, stock, batches, device)
    losses = first_losses(ours), first_losses(eager)
    if max(abs(a - b) for a, b in zip(*losses, strict=True)) > TOLERANCE:
        raise AssertionError(f"the losses on fastllm are {losses[0]}, on stock PyTorch {losses[1]}")
    found: dict[str, Callable[[], Ready] | str] = {"fastllm": lambda: ours, "eager": lambda: eager}
    for name, chosen in ((COMPILED, stock), (OURS_COMPILED, config)):
        found[name] = (
            functools.partial(ready, GPT, chosen, batches, device, compiled=True) if compiles else NOT_COMPILED
        )
    return found


def calls(config: GPTConfig, batch: int) -> dict[str, tuple[tuple, dict[str, Any]]]:
    """The arguments of the calls in a step that Triton has kernels for, by the op's name: on the meta device, with the
    shapes that they have in the last block and the dtypes that autocast to bfloat16 gives them."""
    found: dict[str, tuple[tuple, dict[str, Any]]] = {}

    def listening(name: str, op: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] = args, kwargs
            return op(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in ("attention", "linear_cross_entropy"):
            stack.enter_context(mock.patch.object(ops, name, listening(name, getattr(ops, name))))
        tokens = torch.zeros(batch, config.context + 1, dtype=torch.long, device="meta")
        with torch.device("meta"):
            model = GPT(config).train().bfloat16()
        model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    return found


def case(label: str, config: GPTConfig, batch: int, device: str, compiles: bool = True) -> Case:
    parameters, flops = counts(config)
    tokens = batch * config.context
    return Case(
        op="training_step",
        name=f"{label} bf16 {batch}x{config.context}",
        direction="forward+backward",
        args=lambda: sample("layer_norm", device)[0],
        rivals={},
        bytes=28 * parameters,
        flops=flops * tokens,
        products=torch.bfloat16,
        tokens=tokens,
        target="1x torch.compile",
        call=ops.layer_norm,  # for the name of the backend alone
        setup=functools.partial(setup, config, batch, device, compiles),
        rounds=(5, 15),
    )

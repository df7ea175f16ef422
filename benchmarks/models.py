"""A training step of `fastllm.models` on a CPU: GPT as Llama and as GPT-2, BERT, and the encoder-decoder Transformer,
on fastllm's ops and AdamW, on stock PyTorch, and both compiled. float32, no dropout, 2,048 tokens in the vocabulary.

All train the same weights on the same batches; the losses of the first steps are compared. Batches with padding have
rows of 8 to 128 tokens, on average half of their length: stock PyTorch computes padding and masks it, fastllm leaves it
out. Four batches of different lengths take turns.

"products alone" are the matrix products that eager's step makes (all that ATen's mm, addmm and bmm are given there),
one after the other on tensors of these shapes: what no contender without padding can go below. A contender's time less
theirs is its rest. (Attention's products are inside of its kernels and belong to the rest.)

Operations and bytes are counted as in `_training_step`, without padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastllm import ops
from fastllm.benchmarks._training_step import OURS_COMPILED, first_losses, ready
from fastllm.benchmarks.harness import COMPILED, Case, Ready
from fastllm.benchmarks.linear_cross_entropy import PRODUCTS
from fastllm.models import GPT, Bert, BertConfig, GPTConfig, Transformer, TransformerConfig, mask_tokens
from fastllm.testing import make

VOCABULARY = 2048
TOLERANCE = 1e-4
MASK = 3  # BERT's


def _tokens(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def _lengths(rows: int, longest: int, seed: int) -> Tensor:
    """(rows, 1), one row full, on average half of it."""
    lengths = torch.randint(8, longest - 7, (rows, 1), generator=torch.Generator().manual_seed(seed))
    lengths[0] = longest
    return lengths


def causal(rows: int, length: int) -> list[tuple[Tensor, ...]]:
    tokens = _tokens((rows, length + 1), 0)
    return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]


def masked(rows: int, longest: int, padded: bool) -> list[tuple[Tensor, ...]]:
    found = []
    for seed in range(4 if padded else 1):
        tokens = _tokens((rows, longest), seed)
        if padded:
            tokens = tokens.masked_fill(torch.arange(longest) >= _lengths(rows, longest, seed), 0)
        generator = torch.Generator().manual_seed(seed)
        found.append(tuple(mask_tokens(tokens, MASK, VOCABULARY, special=tokens == 0, generator=generator)))
    return found


def pairs(rows: int, longest: int) -> list[tuple[Tensor, ...]]:
    found = []
    for seed in range(4):
        place = torch.arange(longest)
        source = _tokens((rows, longest), seed).masked_fill(place >= _lengths(rows, longest, seed), 0)
        target = _tokens((rows, longest), 9 + seed).masked_fill(place >= _lengths(rows, longest, 9 + seed), -100)
        found.append((source, target))
    return found


class _Recorder(TorchDispatchMode):
    """Takes down the matrix products that are computed inside: shapes and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[tuple, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.products.append(tuple((tuple(x.shape), x.stride()) for x in args[-2:]))
        return func(*args, **(kwargs or {}))


def products(step: Ready) -> Callable[[], Ready]:
    """The products of one step as a contender. Operands of one shape share their memory, outputs do not."""
    with _Recorder() as recorder:
        step.prepare()
        step.call()

    def build() -> Ready:
        operands: dict[tuple, Tensor] = {}
        for both in recorder.products:
            for shape, stride in both:
                operands.setdefault((shape, stride), torch.randn(shape).as_strided(shape, stride))

        def call() -> None:
            for left, right in recorder.products:
                torch.matmul(operands[left], operands[right])

        return Ready(lambda: None, call)

    return build


def setup(
    build: Callable[[Any], torch.nn.Module],
    config: Any,
    batches: list[tuple[Tensor, ...]],
    layout: Callable[..., dict[str, Any]],
) -> dict[str, Callable[[], Ready] | str]:
    stock = replace(config, ops="torch")

    def contender(chosen: Any, compiled: bool = False) -> Ready:
        extra = layout if chosen.ops == "fastllm" or compiled else lambda model, *batch: {}
        return ready(build, chosen, batches, "cpu", bf16=False, compiled=compiled, layout=extra)

    ours, eager = contender(config), contender(stock)
    losses = first_losses(ours), first_losses(eager)
    if max(abs(a - b) for a, b in zip(*losses, strict=True)) > TOLERANCE:
        raise AssertionError(f"the losses on fastllm are {losses[0]}, on stock PyTorch {losses[1]}")
    alone = products(eager)
    return {
        "fastllm": lambda: ours,
        "eager": lambda: eager,
        COMPILED: functools.partial(contender, stock, True),
        OURS_COMPILED: functools.partial(contender, config, True),
        PRODUCTS: alone,
    }


def counts(model: torch.nn.Module, tokens: int) -> tuple[int, int]:
    """The model's parameters, and the operations of a step without those of attention."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, 6 * parameters * tokens


def case(
    name: str,
    build: Callable[[Any], torch.nn.Module],
    config: Any,
    batches: Callable[[], list[tuple[Tensor, ...]]],
    target: str,
    layout: Callable[..., dict[str, Any]] = lambda model, *batch: {},
) -> Case:
    with torch.device("meta"):
        model = build(config)
    example = batches()[0]
    tokens = int((example[0] != 0).sum())
    parameters, flops = counts(model, tokens)
    return Case(
        op="models",
        name=name,
        direction="forward+backward",
        args=lambda: (make((2, 8)), (8,), make((8,))),
        rivals={},
        bytes=28 * parameters,
        flops=flops,
        products=torch.float32,
        tokens=tokens,
        target=target,
        call=ops.rms_norm,  # for the name of the backend alone
        setup=lambda: setup(build, config, batches(), layout),
        rounds=(9, 60),
    )


def _bert_layout(model: Bert, tokens: Tensor, targets: Tensor) -> dict[str, Any]:
    layout = model.layout(tokens)
    return {"layout": layout, "chosen_M": model.chosen(targets, layout)}


def _pair_layouts(model: Transformer, source: Tensor, targets: Tensor) -> dict[str, Any]:
    return {"layouts": model.layouts(source, targets)}


def cases(device: str, quick: bool) -> list[Case]:
    """On a GPU `headline` has a training step."""
    if device != "cpu":
        return []
    found = []
    for layers, width in ((8, 128), (6, 384)):
        sizes = {"vocab_size": VOCABULARY, "context": 128, "layers": layers, "width": width, "heads": width // 64}
        for name, preset in (("Llama", GPTConfig.llama), ("GPT-2", GPTConfig.gpt2)):
            label = f"{name} {layers}x{width} fp32 8x128"
            found.append(case(label, GPT, preset(**sizes), functools.partial(causal, 8, 128), "fastest of all"))
    sizes = {"vocab_size": VOCABULARY, "context": 128, "layers": 4, "width": 256, "heads": 4, "dropout": 0.0}
    bert = BertConfig(**sizes)
    for name, padded in (("16x128", False), ("16x128 half padding", True)):
        batches, target = functools.partial(masked, 16, 128, padded), "1.5x eager" if padded else "fastest of all"
        found.append(case(f"BERT 4x256 fp32 {name}", Bert, bert, batches, target, _bert_layout))
    pair = TransformerConfig(**sizes, label_smoothing=0.0)
    batches = functools.partial(pairs, 16, 128)
    name = "Transformer 4x256 fp32 16x128 half padding"
    found.append(case(name, Transformer, pair, batches, "1.5x eager", _pair_layouts))
    return found[:1] if quick else found

"""A training step of `fastllm.models`: GPT as Llama and as GPT-2, BERT, and the encoder-decoder Transformer, on
fastllm's ops and AdamW, on stock PyTorch, and both compiled. On a CPU in float32 with 2,048 tokens in the vocabulary,
on a GPU in bfloat16 by autocast with 32,768; no dropout.

All train the same weights on the same batches; the losses of the first steps are compared. Batches with padding have
one row of full length and others of 8 tokens on, on average half of it: stock PyTorch computes padding and masks it,
fastllm leaves it out. Four batches of different lengths take turns.

"products alone" are the matrix products that eager's step makes (all that ATen's mm, addmm and bmm are given there),
one after the other on tensors of these shapes: what no contender without padding can go below. A contender's time less
theirs is its rest. (Attention's products are inside of its kernels and belong to the rest.)

Operations are 6 for each weight of a linear layer and each token that must go through it, without padding, embeddings
and attention, and of BERT's masked head for the masked tokens alone; the mean over the batches. Bytes: parameters,
gradients and moments as AdamW moves them.
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

VOCABULARY = {"cpu": 2048, "cuda": 32768}
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
MASK = 3  # BERT's


def _tokens(shape: tuple[int, int], seed: int, vocabulary: int) -> Tensor:
    return torch.randint(4, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def _lengths(rows: int, longest: int, seed: int) -> Tensor:
    """(rows, 1), one row full, on average half of it."""
    lengths = torch.randint(8, longest - 7, (rows, 1), generator=torch.Generator().manual_seed(seed))
    lengths[0] = longest
    return lengths


def causal(vocabulary: int, rows: int, length: int) -> list[tuple[Tensor, ...]]:
    tokens = _tokens((rows, length + 1), 0, vocabulary)
    return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]


def masked(vocabulary: int, rows: int, longest: int, padded: bool) -> list[tuple[Tensor, ...]]:
    found = []
    for seed in range(4 if padded else 1):
        tokens = _tokens((rows, longest), seed, vocabulary)
        if padded:
            tokens = tokens.masked_fill(torch.arange(longest) >= _lengths(rows, longest, seed), 0)
        generator = torch.Generator().manual_seed(seed)
        found.append(tuple(mask_tokens(tokens, MASK, vocabulary, special=tokens == 0, generator=generator)))
    return found


def pairs(vocabulary: int, rows: int, longest: int) -> list[tuple[Tensor, ...]]:
    found = []
    for seed in range(4):
        place = torch.arange(longest)
        source = _tokens((rows, longest), seed, vocabulary)
        target = _tokens((rows, longest), 9 + seed, vocabulary)
        source = source.masked_fill(place >= _lengths(rows, longest, seed), 0)
        target = target.masked_fill(place >= _lengths(rows, longest, 9 + seed), -100)
        found.append((source, target))
    return found


class _Recorder(TorchDispatchMode):
    """Takes down the matrix products that are computed inside: shapes and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[tuple, tuple]] = []  # (shape, stride, dtype, device) of both operands

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.products.append(tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in args[-2:]))
        return func(*args, **(kwargs or {}))


def products(step: Ready) -> Callable[[], Ready]:
    """The products of one step as a contender. Operands of one shape share their memory, outputs do not."""
    with _Recorder() as recorder:
        step.prepare()
        step.call()

    def build() -> Ready:
        operands: dict[tuple, Tensor] = {}
        for both in recorder.products:
            for key in both:
                shape, stride, dtype, device = key
                operands.setdefault(key, make(shape, dtype, device).as_strided(shape, stride))

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
    device: str,
) -> dict[str, Callable[[], Ready] | str]:
    stock = replace(config, ops="torch")
    batches = [tuple(x.to(device) for x in batch) for batch in batches]

    def contender(chosen: Any, compiled: bool = False) -> Ready:
        extra = layout if chosen.ops == "fastllm" or compiled else lambda model, *batch: {}
        return ready(build, chosen, batches, device, bf16=device == "cuda", compiled=compiled, layout=extra)

    ours, eager = contender(config), contender(stock)
    losses = first_losses(ours), first_losses(eager)
    if max(abs(a - b) for a, b in zip(*losses, strict=True)) > TOLERANCE[device]:
        raise AssertionError(f"the losses on fastllm are {losses[0]}, on stock PyTorch {losses[1]}")
    alone = products(eager)
    return {
        "fastllm": lambda: ours,
        "eager": lambda: eager,
        COMPILED: functools.partial(contender, stock, True),
        OURS_COMPILED: functools.partial(contender, config, True),
        PRODUCTS: alone,
    }


def counts(model: torch.nn.Module, batch: tuple[Tensor, ...]) -> tuple[int, int]:
    """The tokens of a batch (a Transformer's of the source), and the operations of a step on it."""
    tokens, scored = int((batch[0] != 0).sum()), int((batch[1] != -100).sum())
    pair = isinstance(model, Transformer)
    head = model.embedding.weight.numel() if getattr(model, "head", None) is None else 0
    operations = head * scored
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            of_target = name.startswith("decoder") and not name.endswith("kv_proj")
            of_scored = name.startswith("masked_head") or (pair and of_target)
            operations += module.weight.numel() * (scored if of_scored else tokens)
    return tokens, 6 * operations


def case(
    name: tuple[str, str],
    build: Callable[[Any], torch.nn.Module],
    config: Any,
    batches: Callable[[], list[tuple[Tensor, ...]]],
    target: str,
    device: str,
    layout: Callable[..., dict[str, Any]] = lambda model, *batch: {},
) -> Case:
    with torch.device("meta"):
        model = build(config)
    drawn = batches()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens, flops = (sum(one) // len(drawn) for one in zip(*(counts(model, batch) for batch in drawn), strict=True))
    bf16 = device == "cuda"
    rows, longest = drawn[0][0].shape
    return Case(
        op="models",
        name=f"{name[0]} {'bf16' if bf16 else 'fp32'} {rows}x{longest}{name[1]}",
        direction="forward+backward",
        args=lambda: (make((2, 8), device=device), (8,), make((8,), device=device)),
        rivals={},
        bytes=28 * parameters,
        flops=flops,
        products=torch.bfloat16 if bf16 else torch.float32,
        tokens=tokens,
        target=target,
        call=ops.rms_norm,  # for the name of the backend alone
        setup=lambda: setup(build, config, batches(), layout, device),
        rounds=(9, 60),
    )


def _bert_layout(model: Bert, tokens: Tensor, targets: Tensor) -> dict[str, Any]:
    layout = model.layout(tokens)
    return {"layout": layout, "chosen_M": model.chosen(targets, layout)}


def _pair_layouts(model: Transformer, source: Tensor, targets: Tensor) -> dict[str, Any]:
    return {"layouts": model.layouts(source, targets)}


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        causal_sizes, encoder, pair = [(8, 128), (6, 384)], (4, 256), (4, 256)
        shapes = (8, 128), (16, 128), (16, 128)
    else:
        causal_sizes, encoder, pair = [(12, 768)], (12, 768), (6, 512)
        shapes = (16, 1024), (64, 512), (64, 256)
    vocabulary = VOCABULARY[device]

    def sizes(layers: int, width: int, length: int, **more: Any) -> dict[str, Any]:
        shape = {"layers": layers, "width": width, "heads": width // 64}
        return {"vocab_size": vocabulary, "context": length, **shape, **more}

    found = []
    for layers, width in causal_sizes:
        batches = functools.partial(causal, vocabulary, *shapes[0])
        for name, preset in (("Llama", GPTConfig.llama), ("GPT-2", GPTConfig.gpt2)):
            config = preset(**sizes(layers, width, shapes[0][1]))
            found.append(case((f"{name} {layers}x{width}", ""), GPT, config, batches, "fastest of all", device))
    config = BertConfig(**sizes(*encoder, shapes[1][1], dropout=0.0))
    for padded in (False, True):
        batches = functools.partial(masked, vocabulary, *shapes[1], padded)
        name, target = ("", "fastest of all") if not padded else (" half padding", "1.5x eager")
        label = "BERT {}x{}".format(*encoder), name
        found.append(case(label, Bert, config, batches, target, device, _bert_layout))
    batches = functools.partial(pairs, vocabulary, *shapes[2])
    config = TransformerConfig(**sizes(*pair, shapes[2][1], dropout=0.0, label_smoothing=0.0))
    label = "Transformer {}x{}".format(*pair), " half padding"
    found.append(case(label, Transformer, config, batches, "1.5x eager", device, _pair_layouts))
    return found[:1] if quick else found

"""What a short run on a GPU measures: chosen cases of the ops, the most valuable first, and a training step of GPT-2.

    first = [harness.measure(case, "cuda", 0.5) for case in headline.cases("cuda")]

Rivals that compile for minutes come in a second pass, for as long as there is time. A ratio counts only within one run,
so fastllm and the best of the first pass are measured again beside them:

    again = headline.second_pass(case, result)   # the next case to measure, or None
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fastllm.benchmarks import (
    _attention,
    _norm,
    _training_step,
    adamw,
    attention,
    attention_kvcache,
    cross_entropy,
    linear_cross_entropy,
    rotary,
    swiglu,
)
from fastllm.benchmarks.harness import AUTOTUNED, COMPILED, NOT_COMPILED, Case, Direction
from fastllm.models import GPTConfig

PASSES: tuple[Direction, ...] = ("forward", "backward")


class _Sizes(NamedTuple):
    """The sizes of the cases: those of real models, or small ones for a rehearsal on a CPU."""

    attention: tuple[int, int, int]  # batch, heads, positions
    decode: tuple[int, int, int, int]  # batch, heads, key and value heads, positions
    rotary: tuple[int, int, int, int]  # batch, positions, heads, key and value heads
    parameters: int | None  # of AdamW; None for as many as fit
    rows: int
    widths: tuple[int, ...]  # of norms
    classifiers: tuple[tuple[int, int, int], ...]  # rows, hidden, classes
    classes: int
    hidden: int  # of swiglu
    gpt: GPTConfig
    gpt_batch: int
    compiles: bool


FULL = _Sizes(
    attention=(2, 16, 8192),
    decode=(8, 32, 4, 8192),
    rotary=(4, 4096, 32, 8),
    parameters=None,
    rows=8192,
    widths=(4096, 16384),
    classifiers=((8192, 4096, 128256), (16384, 768, 50257)),
    classes=128256,
    hidden=14336,
    gpt=GPTConfig.gpt2(),
    gpt_batch=16,
    compiles=True,
)
SMALL = _Sizes(
    attention=(1, 2, 64),
    decode=(1, 8, 1, 64),
    rotary=(1, 16, 4, 2),
    parameters=1000,
    rows=8,
    widths=(32, 48),
    classifiers=((8, 16, 100), (16, 8, 60)),
    classes=100,
    hidden=32,
    gpt=GPTConfig.gpt2(vocab_size=64, context=16, layers=2, heads=2, width=32),
    gpt_batch=2,
    compiles=False,
)


def _attention_cases(device: str, sizes: _Sizes) -> list[Case]:
    """Attention against the fused kernels alone: the formula, compiled or not, is many times slower."""
    batch, heads, rows = sizes.attention
    chosen: dict[str, Any] = {
        "rivals": _attention.gpu_rivals(left=-1, causal=True),
        "timed": ("SDPA cuDNN", "SDPA flash", _attention.FLEX),
        "compiled": False,
    }
    return [
        replace(attention.case(device, rows, size, True, direction, batch=batch, heads=heads), **chosen)
        for size in (128, 64)
        for direction in PASSES
    ]


def _adamw_cases(device: str, sizes: _Sizes) -> list[Case]:
    return [
        adamw.case(device, 1, sizes.parameters or adamw.elements(dtype), dtype, compiles=sizes.compiles)
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _row_cases(device: str, sizes: _Sizes) -> list[Case]:
    """The cases of norms, losses, gates and positions."""
    bf16 = torch.bfloat16
    found = [
        _norm.case(op, device, (sizes.rows, n), bf16, direction)
        for op in ("layer_norm", "rms_norm", "add_rms_norm")
        for n in sizes.widths
        for direction in PASSES
    ]
    found += [linear_cross_entropy.case(device, *shape, bf16) for shape in sizes.classifiers]
    found += [cross_entropy.case(device, sizes.rows, sizes.classes, bf16, direction) for direction in PASSES]
    found += [swiglu.case(device, (sizes.rows, sizes.hidden), bf16, direction) for direction in PASSES]
    found.append(rotary.case(device, *sizes.rotary, 128, bf16))
    return [replace(case, compiled=True, slow=(AUTOTUNED,)) for case in found]


def _decode_cases(device: str, sizes: _Sizes) -> list[Case]:
    batch, heads, kv_heads, keys = sizes.decode
    found = attention_kvcache.case(device, batch, heads, kv_heads, keys, 128, torch.bfloat16)
    return [replace(found, rivals=attention_kvcache.gpu_rivals())]


def _training_cases(device: str, sizes: _Sizes) -> list[Case]:
    """The training step against eager, and against what takes a minute to compile: the first need not wait for that."""
    label = f"GPT-2 {_training_step.counts(sizes.gpt)[0] / 1e6:.3g}M"
    step = _training_step.case(label, sizes.gpt, sizes.gpt_batch, device, compiles=sizes.compiles)
    compiled: dict[str, Any] = {"timed": (COMPILED,), "slow": (_training_step.OURS_COMPILED,)}
    return [replace(step, timed=("eager",)), replace(step, name=f"{step.name}, compiled", **compiled)]


def _rehearsed(case: Case) -> Case:
    """The case with nothing compiled."""
    if not case.compiled or case.setup is not None:
        return case
    missing: dict[str, Callable | str] = {COMPILED: NOT_COMPILED}
    if AUTOTUNED in case.slow:
        missing[AUTOTUNED] = NOT_COMPILED
    return replace(case, compiled=False, rivals=case.rivals | missing)


def cases(device: str, small: bool = False) -> list[Case]:
    """The cases of the first pass, the most valuable first.

    Args:
        device: "cuda" or "cpu".
        small: the same at sizes for a CPU, and without torch.compile: the rehearsal of a run.
    """
    sizes = SMALL if small else FULL
    parts = (_attention_cases, _adamw_cases, _row_cases, _decode_cases, _training_cases)
    found = [case for part in parts for case in part(device, sizes)]
    return found if sizes.compiles else [_rehearsed(case) for case in found]


def second_pass(case: Case, result: dict[str, Any]) -> Case | None:
    """The case once more with the rivals that compile for minutes, beside fastllm and the best other one.

    Args:
        case: of the first pass.
        result: of the same case.

    Returns:
        The case to measure; None where no rival compiles for minutes.
    """
    if not case.slow:
        return None
    contenders = {name: figures["median_ms"] for name, figures in result["contenders"].items()}
    rivals = contenders.keys() - {"fastllm", linear_cross_entropy.PRODUCTS}  # the products are a floor
    best = sorted(rivals, key=contenders.__getitem__)[:1]
    return replace(case, name=f"{case.name}, second pass", timed=(*best, *case.slow))

"""attention_kvcache: one new token over a long cache, grouped heads, against SDPA's backends and FlexAttention.

It is measured by bytes: a key and a value are read for two products of one row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastllm.benchmarks import _attention
from fastllm.benchmarks.harness import AUTOTUNE, Case, dtype_name
from fastllm.testing import make


def on_cut_cache(attend: Callable) -> Callable:
    def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: int) -> Tensor:
        return attend(q, k_cache[:, :, :cache_seqlens], v_cache[:, :, :cache_seqlens])

    return attention


def gpu_rivals() -> dict[str, Callable | str]:
    found: dict[str, Callable | str] = {"eager": on_cut_cache(_attention.eager), "SDPA": on_cut_cache(_attention.stock)}
    for name, backend in _attention.BACKENDS.items():
        found[name] = on_cut_cache(functools.partial(_attention.stock, backend=backend))
    for name, mode in ((_attention.FLEX, None), (_attention.FLEX_AUTOTUNED, AUTOTUNE)):
        found[name] = on_cut_cache(functools.partial(_attention.flex, mode=mode))
    return found


def arguments(batch: int, heads: int, kv_heads: int, length: int, size: int, dtype: torch.dtype, device: str) -> tuple:
    q = make((batch, heads, 1, size), dtype, device, seed=0)
    caches = [make((batch, kv_heads, length, size), dtype, device, seed=seed) for seed in (1, 2)]
    return q, *caches, length


def case(device: str, batch: int, heads: int, kv_heads: int, length: int, size: int, dtype: torch.dtype) -> Case:
    rivals = gpu_rivals()
    return Case(
        op="attention_kvcache",
        name=f"{dtype_name(dtype)} B{batch} {heads}:{kv_heads} heads {length} keys D{size}",
        direction="forward",
        args=functools.partial(arguments, batch, heads, kv_heads, length, size, dtype, device),
        rivals=rivals if device == "cuda" else {name: rivals[name] for name in ("eager", "SDPA")},
        bytes=2 * batch * kv_heads * length * size * dtype.itemsize,
        flops=4 * batch * heads * length * size,
        inference=True,
        slow=(_attention.FLEX_AUTOTUNED,),
    )


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        found = [case("cpu", 2, 8, 2, 2048, 64, torch.float32)]
        return found if quick else [*found, case("cpu", 8, 8, 8, 512, 64, torch.float32)]
    found = [case(device, 8, 32, 4, 8192, 128, torch.bfloat16)]
    return found if quick else [*found, case(device, 1, 32, 4, 32768, 128, torch.bfloat16)]

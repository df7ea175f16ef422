"""attention_kvcache: one new token over a long cache, grouped heads, against SDPA."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

from fastllm.benchmarks.harness import Case, dtype_name
from fastllm.testing import make


def stock(q, k_cache, v_cache, cache_seqlens):
    k, v = k_cache[:, :, :cache_seqlens], v_cache[:, :, :cache_seqlens]
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def eager(q, k_cache, v_cache, cache_seqlens):
    group = q.shape[1] // k_cache.shape[1]
    k, v = (x[:, :, :cache_seqlens].repeat_interleave(group, 1) for x in (k_cache, v_cache))
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def arguments(batch: int, heads: int, kv_heads: int, length: int, size: int, dtype: torch.dtype, device: str) -> tuple:
    q = make((batch, heads, 1, size), dtype, device, seed=0)
    caches = [make((batch, kv_heads, length, size), dtype, device, seed=seed) for seed in (1, 2)]
    return q, *caches, length


def case(device: str, batch: int, heads: int, kv_heads: int, length: int, size: int, dtype: torch.dtype) -> Case:
    return Case(
        op="attention_kvcache",
        name=f"{dtype_name(dtype)} B{batch} {heads}:{kv_heads} heads {length} keys D{size}",
        direction="forward",
        args=functools.partial(arguments, batch, heads, kv_heads, length, size, dtype, device),
        rivals={"eager": eager, "SDPA": stock},
        bytes=2 * batch * kv_heads * length * size * dtype.itemsize,
        flops=4 * batch * heads * length * size,
        inference=True,
    )


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        found = [case("cpu", 2, 8, 2, 2048, 64, torch.float32)]
        return found if quick else [*found, case("cpu", 8, 8, 8, 512, 64, torch.float32)]
    found = [case(device, 8, 32, 4, 8192, 128, torch.bfloat16)]
    return found if quick else [*found, case(device, 1, 32, 4, 32768, 128, torch.bfloat16)]

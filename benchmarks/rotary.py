"""rotary against what models on Hugging Face do, compiled and not; Liger-Kernel's on a GPU.

Bytes: q and k are read and written, once in each direction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastllm import ops
from fastllm.benchmarks.harness import Case, dtype_name, rival
from fastllm.testing import make


class Tables:
    """The tables cos and sin, (S, D / 2). They are made with the case's arguments: no GPU is needed to list cases."""

    cos: Tensor
    sin: Tensor
    doubled: tuple[Tensor, Tensor]  # as transformers has them: everything twice, in the dtype of the model


def arguments(
    tables: Tables, batch: int, seq: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: str
) -> tuple:
    """Queries and keys as projections lay them out, (B, S, H, D)."""
    angles = torch.outer(torch.arange(seq, dtype=torch.float64), 10000.0 ** -(torch.arange(size // 2) / (size // 2)))
    tables.cos, tables.sin = angles.cos().float().to(device), angles.sin().float().to(device)
    cos, sin = (torch.cat([t, t], -1)[None, None].to(dtype) for t in (tables.cos, tables.sin))
    tables.doubled = cos, sin
    q, k = (make((batch, seq, n, size), dtype, device, seed=i).transpose(1, 2) for i, n in enumerate((heads, kv_heads)))
    return q, k


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def make_eager(tables: Tables) -> Callable:
    def eager(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = tables.doubled
        return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin

    return eager


def make_fused(tables: Tables) -> Callable:
    def rotary(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rotary(q, k, tables.cos, tables.sin)

    return rotary


def make_liger(tables: Tables) -> Callable:
    from liger_kernel.ops.rope import LigerRopeFunction

    # It writes into its arguments, which must outlive the call here.
    return lambda q, k: LigerRopeFunction.apply(q.clone(), k.clone(), *(table[0] for table in tables.doubled))


def case(
    device: str, batch: int, seq: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, target: str = ""
) -> Case:
    tables, short_tables = Tables(), Tables()
    rivals: dict[str, Callable | str] = {"eager": make_eager(tables)}
    if device == "cuda":
        rivals["Liger + clones"] = rival(functools.partial(make_liger, tables))
    elements = batch * seq * (heads + kv_heads) * size
    return Case(
        op="rotary",
        name=f"{dtype_name(dtype)} B{batch} S{seq} {heads}:{kv_heads} heads D{size} forward+backward",
        direction="forward+backward",
        args=functools.partial(arguments, tables, batch, seq, heads, kv_heads, size, dtype, device),
        check=functools.partial(arguments, short_tables, 1, min(seq, 1000), heads, kv_heads, size, dtype, device),
        checked=(make_fused(short_tables), make_eager(short_tables)),
        rivals=rivals,
        bytes=4 * elements * dtype.itemsize,
        flops=6 * elements,
        target=target,
        call=make_fused(tables),
    )


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        found = [
            case(device, 2, 2048, 16, 4, 64, torch.float32, "2.5x eager, 1x torch.compile"),
            case(device, 2, 2048, 16, 4, 64, torch.bfloat16),
        ]
    else:
        found = [
            case(device, 4, 4096, 32, 8, 128, torch.bfloat16, "85% of copy, 1x torch.compile"),
            case(device, 8, 1024, 12, 12, 64, torch.bfloat16),
        ]
    return found[:1] if quick else found

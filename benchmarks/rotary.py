"""rotary against what models on Hugging Face do, compiled and not; Liger-Kernel's on a GPU.

Bytes: q and k are read and written, once in each direction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastllm import ops
from fastllm.benchmarks.harness import Case, dtype_name
from fastllm.testing import make


def arguments(batch: int, seq: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: str) -> tuple:
    """Queries and keys as projections lay them out, (B, S, H, D)."""
    q, k = (make((batch, seq, n, size), dtype, device, seed=i).transpose(1, 2) for i, n in enumerate((heads, kv_heads)))
    return q, k


def tables(seq: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin, (S, D / 2)."""
    angles = torch.outer(torch.arange(seq, dtype=torch.float64), 10000.0 ** -(torch.arange(size // 2) / (size // 2)))
    return angles.cos().float().to(device), angles.sin().float().to(device)


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def make_eager(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Callable:
    """As transformers: tables that hold everything twice, in the dtype of the model."""
    cos, sin = (torch.cat([t, t], -1)[None, None].to(dtype) for t in (cos, sin))

    def eager(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin

    return eager


def make_fused(cos: Tensor, sin: Tensor) -> Callable:
    def rotary(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rotary(q, k, cos, sin)

    return rotary


def make_liger(cos: Tensor, sin: Tensor) -> Callable | None:
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError:
        return None
    cos, sin = (torch.cat([t, t], -1)[None] for t in (cos, sin))
    # It writes into its arguments, which must outlive the call here.
    return lambda q, k: LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)


def case(
    device: str, batch: int, seq: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, target: str = ""
) -> Case:
    cos, sin = tables(seq, size, device)
    rivals: dict[str, Callable] = {"eager": make_eager(cos, sin, dtype)}
    if device == "cuda" and (found := make_liger(cos, sin)):
        rivals["Liger"] = found
    elements = batch * seq * (heads + kv_heads) * size
    return Case(
        op="rotary",
        name=f"{dtype_name(dtype)} B{batch} S{seq} {heads}:{kv_heads} heads D{size} forward+backward",
        direction="forward+backward",
        args=functools.partial(arguments, batch, seq, heads, kv_heads, size, dtype, device),
        rivals=rivals,
        bytes=4 * elements * dtype.itemsize,
        flops=6 * elements,
        target=target,
        call=make_fused(cos, sin),
    )


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        found = [
            case(device, 2, 2048, 16, 4, 64, torch.float32, "2.5x eager, 1x torch.compile"),
            case(device, 2, 2048, 16, 4, 64, torch.bfloat16),
        ]
    else:
        found = [case(device, 4, 4096, 32, 8, 128, torch.bfloat16, "85% of copy, 1x torch.compile")]
    return found[:1] if quick else found

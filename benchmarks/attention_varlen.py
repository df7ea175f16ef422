"""attention_varlen on skewed lengths, against SDPA with a materialised mask and the formula."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastllm.benchmarks import _attention
from fastllm.benchmarks.harness import Case, Direction, dtype_name
from fastllm.testing import make

SKEWED = (8192, 4096, 2048, 1024, 512, 256, 128, 128)


def documents(lengths: tuple[int, ...], device) -> Tensor:
    """(S, S): same document, and not in the future."""
    document = torch.repeat_interleave(torch.tensor(lengths, device=device))
    return (document[:, None] == document) & torch.ones(
        len(document), len(document), dtype=torch.bool, device=device
    ).tril()


def dense(q, k, v, cu_q, cu_k, max_q, max_k, *, lengths: tuple[int, ...], stock: bool) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = documents(lengths, q.device)
    if stock:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    else:
        out = torch.softmax((q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf), -1) @ v
    return out[0].transpose(0, 1)


def arguments(lengths: tuple[int, ...], heads: int, size: int, dtype: torch.dtype, device: str) -> tuple:
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    q, k, v = (make((sum(lengths), heads, size), dtype, device, seed=seed) for seed in range(3))
    return q, k, v, cu, cu, max(lengths), max(lengths)


def case(
    device: str,
    lengths: tuple[int, ...],
    heads: int,
    size: int,
    dtype: torch.dtype,
    direction: Direction,
    target: str = "",
) -> Case:
    pairs = sum(length * length for length in lengths) // 2
    moved = 4 * sum(lengths) * heads * size * dtype.itemsize
    same = len(set(lengths)) == 1
    return Case(
        op="attention_varlen",
        name=f"{dtype_name(dtype)} {f'{len(lengths)}x{lengths[0]}' if same else 'skewed'} D{size} causal {direction}",
        direction=direction,
        args=functools.partial(arguments, lengths, heads, size, dtype, device),
        rivals={
            "eager": functools.partial(dense, lengths=lengths, stock=False),
            "SDPA with a mask": functools.partial(dense, lengths=lengths, stock=True),
        },
        bytes=moved * {"forward": 1, "backward": 2, "forward+backward": 3}[direction],
        flops=_attention.flops(pairs, heads, size, direction),
        target=target,
        kwargs={"is_causal": True},
    )


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        goal = "4x SDPA with a mask"
        found = [case("cpu", (256,) * 8, 8, 64, torch.float32, "forward+backward", target=goal)]
        return found if quick else [*found, case("cpu", (256,) * 8, 8, 64, torch.float32, "forward", target=goal)]
    directions: tuple[Direction, ...] = ("forward",) if quick else ("forward", "backward")
    # Two heads, since the rivals hold (H, S, S) and the check does so in float64.
    return [
        case(device, SKEWED, 2, 128, torch.bfloat16, direction, target="within 10% of dense")
        for direction in directions
    ]

"""attention_varlen on skewed lengths, against torch's varlen_attn, FlexAttention and SDPA with a mask, and the formula.

Masks are made once, outside of what is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from fastllm import ops
from fastllm.benchmarks import _attention
from fastllm.benchmarks.harness import AUTOTUNE, Case, Direction, dtype_name, rival
from fastllm.testing import make

SKEWED = (8192, 4096, 2048, 1024, 512, 256, 128, 128)


class Masks:
    """The masks of what a document may see. They are made when a case's arguments are, which is not timed."""

    dense: Tensor  # (S, S)
    blocks: BlockMask

    def make(self, lengths: tuple[int, ...], device: str) -> None:
        document = torch.repeat_interleave(torch.tensor(lengths, device=device))

        def seen(b, h, i, j):
            return (document[i] == document[j]) & (i >= j)

        self.dense = (document[:, None] == document).tril()
        self.blocks = create_block_mask(seen, None, None, len(document), len(document), device=device)


def packed(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """A function of packed batches (S, H, D) that calls `attend` on (1, H, S, D)."""

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        return attend(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)

    return attention


def eager(masks: Masks) -> Callable:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return torch.softmax(scores.masked_fill(~masks.dense, -torch.inf), -1) @ v

    return packed(attend)


def stock(masks: Masks) -> Callable:
    return packed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, masks.dense))


def flex(masks: Masks, mode: str | None = None) -> Callable:
    return packed(lambda q, k, v: _attention.flex(q, k, v, block_mask=masks.blocks, mode=mode))


def torch_varlen() -> Callable:
    """Torch's own, on flash attention; a window of (-1, 0) is how all its versions spell causal."""
    from torch.nn.attention.varlen import varlen_attn

    return functools.partial(varlen_attn, window_size=(-1, 0))


def rivals(device: str, masks: Masks) -> dict[str, Callable | str]:
    found: dict[str, Callable | str] = {"eager": eager(masks), "SDPA with a mask": stock(masks)}
    if device == "cuda":
        found["torch varlen_attn"] = rival(torch_varlen)
        found |= {_attention.FLEX: flex(masks), _attention.FLEX_AUTOTUNED: flex(masks, AUTOTUNE)}
    return found


def arguments(masks: Masks, lengths: tuple[int, ...], heads: int, size: int, dtype: torch.dtype, device: str) -> tuple:
    masks.make(lengths, device)
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
    # The check holds (H, S, S) in float64, and so do eager and what is compiled from it in the case's dtype.
    large = sum(lengths) > 4096
    short = tuple(length // 16 for length in lengths) if large else lengths
    masks, short_masks = Masks(), Masks()
    found = rivals(device, masks)
    return Case(
        op="attention_varlen",
        name=f"{dtype_name(dtype)} {f'{len(lengths)}x{lengths[0]}' if same else 'skewed'} {heads} heads D{size} causal "
        f"{direction}",
        direction=direction,
        args=functools.partial(arguments, masks, lengths, heads, size, dtype, device),
        check=functools.partial(arguments, short_masks, short, heads, size, dtype, device),
        checked=(functools.partial(ops.attention_varlen, is_causal=True), eager(short_masks)),
        rivals=found,
        compiled=not large,
        timed=tuple(name for name in found if name not in ("eager", _attention.FLEX_AUTOTUNED)) if large else None,
        bytes=moved * {"forward": 1, "backward": 2, "forward+backward": 3}[direction],
        flops=_attention.flops(pairs, heads, size, direction),
        products=dtype,
        target=target,
        slow=(_attention.FLEX_AUTOTUNED,),
        kwargs={"is_causal": True},
    )


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        goal = "4x SDPA with a mask"
        found = [case("cpu", (256,) * 8, 8, 64, torch.float32, "forward+backward", target=goal)]
        return found if quick else [*found, case("cpu", (256,) * 8, 8, 64, torch.float32, "forward", target=goal)]
    directions: tuple[Direction, ...] = ("forward",) if quick else ("forward", "backward")
    return [
        case(device, SKEWED, 16, 128, torch.bfloat16, direction, target="within 10% of dense")
        for direction in directions
    ]

"""Cross-entropy over a vocabulary that is cut over the ranks of a process group (Megatron-LM, Shoeybi et al., 2019)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def extent(size: int, device: torch.device, group: Any) -> tuple[int, int]:
    """(size of the whole vocabulary, where this rank's part starts), from every rank's size."""
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    rank = dist.get_rank(group)
    sizes[rank] = size
    dist.all_reduce(sizes, group=group)
    found = sizes.tolist()
    return sum(found), sum(found[:rank])


def _check_once() -> None:
    """Refuses create_graph=True: a second derivative would lack what the other ranks' gradients depend on."""
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy: with a process_group, gradients have no gradients themselves")


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        _check_once()
        # Partial sums of 16 bits would be rounded once more for each rank.
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


def replicated(x: Tensor, group: Any) -> Tensor:
    """`x`, the same on all ranks, whose gradient is the sum of what the ranks find."""
    return _Replicated.apply(x, group)


class _LogSumExp(torch.autograd.Function):
    """Over the ranks."""

    @staticmethod
    def forward(ctx, lse, group):
        parts = [torch.empty_like(lse) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, lse.contiguous(), group=group)
        whole = torch.logsumexp(torch.stack(parts), 0)
        ctx.save_for_backward(lse, whole)
        return whole

    @staticmethod
    def backward(ctx, grad):
        _check_once()
        lse, whole = ctx.saved_tensors
        return torch.where(grad == 0, 0.0, grad * torch.exp(lse - whole)), None  # such a row may hold anything


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        _check_once()
        return grad, None


def combined(
    stats: tuple[Tensor, Tensor, Tensor, Tensor | None], mine: Tensor, share: float, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """top, lse, picked and mean over the whole vocabulary, from those over a part that is `share` of it and has the
    targets of the rows `mine`."""
    top, lse, picked, mean = stats
    highest = torch.where(lse == -torch.inf, -torch.inf, top)  # a part that has nothing says nothing
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    highest = torch.where(highest == -torch.inf, 0.0, highest)
    below = top - highest  # from where this part counts
    whole_mean = None if mean is None else _Sum.apply((mean + below) * share, group)
    whole_picked = _Sum.apply(torch.where(mine, picked + below, 0.0), group)
    return highest, _LogSumExp.apply(lse + below, group), whole_picked, whole_mean

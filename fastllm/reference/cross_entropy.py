"""What cross-entropy needs to know of a row of logits, and the gradient of that.

    t = x, or c tanh(x / c) with a softcap c
    top = max_j t_j
    lse = log(sum_j exp(t_j - top))
    picked = t_y - top                     of probabilities: sum_j w_j q_j (t_j - top)
    mean = sum_j w_j (t_j - top) / V

    dx_j = (dlse exp(t_j - top - lse) + dpicked [j = y] + w_j dmean / V) (1 - (t_j / c)^2)

Everything is counted from the top, which cancels in the loss: logits of any size lose no digits. It is a constant to
the gradient. A target outside [0, V) picks nothing, 0. `fastllm/ops/cross_entropy.py` makes the loss of these.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cap(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap) if softcap else x


def _chosen(target: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Class indices that are surely inside, and whether they were."""
    inside = (target >= 0) & (target < size)
    return target.clamp(0, max(size - 1, 0))[:, None], inside


def cross_entropy_fwd(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,) int64 class indices, or (N, V) floating probabilities q
    weight: Tensor | None,  # (V,)
    softcap: float,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns top, lse, picked and mean, each (N,) in the accumulation dtype; mean is empty if it is not asked for."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    t = cap(logits.to(acc), softcap)
    if t.shape[1] == 0:
        zeros = t.new_zeros(t.shape[:1])
        return zeros, torch.full_like(zeros, -torch.inf), zeros.clone(), zeros.clone() if mean else t.new_empty(0)
    top = t.detach().amax(-1)
    top = torch.where(top == -torch.inf, 0.0, top)
    t = t - top[:, None]
    w = t.new_ones(()) if weight is None else weight.to(acc)
    lse = torch.logsumexp(t, -1)
    if target.is_floating_point():
        picked = (t * w * target.to(acc)).sum(-1)
    else:
        place, inside = _chosen(target, t.shape[1])
        picked = torch.where(inside, t.gather(1, place)[:, 0], 0.0)
    return top, lse, picked, (t * w).mean(-1) if mean else t.new_empty(0)


def cross_entropy_bwd(
    dlse: Tensor,
    dpicked: Tensor,
    dmean: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    top: Tensor,
    lse: Tensor,
    softcap: float,
) -> Tensor:
    """Returns the gradient of the logits."""
    if logits.shape[1] == 0:
        return logits.new_zeros(logits.shape)
    acc = torch.promote_types(logits.dtype, torch.float32)
    t = cap(logits.to(acc), softcap)
    w = t.new_ones(()) if weight is None else weight.to(acc)
    # A row whose lse has no gradient is left out altogether, whatever its logits are.
    idle = (dlse == 0) & ~lse.isfinite()
    t = t.masked_fill(idle[:, None], 0.0)
    grad = dlse[:, None] * torch.exp(t - torch.where(idle, 0.0, top + lse)[:, None])
    if target.is_floating_point():
        grad = grad + dpicked[:, None] * (w * target.to(acc))
    else:
        place, inside = _chosen(target, t.shape[1])
        grad = grad.scatter_add(1, place, torch.where(inside, dpicked, 0.0).to(acc)[:, None])
    if dmean is not None:
        grad = grad + w * dmean[:, None] / t.shape[1]
    if softcap:
        grad = grad * (1 - (t / softcap).square())
    return grad.to(logits.dtype)

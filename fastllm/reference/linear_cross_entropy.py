"""Cross-entropy of logits = input weight^T + bias, which are held whole here; the rest is `cross_entropy`'s.

d = gradient of the logits       dinput = d weight       dweight = d^T input       dbias = sum over rows of d
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.reference.cross_entropy import cross_entropy_bwd, cross_entropy_fwd


def _logits(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    acc = torch.promote_types(input.dtype, torch.float32)
    return torch.nn.functional.linear(input.to(acc), weight.to(acc), None if bias is None else bias.to(acc))


def linear_cross_entropy_fwd(
    input: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,) int64
    softcap: float,
    mean: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `cross_entropy_fwd`."""
    return cross_entropy_fwd(_logits(input, weight, bias), target, None, softcap, mean)


def linear_cross_entropy_bwd(
    dlse: Tensor,
    dpicked: Tensor,
    dmean: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    top: Tensor,
    lse: Tensor,
    softcap: float,
    chunk_size: int,
    wanted: list[bool],  # of the gradients of input, weight and bias
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients that are wanted; empty for the others."""
    logits = _logits(input, weight, bias)
    d = cross_entropy_bwd(dlse, dpicked, dmean, logits, target, None, top, lse, softcap)
    return (
        (d @ weight.to(d.dtype)).to(input.dtype) if wanted[0] else input.new_empty(0),
        (d.T @ input.to(d.dtype)).to(weight.dtype) if wanted[1] else weight.new_empty(0),
        d.sum(0).to(bias.dtype) if wanted[2] and bias is not None else weight.new_empty(0),
    )


def loss_gradients(
    scale: Tensor, top: Tensor, lse: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dlse, dpicked, dmean) of sum_i scale_i ((1 - e) (lse - picked) + e (lse - mean) + z (top + lse)^2)."""
    # A row without a share may hold anything.
    dlse = scale * (1 + 2 * z_loss * torch.where(scale == 0, 0.0, top + lse)) if z_loss else scale
    return dlse, scale * (label_smoothing - 1), scale * -label_smoothing if label_smoothing else None


def linear_cross_entropy_fwd_bwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,  # (N,), of each row's loss in the sum that is differentiated
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    chunk_size: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns top, lse, picked, mean, and the gradients as `linear_cross_entropy_bwd`."""
    stats = linear_cross_entropy_fwd(input, weight, bias, target, softcap, label_smoothing > 0, chunk_size)
    grads = loss_gradients(scale, *stats[:2], label_smoothing, z_loss)
    return *stats, *linear_cross_entropy_bwd(
        *grads, input, weight, bias, target, *stats[:2], softcap, chunk_size, wanted
    )  # fmt: skip

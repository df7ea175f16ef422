"""Stock PyTorch for each op, with the op's arguments: the rivals of the error budget."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def norm(*args, biased: bool, added: bool, dtype: torch.dtype | None = None):
    """Of layer_norm or rms_norm, after an addition or not; `dtype` is that of the sum, default the input's."""
    stock = F.layer_norm if biased else F.rms_norm
    if not added:
        return stock(*args)
    input, residual, *rest = args
    total = (input + residual).to(dtype).to(input.dtype) if dtype else input + residual
    return stock(total, *rest), total


def gelu(input, approximate="none", *, bias=None):
    return F.gelu(input if bias is None else input + bias, approximate=approximate)


def cross_entropy(input, target, *, z_loss=0.0, softcap=0.0, num_valid=None, inplace=False, **rest):
    """Stock PyTorch."""
    t = softcap * torch.tanh(input / softcap) if softcap else input
    reduction = rest.pop("reduction", "mean")
    rows = F.cross_entropy(t, target, reduction="none", **rest)
    valid = target != rest.get("ignore_index", -100)
    if z_loss:
        rows = rows + torch.where(valid, z_loss * torch.logsumexp(t, 1).square(), 0.0)
    if reduction == "none":
        return rows
    return rows.sum() / (valid.sum() if num_valid is None else num_valid) if reduction == "mean" else rows.sum()


def linear_cross_entropy(
    input, weight, target, *, linear_bias=None, z_loss=0.0, softcap=0.0, reduction="mean", num_valid=None, **rest
):
    """Stock PyTorch, with the logits."""
    rest.pop("chunk_size", None)
    t = F.linear(input, weight, linear_bias).flatten(0, -2)
    target, shape = target.flatten(), target.shape
    t = softcap * torch.tanh(t / softcap) if softcap else t
    rows = F.cross_entropy(t, target, reduction="none", **rest)
    valid = target != -100
    if z_loss:
        rows = rows + torch.where(valid, z_loss * torch.logsumexp(t, 1).square(), 0.0)
    if reduction == "none":
        return rows.view(shape)
    return rows.sum() / (valid.sum() if num_valid is None else num_valid) if reduction == "mean" else rows.sum()


def rotary(q, k, *, cos, sin, interleaved=False, position_ids=None):
    """What models do, in the dtype of q; (B, H, S, D)."""
    if position_ids is not None:
        cos, sin = (t[position_ids.expand(q.shape[0], q.shape[2])] for t in (cos, sin))
    elif cos.dim() == 2:
        cos, sin = (t[None, : q.shape[2]] for t in (cos, sin))
    cos, sin = cos[:, None].to(q.dtype), sin[:, None].to(q.dtype)
    half = cos.shape[-1]

    def turn(x):
        front, rest = x[..., : 2 * half], x[..., 2 * half :]
        if interleaved:
            a, b = front[..., ::2], front[..., 1::2]
            front = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = front.chunk(2, -1)
            front = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((front, rest), -1)

    return turn(q), turn(k)

"""Attention and its gradients, in the open.

    p_i = i + diagonal, diagonal = Sk - Sq if bottom_right else 0
    s_ij = scale q_i.k_j                     softcap c: c tanh(s_ij / c)
    t_ij = s_ij - slope |p_i - j| + mask_ij  -inf where mask_ij is False, or not p_i - left <= j <= p_i + right
    lse_i = log(sum_j exp(t_ij) + exp(sink)), P = exp(t - lse)
    o_i = sum_j P_ij Z_ij v_j                Z: dropout's 0 or 1 / (1 - rate)

Computed in float32, or in float64 for float64 input; results are rounded to the input's dtype. A row without a key
gives o = 0, lse = -inf and no gradient. Query head h reads key head h // (H / HK).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.reference._philox import keep_scale, kept, philox


def dropout(seed: Tensor, rate: float, batch: int, heads: int, seq_q: int, seq_k: int, first_batch: int = 0) -> Tensor:
    """Z, (batch, heads, seq_q, seq_k)."""

    def count(n: int) -> Tensor:
        return torch.arange(n, device=seed.device)

    i, j = count(seq_q)[:, None], count(seq_k)[None, :]
    row = (first_batch + count(batch)[:, None]) * heads + count(heads)
    return kept(philox(seed, i, j, row[..., None, None], torch.zeros_like(j))[0], rate) * keep_scale(rate)


def visible(seq_q: int, seq_k: int, left: int, right: int, bottom_right: bool, device) -> Tensor:
    """(Sq, Sk): whether query i may see key j by the window alone."""
    ahead = distance(seq_q, seq_k, bottom_right, device)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def distance(seq_q: int, seq_k: int, bottom_right: bool, device) -> Tensor:
    """(Sq, Sk): j - p_i."""
    diagonal = seq_k - seq_q if bottom_right else 0
    return torch.arange(seq_k, device=device)[None, :] - torch.arange(seq_q, device=device)[:, None] - diagonal


def _finite(lse: Tensor) -> Tensor:
    """For exp(t - lse): a row that sees nothing has lse -inf, and probabilities of zero."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


class Attention:
    """The intermediate values that forward and backward share; `q` (B, H, Sq, D), `k` and `v` (B, HK, Sk, D or DV);
    `draw` computes what `dropout` does."""

    def __init__(
        self, q, k, v, mask, sinks, slopes, seed, dropout_p, scale, left, right, softcap, bottom_right, first_batch=0,
        draw=dropout,
    ):  # fmt: skip
        acc = torch.promote_types(q.dtype, torch.float32)
        self.group, self.scale, self.softcap = q.shape[1] // k.shape[1], scale, softcap
        self.q, self.k, self.v = q.to(acc), *(x.to(acc).repeat_interleave(self.group, 1) for x in (k, v))
        (batch, heads, seq_q, _), seq_k = q.shape, k.shape[2]
        t = self.q @ self.k.mT * scale
        if softcap:
            self.tanh = torch.tanh(t / softcap)
            t = self.tanh * softcap
        if slopes is not None:
            t = t - slopes.to(acc)[..., None, None] * distance(seq_q, seq_k, bottom_right, q.device).abs()
        seen = visible(seq_q, seq_k, left, right, bottom_right, q.device)
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask
        elif mask is not None:
            t = t + mask.to(acc)
        self.t = t.masked_fill(~seen, -torch.inf)
        self.blind = (self.t == -torch.inf).all(-1)  # rows without a key
        self.sinks = None if sinks is None else sinks.to(acc)[:, None]
        self.z = None
        if dropout_p > 0:
            self.z = draw(seed, dropout_p, batch, heads, seq_q, seq_k, first_batch).to(acc)

    def forward(self) -> tuple[Tensor, Tensor]:
        if self.t.shape[-1] == 0:
            lse = self.t.new_full(self.t.shape[:-1], -torch.inf)
        else:  # with zeros for what would give the gradients' own gradients NaN
            lse = torch.logsumexp(self.t.masked_fill(self.blind[..., None], 0.0), -1).masked_fill(
                self.blind, -torch.inf
            )
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.sinks)
        p = self.probabilities(lse)
        return (p if self.z is None else p * self.z) @ self.v, lse

    def probabilities(self, lse: Tensor) -> Tensor:
        return torch.exp(self.t - _finite(lse)[..., None])

    def backward(self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor):
        """Returns dq, dk, dv, the gradient of t (B, H, Sq, Sk), and dsinks (H,) or None."""
        acc = self.q.dtype
        dout, lse = dout.to(acc), lse.to(acc)
        p = self.probabilities(lse)
        delta = (out.to(acc) * dout).sum(-1)
        if dlse is not None:
            delta = delta - dlse.to(acc)
        dp = dout @ self.v.mT
        dv = (p if self.z is None else p * self.z).mT @ dout
        if self.z is not None:
            dp = dp * self.z
        dt = p * (dp - delta[..., None])
        ds = dt * self.scale if not self.softcap else dt * (1 - self.tanh.square()) * self.scale
        dsinks = None if self.sinks is None else -(torch.exp(self.sinks - _finite(lse)) * delta).sum((0, 2))
        return ds @ self.k, self._by_group(ds.mT @ self.q), self._by_group(dv), dt, dsinks

    def _by_group(self, grad: Tensor) -> Tensor:
        return grad.unflatten(1, (-1, self.group)).sum(2)

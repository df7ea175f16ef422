"""Attention over packed sequences (reference: fastllm/reference/attention_varlen.py).

The kernels of `attention`, told by a table which sequence and which block of it each program owns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.kernels import attention
from fastllm.kernels.attention import Packed, Scores


def _dense(x: Tensor) -> Tensor:
    """(total, H, D) as (1, H, total, D)."""
    return x.unsqueeze(0).transpose(1, 2)


def _slopes(slopes: Tensor | None) -> Tensor | None:
    """With one more row, for the rows behind the last sequence."""
    if slopes is None or slopes.stride(0) == 0:
        return slopes
    return torch.cat([slopes, slopes.new_zeros(1, slopes.shape[1])])


def describe(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, seed: Tensor | None, scores: Scores) -> str:
    """Which of the kernels runs, where a chip has two; else nothing."""
    return attention.describe(_dense(q), _dense(k), _dense(v), None, _slopes(slopes), seed, scores)


def attention_varlen_fwd(
    out: Tensor,  # (total_q, H, DV)
    lse: Tensor,  # (H, total_q) float32
    q: Tensor,  # (total_q, H, D)
    k: Tensor,  # (total_k, HK, D)
    v: Tensor,  # (total_k, HK, DV)
    cu_q: Tensor,  # (N + 1,) int32 or int64
    cu_k: Tensor,  # (N + 1,)
    sinks: Tensor | None,
    slopes: Tensor | None,  # (N, H)
    seed: Tensor | None,
    scores: Scores,
) -> None:
    q, k, v, out = map(_dense, (q, k, v, out))
    attention.attention_fwd(out, lse[None], q, k, v, None, sinks, _slopes(slopes), seed, scores, Packed(cu_q, cu_k))


def attention_varlen_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dsinks: Tensor | None,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    scores: Scores,
) -> None:
    dq, dk, dv, dout, q, k, v, out = map(_dense, (dq, dk, dv, dout, q, k, v, out))
    attention.attention_bwd(
        dq, dk, dv, dsinks, dout, None if dlse is None else dlse[None], q, k, v, out, lse[None], None, sinks,
        _slopes(slopes), seed, scores, Packed(cu_q, cu_k),
    )  # fmt: skip

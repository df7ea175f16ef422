"""Attention over packed sequences, one after the other; the formulas are in `_attention`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastllm.reference._attention import Attention, dropout


def _dense(x: Tensor, rows: slice) -> Tensor:
    """Rows of (total, H, D) as (1, H, rows, D)."""
    return x[rows].transpose(0, 1)[None]


def _packed(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def _sequences(q, k, v, cu_q, cu_k, sinks, slopes, seed, *scores, draw) -> Iterator[tuple[slice, slice, Attention]]:
    """Every sequence, and the rows behind the last as one more, without keys."""
    bounds_q, bounds_k = [*cu_q.tolist(), q.shape[0]], cu_k.tolist()
    bounds_k.append(bounds_k[-1])
    if slopes is not None:
        slopes = torch.cat([slopes, slopes.new_zeros(1, slopes.shape[1])])
    for n in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[n : n + 2]), slice(*bounds_k[n : n + 2])
        slope = None if slopes is None else slopes[n : n + 1]
        dense = _dense(q, rows), _dense(k, keys), _dense(v, keys)
        yield rows, keys, Attention(*dense, None, sinks, slope, seed, *scores, n, draw=draw)  # type: ignore[misc, call-arg]


def attention_varlen_fwd(
    query: Tensor,  # (total_q, H, D)
    key: Tensor,  # (total_k, HK, D)
    value: Tensor,  # (total_k, HK, DV)
    cu_seq_q: Tensor,  # (N + 1,): sequence n is rows cu_seq_q[n] to cu_seq_q[n + 1]
    cu_seq_k: Tensor,  # (N + 1,)
    sinks: Tensor | None,  # (H,)
    alibi_slopes: Tensor | None,  # (N, H)
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    *scores,
    draw=dropout,
) -> tuple[Tensor, Tensor]:
    """Returns out (total_q, H, DV) in query's dtype and lse (H, total_q).

    Behind the last sequence they are what a query without keys gets.
    """
    acc = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(*query.shape[:2], value.shape[2])
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=acc)
    sequences = query, key, value, cu_seq_q, cu_seq_k, sinks, alibi_slopes, seed
    for rows, _, attention in _sequences(*sequences, *scores, draw=draw):
        part, part_lse = attention.forward()
        out[rows], lse[:, rows] = _packed(part).to(out.dtype), part_lse[0]
    return out, lse


def attention_varlen_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    *scores,
    draw=dropout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv and dsinks (empty if there are no sinks)."""
    acc = lse.dtype
    grads = [x.new_zeros(x.shape, dtype=acc) for x in (query, key, value)]
    dsinks = query.new_zeros(0) if sinks is None else sinks.new_zeros(sinks.shape, dtype=acc)
    sequences = query, key, value, cu_seq_q, cu_seq_k, sinks, alibi_slopes, seed
    for rows, keys, attention in _sequences(*sequences, *scores, draw=draw):
        part_dlse = None if dlse is None else dlse[None, :, rows]
        parts = attention.backward(_dense(dout, rows), part_dlse, _dense(out, rows), lse[None, :, rows])
        for grad, at, part in zip(grads, (rows, keys, keys), parts[:3], strict=True):
            grad[at] = _packed(part)
        if sinks is not None:
            dsinks += parts[4]
    dq, dk, dv = (grad.to(x.dtype) for grad, x in zip(grads, (query, key, value), strict=True))
    return dq, dk, dv, dsinks if sinks is None else dsinks.to(sinks.dtype)

"""Attention of new queries over a cache, sequence by sequence; the formulas are in `_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.reference._attention import Attention


def attention_kvcache_fwd(
    query: Tensor,  # (B, H, Sq, D)
    k_cache: Tensor,  # (B, HK, Smax, D)
    v_cache: Tensor,  # (B, HK, Smax, DV)
    lengths: Tensor,  # (B,): keys of sequence b are k_cache[b, :, : lengths[b]], the last query stands at the last
    sinks: Tensor | None,  # (H,)
    alibi_slopes: Tensor | None,  # (B, H)
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, H, Sq, DV) in query's dtype and lse (B, H, Sq)."""
    outs, lses = [], []
    for b, length in enumerate(lengths.tolist()):
        q, k, v = query[b : b + 1], k_cache[b : b + 1, :, :length], v_cache[b : b + 1, :, :length]
        slopes = None if alibi_slopes is None else alibi_slopes[b : b + 1]
        scores = (0.0, scale, window_left, window_right, softcap, True)
        out, lse = Attention(q, k, v, None, sinks, slopes, None, *scores).forward()
        outs.append(out.to(query.dtype))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)

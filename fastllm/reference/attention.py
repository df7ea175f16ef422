"""Attention over dense tensors; the formulas are in `_attention`."""

from __future__ import annotations

from torch import Tensor

from fastllm.reference._attention import Attention, dropout


def attention_fwd(
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, HK, Sk, D)
    value: Tensor,  # (B, HK, Sk, DV)
    attn_mask: Tensor | None,  # (B, H, Sq, Sk), bool or floating
    sinks: Tensor | None,  # (H,)
    alibi_slopes: Tensor | None,  # (B, H)
    seed: Tensor | None,  # (1,) int64
    mask_grad: bool,
    *scores,  # dropout_p, scale, window_left, window_right, softcap, bottom_right
    draw=dropout,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, H, Sq, DV) in query's dtype and lse (B, H, Sq) in the accumulation dtype."""
    out, lse = Attention(query, key, value, attn_mask, sinks, alibi_slopes, seed, *scores, draw=draw).forward()  # type: ignore[misc]
    return out.to(query.dtype), lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    mask_grad: bool,
    *scores,
    draw=dropout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv, the gradient of attn_mask if `mask_grad`, and of sinks; empty where there is none."""
    attention = Attention(query, key, value, attn_mask, sinks, alibi_slopes, seed, *scores, draw=draw)  # type: ignore[misc]
    dq, dk, dv, dmask, dsinks = attention.backward(dout, dlse, out, lse)
    dmask = dmask.to(attn_mask.dtype) if mask_grad and attn_mask is not None else query.new_empty(0)
    dsinks = query.new_empty(0) if sinks is None else dsinks.to(sinks.dtype)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dmask, dsinks

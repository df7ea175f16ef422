"""flash-attn's functions: change `from flash_attn import ...` to `from fastllm.compat.flash_attn import ...`.

Layout (batch, sequence, heads, head size), the diagonal at the bottom right, softcap before ALiBi, as flash-attn 2.
Fewer heads in k and v than in q mean grouped-query attention.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastllm.ops import attention, attention_kvcache, attention_varlen

__all__ = [
    "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache",
]  # fmt: skip


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _probabilities(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, None]:
    """What flash-attn calls (out, lse, S_dmask): lse has no gradient there, and S_dmask is for its own tests."""
    return out, lse.detach(), None


def flash_attn_func(
    q: Tensor,  # (B, Sq, H, D)
    k: Tensor,  # (B, Sk, HK, D)
    v: Tensor,  # (B, Sk, HK, DV)
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """As flash_attn.flash_attn_func: out (B, Sq, H, DV), or (out, lse (B, H, Sq), None) with return_attn_probs."""
    found = attention(
        _heads_first(q), _heads_first(k), _heads_first(v), None, dropout_p, causal, softmax_scale, True,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes, causal_align="bottom_right",
        deterministic=deterministic, return_lse=return_attn_probs,
    )  # fmt: skip
    if return_attn_probs:
        out, lse = found
        return _probabilities(out.transpose(1, 2), lse)
    return cast("Tensor", found).transpose(1, 2)


def flash_attn_kvpacked_func(
    q: Tensor,  # (B, Sq, H, D)
    kv: Tensor,  # (B, Sk, 2, HK, D)
    *args,
    **kwargs,
):
    """As flash_attn.flash_attn_kvpacked_func; further arguments as `flash_attn_func`."""
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,  # (B, S, 3, H, D)
    *args,
    **kwargs,
):
    """As flash_attn.flash_attn_qkvpacked_func; further arguments as `flash_attn_func`."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,  # (total_q, H, D)
    k: Tensor,  # (total_k, HK, D)
    v: Tensor,  # (total_k, HK, DV)
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
):
    """As flash_attn.flash_attn_varlen_func, without paged caches."""
    if block_table is not None:
        raise NotImplementedError("flash_attn_varlen_func: block_table (a paged cache) is not supported")
    found = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=causal, scale=softmax_scale,
        window_size=window_size, enable_gqa=True, dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes,
        deterministic=deterministic, return_lse=return_attn_probs,
    )  # fmt: skip
    return _probabilities(*found) if return_attn_probs else found


def flash_attn_varlen_kvpacked_func(
    q: Tensor,  # (total_q, H, D)
    kv: Tensor,  # (total_k, 2, HK, D)
    *args,
    **kwargs,
):
    """As flash_attn.flash_attn_varlen_kvpacked_func; further arguments as `flash_attn_varlen_func`."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,  # (total, 3, H, D)
    cu_seqlens: Tensor,
    max_seqlen: int,
    *args,
    **kwargs,
):
    """As flash_attn.flash_attn_varlen_qkvpacked_func; further arguments as `flash_attn_varlen_func`."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


def flash_attn_with_kvcache(
    q: Tensor,  # (B, Sq, H, D)
    k_cache: Tensor,  # (B, Smax, HK, D)
    v_cache: Tensor,  # (B, Smax, HK, DV)
    k: Tensor | None = None,  # (B, Snew, HK, D)
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
):
    """As flash_attn.flash_attn_with_kvcache, without rotary embedding, paging, left padding and batch indices."""
    for label, value in {
        "rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad, "block_table": block_table,
    }.items():  # fmt: skip
        if value is not None:
            raise NotImplementedError(f"flash_attn_with_kvcache: {label} is not supported")
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("flash_attn_with_kvcache: k and v need cache_seqlens, behind which they are written")
        cache_seqlens = torch.full((q.shape[0],), k_cache.shape[1], dtype=torch.int32, device=q.device)
    found = attention_kvcache(
        _heads_first(q), _heads_first(k_cache), _heads_first(v_cache), cache_seqlens,
        None if k is None else _heads_first(k), None if v is None else _heads_first(v), is_causal=causal,
        scale=softmax_scale, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        return_lse=return_softmax_lse,
    )  # fmt: skip
    if return_softmax_lse:
        out, lse = found
        return out.transpose(1, 2), lse
    return cast("Tensor", found).transpose(1, 2)

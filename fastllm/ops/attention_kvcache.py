"""Attention of new tokens over the keys and values of those before them, for generation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm.backends import Backend, Op, autocasts
from fastllm.ops import _attention, _sdpa
from fastllm.ops._arguments import DTYPES, number
from fastllm.ops._autograd import Function, run
from fastllm.ops.attention import attention
from fastllm.reference import attention_kvcache as reference
from fastllm.tracing import host_values

PROMPT = 64  # new tokens from which on the kernels of training are faster than those that share the cache out


def _fake(query, k_cache, v_cache, *rest):
    return _attention.empty_out(query, v_cache.shape[3]), _attention.empty_lse(query, query.shape[:3])


def _reference(*args):
    return _attention.into(_fake(*args), reference.attention_kvcache_fwd(*args))


def _triton_supports(query, k_cache, v_cache, lengths, sinks, slopes, scale, *rest):
    return _attention.triton_supports(query, k_cache, v_cache, False, scale)


def _triton(query, k_cache, v_cache, lengths, sinks, slopes, scale, left, right, softcap):
    args = (query, k_cache, v_cache, lengths, sinks, slopes)
    if not query.numel() or not k_cache.numel():
        return _reference(*args, scale, left, right, softcap)
    from fastllm.kernels import attention_kvcache as kernels

    out, lse = _fake(*args)
    scores = kernels.Scores(0.0, scale, left, right, softcap, True)
    kernels.attention_kvcache_fwd(out, lse, *args, scores)
    return out, lse


def _sdpa_supports(query, k_cache, v_cache, lengths, sinks, slopes, scale, left, right, softcap):
    return _attention.sdpa_supports(query, sinks, slopes, False, 0.0, scale, softcap)


def _sdpa_run(query, k_cache, v_cache, lengths, sinks, slopes, scale, left, right, softcap):
    outputs = out, lse = _fake(query, k_cache, v_cache)
    (batch, _, rows, _), kv_heads = query.shape, k_cache.shape[1]
    ends = lengths.tolist()
    window = (left, right)
    if rows == 1:  # heads that share keys become rows, so that the keys are read once; the slice below is the window
        query, out, lse = (x.squeeze(2).unflatten(1, (kv_heads, -1)) for x in (query, *outputs))
        window = (-1, -1)
    same = len(set(ends)) == 1
    for n in range(1 if same else batch):
        at = slice(None) if same else slice(n, n + 1)
        first = max(0, ends[n] - 1 - left) if rows == 1 and left >= 0 else 0
        k, v = (x[at, :, first : ends[n]] for x in (k_cache, v_cache))
        out[at] = _sdpa.forward(lse[at], query[at], k, v, None, scale, *window, True)
    return outputs


_fwd = Op(
    "attention_kvcache_fwd(Tensor query, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? sinks, "
    "Tensor? alibi_slopes, float scale, SymInt window_left, SymInt window_right, float softcap) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    backends=(
        Backend("triton", _triton_supports, _triton),
        Backend("torch", _sdpa_supports, _sdpa_run),
    ),
)


@_fwd.differentiate
class _AttentionKVCache(Function):
    @staticmethod
    def forward(q, k_cache, v_cache, lengths, sinks, slopes, scale, left, right, softcap):
        return _fwd.below_autograd(q, k_cache, v_cache, lengths, sinks, slopes, scale, left, right, softcap)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("attention_kvcache is for generation and has no gradient; use attention")


def attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over a cache of keys and values, with every sequence of the batch at its own length.

    With k and v, they are first written into the caches, in place, behind the cache_seqlens[b] tokens that are there,
    and attended to as well. The last query stands at the last key. A prompt of 64 tokens or more, of one length for
    all, goes through the kernels of `attention`.

    Args:
        q: (B, H, Sq, D), any strides; float32, bfloat16, float16; float64 on the CPU.
        k_cache, v_cache: (B, HK, Smax, D) and (B, HK, Smax, DV); H is a multiple of HK.
        cache_seqlens: (B,) int32 or int64, or one int: the tokens in the cache, without k and v. On a GPU it is not
            checked against the cache, for which the host would have to wait; what lies outside is not read.
        k, v: (B, HK, Snew, D) and (B, HK, Snew, DV), or None. cache_seqlens + Snew must not exceed Smax. Under
            autocast they and q are cast to the caches' dtype, in which the result is then.
        is_causal: a query sees keys up to its own position.
        scale, window_size, softcap, sinks, alibi_slopes: as `attention`.
        return_lse: also return lse.

    Returns:
        out (B, H, Sq, DV), with return_lse also lse (B, H, Sq). Not differentiable. The caller counts cache_seqlens up.

    Raises:
        TypeError: for other dtypes or several, and what is no number; ValueError: for shapes, devices or numbers
            that do not fit.
    """
    name = "attention_kvcache"
    if isinstance(q, Tensor) and isinstance(k_cache, Tensor) and autocasts(q.device.type):
        q = q.to(k_cache.dtype)
        k, v = (x.to(k_cache.dtype) if isinstance(x, Tensor) else x for x in (k, v))
        with torch.autocast(q.device.type, enabled=False):
            return attention_kvcache(
                q, k_cache, v_cache, cache_seqlens, k, v, is_causal=is_causal, scale=scale, window_size=window_size,
                softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, return_lse=return_lse,
            )  # fmt: skip
    softcap = 0.0 if softcap is None else number(name, "softcap", softcap)
    if sinks is alibi_slopes is None and softcap == 0 and not return_lse and window_size == (-1, -1):
        out = _stock(q, k_cache, v_cache, cache_seqlens, k, v, is_causal, scale)
        if out is not None:
            return out
    _attention.check_tensors(name, "BHSD", q=q, k_cache=k_cache, v_cache=v_cache)
    _attention.check_heads(name, q, k_cache, v_cache, 1, True)
    batch = q.shape[0]
    if k_cache.shape[0] != batch:
        raise ValueError(f"{name}: q has batch size {batch}, k_cache {k_cache.shape[0]}")
    if (k is None) != (v is None):
        raise ValueError(f"{name}: k and v go together")
    new = 0
    if k is not None and v is not None:
        _check_new(q, k_cache, v_cache, k, v)
        new = k.shape[2]
    length = cache_seqlens if isinstance(cache_seqlens, int) else None
    if length is not None:
        _check_length(length, new, k_cache.shape[2])
        cache_seqlens = torch.full((batch,), length, dtype=torch.int32, device=q.device)
    if not isinstance(cache_seqlens, Tensor) or cache_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: cache_seqlens must be an int, or an int32 or int64 tensor, got {cache_seqlens!r}")
    if cache_seqlens.shape != (batch,) or cache_seqlens.device != q.device:
        raise ValueError(
            f"{name}: cache_seqlens must have shape ({batch},) on {q.device}, got {tuple(cache_seqlens.shape)} on "
            f"{cache_seqlens.device}"
        )
    if length is None and (values := host_values(cache_seqlens)) is not None:
        for length_b in values.flatten().tolist():
            _check_length(length_b, new, k_cache.shape[2])
    left, right = _attention.check_window(name, window_size, is_causal)
    _, scale, softcap, alibi_slopes = _attention.check_extras(
        name, q, q.shape[1], batch, 0.0, scale, softcap, sinks, alibi_slopes
    )
    inputs = (q, k_cache, v_cache, k, v, sinks)
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if length is not None and q.shape[2] >= PROMPT and not differentiated:
        if k is not None and v is not None:
            with torch.no_grad():
                k_cache[:, :, length : length + new], v_cache[:, :, length : length + new] = k, v
        k_cache, v_cache = (cache[:, :, : length + new] for cache in (k_cache, v_cache))
        return attention(
            q, k_cache, v_cache, scale=scale, window_size=(left, right), softcap=softcap, sinks=sinks,
            alibi_slopes=alibi_slopes, causal_align="bottom_right", enable_gqa=True, return_lse=return_lse,
        )  # fmt: skip
    if k is not None and v is not None:
        cache_seqlens = _append(k_cache, v_cache, k, v, cache_seqlens)
    out, lse = run(_fwd, q, k_cache, v_cache, cache_seqlens, sinks, alibi_slopes, scale, left, right, softcap)
    return (out, lse) if return_lse else out


def _stock(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor | int, k: Tensor | None, v: Tensor | None,
    is_causal: bool, scale: float | None,
) -> Tensor | None:  # fmt: skip
    """What stock attention on a CPU can do in one call, without the price of the checks and the op around it, which is
    that of a short cache; None if these arguments are anything else, or wrong."""
    tensors = [q, k_cache, v_cache, *(x for x in (k, v) if x is not None)]
    if not isinstance(length, int) or not all(isinstance(x, Tensor) and x.dim() == 4 for x in tensors):
        return None
    if not _attention.stock_cpu(q, k_cache, v_cache, scale):
        return None
    (batch, heads, rows, size), kept = q.shape, k_cache.shape
    new = None if k is None else (batch, kept[1], k.shape[2], size)
    end = length + (0 if new is None else new[2])
    fits = (
        q.dtype in DTYPES
        and kept == v_cache.shape == (batch, kept[1], kept[2], size)
        and heads % kept[1] == 0
        and length >= 0
        and 0 < end <= kept[2]
        and rows in (1, end)  # of one query, or of as many as there are keys, causal means the same to torch
        and ((k is None and v is None) or (v is not None and new == k.shape == v.shape))  # type: ignore[union-attr]
        and all(x.dtype == q.dtype and x.device == q.device for x in tensors)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    )
    if not fits:
        return None
    if k is not None and v is not None:
        k_cache[:, :, length:end] = k
        v_cache[:, :, length:end] = v
    return F.scaled_dot_product_attention(
        q,
        k_cache[:, :, :end],
        v_cache[:, :, :end],
        is_causal=is_causal and rows > 1,
        scale=scale,
        enable_gqa=heads != kept[1],
    )


def _check_new(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor) -> None:
    _attention.check_tensors("attention_kvcache", "BHSD", q=q, k=k, v=v)
    for label, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new.shape[:2] != cache.shape[:2] or new.shape[3] != cache.shape[3]:
            raise ValueError(
                f"attention_kvcache: {label} must have the cache's shape {tuple(cache.shape)} but for its length, got "
                f"{tuple(new.shape)}"
            )
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"attention_kvcache: k has {k.shape[2]} tokens, v {v.shape[2]}")


def _check_length(length: int, new: int, room: int) -> None:
    if not 0 <= length <= room - new:
        behind = f" and {new} new ones" if new else ""
        raise ValueError(
            f"attention_kvcache: cache_seqlens of {length}{behind} do not fit into a cache of {room} tokens"
        )


def _append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Writes k and v behind the first `lengths` tokens; returns the new lengths."""
    count = k.shape[2]
    places = lengths.long()[:, None] + torch.arange(count, device=k.device)
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    with torch.no_grad():
        k_cache.transpose(1, 2)[rows, places] = k.transpose(1, 2)
        v_cache.transpose(1, 2)[rows, places] = v.transpose(1, 2)
    return lengths + count

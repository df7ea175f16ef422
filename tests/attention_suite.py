"""Inputs, the eager rival and the error-budget checks that the attention tests share."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm import ops
from fastllm.reference import _attention as reference
from fastllm.testing import check_op, make

# Every P = exp(t - lse) is off by the rounding of lse, which is stored: |lse| (5 to 8 here) times that of one.
ROUNDINGS = 16
# dt = P (do.v - delta) is zero for a row with one key, the difference of two numbers of this size.
CANCELLING = 4.0
# What each feature adds to a call; `heads` and the shape are filled in by `features`.
FEATURES = (
    "causal", "window", "bool_mask", "float_mask", "softcap", "sinks", "alibi", "dropout", "gqa", "bottom_right",
)  # fmt: skip
PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if pair != ("bool_mask", "float_mask")]
# Every pair is in one of these: a kernel compiled for each group instead of each pair.
GROUPS = [
    ("causal", "window", "bool_mask", "softcap"),
    ("causal", "float_mask", "sinks", "alibi"),
    ("causal", "dropout", "gqa", "bottom_right"),
    ("window", "bool_mask", "sinks", "dropout"),
    ("window", "bool_mask", "alibi", "gqa"),
    ("window", "float_mask", "softcap", "bottom_right"),
    ("float_mask", "softcap", "sinks", "gqa"),
    ("float_mask", "softcap", "alibi", "dropout"),
    ("bool_mask", "sinks", "alibi", "bottom_right"),
]


def eager_attention(
    q, k, v, mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *, window_size=(-1, -1),
    softcap=0.0, sinks=None, alibi_slopes=None, causal_align="top_left", return_lse=False, first_batch=0, seed=None,
):  # fmt: skip
    """What a PyTorch user would write, in the dtype of its inputs."""
    group, (seq_q, seq_k) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    t = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        t = torch.tanh(t / softcap) * softcap
    corner = causal_align == "bottom_right"
    if alibi_slopes is not None:
        t = t - alibi_slopes.to(t)[..., None, None] * reference.distance(seq_q, seq_k, corner, q.device).abs()
    left, right = window_size
    seen = reference.visible(seq_q, seq_k, left, 0 if is_causal else right, corner, q.device)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        t = t + mask.to(t)
        seen = seen & (mask > -torch.inf)
    some = seen.any(-1, keepdim=True)
    t = t.masked_fill(~seen & some, -torch.inf).masked_fill(~some, 0.0)
    if sinks is not None:
        sink = sinks.to(t)[:, None, None].expand(*t.shape[:-1], 1)
        both = torch.cat([t.masked_fill(~some, -torch.inf), sink], -1)
        p = torch.softmax(both, -1)[..., :-1]
        lse = torch.logsumexp(both.float() if t.dtype != torch.float64 else both, -1)
    else:
        p = torch.softmax(t, -1) * some
        lse = torch.logsumexp(t.float() if t.dtype != torch.float64 else t, -1).masked_fill(~some[..., 0], -torch.inf)
    if dropout_p:
        if seed is None:
            seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
        p = p * reference.dropout(seed, dropout_p, *q.shape[:2], seq_q, seq_k, first_batch).to(p)
    out = p @ v
    return (out, lse) if return_lse else out


def stock_attention(q, k, v, mask, *, is_causal=False, causal_align="top_left", sinks, return_lse):
    """torch's function on the mask of what is visible."""
    assert (mask, sinks, return_lse) == (None, None, False)
    right = 0 if is_causal else -1
    seen = reference.visible(q.shape[2], k.shape[2], -1, right, causal_align == "bottom_right", q.device)
    return F.scaled_dot_product_attention(q, k, v, seen)


def features(names, batch: int, heads: int, seq_q: int, seq_k: int, device: str = "cpu") -> dict:
    """Keyword arguments of `attention` for the named features."""
    found: dict = {}
    for name in names:
        found |= {
            "causal": lambda: {"is_causal": True},
            "window": lambda: {"window_size": (seq_k // 3, 2)},
            "bool_mask": lambda: {"attn_mask": make((batch, 1, seq_q, seq_k), torch.float32, device, seed=90) > -0.5},
            "float_mask": lambda: {"attn_mask": make((heads, seq_q, seq_k), torch.float32, device, seed=91)},
            "softcap": lambda: {"softcap": 1.5},
            "sinks": lambda: {"sinks": make((heads,), torch.float32, device, seed=92)},
            "alibi": lambda: {"alibi_slopes": make((heads,), torch.float32, device, seed=93).abs()},
            "dropout": lambda: {"dropout_p": 0.3},
            "gqa": lambda: {"enable_gqa": True},
            "bottom_right": lambda: {"causal_align": "bottom_right"},
        }[name]()
    return found


def check(
    names=(),
    *,
    shape: tuple[int, int, int, int] = (1, 2, 40, 40),  # B, H, Sq, Sk
    size: int = 16,
    value_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    lse: bool = True,
    bshd: bool = False,
    layout: str = "contiguous",
    grad_layout: str = "contiguous",
    rival: Callable = eager_attention,
    **more,
) -> None:
    """Output, lse and gradients of q, k, v and sinks are within the budget that `rival` leaves, of the reference in
    float64."""
    batch, heads, seq_q, seq_k = shape
    kv_heads = 1 if "gqa" in names else heads
    extras = features(names, batch, heads, seq_q, seq_k, device) | more
    sinks = extras.pop("sinks", None)

    def draw(seed: int, heads: int, rows: int, width: int) -> Tensor:
        if bshd:
            return make((batch, rows, heads, width), dtype, device, seed, layout).transpose(1, 2)
        return make((batch, heads, rows, width), dtype, device, seed, layout)

    args = [draw(1, heads, seq_q, size), draw(2, kv_heads, seq_k, size), draw(3, kv_heads, seq_k, value_size or size)]
    args += [] if sinks is None else [sinks.to(dtype)]

    def call(fn: Callable, q, k, v, sinks=None):
        torch.manual_seed(11)
        given = dict(extras)
        mask = given.pop("attn_mask", None)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        return fn(q, k, v, mask, sinks=sinks, return_lse=lse, **given)

    ours, eager = functools.partial(call, ops.attention), functools.partial(call, rival)
    check_op(ours, eager, args, grad_layout=grad_layout, roundings=ROUNDINGS, cancelling=CANCELLING)


def cumulative(lengths, device: str = "cpu", dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


def eager_varlen(q, k, v, cu_q, cu_k, *, return_lse=False, sinks=None, alibi_slopes=None, **extras):
    """Sequence by sequence."""
    seed = None
    if extras.get("dropout_p"):
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    outs, lses, bounds_q, bounds_k = [], [], cu_q.tolist(), cu_k.tolist()
    for n in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[n : n + 2]), slice(*bounds_k[n : n + 2])
        dense = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[n : n + 1]
        if rows.start == rows.stop or keys.start == keys.stop:
            out = q[rows][..., :1] * 0 + v.new_zeros(v.shape[-1])
            lse = q.new_full((q.shape[1], rows.stop - rows.start), -torch.inf, dtype=torch.float32)
            lse = lse if sinks is None else sinks[:, None].expand_as(lse).to(lse)
        else:
            out, lse = eager_attention(*dense, sinks=sinks, alibi_slopes=slopes, causal_align="bottom_right",
                                       return_lse=True, seed=seed, first_batch=n, **extras)  # fmt: skip
            out, lse = out[0].transpose(0, 1), lse[0]
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    return (out, lse) if return_lse else out


def check_varlen(
    lengths_q,
    lengths_k=None,
    names=(),
    *,
    heads: int = 2,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    lse: bool = True,
    **more,
) -> None:
    lengths_k = lengths_k or lengths_q
    kv_heads = 1 if "gqa" in names else heads
    cu_q, cu_k = cumulative(lengths_q, device), cumulative(lengths_k, device)
    extras = (
        features([n for n in names if n != "bottom_right"], 1, heads, max(lengths_q), max(lengths_k), device) | more
    )
    sinks = extras.pop("sinks", None)
    args = [make((int(cu_q[-1]), heads, size), dtype, device, 1)]
    args += [make((int(cu_k[-1]), kv_heads, size), dtype, device, seed) for seed in (2, 3)]
    args += [] if sinks is None else [sinks.to(dtype)]

    def ours(q, k, v, sinks=None):
        torch.manual_seed(11)
        return ops.attention_varlen(
            q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), sinks=sinks, return_lse=lse, **extras
        )

    def eager(q, k, v, sinks=None):
        torch.manual_seed(11)
        return eager_varlen(q, k, v, cu_q, cu_k, sinks=sinks, return_lse=lse, **extras)

    check_op(ours, eager, args, roundings=ROUNDINGS, cancelling=CANCELLING)


def eager_kvcache(q, k_cache, v_cache, cache_seqlens, k=None, v=None, *, return_lse=False, **extras):
    """Every sequence on the part of the cache that is its own, and what is appended to it."""
    parts = []
    for b, length in enumerate(cache_seqlens.tolist()):
        keys, values = (
            cache[b : b + 1, :, :length]
            if more is None
            else torch.cat([cache[b : b + 1, :, :length], more[b : b + 1]], 2)
            for cache, more in ((k_cache, k), (v_cache, v))
        )
        parts.append(
            eager_attention(q[b : b + 1], keys, values, causal_align="bottom_right", return_lse=True, **extras)
        )
    out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
    return (out, lse) if return_lse else out


def check_kvcache(
    lengths,
    names=(),
    *,
    rows: int = 1,
    new: int = 0,
    heads: int = 4,
    kv_heads: int = 2,
    capacity: int = 100,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bshd: bool = False,
    **more,
) -> None:
    """Every sequence against eager attention on the part of the cache that is its own; appended keys are written."""
    import fastllm
    from fastllm.testing import assert_within_budget

    batch = len(lengths)

    def draw(seed: int, heads: int, length: int) -> Tensor:
        if bshd:
            return make((batch, length, heads, size), dtype, device, seed).transpose(1, 2)
        return make((batch, heads, length, size), dtype, device, seed)

    q, caches = draw(1, heads, rows), (draw(2, kv_heads, capacity), draw(3, kv_heads, capacity))
    added = (draw(4, kv_heads, new), draw(5, kv_heads, new)) if new else (None, None)
    extras = {"is_causal": False} | features(names, 1, heads, rows, capacity, device) | more
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    used = [cache.clone() for cache in caches]
    out, lse = ops.attention_kvcache(q, *used, seqlens, *added, return_lse=True, **extras)
    double = [None if x is None else x.double() for x in (q, *caches, *added)]
    with fastllm.use_backend("reference"):
        truth = ops.attention_kvcache(*double[:3], seqlens, *double[3:], return_lse=True, **extras)
    rival = eager_kvcache(q, *caches, seqlens, *added, return_lse=True, **extras)
    for b, length in enumerate(lengths):
        for cache, before, more in zip(used, caches, added, strict=True):
            assert torch.equal(cache[b, :, :length], before[b, :, :length])
            assert more is None or torch.equal(cache[b, :, length : length + new], more[b])
    assert_within_budget(out, truth[0], rival[0])
    assert_within_budget(lse, truth[1], rival[1], name="lse")

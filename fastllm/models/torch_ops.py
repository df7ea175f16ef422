"""Stock PyTorch under the names of `fastllm.ops` and `fastllm.nn`, for models with ops="torch": what a user would
otherwise run, to compare with. Only what the models call, and only the arguments that they give."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm(norm: Any, x: Tensor, residual: Tensor | None, dropout: float) -> Any:
    """norm(x), or with a residual (norm(sum), sum), sum = dropout(x) + residual."""
    if residual is None:
        return norm(x)
    total = (F.dropout(x, dropout) if dropout else x) + residual
    return norm(total), total


class LayerNorm(torch.nn.LayerNorm):
    def forward(self, input: Tensor, residual: Tensor | None = None, dropout: float = 0.0) -> Any:
        """As `fastllm.nn.LayerNorm`."""
        return add_norm(super().forward, input, residual, dropout)


class RMSNorm(torch.nn.RMSNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None, dropout: float = 0.0) -> Any:
        """As `fastllm.nn.RMSNorm`."""
        return add_norm(super().forward, x, residual, dropout)


def norm(module: Any, x: Tensor) -> Tensor:
    """`module` as torch's own class computes it."""
    stock = torch.nn.LayerNorm if isinstance(module, torch.nn.LayerNorm) else torch.nn.RMSNorm
    return stock.forward(module, x)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    causal_align: str = "top_left",
) -> Tensor:
    """As `fastllm.ops.attention`."""
    seq_q, seq_k = query.shape[2], key.shape[2]
    diagonal = seq_k - seq_q if causal_align == "bottom_right" else 0
    left, right = window_size
    own = not softcap and sinks is None and attn_mask is None and diagonal == 0 and (left, right) == (-1, -1)
    if not own:  # what torch's does not know is a mask
        right = 0 if is_causal else right
        is_causal = False
        ahead = torch.arange(seq_k, device=query.device) - torch.arange(seq_q, device=query.device)[:, None] - diagonal
        for limited, seen in ((left >= 0, ahead >= -left), (right >= 0, ahead <= right)):
            if limited:
                attn_mask = _both(attn_mask, seen)
    if not softcap and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(-1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    probabilities = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., :seq_k]
    return F.dropout(probabilities, dropout_p) @ value


def _both(mask: Tensor | None, seen: Tensor) -> Tensor:
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def attention_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: int, k: Tensor, v: Tensor, **options: Any
) -> Tensor:
    """As `fastllm.ops.attention_kvcache`, for sequences of one length."""
    q, k, v = (x.to(k_cache.dtype) for x in (q, k, v))  # under autocast they come in another dtype
    end = cache_seqlens + q.shape[2]
    k_cache[:, :, cache_seqlens:end] = k
    v_cache[:, :, cache_seqlens:end] = v
    gqa = q.shape[1] != k_cache.shape[1]
    options = {"is_causal": q.shape[2] > 1, "causal_align": "bottom_right", "enable_gqa": gqa, **options}
    return attention(q, k_cache[:, :, :end], v_cache[:, :, :end], **options)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `fastllm.ops.rotary`; tables (S, D / 2) or (B, S, D / 2)."""
    cos, sin = (x.unsqueeze(-3) for x in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turned(q), turned(k)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(input, approximate=approximate)


def swiglu(gate: Tensor) -> Tensor:
    gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(gate: Tensor) -> Tensor:
    gate, up = gate.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    """As `fastllm.ops.linear_cross_entropy`."""
    return cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)


def cross_entropy(input: Tensor, target: Tensor, *, dtype: torch.dtype, **options: Any) -> Tensor:
    """As `fastllm.ops.cross_entropy`, of logits with the classes last."""
    return F.cross_entropy(input.flatten(0, -2).to(dtype), target.flatten(), **options)

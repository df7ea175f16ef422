"""Attention of transformers' models, by way of its AttentionInterface and AttentionMaskInterface."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm import ops

NAME = "fastllm"
"""Of the attention implementation, as `set_attn_implementation` takes it."""


def register() -> bool:
    """Makes NAME known to transformers: attention and mask together, for without its mask function a model would hand
    over no mask, and lose causality and padding. Returns whether transformers is there."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        return False
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # boolean, or None where is_causal says it all
    return True


def attention(
    module: nn.Module,
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, HK, Sk, D)
    value: Tensor,  # (B, HK, Sk, DV)
    attention_mask: Tensor | None,  # (B or 1, H or 1, Sq, Sk), boolean or added
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls as an attention function.

    Returns (B, Sq, H, DV), and the weights where they are asked for."""
    if kwargs.get("output_attentions"):
        return _with_weights(
            module, query, key, value, attention_mask, dropout, scaling, position_bias, softcap, s_aux, **kwargs
        )
    rows = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # A single query with a cache sees all of it. Without a mask the queries are the first positions, as torch aligns
    # them, also where a static cache is longer.
    causal = rows > 1 and attention_mask is None and bool(is_causal)
    if causal and key.shape[2] > rows:
        key, value = key[:, :, :rows], value[:, :, :rows]
        position_bias = None if position_bias is None else position_bias[..., :rows]
    mask = attention_mask
    if mask is not None:
        mask = mask[..., : key.shape[2]]
    if position_bias is not None:
        mask, causal = _biased(position_bias, mask, causal, query, key), False
    grouped = query.shape[1] != key.shape[1]
    if dropout and query.device.type == "cpu" and softcap is None and s_aux is None:
        # Only the reference drops out on a CPU; torch's own attention is faster.
        out = F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
    else:
        out = ops.attention(  # type: ignore[assignment]
            query, key, value, mask, dropout, is_causal=causal, scale=scaling, enable_gqa=grouped,
            softcap=softcap or 0.0, sinks=s_aux,
        )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _biased(bias: Tensor, mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor:
    """One mask to add, of a learned bias, the mask and causality."""
    if mask is not None and mask.dtype != torch.bool:
        return bias + mask
    if causal:
        rows, columns = query.shape[2], key.shape[2]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
    return bias.to(query.dtype) if mask is None else torch.where(mask, bias, torch.finfo(bias.dtype).min)


def _with_weights(module, query, key, value, mask, dropout, scaling, position_bias, softcap, sinks, **kwargs):
    """The model's own attention in plain PyTorch: no fused one has the weights."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(f"{type(module).__name__} has no attention that gives its weights")
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    elif mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        mask = torch.full((query.shape[2], key.shape[2]), torch.finfo(query.dtype).min, device=query.device)
        mask = mask.to(query.dtype).triu(1 + key.shape[2] - query.shape[2])
    optional = {"position_bias": position_bias, "softcap": softcap, "s_aux": sinks}
    kwargs |= {name: value for name, value in optional.items() if value is not None}
    return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def reason_against(model: Any) -> str | None:
    """Why a transformers model cannot take this attention, or None, and NAME is known to transformers."""
    can = getattr(model, "_can_set_attn_implementation", None)
    if can is None or not can():
        return "its attention does not go through transformers' AttentionInterface"
    if model.config._attn_implementation == NAME:
        return "replaced already"
    return None if register() else "transformers is not installed"


def switch(model: Any) -> Callable[[], None]:
    """Sets the model's attention to NAME; returns what sets it back."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in list(configs.values()):
        for name in getattr(config, "sub_configs", {}):
            inner = getattr(config, name, None)
            if inner is not None:
                configs[id(inner)] = inner
    name = "_attn_implementation_internal"
    before = [(config, getattr(config, name)) for config in configs.values() if hasattr(config, name)]
    model.set_attn_implementation(NAME)

    def undo() -> None:
        for config, value in before:
            setattr(config, name, value)

    return undo

"""torch.nn.MultiheadAttention, where it is not asked for its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm.patching import _probe
from fastllm.patching._attention import dot_product
from fastllm.patching._forward import Forward, bind
from fastllm.patching._probe import Differs

OPS = ("attention",)


def matches(module: nn.Module) -> bool:
    return type(module) is nn.MultiheadAttention


def forward(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch's; so are calls that ask for weights, which no fused attention has, that are not batched, and those
    with masks that torch refuses."""
    odd = any(m is not None and m.dtype not in (torch.bool, query.dtype) for m in (key_padding_mask, attn_mask))
    if attn_mask is not None:
        rows = query.shape[0], key.shape[0]
        if module.batch_first and query.dim() == 3:
            rows = query.shape[1], key.shape[1]
        odd |= tuple(attn_mask.shape[-2:]) != rows
    if odd or need_weights or query.dim() != 3 or query.is_nested or (is_causal and attn_mask is None):
        return type(module).forward(
            module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    q, k, v = _projected(module, query, key, value)
    if not module.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    batch, heads = q.shape[0], module.num_heads
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    causal = is_causal and key_padding_mask is None  # as torch takes the hint
    mask = None if causal or attn_mask is None else attn_mask
    if mask is not None and mask.dim() == 3:
        mask = mask.view(batch, heads, *mask.shape[1:])
    padding = None if key_padding_mask is None else key_padding_mask[:, None, None]
    out = dot_product(q, k, v, _keep(mask, padding, q.dtype), module.dropout if module.training else 0.0, causal)
    out = out.transpose(1, 2).flatten(2)
    out = F.linear(out if module.batch_first else out.transpose(0, 1), module.out_proj.weight, module.out_proj.bias)
    return out, None


def _projected(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    weight, bias = module.in_proj_weight, module.in_proj_bias
    if weight is not None and query is key and key is value:
        return list(F.linear(query, weight, bias).chunk(3, -1))
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if weight is None else weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]  # type: ignore[misc]


def _keep(mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One mask as scaled_dot_product_attention takes it, of two in which True, or a number added, hides."""
    given = [m for m in (mask, padding) if m is not None]
    if not given:
        return None
    if all(m.dtype == torch.bool for m in given):
        return ~functools.reduce(torch.logical_or, given)
    added = [
        torch.zeros_like(m, dtype=dtype).masked_fill_(m, -torch.inf) if m.dtype == torch.bool else m.to(dtype)
        for m in given
    ]
    return functools.reduce(torch.add, added)


def find(module: nn.MultiheadAttention, only: bool | None = None) -> bool:
    """Raises Differs unless the replacement computes what the module does, in every kind of call."""
    if module.bias_k is not None or module.add_zero_attn:
        raise Differs("it adds keys of its own")
    weight = module.out_proj.weight
    sizes = module.embed_dim, module.kdim, module.vdim
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, sum(sizes), generator=generator).to(weight.device, weight.dtype)
    causal = torch.ones(4, 4, dtype=torch.bool, device=x.device).triu(1)
    padding = torch.zeros(4, 4, dtype=torch.bool, device=x.device)
    padding[1:, 3] = True
    calls: list[dict[str, Any]] = [{}, {"attn_mask": causal, "is_causal": True}]
    calls.append({"attn_mask": causal, "key_padding_mask": padding})

    def call(function: Callable, alike: bool, **masks: Any) -> Callable:
        def run(x: Tensor) -> Tensor:
            q, k, v = x.split(sizes, -1)
            # All of x counts, so that it has a gradient.
            q, k, v = ((q + k + v) / 2,) * 3 if alike else (q, k, v)
            return function(q, k, v, need_weights=False, **masks)[0]

        return run

    for alike in (True, False) if len(set(sizes)) == 1 else (False,):
        for masks in calls:

            def truth(x: Tensor, *parameters: Tensor, alike=alike, masks=masks) -> Tensor:
                return call(_probe.functional(module, parameters), alike, **masks)(x)

            with _probe.dropping(module, 0.0):
                _probe.check(
                    module,
                    call(functools.partial(forward, module), alike, **masks),
                    truth,
                    x,
                    call(functools.partial(type(module).forward, module), alike, **masks),
                )
    return True


def replacement(module: nn.MultiheadAttention, found: bool) -> Forward:
    return bind(module, forward)


def op(found: bool) -> str:
    return OPS[0]

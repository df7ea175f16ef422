"""The choice of the next token."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_token(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token a row from softmax(logits / temperature), cut off by `top_k` and then by `top_p`.

    Args:
        logits_BV: (B, V), of any floating dtype.
        temperature: 0 takes the most likely token; 1 is the model's own distribution.
        top_k: keep the k most likely tokens, and what ties with the last of them.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least this (nucleus sampling, Holtzman
            et al., 2020).
        generator: on the logits' device; None draws from torch's global one.

    Returns:
        (B,) int64.

    Raises:
        ValueError: for a temperature below 0, a top_k below 1 or a top_p outside (0, 1].
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None:
        smallest_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    probs_BV = logits_BV.softmax(-1)
    if top_p is not None:
        sorted_BV, order_BV = probs_BV.sort(descending=True)
        mass_before_BV = sorted_BV.cumsum(-1) - sorted_BV
        sorted_BV = sorted_BV.masked_fill(mass_before_BV >= top_p, 0)
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV)
    return torch.multinomial(probs_BV, 1, generator=generator).squeeze(1)

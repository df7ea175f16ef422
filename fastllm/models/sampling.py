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
        temperature: 0 takes the most likely token; 1 is the model's own distribution. None between 0 and 1.2e-38, the
            smallest normal float32.
        top_k: keep the k most likely tokens, and what ties with the last of them.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least this (nucleus sampling, Holtzman
            et al., 2020).
        generator: on the logits' device; None draws from torch's global one.

    Returns:
        (B,) int64.

    Raises:
        ValueError: for a temperature out of range, a top_k below 1 or a top_p outside (0, 1].
        FloatingPointError: for a row without a largest finite logit: the model gives NaN or infinity.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    if 0 < temperature < (least := torch.finfo(torch.float32).tiny):
        raise ValueError(f"temperature must be 0 or at least {least:.2g}, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    logits_BV = logits_BV.float()
    largest_B1 = logits_BV.amax(-1, keepdim=True)
    if not largest_B1.isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    if temperature == 0:
        return logits_BV.argmax(-1)
    # The largest is 0 now, and stays so at any temperature, where a quotient of its own could be infinite.
    logits_BV = (logits_BV - largest_B1) / temperature
    if top_k is not None:
        smallest_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    probs_BV = logits_BV.softmax(-1)
    if top_p is not None:
        sorted_BV, order_BV = probs_BV.sort(descending=True)
        dropped_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
        dropped_BV[:, 0] = False  # where top_p is 0 in float32
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV.masked_fill(dropped_BV, 0))
    return torch.multinomial(probs_BV, 1, generator=generator).squeeze(1)

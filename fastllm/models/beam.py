"""Beam search."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

_NEVER = -1e9  # a score that no hypothesis has; finite, so that sums of it stay ordered


class Hypotheses(NamedTuple):
    """The best continuations of each row, best first."""

    tokens: Tensor  # (B, n, T) int64, behind the start token; filled up with the pad token
    scores: Tensor  # (B, n) float32: log-probability / length^length_penalty


def beam_search(
    step: Callable[[Tensor, Tensor | None], Tensor],
    start_B: Tensor,
    *,
    beams: int,
    max_new_tokens: int,
    end_token: int,
    pad_token: int,
    length_penalty: float = 1.0,
    n_best: int = 1,
    forbidden: Collection[int] = (),
    force_end: bool = False,
) -> Hypotheses:
    """The most likely continuations that a search over `beams` prefixes a row finds.

        score = sum of log p(token) / length^length_penalty, the end token counted in

    At each step the 2 * beams best extensions of a row's prefixes are looked at: those of the best `beams` that end are
    hypotheses, the others go on. A row is finished when it has `beams` hypotheses, and its best prefix, at its present
    length, scores no better than the worst of them. What does not end within `max_new_tokens` is a hypothesis as it is.
    (Sutskever et al., 2014; the length penalty as in Wu et al., 2016, without its constant; the rule when to stop is
    that of transformers with early_stopping=False.)

    Args:
        step: step(tokens, rows) gives the logits (B * beams, V) behind the tokens (B * beams, 1), where each prefix is
            to go on from what the prefix rows[i] of (B * beams,) was before; rows is None at the first.
        start_B: (B,) the first token.
        beams, n_best: how many prefixes are kept, and how many hypotheses returned, at most `beams`.
        max_new_tokens: the most tokens of a hypothesis, at least 1.
        end_token, pad_token: end of a hypothesis, and what fills it up behind that.
        length_penalty: above; larger favours longer ones.
        forbidden: tokens that are never chosen.
        force_end: make the last token that fits `end_token`.

    Raises:
        ValueError: for numbers out of range.
    """
    if beams < 1 or not 1 <= n_best <= beams:
        raise ValueError(f"beam_search: beams must be at least 1 and n_best in [1, beams], got {beams} and {n_best}")
    if max_new_tokens < 1:
        raise ValueError(f"beam_search: max_new_tokens must be at least 1, got {max_new_tokens}")
    batch, device = start_B.shape[0], start_B.device
    row_B1 = torch.arange(batch, device=device)[:, None] * beams
    tokens = start_B.repeat_interleave(beams)[:, None]
    prefixes = torch.full((batch, beams, max_new_tokens), pad_token, device=device)
    # All prefixes are the same at first: only one of them may be extended.
    scores = torch.full((batch, beams), _NEVER, device=device)
    scores[:, 0] = 0
    found, found_scores = prefixes.clone(), torch.full((batch, beams), _NEVER, device=device)
    found_lengths = torch.zeros(batch, beams, dtype=torch.int64, device=device)
    open_B = torch.ones(batch, 1, dtype=torch.bool, device=device)
    parents: Tensor | None = None
    for length in range(1, max_new_tokens + 1):
        logp_RV = step(tokens, parents).float().log_softmax(-1)
        if forbidden:
            logp_RV[:, sorted(forbidden)] = -torch.inf
        if force_end and length == max_new_tokens:
            logp_RV.fill_(-torch.inf)[:, end_token] = 0
        classes = logp_RV.shape[1]
        total = (logp_RV.view(batch, beams, classes) + scores[..., None]).flatten(1)
        best, index = total.topk(min(2 * beams, total.shape[1]))
        parent, token = index // classes, index % classes
        candidates = prefixes.gather(1, parent[..., None].expand(-1, -1, max_new_tokens))
        candidates[:, :, length - 1] = token
        ends = (token == end_token) | (length == max_new_tokens)

        # Hypotheses, if they are among the best `beams`, and their row is open.
        final = best / length**length_penalty
        final = torch.where(ends & open_B, final, _NEVER)
        final[:, beams:] = _NEVER
        found_scores, order = torch.cat((found_scores, final), 1).topk(beams)
        everything = torch.cat((found, candidates), 1)
        found = everything.gather(1, order[..., None].expand(-1, -1, max_new_tokens))
        found_lengths = torch.cat((found_lengths, torch.full_like(token, length)), 1).gather(1, order)
        if length == max_new_tokens:
            break

        scores, order = torch.where(ends, best + _NEVER, best).topk(beams)
        prefixes = candidates.gather(1, order[..., None].expand(-1, -1, max_new_tokens))
        tokens = token.gather(1, order).view(-1, 1)
        parents = (parent.gather(1, order) + row_B1).flatten()
        complete_B1 = (found_scores > _NEVER / 2).all(1, keepdim=True)
        hopeful_B1 = scores[:, :1] / length**length_penalty > found_scores[:, -1:]
        open_B &= hopeful_B1 | ~complete_B1
        if not open_B.any():
            break
    longest = int(found_lengths[:, :n_best].max())
    return Hypotheses(found[:, :n_best, :longest], found_scores[:, :n_best])

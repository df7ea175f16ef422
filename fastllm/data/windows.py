"""Batches cut from one long stream of tokens: no padding, and no state, so that a resumed run sees the same batches."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastllm._extras import require

IGNORE = -100


class Dataset(Protocol):
    """What the trainer reads from."""

    def batch(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """The batch number `index` with `size` rows: (inputs, targets), both (size, T) int64.

        The same arguments give the same batch, always. A target of -100 takes no part in the loss.
        """


class _Windows:
    def __init__(self, tokens: Tensor, context: int):
        if tokens.ndim != 1:
            raise ValueError(f"tokens must be one stream of shape (n,), got {tuple(tokens.shape)}")
        if tokens.numel() < context + 1:
            raise ValueError(
                f"a window of {context} tokens and their targets needs {context + 1} tokens, the text has only "
                f"{tokens.numel()}"
            )
        self.tokens, self.context = tokens, context

    def _cut(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        windows = self.tokens[starts[:, None] + torch.arange(self.context + 1)].long()
        return windows[:, :-1], windows[:, 1:]


class RandomWindows(_Windows):
    """Windows that start anywhere, drawn with replacement.

    Args:
        tokens: (n,) integers.
        context: tokens a window.
        seed: of the draw; each batch depends on it and on its own index alone.

    Raises:
        ValueError: for fewer than context + 1 tokens, or a negative seed.
    """

    def __init__(self, tokens: Tensor, context: int, seed: int = 0):
        super().__init__(tokens, context)
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.seed = seed

    def batch(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        # NumPy mixes a sequence of seeds soundly; torch's CPU generator drops all but the lowest 32 bits of its one.
        draw = require("numpy", "train").random.default_rng((self.seed, index))
        starts = draw.integers(0, self.tokens.numel() - self.context, size)
        return self._cut(torch.from_numpy(starts))


class SequentialWindows(_Windows):
    """Windows side by side, for validation: every token but the first is a target exactly once.

    The last window reaches back to be full; what it repeats has the target -100. Takes what `RandomWindows` takes.
    """

    def __len__(self) -> int:
        """The number of windows; batch(i, size) exists for i * size < len."""
        return -(-(self.tokens.numel() - 1) // self.context)

    def batch(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """As `Dataset.batch`; the last batch may have fewer rows.

        Raises:
            IndexError: past the last window.
        """
        windows = range(len(self))[index * size : (index + 1) * size]
        if not windows:
            raise IndexError(f"batch {index} of {size} windows: there are only {len(self)} windows")
        wanted = torch.tensor(windows) * self.context
        starts = wanted.clamp(max=self.tokens.numel() - self.context - 1)
        inputs, targets = self._cut(starts)
        repeated = torch.arange(self.context) < (wanted - starts)[:, None]
        return inputs, targets.masked_fill(repeated, IGNORE)

"""Batches cut from one long stream of tokens: no padding, and no state, so that a resumed run sees the same batches."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastllm._extras import require
from fastllm.data.order import shuffled
from fastllm.data.token_file import TokenStream

if TYPE_CHECKING:
    import numpy as np

IGNORE = -100


class Dataset(Protocol):
    """What the trainer reads from."""

    def batch(self, index: int, size: int) -> tuple[Any, ...]:
        """The batch number `index` with `size` rows: (inputs, targets), both int64, of language models (size, T).

        The same arguments give the same batch, always. A target of -100 takes no part in the loss. There may be a third
        element, a dict of further arguments of the model.
        """


class _Windows:
    def __init__(self, tokens: Tensor | TokenStream, context: int, seed: int = 0):
        if isinstance(tokens, Tensor) and tokens.ndim != 1:
            raise ValueError(f"tokens must be one stream of shape (n,), got {tuple(tokens.shape)}")
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        if len(tokens) < context + 1:
            raise ValueError(
                f"a window of {context} tokens and their targets needs {context + 1} tokens, the text has only "
                f"{len(tokens)}"
            )
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.tokens, self.context, self.seed = tokens, context, seed

    def digest(self) -> str:
        """A hash of the tokens: a run is not resumed with others."""
        if not isinstance(self.tokens, Tensor):
            return self.tokens.digest()
        return hashlib.sha256(self.tokens.cpu().contiguous().numpy().data).hexdigest()

    def _cut(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        places = starts[:, None] + torch.arange(self.context + 1)
        if isinstance(self.tokens, Tensor):
            windows = self.tokens[places].long()
        else:
            windows = torch.from_numpy(self.tokens.tokens[places.numpy()].astype("int64"))
        return windows[:, :-1], windows[:, 1:]


class RandomWindows(_Windows):
    """Windows that start anywhere, drawn with replacement.

    Args:
        tokens: (n,) integers, or what `open_tokens` gives, which stays on the disk.
        context: tokens a window.
        seed: of the draw; each batch depends on it and on its own index alone.

    Raises:
        ValueError: for fewer than context + 1 tokens, a context below 1, or a negative seed.
    """

    def batch(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        # NumPy mixes a sequence of seeds soundly; torch's CPU generator drops all but the lowest 32 bits of its one.
        draw = require("numpy", "train").random.default_rng((self.seed, index))
        starts = draw.integers(0, len(self.tokens) - self.context, size)
        return self._cut(torch.from_numpy(starts))


class ShuffledWindows(_Windows):
    """Windows side by side, in another order each epoch, and each once an epoch. Takes what `RandomWindows` takes.

    An epoch's windows begin at a random offset, so that other tokens are at their borders each time; fewer than
    2 * context tokens are left out. Epochs follow each other without a gap, within a batch, too.
    """

    @property
    def rows_per_epoch(self) -> int:
        return max(1, len(self.tokens) // self.context - 1)

    def _offset(self, epoch: int) -> int:
        draw = require("numpy", "train").random.default_rng((self.seed, epoch))
        return int(draw.integers(len(self.tokens) - self.rows_per_epoch * self.context))

    def batch(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        numpy = require("numpy", "train")
        rows, epochs = shuffled(range(index * size, (index + 1) * size), self.rows_per_epoch, self.seed)
        found, which = numpy.unique(epochs, return_inverse=True)
        offsets: np.ndarray = numpy.array([self._offset(int(epoch)) for epoch in found])
        return self._cut(torch.from_numpy(rows * self.context + offsets[which]))


class SequentialWindows(_Windows):
    """Windows side by side, for validation: every token but the first is a target exactly once.

    The last window reaches back to be full; what it repeats has the target -100. Takes what `RandomWindows` takes.
    """

    def __len__(self) -> int:
        """The number of windows; batch(i, size) exists for i * size < len."""
        return -(-(len(self.tokens) - 1) // self.context)

    def batch(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """As `Dataset.batch`; the last batch may have fewer rows.

        Raises:
            IndexError: past the last window.
        """
        windows = range(len(self))[index * size : (index + 1) * size]
        if not windows:
            raise IndexError(f"batch {index} of {size} windows: there are only {len(self)} windows")
        wanted = torch.tensor(windows) * self.context
        starts = wanted.clamp(max=len(self.tokens) - self.context - 1)
        inputs, targets = self._cut(starts)
        repeated = torch.arange(self.context) < (wanted - starts)[:, None]
        return inputs, targets.masked_fill(repeated, IGNORE)

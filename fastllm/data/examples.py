"""Batches of rows for fine-tuning, and masked ones: like windows, pure functions of a batch's index.

Rows come shuffled, each once an epoch, in batches of rows of about the same length; or with shuffle=False, for
validation, each once and in order, the last batch with fewer rows.
"""

from __future__ import annotations

import hashlib
import warnings
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastllm._extras import require
from fastllm.data.order import permuted, shuffled
from fastllm.data.windows import IGNORE, Dataset

if TYPE_CHECKING:
    import numpy as np

_BUCKET = 100  # batches whose rows are sorted by length


class _Rows:
    """`lengths` decides which rows go together."""

    def __init__(self, lengths: np.ndarray, shuffle: bool, seed: int):
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if len(lengths) == 0:
            raise ValueError(f"{type(self).__name__}: there are no rows")
        self.lengths, self.shuffle, self.seed = lengths, shuffle, seed
        self._last: tuple[tuple[int, int], np.ndarray] | None = None  # the last bucket, since the next batch is of it

    def __len__(self) -> int:
        """The number of rows; without shuffling, batch(i, size) exists for i * size < len."""
        return len(self.lengths)

    def digest(self) -> str:
        """A hash of all rows: a run is not resumed with others."""
        parts = [value for value in vars(self).values() if isinstance(value, (_Tokens, Tensor))]
        found = hashlib.sha256()
        for part in parts:
            arrays = (part.tokens, part.lengths) if isinstance(part, _Tokens) else (part.numpy(),)
            for array in arrays:
                found.update(array.tobytes())
        return found.hexdigest()

    def rows(self, index: int, size: int) -> np.ndarray:
        """The numbers of the rows in batch `index`.

        Raises:
            IndexError: past the last row, without shuffling.
        """
        numpy = require("numpy", "train")
        total = len(self)
        if not self.shuffle:
            if not 0 <= index * size < total:
                raise IndexError(f"batch {index} of {size} rows: there are only {total} rows")
            return numpy.arange(index * size, min(total, (index + 1) * size))
        found, at, stop = [], index * size, (index + 1) * size
        while at < stop:
            end = min(stop, (at // total + 1) * total)  # of the batch, or of the epoch
            found.append(self._chunk(at, size) if end - at == size else shuffled(range(at, end), total, self.seed)[0])
            at = end
        return numpy.concatenate(found)

    def _chunk(self, at: int, size: int) -> np.ndarray:
        """The rows of a batch that lies within an epoch and begins at sample `at`: an epoch's such batches are sorted
        by length, `_BUCKET` of them at a time, and come in an order of their own."""
        numpy = require("numpy", "train")
        total = len(self)
        epoch, place = divmod(at, total)
        head = place % size  # rows before the first of these batches; the epoch before may end within a batch
        number, place = divmod(place // size, _BUCKET)
        begin = epoch * total + head + number * _BUCKET * size
        batches = min(_BUCKET, (total - head) // size - number * _BUCKET)
        if self._last is None or self._last[0] != (begin, size):
            rows, _ = shuffled(range(begin, begin + batches * size), total, self.seed)
            self._last = (begin, size), rows[numpy.argsort(self.lengths[rows], kind="stable")]
        # So that short rows do not always come first.
        place = int(permuted([place], batches, (self.seed, epoch, number))[0])
        return self._last[1][place * size : (place + 1) * size]


class _Tokens:
    """Rows of tokens behind each other in one array."""

    def __init__(self, name: str, rows: Sequence[Any], places: Sequence[str] | None, empty: bool = False):
        numpy = require("numpy", "train")
        self.lengths = numpy.array([len(row) for row in rows], numpy.int64)
        if places is not None and len(places) != len(rows):
            raise ValueError(f"{name}: {len(rows)} rows, but {len(places)} places")
        self.name, self.places = name, places
        if not empty and len(rows) and not self.lengths.all():
            raise ValueError(f"{name}: {self.place(int(self.lengths.argmin()))} has no tokens")
        self.ends = self.lengths.cumsum()
        self.tokens = numpy.concatenate([numpy.empty(0, numpy.int32), *(numpy.asarray(r, numpy.int32) for r in rows)])

    def place(self, row: int) -> str:
        return f"row {row}" if self.places is None else self.places[row]

    def __getitem__(self, row: int) -> np.ndarray:
        end = self.ends[row]
        return self.tokens[end - self.lengths[row] : end]

    def refuse(self, token: int, what: str) -> None:
        """Raises ValueError for a row that has this token, naming it."""
        if (inside := (self.tokens == token).nonzero()[0]).size:
            row = int(require("numpy", "train").searchsorted(self.ends, inside[0], side="right"))
            raise ValueError(f"{self.name}: {self.place(row)} has the {what} {token} in it")

    def limit(self, context: int | None, truncate: bool, lengths: np.ndarray) -> None:
        """Refuses rows of more than `context` tokens, or warns of how many there are."""
        if context is None or not (over := lengths > context).any():
            return
        first = int(over.argmax())
        what = f"{self.place(first)} has {lengths[first]} tokens, more than the context of {context}"
        if not truncate:
            raise ValueError(f"{self.name}: {what}; truncate=True cuts it off")
        warnings.warn(f"{self.name}: {over.sum()} of {len(over)} rows are cut off: {what}", stacklevel=4)

    def padded(self, rows: np.ndarray, pad: int, context: int | None, end: Sequence[int] = ()) -> Tensor:
        """(len(rows), longest) int64, each row with `end` behind it, `context` tokens with it at most."""
        found = [self[row][: None if context is None else context - len(end)] for row in rows]
        batch = torch.full((len(rows), max(map(len, found)) + len(end)), pad)
        for into, row in zip(batch, found, strict=True):
            into[: len(row)] = torch.from_numpy(row)
            into[len(row) : len(row) + len(end)] = torch.tensor(end)
        return batch


class LabelledRows(_Rows):
    """Classification: rows of tokens (B, T), padded to the longest of the batch, and their labels (B,).

    Args:
        rows: of tokens: lists, arrays or tensors, none of them empty.
        labels: as many integers.
        pad: the token that fills rows up.
        context: tokens a row at most; None for any number.
        truncate: cut longer rows off and say how many, instead of refusing them.
        shuffle, seed: another order each epoch, or with shuffle=False once and in order.
        places: where the rows come from, for messages.

    Raises:
        ValueError: for rows that are empty or too long, naming the first; no rows, or another number of labels.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        labels: Sequence[int],
        *,
        pad: int,
        context: int | None = None,
        truncate: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        places: Sequence[str] | None = None,
    ):
        if len(rows) != len(labels):
            raise ValueError(f"LabelledRows: {len(rows)} rows, but {len(labels)} labels")
        self.tokens = _Tokens("LabelledRows", rows, places)
        self.tokens.refuse(pad, "padding")
        self.tokens.limit(context, truncate, self.tokens.lengths)
        super().__init__(self.tokens.lengths, shuffle, seed)
        self.labels, self.pad, self.context = torch.tensor(list(labels), dtype=torch.int64), pad, context

    def batch(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """As `Dataset.batch`; without shuffling, IndexError past the last row."""
        rows = self.rows(index, size)
        return self.tokens.padded(rows, self.pad, self.context), self.labels[torch.from_numpy(rows)]


class PairRows(_Rows):
    """Sequence to sequence: sources (B, S), filled up with `pad`, and targets (B, T), each with its end token, filled
    up with -100.

    Args:
        sources, targets: rows of tokens, as many of both; a target may be empty.
        pad: the token that fills sources up.
        end: the token behind each target.
        end_source: put it behind each source, too (T5, Marian).
        context: tokens a row at most, with the end token.
        truncate, shuffle, seed, places: as in `LabelledRows`.

    Raises:
        ValueError: as `LabelledRows`.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        targets: Sequence[Any],
        *,
        pad: int,
        end: int,
        end_source: bool = False,
        context: int | None = None,
        truncate: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        places: Sequence[str] | None = None,
    ):
        if len(sources) != len(targets):
            raise ValueError(f"PairRows: {len(sources)} sources, but {len(targets)} targets")
        self.source_end = (end,) if end_source else ()
        self.sources = _Tokens("PairRows: sources", sources, places)
        self.targets = _Tokens("PairRows: targets", targets, places, empty=True)
        self.sources.refuse(pad, "padding")
        self.targets.refuse(pad, "padding")
        self.targets.refuse(end, "end token")
        self.sources.limit(context, truncate, self.sources.lengths + len(self.source_end))
        self.targets.limit(context, truncate, self.targets.lengths + 1)
        super().__init__(self.sources.lengths + self.targets.lengths, shuffle, seed)
        self.pad, self.end, self.context = pad, end, context

    def batch(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """As `Dataset.batch`; without shuffling, IndexError past the last row."""
        rows = self.rows(index, size)
        sources = self.sources.padded(rows, self.pad, self.context, self.source_end)
        return sources, self.targets.padded(rows, IGNORE, self.context, (self.end,))


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: the longest first, each into the fullest bin that has room for it (as in Ding
    et al., Fewer Truncations Improve Language Modeling, 2024).

    Args:
        lengths: of the rows, none larger than `capacity`.
        capacity: of a bin.

    Returns:
        For each bin the numbers of its rows.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # bins, by how much room they have
    rooms: list[int] = []  # the keys, sorted
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        at = bisect_left(rooms, lengths[row])
        if at == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        bins[number].append(row)
        room -= int(lengths[row])
        if room not in with_room:
            with_room[room] = []
            insort(rooms, room)
        with_room[room].append(number)
    return bins


class AnswerRows(_Rows):
    """Question and answer for a causal model: prompts and answers in windows of one length (B, context), several in
    each, with the loss on answers and the end tokens behind them alone.

    A row is a prompt, its answer and `end`, which is the model's `document_token`: attention does not look past it.
    Rows are packed whole, by best fit; what is left of a window is filled up with `end`, without a loss. A batch has
    windows for rows, and so has an epoch.

    Args:
        prompts, answers: rows of tokens, as many of both; an answer may be empty.
        end: the token behind each row, which is in none of them.
        context: tokens a window.
        truncate: cut rows that are too long off at their ends, which may leave of an answer nothing to learn; say how
            many there are, instead of refusing them.
        shuffle, seed, places: as in `LabelledRows`.

    Raises:
        ValueError: for rows that are too long or have the end token in them, naming the first; empty prompts; no rows,
            or another number of answers.
    """

    def __init__(
        self,
        prompts: Sequence[Any],
        answers: Sequence[Any],
        *,
        end: int,
        context: int,
        truncate: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        places: Sequence[str] | None = None,
    ):
        numpy = require("numpy", "train")
        if len(prompts) != len(answers):
            raise ValueError(f"AnswerRows: {len(prompts)} prompts, but {len(answers)} answers")
        self.prompts = _Tokens("AnswerRows: prompts", prompts, places)
        self.answers = _Tokens("AnswerRows: answers", answers, places, empty=True)
        for rows in (self.prompts, self.answers):
            rows.refuse(end, "end token")
        # The last token of a window is a target only: a window takes context + 1.
        lengths = self.prompts.lengths + self.answers.lengths + 1
        self.prompts.limit(context, truncate, lengths - 1)
        if not (self.prompts.lengths <= context).any():
            raise ValueError(f"AnswerRows: no prompt leaves room for an answer in the context of {context}")
        self.windows = pack(numpy.minimum(lengths, context + 1).tolist(), context + 1)
        super().__init__(numpy.full(len(self.windows), context), shuffle, seed)
        self.end, self.context = end, context

    def batch(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """As `Dataset.batch`; without shuffling, IndexError past the last window."""
        windows = self.rows(index, size)
        tokens = torch.full((len(windows), self.context + 1), self.end)
        targets = torch.full_like(tokens, IGNORE)
        for number, window in enumerate(windows):
            at = 0
            for row in self.windows[window]:
                prompt = torch.from_numpy(self.prompts[row])[: self.context + 1]
                answer = torch.from_numpy(self.answers[row])[: self.context + 1 - len(prompt)]
                learned = at + len(prompt)
                end = min(learned + len(answer) + 1, self.context + 1)
                tokens[number, at:learned] = prompt
                tokens[number, learned : learned + len(answer)] = answer
                targets[number, learned:end] = tokens[number, learned:end]
                at = end
        return tokens[:, :-1], targets[:, 1:]


class MaskedWindows:
    """Masked language modelling over other windows: masked anew at each batch, and the same for the same batch.

    Args:
        windows: whose inputs are masked. Where their targets are -100 (a window of `SequentialWindows` that repeats
            some tokens), nothing is.
        mask_tokens: how: `fastllm.models.mask_tokens`, or what takes the same.
        mask_token, vocab_size: as it takes them.
        special_tokens: what is never masked: padding, ends of documents, [CLS], [SEP].
        seed: of the draw, which depends on it and on the batch's index alone.

    Raises:
        ValueError: for a negative seed.
    """

    def __init__(
        self,
        windows: Dataset,
        mask_tokens: Callable[..., tuple[Tensor, Tensor]],
        *,
        mask_token: int,
        vocab_size: int,
        special_tokens: Sequence[int] = (),
        seed: int = 0,
    ):
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.windows, self.mask_tokens, self.seed = windows, mask_tokens, seed
        self.mask_token, self.vocab_size = mask_token, vocab_size
        self.special_tokens = torch.tensor(list(special_tokens), dtype=torch.int64)

    def __len__(self) -> int:
        """That of the windows, which have one if they end."""
        return len(self.windows)  # type: ignore[arg-type]

    def digest(self) -> str:
        """That of the windows."""
        return self.windows.digest()  # type: ignore[attr-defined]

    def batch(self, index: int, size: int) -> tuple[Any, ...]:
        """As `Dataset.batch`: tokens, some of them replaced, and the original ones where they were chosen."""
        inputs, targets, *more = self.windows.batch(index, size)
        # NumPy mixes the seeds; torch's generator takes 32 bits.
        seed = require("numpy", "train").random.SeedSequence((self.seed, index)).generate_state(1)
        tokens, targets = self.mask_tokens(
            inputs,
            self.mask_token,
            self.vocab_size,
            special=torch.isin(inputs, self.special_tokens) | (targets == IGNORE),
            generator=torch.Generator().manual_seed(int(seed[0])),
        )
        return tokens, targets, *more

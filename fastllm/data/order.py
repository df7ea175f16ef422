"""Orders that need no memory: which row comes when is computed, for any row at any time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastllm._extras import require

if TYPE_CHECKING:
    import numpy as np

_ROUNDS = 8
_BLOCK = 4096  # places of an epoch whose rows are found at once


def permuted(where: np.ndarray | Sequence[int], n: int, key: int | Sequence[int]) -> np.ndarray:
    """Where a random permutation of range(n) puts these: in time and memory that depend on the number of them alone.

    A Feistel network permutes the numbers of an even number of bits, of which there are fewer than 4n; what falls
    outside of range(n) is permuted again until it falls inside (Black and Rogaway, Ciphers with Arbitrary Finite
    Domains, 2002). Good for shuffling, no cipher.

    Args:
        where: integers in range(n), of any shape.
        n: from 1 to 2^62.
        key: chooses the permutation; integers that are not negative.

    Returns:
        int64, of the shape of `where`.

    Raises:
        ValueError: for n or `where` out of range.
    """
    numpy = require("numpy", "train")
    i: np.ndarray = numpy.asarray(where)
    if not 1 <= n <= 1 << 62:
        raise ValueError(f"permuted: n must be from 1 to 2^62, got {n}")
    if i.size and not (i.min() >= 0 and i.max() < n):
        raise ValueError(f"permuted: i must be in range({n}), got {i.min()} to {i.max()}")
    half = numpy.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = numpy.uint64((1 << int(half)) - 1)
    keys = numpy.random.SeedSequence(key).generate_state(_ROUNDS, numpy.uint64)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        return left << half | right

    found = network(i.astype(numpy.uint64).reshape(-1))
    while (outside := (found >= n).nonzero()[0]).size:
        found[outside] = network(found[outside])
    return found.astype(numpy.int64).reshape(i.shape)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al., 2014): every bit of the output depends on every bit of `x`."""
    uint64 = x.dtype.type
    x = (x ^ (x >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> uint64(27))) * uint64(0x94D049BB133111EB)
    return x ^ (x >> uint64(31))


@functools.lru_cache(8)
def _block(n: int, seed: int, epoch: int, number: int) -> np.ndarray:
    """The rows at so many places of an epoch. Those of a batch alone take as many calls of NumPy, 0.4 ms."""
    numpy = require("numpy", "train")
    found = permuted(numpy.arange(number * _BLOCK, min(n, (number + 1) * _BLOCK)), n, (seed, epoch))
    found.flags.writeable = False
    return found


def shuffled(samples: range, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs of n rows, each in an order of its own, one behind the other without a gap.

    Args:
        samples: which of this endless sequence.
        n: rows an epoch.
        seed: of all orders; not negative.

    Returns:
        (the rows, the epoch of each), int64.
    """
    numpy = require("numpy", "train")
    rows, epochs = [numpy.empty(0, numpy.int64)], [numpy.empty(0, numpy.int64)]
    at = samples.start
    while at < samples.stop:
        epoch, place = divmod(at, n)
        number, start = divmod(place, _BLOCK)
        rows.append(_block(n, seed, epoch, number)[start : start + samples.stop - at])
        epochs.append(numpy.full_like(rows[-1], epoch))
        at += len(rows[-1])
    return numpy.concatenate(rows), numpy.concatenate(epochs)

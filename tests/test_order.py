"""Shuffling without memory: permutations, uniform ones, and windows each once an epoch."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from fastllm import data
from fastllm.data.order import permuted, shuffled


def test_permutations():
    for n in [*range(1, 301), 4096, 4097, 100_003]:
        assert (np.bincount(permuted(np.arange(n), n, (n, 1)), minlength=n) == 1).all(), n
    i = np.arange(12).reshape(3, 4)
    found = permuted(i, 12, 5)
    assert found.shape == (3, 4)
    assert found.dtype == np.int64
    assert [int(permuted(np.array(k), 12, 5)) for k in range(12)] == found.flatten().tolist()
    assert not np.array_equal(permuted(i, 12, 6), found)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13, 17, 40])
def test_every_place_is_as_likely(n):
    """Chi-square over where each number goes, and over the distance between the places of neighbours."""
    keys = 2000
    places = np.array([permuted(np.arange(n), n, (key, 7)) for key in range(keys)])

    def deviation(counts):
        expected = counts.sum() / len(counts)
        freedom = max(1, len(counts) - 1)
        return (((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5

    assert max(deviation(np.bincount(places[:, i], minlength=n)) for i in range(n)) < 6
    apart = (places[:, 1:] - places[:, :-1]) % n
    assert deviation(np.bincount(apart.flatten(), minlength=n)[1:]) < 6


def test_memory_does_not_grow_with_n():
    i = np.array([0, 1, 2, 10**12 - 1])
    tracemalloc.start()
    found = permuted(i, 10**12, (3, 4))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    assert len(set(found.tolist())) == 4
    assert (found >= 0).all()
    assert found.max() < 10**12
    assert found.max() > 10**9
    assert 0 <= permuted(np.array([2**62 - 1]), 2**62, 0)[0] < 2**62


@pytest.mark.parametrize(
    ("i", "n", "message"),
    [
        ([3], 3, r"i must be in range\(3\), got 3 to 3"),
        ([-1, 2], 3, r"i must be in range\(3\), got -1 to 2"),
        ([], 0, r"n must be from 1 to 2\^62, got 0"),
    ],
)
def test_what_does_not_fit_is_named(i, n, message):
    with pytest.raises(ValueError, match=message):
        permuted(np.array(i, np.int64), n, 0)


def test_epochs_follow_each_other():
    rows, epochs = shuffled(range(35), 10, 3)
    assert epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 5
    for epoch in range(3):
        assert sorted(rows[epochs == epoch]) == list(range(10))
    assert len({tuple(rows[epochs == epoch]) for epoch in range(3)}) == 3
    for start, end in ((0, 1), (7, 13), (9, 31)):  # from anywhere
        assert shuffled(range(start, end), 10, 3)[0].tolist() == rows[start:end].tolist()


@pytest.mark.parametrize(("length", "context"), [(101, 7), (9, 8), (17, 8), (64, 8), (65, 8), (23, 8), (12, 1)])
def test_shuffled_windows_come_once_an_epoch(length, context):
    windows = data.ShuffledWindows(torch.arange(length), context, seed=5)
    count = windows.rows_per_epoch
    size = 3
    starts, first_of_epochs = [], set()
    for index in range(-(-4 * count // size)):
        inputs, targets = windows.batch(index, size)
        assert inputs.shape == (size, context)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(context))
        starts += inputs[:, 0].tolist()
    for epoch in range(4):  # its border is inside a batch
        places = sorted(starts[epoch * count : (epoch + 1) * count])
        assert places == list(range(places[0], places[0] + count * context, context))
        assert places[0] < 2 * context
        assert length - count * context < 2 * context
        first_of_epochs.add(places[0])
    if length == 101:
        assert len(first_of_epochs) > 1
        assert starts[:count] != starts[count : 2 * count]


def test_every_token_is_trained_on_in_some_epoch():
    windows = data.ShuffledWindows(torch.arange(50), 8)
    seen = {int(token) for index in range(40) for token in windows.batch(index, 5)[1].flatten()}
    assert seen == set(range(1, 50))


def test_shuffled_windows_depend_on_seed_and_index_alone():
    windows = data.ShuffledWindows(torch.arange(10_000), 8, seed=5)
    first = windows.batch(7, 16)[0]
    windows.batch(8, 16)
    assert torch.equal(windows.batch(7, 16)[0], first)
    assert not torch.equal(data.ShuffledWindows(torch.arange(10_000), 8, seed=6).batch(7, 16)[0], first)
    ranks = [windows.batch(index, 4)[0] for index in range(28, 32)]  # four ranks see what one would see
    assert torch.equal(torch.cat(ranks), first)

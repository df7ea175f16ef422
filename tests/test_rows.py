"""Rows for fine-tuning: padding, labels, packing, masking, and that each row comes once an epoch."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm import data
from fastllm.data.examples import pack
from fastllm.models import GPT, GPTConfig, mask_tokens

PAD, END, IGNORE = 0, 1, -100


def rows_of(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """Rows of different lengths; the first token says which."""
    draw = random.Random(seed)
    return [[1000 + row, *(draw.randrange(2, 900) for _ in range(draw.randrange(longest)))] for row in range(count)]


def test_labelled_rows_once_and_in_order():
    rows = rows_of(7)
    dataset = data.LabelledRows(rows, range(10, 17), pad=PAD, shuffle=False)
    assert len(dataset) == 7
    seen = 0
    for index in range(3):
        inputs, labels = dataset.batch(index, 3)
        assert inputs.dtype == labels.dtype == torch.int64
        some = rows[seen : seen + len(inputs)]
        assert inputs.shape == (len(some), max(map(len, some)))
        for found, row in zip(inputs.tolist(), some, strict=True):
            assert found == row + [PAD] * (inputs.shape[1] - len(row))
        assert labels.tolist() == list(range(10 + seen, 10 + seen + len(some)))
        seen += len(some)
    assert seen == 7
    with pytest.raises(IndexError, match="batch 3 of 3 rows: there are only 7 rows"):
        dataset.batch(3, 3)


@pytest.mark.parametrize(("count", "size"), [(7, 3), (3, 8), (1, 1), (250, 2), (640, 4), (2400, 16), (1000, 7)])
def test_shuffled_rows_come_once_an_epoch(count, size):
    dataset = data.LabelledRows(rows_of(count), range(count), pad=PAD, seed=4)
    labels = torch.cat([dataset.batch(index, size)[1] for index in range(-(-3 * count // size))])
    for epoch in range(3):
        assert labels[epoch * count : (epoch + 1) * count].sort().values.tolist() == list(range(count)), epoch
    again = data.LabelledRows(rows_of(count), range(count), pad=PAD, seed=4)
    for index in (5, 0, 2):
        assert torch.equal(again.batch(index, size)[1], dataset.batch(index, size)[1])
    if count > 10:
        assert len({tuple(dataset.batch(index, size)[1].tolist()) for index in range(9)}) == 9
        other = data.LabelledRows(rows_of(count), range(count), pad=PAD, seed=5)
        assert not torch.equal(other.batch(5, size)[1], dataset.batch(5, size)[1])


def test_rows_of_a_length_go_together():
    draw = random.Random(1)
    rows = [[5] * max(1, int(draw.lognormvariate(4, 0.7))) for _ in range(3000)]
    padded = {}
    for bucketed in (True, False):
        dataset = data.LabelledRows(rows, [0] * len(rows), pad=PAD)
        if not bucketed:
            dataset.lengths = dataset.lengths * 0
        inputs = [dataset.batch(index, 16)[0] for index in range(150)]
        padded[bucketed] = sum(int((x == PAD).sum()) for x in inputs) / sum(x.numel() for x in inputs)
    assert padded[True] < 0.1  # measured: 0.084, without sorting 0.67
    assert padded[False] > 0.5
    lengths = [x.shape[1] for x in inputs]
    assert abs(sum(lengths[:50]) - sum(lengths[50:100])) < 0.3 * sum(lengths[:50])


def test_pair_rows():
    sources, targets = [[5, 6, 7], [8]], [[9], [2, 3]]
    dataset = data.PairRows(sources, targets, pad=PAD, end=END, shuffle=False)
    source, target = dataset.batch(0, 2)
    assert source.tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert target.tolist() == [[9, END, IGNORE], [2, 3, END]]
    dataset = data.PairRows(sources, targets, pad=PAD, end=END, end_source=True, context=4, shuffle=False)
    assert dataset.batch(0, 2)[0].tolist() == [[5, 6, 7, END], [8, END, PAD, PAD]]
    with pytest.raises(ValueError, match="PairRows: sources: row 0 has 4 tokens, more than the context of 3"):
        data.PairRows(sources, targets, pad=PAD, end=END, end_source=True, context=3)
    with pytest.warns(UserWarning, match="targets: 1 of 2 rows are cut off: b:2 has 3 tokens"):
        dataset = data.PairRows(
            [[5], [8]], targets, pad=PAD, end=END, context=2, truncate=True, shuffle=False, places=["b:1", "b:2"]
        )
    assert dataset.batch(0, 2)[1].tolist() == [[9, END], [2, END]]


def test_tensors_and_arrays_are_rows():
    rows = rows_of(5)
    expected = data.LabelledRows(rows, range(5), pad=PAD).batch(3, 4)[0]
    for kind in (torch.tensor, lambda row: torch.tensor(row, dtype=torch.int32).numpy()):
        found = data.LabelledRows([kind(row) for row in rows], range(5), pad=PAD).batch(3, 4)[0]
        assert torch.equal(found, expected)


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 20), max_size=60))
def test_packing_is_best_fit(lengths):
    bins = pack(lengths, 20)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    expected: list[list[int]] = []  # the definition, written out
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        rooms = [20 - sum(lengths[other] for other in rows) for rows in expected]
        fitting = [room for room in rooms if room >= lengths[row]]
        if fitting:
            expected[rooms.index(min(fitting))].append(row)
        else:
            expected.append([row])

    def fill(bins):
        return sorted(sorted(lengths[row] for row in rows) for rows in bins)

    assert len(bins) == len(expected)
    assert sorted(sum(rows) for rows in fill(bins)) == sorted(sum(rows) for rows in fill(expected))
    assert all(sum(rows) <= 20 for rows in fill(bins))


def test_packing_wastes_little_of_real_lengths():
    draw = random.Random(0)
    lengths = [min(1024, max(2, int(draw.lognormvariate(5, 1)))) for _ in range(20_000)]
    bins = pack(lengths, 1024)
    assert sum(lengths) / (len(bins) * 1024) > 0.99


@pytest.mark.parametrize("context", [11, 16, 40])
def test_answers_alone_are_learned(context):
    draw = random.Random(3)
    prompts = [[draw.randrange(2, 90) for _ in range(draw.randrange(1, 7))] for _ in range(50)]
    answers = [[draw.randrange(2, 90) for _ in range(draw.randrange(0, 6))] for _ in range(50)]
    dataset = data.AnswerRows(prompts, answers, end=END, context=context, shuffle=False)
    found = []
    for index in range(-(-len(dataset) // 4)):
        inputs, targets = dataset.batch(index, 4)
        assert inputs.shape == targets.shape == (min(4, len(dataset) - 4 * index), context)
        for tokens, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
            # The window's tokens, with the last target, cut up at the end tokens.
            tokens = [*tokens, wanted[-1] if wanted[-1] != IGNORE else END]
            learned = [False, *(target != IGNORE for target in wanted)]
            assert all(
                not yes or token == target for yes, token, target in zip(learned, tokens, [0, *wanted], strict=True)
            )
            start = 0
            for end in [at for at, token in enumerate(tokens) if token == END]:
                if end > start:
                    prompt = tuple(t for t, yes in zip(tokens[start:end], learned[start:end], strict=True) if not yes)
                    answer = tuple(t for t, yes in zip(tokens[start:end], learned[start:end], strict=True) if yes)
                    assert tokens[start:end] == [*prompt, *answer]
                    assert learned[end]
                    found.append((prompt, answer))
                else:
                    assert not learned[end]
                start = end + 1
    assert sorted(found) == sorted(zip(map(tuple, prompts), map(tuple, answers), strict=True))


def test_a_packed_row_is_worth_what_its_rows_are_one_by_one():
    torch.manual_seed(0)
    config = GPTConfig.llama(vocab_size=90, context=32, layers=1, heads=2, width=16, document_token=END)
    model = GPT(config)
    prompts, answers = [[5, 6], [7], [8, 9, 10]], [[11, 12, 13], [14], [15]]
    packed = data.AnswerRows(prompts, answers, end=END, context=32)
    assert len(packed) == 1
    together = model(*packed.batch(0, 1), reduction="sum")
    alone = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        row = torch.tensor([[*prompt, *answer, END]])
        targets = row[:, 1:].clone()
        targets[:, : len(prompt) - 1] = IGNORE
        alone += model(row[:, :-1], targets, reduction="sum")
    torch.testing.assert_close(together, alone)


def test_rows_that_are_too_long_are_named_or_cut_off():
    prompts, answers = [[5, 6], [7, 8, 9]], [[10], [11, 12]]
    with pytest.raises(ValueError, match=r"AnswerRows: prompts: q.csv:3 has 5 tokens, more than the context of 4"):
        data.AnswerRows(prompts, answers, end=END, context=4, places=["q.csv:2", "q.csv:3"])
    with pytest.warns(UserWarning, match="1 of 2 rows are cut off: row 1 has 5 tokens"):
        dataset = data.AnswerRows(prompts, answers, end=END, context=4, truncate=True, shuffle=False)
    inputs, targets = dataset.batch(0, 2)
    assert inputs.tolist() == [[7, 8, 9, 11], [5, 6, 10, END]]
    assert targets.tolist() == [[IGNORE, IGNORE, 11, 12], [IGNORE, 10, END, IGNORE]]
    with (
        pytest.warns(UserWarning, match="cut off"),
        pytest.raises(ValueError, match="no prompt leaves room for an answer in the context of 4"),
    ):
        data.AnswerRows([[5, 6, 7, 8, 9, 2]], [[3]], end=END, context=4, truncate=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.LabelledRows([[1]], [0, 1], pad=0), "LabelledRows: 1 rows, but 2 labels"),
        (lambda: data.LabelledRows([[1], []], [0, 1], pad=0), "LabelledRows: row 1 has no tokens"),
        (lambda: data.LabelledRows([], [], pad=0), "LabelledRows: there are no rows"),
        (lambda: data.LabelledRows([[1]], [0], pad=0, seed=-1), "seed must not be negative, got -1"),
        (lambda: data.LabelledRows([[1]], [0], pad=0, places=[]), "1 rows, but 0 places"),
        (lambda: data.LabelledRows([[1, 2]], [0], pad=0, context=1), "row 0 has 2 tokens, more than the context of 1"),
        (lambda: data.PairRows([[1]], [], pad=0, end=1), "PairRows: 1 sources, but 0 targets"),
        (lambda: data.AnswerRows([[1]], [], end=1, context=4), "AnswerRows: 1 prompts, but 0 answers"),
        (lambda: data.AnswerRows([[2], []], [[3], [3]], end=1, context=4), "AnswerRows: prompts: row 1 has no tokens"),
        (lambda: data.AnswerRows([[2], [2]], [[3], [5, 1]], end=1, context=4), "answers: row 1 has the end token 1 in"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_masked_windows():
    windows = data.ShuffledWindows(torch.randint(5, 1000, (9000,), generator=torch.Generator().manual_seed(0)), 64)
    masked = data.MaskedWindows(windows, mask_tokens, mask_token=3, vocab_size=1000, special_tokens=[7, 8], seed=2)
    inputs = torch.cat([windows.batch(index, 16)[0] for index in range(40)])
    batches = [masked.batch(index, 16) for index in range(40)]
    tokens, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    chosen = targets != IGNORE
    assert torch.equal(targets[chosen], inputs[chosen])
    assert torch.equal(tokens[~chosen], inputs[~chosen])
    assert not chosen[(inputs == 7) | (inputs == 8)].any()
    assert abs(chosen.float().mean() - 0.15) < 0.005
    assert abs((tokens[chosen] == 3).float().mean() - 0.8) < 0.02
    assert abs((tokens[chosen] == inputs[chosen]).float().mean() - 0.1) < 0.02
    torch.manual_seed(9)
    assert all(torch.equal(a, b) for a, b in zip(masked.batch(7, 16), batches[7], strict=True))
    assert not torch.equal(targets[:16] != IGNORE, targets[16:32] != IGNORE)
    # The same windows in the next epoch are masked in another way; another seed masks them in another way.
    other = data.MaskedWindows(windows, mask_tokens, mask_token=3, vocab_size=1000, seed=3)
    assert not torch.equal(other.batch(7, 16)[1], batches[7][1])


def test_masked_windows_for_validation():
    windows = data.SequentialWindows(torch.arange(5, 62), 10)
    masked = data.MaskedWindows(windows, mask_tokens, mask_token=3, vocab_size=100)
    assert len(masked) == 6
    assert masked.batch(1, 4)[0].shape == (2, 10)
    with pytest.raises(IndexError, match="there are only 6"):
        masked.batch(2, 4)
    scored = [token for seed in range(300) for token in _scored(windows, seed)]
    assert set(scored) == set(range(5, 61))
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        data.MaskedWindows(windows, mask_tokens, mask_token=3, vocab_size=100, seed=-1)


def _scored(windows, seed):
    """What is predicted: no token twice, though the last window repeats some."""
    masked = data.MaskedWindows(windows, mask_tokens, mask_token=3, vocab_size=100, seed=seed)
    targets = masked.batch(0, 6)[1]
    found = targets[targets != IGNORE].tolist()
    assert len(found) == len(set(found))
    return found

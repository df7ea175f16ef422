"""Learning rates over a run."""

from __future__ import annotations

import math

import pytest

from fastllm.trainer.schedule import SCHEDULES, learning_rate


def rates(schedule: str, steps: int = 101, warmup: int = 10, **changes) -> list[float]:
    given = {"schedule": schedule, "steps": steps, "warmup": warmup, "peak": 2.0, "floor": 0.2, **changes}
    return [learning_rate(step, **given) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_comes_first_and_rates_never_rise_behind_it(schedule):
    found = rates(schedule, decay=0.1, decay_share=0.3)
    assert found[:10] == [2.0 * n / 10 for n in range(1, 11)]
    assert found[10:] == sorted(found[10:], reverse=True)
    assert rates(schedule, warmup=0)[0] == 2.0
    assert rates(schedule, steps=1, warmup=0, decay_share=0.0) == [2.0]
    assert rates(schedule, steps=3, warmup=7) == [2.0 * n / 7 for n in range(1, 4)]  # a run that ends in its warm-up


def test_each_schedule_has_its_formula():
    assert set(rates("constant")[9:]) == {2.0}
    linear, cosine = rates("linear"), rates("cosine")
    assert linear[10] == cosine[10] == 2.0
    assert linear[55] == pytest.approx(1.1)  # half way
    assert linear[28] == pytest.approx(2.0 - 1.8 * 18 / 90)
    assert linear[100] == cosine[100] == pytest.approx(0.2)
    assert cosine == [2.0 * (step + 1) / 10 for step in range(10)] + [
        0.2 + (2.0 - 0.2) * (1 + math.cos(math.pi * min(1.0, (step - 10) / 90))) / 2 for step in range(10, 101)
    ]  # to the last bit
    root = rates("inverse_sqrt")
    assert root[9] == 2.0
    assert root[39] == pytest.approx(1.0)
    assert rates("inverse_sqrt", warmup=0)[24] == pytest.approx(2.0 / 5)
    time = rates("inverse_time", decay=0.5)
    assert time[10:13] == pytest.approx([2.0, 2.0 / 1.5, 1.0])


def test_wsd_falls_over_the_last_share():
    found = rates("wsd", steps=100, decay_share=0.2)
    assert found[9:80] == [2.0] * 71
    assert found[80] == pytest.approx(2.0 - 1.8 / 20)
    assert found[89] == pytest.approx(1.1)
    assert found[99] == 0.2
    whole = rates("wsd", steps=20, decay_share=1.0)  # the warm-up is not cut
    assert whole[9] == 2.0
    assert whole[10] == pytest.approx(2.0 - 1.8 / 10)
    assert rates("wsd", decay_share=0.0)[9:] == [2.0] * 92


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosin"}, "schedule must be one of .*got 'cosin'"),
        ({"step": 5}, "step must be at least 0 and less than steps=5, got 5"),
        ({"step": -1}, "got -1"),
        ({"warmup": -2}, "warmup must not be negative, got -2"),
        ({"peak": math.inf}, "peak must be finite and not negative, got inf"),
        ({"floor": 3.0}, r"floor must be in \[0, peak=2.0\], got 3.0"),
        ({"decay": -0.1}, "decay must be finite and not negative, got -0.1"),
        ({"decay_share": 1.1}, r"decay_share must be in \[0, 1\], got 1.1"),
    ],
)
def test_values_out_of_range_are_named(changes, message):
    given = {"step": 0, "schedule": "cosine", "steps": 5, "warmup": 1, "peak": 2.0, **changes}
    with pytest.raises(ValueError, match=message):
        learning_rate(given.pop("step"), **given)

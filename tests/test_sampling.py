"""The choice of the next token, at the ends of its arguments' ranges."""

from __future__ import annotations

import pytest
import torch

from fastllm.models.sampling import sample_token

LOGITS = torch.tensor([[3.0, -1.0, 5.0, 5.0], [1e30, -1e30, -torch.inf, 0.0]])


@pytest.mark.parametrize("temperature", [0, 1.2e-38, 1e-30, 1e-5])
def test_a_low_temperature_takes_the_largest(temperature):
    draws = {tuple(sample_token(LOGITS, temperature=temperature).tolist()) for _ in range(20)}
    assert draws <= {(2, 0), (3, 0)}


def test_a_high_temperature_takes_any():
    torch.manual_seed(0)
    logits = LOGITS[:1].expand(4000, 4)
    counts = sample_token(logits, temperature=1e38).bincount(minlength=4)
    assert (counts - 1000).abs().max() < 150


@pytest.mark.parametrize("top_p", [5e-324, 1e-50, 1e-45, 1e-8])
def test_a_small_top_p_takes_the_most_likely(top_p):
    assert sample_token(LOGITS[:, :3], top_p=top_p).tolist() == [2, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value, temperature):
    logits = torch.full((2, 3), value)
    logits[0] = 1.0
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        sample_token(logits, temperature=temperature)


@pytest.mark.parametrize("temperature", [-1, 1e-45, 1e-320, 1.1e-38, float("nan"), float("inf")])
def test_temperatures_out_of_range_are_named(temperature):
    with pytest.raises(ValueError, match=f"temperature must be .*got {temperature}"):
        sample_token(LOGITS, temperature=temperature)

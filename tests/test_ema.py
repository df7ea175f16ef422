"""Averages of weights."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fastllm.trainer.ema import EMA
from fastllm.trainer.optimizers import gather


def make_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)).to(dtype)
    model[0].bias.requires_grad_(False)
    return model


def move(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_follow_the_formula(dtype):
    model = make_model(dtype)
    ema = EMA(model, 0.5)
    expected = {name: weight.detach().double() for name, weight in model.named_parameters() if weight.requires_grad}
    for step in range(15):
        move(model, step)
        ema.update()
        d = min(0.5, (1 + step) / (10 + step))
        for name, weight in model.named_parameters():
            if name in expected:
                expected[name] = d * expected[name] + (1 - d) * weight.detach().double()
    found = ema.tensors()
    assert int(found.pop("ema.updates")) == 15
    assert found.keys() == {f"ema.{name}" for name in expected}
    for name, average in expected.items():
        assert found[f"ema.{name}"].dtype == torch.float32
        torch.testing.assert_close(found[f"ema.{name}"].double(), average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [1.0, float("nan")])
def test_a_bad_step_changes_nothing(bad):
    model = make_model()
    ema = EMA(model, 0.9)
    before = gather(ema.tensors())
    move(model, 1)
    ema.update(torch.tensor(bad))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.tensors().items())
    ema.update(torch.tensor(0.0))
    assert int(ema.tensors()["ema.updates"]) == 1
    assert not torch.equal(ema.tensors()["ema.0.weight"], before["ema.0.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped(dtype):
    model = make_model(dtype)
    ema = EMA(model, 0.9)
    move(model, 1)
    ema.update()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    addresses = [weight.data_ptr() for weight in model.parameters()]
    with contextlib.suppress(KeyError), ema.swapped():
        assert torch.equal(model[2].weight, ema.tensors()["ema.2.weight"].to(dtype))
        assert not torch.equal(model[2].weight, before["2.weight"])
        assert torch.equal(model[0].bias, before["0.bias"])  # not trained
        raise KeyError
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert addresses == [weight.data_ptr() for weight in model.parameters()]


def test_a_loaded_average_goes_on_to_the_last_bit():
    model = make_model()
    ema = EMA(model, 0.99)
    for step in range(3):
        move(model, step)
        ema.update()
    other = EMA(model, 0.99)
    saved = gather(ema.tensors())
    other.load(saved)
    move(model, 9)
    ema.update()
    other.update()
    for name, tensor in ema.tensors().items():
        assert torch.equal(tensor, other.tensors()[name])
        assert tensor.data_ptr() != other.tensors()[name].data_ptr()


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1.0"):
        EMA(make_model(), 1.0)
    ema = EMA(make_model(), 0.9)
    saved = ema.tensors()
    with pytest.raises(ValueError, match=r"the averages lack ema\.0\.weight"):
        ema.load({name: tensor for name, tensor in saved.items() if name != "ema.0.weight"})
    with pytest.raises(ValueError, match=r"have ema\.x too many"):
        ema.load({**saved, "ema.x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"ema\.0\.weight has shape \(5,\) for weights of \(5, 7\)"):
        ema.load({**saved, "ema.0.weight": torch.zeros(5)})

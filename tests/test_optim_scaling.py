"""fastllm.optim.AdamW under torch's GradScaler: who divides the gradients, and who leaves a step out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from optim_suite import assert_as_torchs_fused, assert_equal, parameters, set_grads

from fastllm.optim import AdamW

SHAPES = ((16, 5), (48,), (2, 8, 4))  # whole vectors of any instruction set
OVERFLOWS = (2, 3)


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)


def run_scaled(optimizer: torch.optim.Optimizer, max_norm: float | None = None, first: int = 0) -> list[float]:
    """Eight steps from `first` on, two of them on infinite gradients; the scales."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    one, scales = scaler(), []
    for seed in range(first, first + 8):
        one.scale(torch.zeros(()))  # as the loss would be
        set_grads(seed, params)
        for p in params:
            p.grad *= one.get_scale()
        if seed in OVERFLOWS:
            params[0].grad[0, 0] = float("inf")
        if max_norm is not None:
            one.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        one.step(optimizer)
        one.update()
        scales.append(one.get_scale())
    return scales


def stock(params: list[torch.nn.Parameter], fused: bool | None, **kwargs) -> torch.optim.AdamW:
    """torch's fused kernel, but the scaler treats it as the one of this `fused`."""
    optimizer = torch.optim.AdamW(params, fused=True, **kwargs)
    if not fused:
        del optimizer._step_supports_amp_scaling
    return optimizer


FUSED = pytest.mark.parametrize("fused", [None, False, True])


@FUSED
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_the_same_numbers_as_torch_through_overflows(fused, max_norm):
    """Clipped between the scaler's division and the step, as its documentation shows, or not clipped."""
    params, theirs = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    ours, other = AdamW(params, lr=1e-2, fused=fused), stock(theirs, fused, lr=1e-2)
    assert run_scaled(ours, max_norm) == run_scaled(other, max_norm)
    assert_as_torchs_fused(params, theirs)
    assert_equal([p.grad for p in params], [p.grad for p in theirs])
    for key in ("exp_avg", "exp_avg_sq"):
        assert_as_torchs_fused([ours.state[p][key] for p in params], [other.state[p][key] for p in theirs])
    assert {int(state["step"]) for state in ours.state.values()} == {6}


@FUSED
def test_max_norm_clips_what_the_scaler_divided(fused):
    params, theirs = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    ours, other = AdamW(params, max_norm=0.1, fused=fused), stock(theirs, fused)
    assert run_scaled(ours) == run_scaled(other, 0.1)
    for a, b in zip(params, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    set_grads(7, theirs)
    torch.testing.assert_close(ours.grad_norm, torch.nn.utils.get_total_norm([p.grad for p in theirs]))


@FUSED
def test_whether_the_scaler_hands_over_is_as_in_torch(fused):
    """The scaler, Lightning and others read an attribute that torch's optimizers have if they were made with fused."""
    name = "_step_supports_amp_scaling"
    ours, other = AdamW(parameters(), fused=fused), torch.optim.AdamW(parameters(), fused=fused)
    assert getattr(ours, name, False) == getattr(other, name, False) == bool(fused)
    for loaded in (None, True):
        checkpoint = torch.optim.AdamW(parameters(), fused=loaded).state_dict()
        for optimizer in (ours, other):
            optimizer.load_state_dict(copy.deepcopy(checkpoint))
            optimizer.add_param_group({"params": parameters()})
        assert getattr(ours, name, False) == getattr(other, name, False) == bool(fused)
        for optimizer in (ours, other):
            del optimizer.param_groups[1:]


@FUSED
@pytest.mark.parametrize("remake", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
def test_a_copy_goes_on_under_a_scaler(fused, remake):
    params, theirs = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    ours, other = AdamW(params, fused=fused), stock(theirs, fused)
    for optimizer in (ours, other):
        run_scaled(optimizer)
    again = remake(ours)
    assert getattr(again, "_step_supports_amp_scaling", False) == bool(fused)
    more, their_more = parameters(shapes=((32,),), seed=1), parameters(shapes=((32,),), seed=1)
    again.add_param_group({"params": more})
    other.add_param_group({"params": their_more})
    for optimizer in (again, other):
        run_scaled(optimizer, first=8)
    assert_as_torchs_fused([*again.param_groups[0]["params"], *more], [*theirs, *their_more])


def test_grad_scaler_with_an_expanded_gradient():
    """As .sum() sends back: unscaled, it is written, so it gets memory of its own."""
    params, stock = parameters(shapes=((6, 5),)), parameters(shapes=((6, 5),))
    for kind, (param,) in zip((AdamW, torch.optim.AdamW), (params, stock), strict=True):
        optimizer = kind([param], fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        param.grad = torch.ones(1, 5).expand(6, 5) if kind is AdamW else torch.ones(6, 5)
        optimizer.step()
    assert_as_torchs_fused(params, stock)
    assert torch.equal(params[0].grad, torch.full((6, 5), 0.25))

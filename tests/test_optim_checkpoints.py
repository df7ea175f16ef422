"""Checkpoints and copies of AdamW, to and from torch.optim.AdamW, and between its own options."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from optim_suite import assert_equal, parameters, run, through_disk

from fastllm.optim import AdamW


@pytest.mark.parametrize("kwargs", [{}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("theirs", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("mine", [{}, {"fused": True}], ids=str)
def test_checkpoints_both_ways(theirs, mine, kwargs):
    lists = [parameters() for _ in range(4)]
    ours, stock = AdamW(lists[0], **mine, **kwargs), torch.optim.AdamW(lists[1], **theirs, **kwargs)
    run(ours, range(5))
    run(stock, range(5))
    with torch.no_grad():
        for new, old in ((lists[2], lists[1]), (lists[3], lists[0])):
            for a, b in zip(new, old, strict=True):
                a.copy_(b)
    from_stock, from_ours = AdamW(lists[2], lr=1.0), torch.optim.AdamW(lists[3], lr=1.0)
    from_stock.load_state_dict(through_disk(stock.state_dict()))
    from_ours.load_state_dict(through_disk(ours.state_dict()))
    for a, b in zip(lists[2], lists[1], strict=True):
        for key, value in stock.state[b].items():
            assert torch.equal(from_stock.state[a][key], value)
    run(from_stock, range(5, 10))
    run(stock, range(5, 10))
    run(from_ours, range(5, 10))
    run(ours, range(5, 10))
    for one, other in ((lists[2], lists[1]), (lists[3], lists[0])):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert int(from_ours.state[lists[3][0]]["step"]) == 10


OPTIONS = [
    {},
    {"master_weights": "float32"},
    {"master_weights": "remainder"},
    {"moment_dtype": torch.uint8},
    {"moment_dtype": torch.float32, "stochastic_rounding": True, "seed": 9},
    {"master_weights": "remainder", "moment_dtype": torch.uint8},
    {"amsgrad": True, "moment_dtype": torch.float32},
]


@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
def test_resume_is_bit_for_bit(kwargs):
    whole, half = parameters(torch.bfloat16), parameters(torch.bfloat16)
    run(AdamW(whole, max_norm=1.0, **kwargs), range(10))
    first = AdamW(half, max_norm=1.0, **kwargs)
    run(first, range(5))
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in half]
    second = AdamW(resumed, lr=123.0, max_norm=1.0, **kwargs)
    second.load_state_dict(through_disk(first.state_dict()))
    for a, b in zip(half, resumed, strict=True):
        for key, value in first.state[a].items():
            assert second.state[b][key].dtype == value.dtype
            assert torch.equal(second.state[b][key], value)
    run(second, range(5, 10))
    assert_equal(whole, resumed)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
def test_copies_go_on_alone(copier, kwargs):
    params = parameters(torch.bfloat16)
    optimizer = AdamW(params, max_norm=1.0, **kwargs)
    run(optimizer, range(3))
    twin_params, twin = copier((params, optimizer))
    for name in ("max_norm", "master_weights", "moment_dtype", "stochastic_rounding", "seed"):
        assert getattr(twin, name) == getattr(optimizer, name)
    run(optimizer, range(3, 6))
    assert int(twin.state[twin_params[0]]["step"]) == 3, "the copy shares no memory"
    run(twin, range(3, 6))
    assert_equal(params, twin_params)


def test_states_of_other_options_are_converted():
    options = {
        "plain": {},
        "float32": {"moment_dtype": torch.float32},
        "8 bit": {"moment_dtype": torch.uint8},
        "master": {"master_weights": "float32"},
        "remainder": {"master_weights": "remainder"},
    }
    for name, kwargs in options.items():
        params = parameters(torch.bfloat16)
        saved = AdamW(params, **kwargs)
        run(saved, range(5))
        for other, other_kwargs in options.items():
            copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
            loaded = AdamW(copies, **other_kwargs)
            loaded.load_state_dict(through_disk(saved.state_dict()))
            run(loaded, range(5, 6))
            fresh = AdamW([torch.nn.Parameter(p.detach().clone()) for p in params], **other_kwargs)
            run(fresh, range(1))
            for p, q in zip(copies, fresh.param_groups[0]["params"], strict=True):
                state = loaded.state[p]
                assert state.keys() == fresh.state[q].keys(), (name, other)
                assert [v.dtype for v in state.values()] == [v.dtype for v in fresh.state[q].values()]
                assert int(state["step"]) == 6
            reference = AdamW([torch.nn.Parameter(p.detach().clone()) for p in params], moment_dtype=torch.float32)
            reference.load_state_dict(through_disk(saved.state_dict()))
            run(reference, range(5, 6))
            for p, q in zip(copies, reference.param_groups[0]["params"], strict=True):
                torch.testing.assert_close(p, q, rtol=2**-7, atol=2e-4)


def test_8_bit_state_of_another_memory_format():
    """Its scales belong to blocks in the order of memory: it is coded anew for a parameter in another."""
    weight = torch.randn(8, 16, 9, 9, generator=torch.Generator().manual_seed(0))
    first = torch.nn.Parameter(weight.clone().to(memory_format=torch.channels_last))
    saved = AdamW([first], lr=1e-2, moment_dtype=torch.uint8)
    whole = torch.nn.Parameter(weight.clone())
    exact = AdamW([whole], lr=1e-2)
    spread = 10 ** torch.randn(8, 16, 1, 1, generator=torch.Generator().manual_seed(9))
    for seed in range(5):
        for param, optimizer in ((first, saved), (whole, exact)):
            param.grad = (torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * spread).to(
                memory_format=torch.channels_last if param is first else torch.contiguous_format
            )
            optimizer.step()
    second = torch.nn.Parameter(first.detach().contiguous())
    loaded = AdamW([second], lr=1e-2, moment_dtype=torch.uint8)
    loaded.load_state_dict(through_disk(saved.state_dict()))
    params = (first, second, whole)
    before = [p.detach().clone() for p in params]
    for param, optimizer in zip(params, (saved, loaded, exact), strict=True):
        param.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6)) * spread
        optimizer.step()
    stayed, moved, true = (p.detach() - b for p, b in zip(params, before, strict=True))
    assert float((moved - true).norm()) < 1.2 * float((stayed - true).norm())


def test_a_checkpoint_that_does_not_fit_the_options_is_an_error():
    params = parameters()
    saved = torch.optim.AdamW(params, amsgrad=True)
    run(saved, range(2))
    with pytest.raises(ValueError, match="does not go with amsgrad"):
        AdamW(parameters(), moment_dtype=torch.uint8).load_state_dict(saved.state_dict())


def test_masters_survive_their_other_form():
    params = parameters(torch.bfloat16)
    saved = AdamW(params, master_weights="float32")
    run(saved, range(5))
    for kind in ("remainder", "float32"):
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        loaded = AdamW(copies, master_weights=kind)
        loaded.load_state_dict(through_disk(saved.state_dict()))
        run(loaded, range(5, 9))
        again = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = AdamW(again, master_weights="float32")
        other.load_state_dict(through_disk(saved.state_dict()))
        run(other, range(5, 9))
        assert_equal(copies, again)


def test_8_bit_state_does_not_load_into_torch_in_silence():
    params = parameters()
    optimizer = AdamW(params, moment_dtype=torch.uint8)
    run(optimizer, range(2))
    stock = torch.optim.AdamW(parameters())
    stock.load_state_dict(optimizer.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):
        run(stock, range(1))


def test_what_torch_cast_is_not_taken_for_what_it_was():
    """Through torch and back: codes are refused, masters start from the parameter again."""
    params = parameters(torch.bfloat16)
    coded = AdamW(params, moment_dtype=torch.uint8)
    run(coded, range(2))
    stock = torch.optim.AdamW(params)
    stock.load_state_dict(coded.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg_code was cast to torch\.bfloat16"):
        AdamW(params, moment_dtype=torch.uint8).load_state_dict(stock.state_dict())
    for kind in ("float32", "remainder"):
        mastered = AdamW(params, master_weights=kind)
        run(mastered, range(2))
        stock = torch.optim.AdamW(params)
        stock.load_state_dict(mastered.state_dict())
        run(stock, range(2))
        before = [p.detach().clone() for p in params]
        again = AdamW(params, lr=0.0, master_weights=kind)
        state = stock.state_dict()
        state["param_groups"][0]["lr"] = 0.0
        again.load_state_dict(state)
        run(again, range(1))
        assert_equal([p.detach() for p in params], before)


def test_step_of_old_checkpoints_is_a_number():
    params = parameters()
    optimizer = AdamW(params)
    run(optimizer, range(3))
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["step"] = 3.0
    loaded = AdamW(params)
    loaded.load_state_dict(state)
    step = loaded.state[params[0]]["step"]
    assert (step.dtype, step.shape, float(step)) == (torch.float32, (), 3.0)
    double = optimizer.state_dict()
    for entry in double["state"].values():
        entry["step"] = torch.tensor(3.0, dtype=torch.float64)
    loaded.load_state_dict(double)
    assert loaded.state[params[0]]["step"].dtype == torch.float32

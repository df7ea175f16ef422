"""What fastllm.optim.AdamW keeps for a parameter lies in memory of its own."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from optim_suite import parameters, run, through_disk

from fastllm.optim import AdamW

SHAPES = ((3,), (1000,), (40, 20), (2**17,), (70,), ())
OPTIONS = (
    (torch.float32, {}),
    (torch.float32, {"amsgrad": True, "fused": True}),
    (torch.float32, {"moment_dtype": torch.uint8}),
    (torch.bfloat16, {"master_weights": "remainder", "moment_dtype": torch.bfloat16}),
    (torch.bfloat16, {"master_weights": "float32"}),
)


def held(state: dict[str, torch.Tensor]) -> int:
    """The bytes of all memory that the tensors of a state keep."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in state.values()}.values())


@pytest.mark.parametrize(("dtype", "options"), OPTIONS, ids=str)
def test_a_state_costs_itself_alone(dtype, options):
    params = parameters(dtype, SHAPES)
    optimizer = AdamW(params, **options)
    run(optimizer, range(2))
    addresses = set()
    for p in params:
        state = optimizer.state[p]
        size = sum(x.nbytes for x in state.values())
        assert held(state) == held(copy.deepcopy(state)) == held(pickle.loads(pickle.dumps(state))) == size
        file = io.BytesIO()
        torch.save(state, file)
        assert len(file.getvalue()) < size + 4000
        for x in state.values():
            assert x.data_ptr() % (64 if x.dim() else 4) == 0
            addresses.add(x.untyped_storage().data_ptr())
    assert len(addresses) == sum(len(state) for state in optimizer.state.values())


def test_a_part_of_a_state_dict_costs_that_part():
    params = parameters(shapes=[(32, 32)] * 50)
    optimizer = AdamW(params)
    run(optimizer, range(1))
    part = {"state": {7: optimizer.state_dict()["state"][7]}}
    file = io.BytesIO()
    torch.save(part, file)
    assert len(file.getvalue()) < 3 * 4 * 32 * 32
    moved = {key: value.share_memory_() for key, value in copy.deepcopy(part["state"][7]).items()}
    assert held(moved) < 3 * 4 * 32 * 32


def test_views_in_a_checkpoint_become_tensors_of_their_own():
    """As files hold them that were written when small states were parts of one tensor."""
    params = parameters(shapes=[(32, 32)] * 50)
    optimizer = AdamW(params)
    run(optimizer, range(1))
    checkpoint = optimizer.state_dict()
    for key in ("exp_avg", "exp_avg_sq", "step"):
        whole = torch.stack([state[key] for state in checkpoint["state"].values()])
        for i, state in checkpoint["state"].items():
            state[key] = whole[i]
    loaded = AdamW(parameters(shapes=[(32, 32)] * 50))
    loaded.load_state_dict(through_disk(checkpoint))
    for p, q in zip(params, loaded.param_groups[0]["params"], strict=True):
        state = loaded.state[q]
        assert held(state) == sum(x.nbytes for x in state.values())
        assert all(torch.equal(x, optimizer.state[p][key]) for key, x in state.items())

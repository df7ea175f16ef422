"""fastllm.optim.AdamW where tensors hold no numbers, or every op is recorded: FakeTensorMode, make_fx, meta tensors."""

from __future__ import annotations

import pytest
import torch
from optim_suite import assert_equal, parameters, set_grads
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fastllm.optim import AdamW

FLOAT, SHORT, HALF = (torch.float32,), (torch.bfloat16,), (torch.float16,)
VARIANTS = {
    "plain": (FLOAT, {}),
    "mixed dtypes": (FLOAT + SHORT + HALF + (torch.float64,), {"foreach": True}),
    "amsgrad": (FLOAT, {"amsgrad": True}),
    "fused": (FLOAT, {"fused": True}),
    "capturable": (FLOAT, {"capturable": True}),
    "max_norm": (FLOAT + SHORT, {"max_norm": 1.0, "skip_nonfinite": True}),
    "8-bit": (FLOAT, {"moment_dtype": torch.uint8}),
    "bfloat16 moments": (FLOAT, {"moment_dtype": torch.bfloat16}),
    "masters": (SHORT + HALF, {"master_weights": "float32"}),
    "remainders": (SHORT, {"master_weights": "remainder", "moment_dtype": torch.uint8}),
    "stochastic": (SHORT, {"stochastic_rounding": True}),
}
EACH = pytest.mark.parametrize(("dtypes", "options"), VARIANTS.values(), ids=VARIANTS)


SHAPES = ((37, 5), (3,), (2, 3, 4), ())


def train(params: list[torch.nn.Parameter], options: dict, lr: torch.dtype | None = None) -> AdamW:
    optimizer = AdamW(params, lr=1e-2, **options)
    if lr is not None:
        optimizer.param_groups[0]["lr"] = torch.full((), 1e-2, dtype=lr)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


def ones(dtypes: tuple, device: str) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for dtype in dtypes for shape in SHAPES]


def described(optimizer: AdamW) -> list[dict]:
    params = optimizer.param_groups[0]["params"]
    return [{k: (v.shape, v.dtype) for k, v in optimizer.state[p].items()} for p in params]


@EACH
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(device, dtypes, options):
    """The state is described as a real one is; no number is asked for, on a device that need not be there."""
    expected = described(train(ones(dtypes, "cpu"), options))
    with FakeTensorMode():
        for lr in (None, torch.float32, torch.float64):
            fake = train(ones(dtypes, device), options, lr)
            assert described(fake) == expected
            assert all(isinstance(x, FakeTensor) for state in fake.state.values() for x in state.values())


def test_a_fake_verdict_is_not_waited_for():
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            optimizer = AdamW(ones(FLOAT, device))
            optimizer.found_inf, optimizer.grad_scale = torch.zeros((), device=device), torch.ones((), device=device)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            optimizer.step()


def test_fake_checkpoints():
    """A master is taken for what it would be; 8-bit moments are coded."""
    with FakeTensorMode():
        saved = train(ones(SHORT, "cpu"), {"master_weights": "float32"}).state_dict()
        loaded = AdamW(ones(SHORT, "cpu"), master_weights="remainder", moment_dtype=torch.uint8)
        loaded.load_state_dict(saved)
        assert all("remainder" in state and "exp_avg_code" in state for state in loaded.state.values())


@EACH
def test_meta_tensors(dtypes, options):
    expected = described(train(ones(dtypes, "cpu"), options))
    assert described(train(ones(dtypes, "meta"), options)) == expected


MODES = [("fake", name) for name in VARIANTS] + [
    (mode, name) for mode in ("real", "pre_dispatch", "symbolic") for name in ("plain", "max_norm")
]


@pytest.mark.parametrize(("mode", "variant"), MODES)
def test_make_fx(mode, variant):
    """The op is in the graph, not a table of addresses, and the graph does what the step does."""
    dtypes, options = VARIANTS[variant]

    def after(weights, grads):
        params = [w.clone().requires_grad_() for w in weights]  # a Parameter becomes a constant, here
        optimizer = AdamW(params, lr=1e-2, **options)
        for _ in range(2):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
        return [p.detach() for p in params] + [x for p in params for x in optimizer.state[p].values()]

    params = [p for dtype in dtypes for p in parameters(dtype)]
    set_grads(0, params)
    args = [p.detach() for p in params], [p.grad for p in params]
    tracing = {"pre_dispatch": True} if mode == "pre_dispatch" else {"tracing_mode": mode}
    graph = make_fx(after, **tracing)(*args)
    names = [str(node.target) for node in graph.graph.nodes]
    assert names.count("fastllm.adamw_step.default") == 2 * len(dtypes)
    assert not [name for name in names if "table" in name]
    assert_equal(graph(*args), after(*args))


@pytest.mark.parametrize("lr", [None, torch.float32, torch.float64])
def test_a_mode_that_counts_changes_no_number(lr):
    counted, plain = ones(FLOAT, "cpu"), ones(FLOAT, "cpu")
    with FlopCounterMode(display=False):
        train(counted, {}, lr)
    train(plain, {}, lr)
    assert_equal(counted, plain)

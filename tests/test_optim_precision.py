"""AdamW with 16-bit weights and 8-bit moments."""

from __future__ import annotations

from pathlib import Path

import torch
from optim_suite import assert_equal, parameters, set_grads

from fastllm.optim import AdamW


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int, scale: float = 0.3) -> None:
    """Steps whose gradients depend on the weights, as they do in training."""
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = (scale * p.detach().float() + torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.step()


def test_remainder_equals_float32_masters():
    shapes = ((300, 40), (1000,), (3,))
    lists = [parameters(torch.bfloat16, shapes) for _ in range(2)]
    optimizers = [
        AdamW(params, lr=1e-3, master_weights=kind)
        for params, kind in zip(lists, ("float32", "remainder"), strict=True)
    ]
    for optimizer, params in zip(optimizers, lists, strict=True):
        train(optimizer, params, 100)
    assert_equal(*lists)
    for a, b in zip(*lists, strict=True):
        master, remainder = optimizers[0].state[a]["master"], optimizers[1].state[b]["remainder"]
        bits = (b.detach().view(torch.int16).int() << 16) + remainder.int()
        assert torch.equal(bits.view(torch.float32), master)
        assert (master.element_size(), remainder.element_size()) == (4, 2)
        assert optimizers[0].state[a]["exp_avg"].dtype == torch.float32


def test_masters_keep_what_16_bits_lose():
    """Updates far below the last bit of a bfloat16: masters follow float32, plain bfloat16 stands still."""
    results = {}
    options = {
        "float32": {},
        "plain": {},
        "master": {"master_weights": "float32"},
        "remainder": {"master_weights": "remainder"},
        "stochastic": {"stochastic_rounding": True, "moment_dtype": torch.float32},
        "8 bit": {"master_weights": "remainder", "moment_dtype": torch.uint8},
    }
    for name, kwargs in options.items():
        param = torch.nn.Parameter(
            torch.full((4096,), 1.0, dtype=torch.float32 if name == "float32" else torch.bfloat16)
        )
        optimizer = AdamW([param], lr=2e-5, weight_decay=0.0, **kwargs)
        for _ in range(1000):
            param.grad = torch.ones_like(param)
            optimizer.step()
        results[name] = float(param.detach().double().mean())
    assert results["plain"] == 1.0
    assert abs(results["float32"] - 0.98) < 1e-4
    for name in ("master", "remainder", "8 bit"):
        assert abs(results[name] - results["float32"]) < 2**-9
    assert abs(results["stochastic"] - results["float32"]) < 5e-4


def test_stochastic_rounding_knows_the_parameters_place():
    """A parameter's random numbers follow its place among all parameters, not among those that have a gradient."""
    lists = [parameters(torch.bfloat16, ((1000,),) * 3) for _ in range(2)]
    for params, skip in zip(lists, (False, True), strict=True):
        optimizer = AdamW(params, lr=1e-2, stochastic_rounding=True, seed=3)
        set_grads(0, params)
        if skip:
            params[0].grad = None
        optimizer.step()
    assert_equal(lists[0][1:], lists[1][1:])
    same = parameters(torch.bfloat16, ((1000,),) * 2)
    same[1].data.copy_(same[0].data)
    optimizer = AdamW(same, lr=1e-2, stochastic_rounding=True)
    for p in same:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(*same)


def test_8_bit_moments_train_like_float32():
    losses = {}
    for moment_dtype in (None, torch.uint8):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
        optimizer = AdamW(model.parameters(), lr=1e-2, moment_dtype=moment_dtype)
        x, target = torch.randn(256, 16), torch.randn(256, 4)
        for _ in range(200):
            loss = torch.nn.functional.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[moment_dtype] = loss.item()
    assert max(losses.values()) < 0.005, f"from about 1: {losses}"


def test_the_docstrings_bytes_a_parameter():
    """What the docstring's table says is what the state takes."""
    table = {}
    for line in (AdamW.__doc__ or "").splitlines():
        numbers = line.split()[-4:]
        if line.startswith(("    float", "    bfloat16", "    the same")):
            label = " ".join(line.split()[:-4])
            table[label] = tuple(map(float, numbers))
    assert len(table) == 10
    n = 256 * 64
    seen = {
        "float32": (torch.float32, {}),
        "float32, moment_dtype=torch.bfloat16": (torch.float32, {"moment_dtype": torch.bfloat16}),
        "float32, moment_dtype=torch.uint8": (torch.float32, {"moment_dtype": torch.uint8}),
        "bfloat16 or float16": (torch.bfloat16, {}),
        "bfloat16 or float16, moment_dtype=torch.float32": (torch.float16, {"moment_dtype": torch.float32}),
        'bfloat16 or float16, master_weights="float32"': (torch.float16, {"master_weights": "float32"}),
        'bfloat16, master_weights="remainder"': (torch.bfloat16, {"master_weights": "remainder"}),
        'bfloat16, master_weights="remainder", moment_dtype=torch.uint8': (
            torch.bfloat16,
            {"master_weights": "remainder", "moment_dtype": torch.uint8},
        ),
        "bfloat16 or float16, stochastic_rounding=True": (torch.bfloat16, {"stochastic_rounding": True}),
        "the same, moment_dtype=torch.uint8": (
            torch.bfloat16,
            {"stochastic_rounding": True, "moment_dtype": torch.uint8},
        ),
    }
    assert seen.keys() == table.keys()
    for label, (dtype, kwargs) in seen.items():
        param = torch.nn.Parameter(torch.zeros(n, dtype=dtype))
        param.grad = torch.zeros_like(param)
        optimizer = AdamW([param], **kwargs)
        optimizer.step()
        sizes = {
            key: value.numel() * value.element_size() / n
            for key, value in optimizer.state[param].items()
            if key != "step"
        }
        extra = sum(size for key, size in sizes.items() if key in ("master", "remainder"))
        moments = sum(size for key, size in sizes.items() if key.startswith("exp_avg"))
        weight = param.element_size()
        assert table[label] == (weight, extra, round(moments, 2), round(weight + extra + moments, 2)), label
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    rows = [
        line.split("|")[2:6]
        for line in readme.splitlines()
        if line.startswith(("| float32", "| bfloat16", "| the same"))
    ]
    assert [tuple(map(float, row)) for row in rows] == list(table.values()), "README says the same"

"""AdamW on gradients that are huge, tiny, infinite or NaN: what becomes of their own elements and of the neighbours."""

from __future__ import annotations

import bindings
import pytest
import torch
from adamw_suite import State, assert_same

import fastllm
from fastllm.ops.adamw import dequantize, grad_norm, quantize
from fastllm.optim import AdamW

SPECIAL = (1e21, -3e38, 1e-45, -1e-30, float("inf"), float("-inf"), float("nan"), 6e20, 1e10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("binding", bindings.NAMES)
def test_kernels_equal_the_reference(binding, dtype):
    """A block for each, one in which it is alone with zeros, and one with all of them."""
    blocks = len(SPECIAL)
    options = {"dtype": dtype, "shapes": [(256 * (2 * blocks + 1) + 77,)], "moment_dtype": torch.uint8}
    with bindings.bound(binding) as device:
        got, expected = State(device=device, **options), State(**options)
        for step in range(4):
            grad = torch.randn(options["shapes"][0], generator=torch.Generator().manual_seed(step))
            grad[256 * blocks : 512 * blocks] = 0
            if step == 1:
                for i, value in enumerate(SPECIAL):
                    grad[[256 * i + 3 * i, 256 * (blocks + i) + 255 - i, 512 * blocks + 20 * i, -1 - i]] = value
            for state in (got, expected):
                with fastllm.use_backend("reference" if state is expected else None):
                    state.step([grad.to(state.params[0].device, dtype)])
    assert_same(got, expected, binding)


@pytest.mark.parametrize("signed", [True, False])
def test_8_bits_of_what_is_not_finite(signed):
    """It is coded as NaN (infinity, without a sign); finite numbers of its block keep their precision."""
    inf, nan = float("inf"), float("nan")
    x = torch.linspace(0.1, 1.0, 1024)
    x[[3, 300, 600]] = torch.tensor([inf, nan, -inf if signed else inf])
    x[768:] = 0
    x[1000] = nan
    code, scale = quantize(x, signed)
    assert (scale < 0).all()
    assert scale[3] == -1
    back = dequantize(code, scale, signed)
    assert torch.equal(back.isfinite(), x.isfinite())
    assert back[~x.isfinite()].isnan().all() if signed else (back[~x.isfinite()] == inf).all()
    torch.testing.assert_close(back[x.isfinite()], x[x.isfinite()], rtol=0.0, atol=0.45 / (64 if signed else 128))
    assert (back[1001:] == 0).all()
    again = quantize(back, signed)
    assert torch.equal(again[0], code)


def test_a_second_moment_that_is_not_zero_is_never_coded_as_zero():
    code, scale = quantize(torch.tensor([3e38, 1e-45, 1e-30, 0.0]), False)
    assert (code > 0).tolist() == [True, True, True, False]
    assert (dequantize(code, scale, False) > 0).tolist() == [True, True, True, False]


def run(value: float | None, moment_dtype: torch.dtype | None, steps: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Parameters behind the step in which element 5 had this gradient, and at the end."""
    p = torch.nn.Parameter(torch.ones(600))
    optimizer = AdamW([p], lr=1e-2, weight_decay=0.0, moment_dtype=moment_dtype)
    for i in range(steps):
        p.grad = torch.randn(600, generator=torch.Generator().manual_seed(i)) * 1e-2 + 1e-2
        if i == 1 and value is not None:
            p.grad[5] = value
        optimizer.step()
        if i == 1:
            behind = p.detach().clone()
    return behind, p.detach()


@pytest.mark.parametrize("moment_dtype", [None, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-30, 1e10, 1e19, 6e20, 1e21, 1e30, 3e38, -3e38])
def test_a_finite_gradient_makes_no_number_nan(value, moment_dtype):
    behind, p = run(value, moment_dtype)
    assert p.isfinite().all()
    if abs(value) >= 1e21:  # its square is infinite, and stays so
        assert p[5] == behind[5]


@pytest.mark.parametrize("moment_dtype", [None, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("value", [1e21, -1e30, 3e38, float("inf"), float("nan")])
def test_the_neighbours_go_on(value, moment_dtype):
    """As they would without it; in 8 bits, as those do, whose largest element is coded a little less exactly."""
    _, p = run(value, moment_dtype)
    _, undisturbed = run(None, moment_dtype)
    assert p.isnan().nonzero().flatten().tolist() == ([] if abs(value) <= 3e38 else [5])
    others = torch.arange(600) != 5
    if moment_dtype != torch.uint8:
        assert torch.equal(p[others], undisturbed[others])
        return
    assert torch.equal(p[256:], undisturbed[256:])
    moved = (undisturbed - 1).abs().mean()
    assert (p - undisturbed)[others].abs().mean() < 0.02 * moved


def test_infinities_survive_a_change_of_moment_dtype():
    p = torch.nn.Parameter(torch.ones(300))
    optimizer = AdamW([p])
    p.grad = torch.ones(300)
    p.grad[7] = 1e21
    optimizer.step()
    for moment_dtype in (torch.uint8, None):
        other = torch.nn.Parameter(p.detach().clone())
        loaded = AdamW([other], moment_dtype=moment_dtype)
        loaded.load_state_dict(optimizer.state_dict())
        for _ in range(3):
            other.grad = torch.ones(300)
            loaded.step()
        assert other.isfinite().all()
        assert float(other[7]) == pytest.approx(float(p[7]) * (1 - 1e-5) ** 3)
        optimizer, p = loaded, other


@pytest.mark.parametrize("binding", bindings.NAMES)
@pytest.mark.parametrize("value", [1e20, 1e30, 3e38])
def test_a_norm_that_overflows(binding, value):
    """Its squares do, in float32: it is infinite, and clips gradients to zero, as torch.nn.utils.clip_grad_norm_."""
    with bindings.bound(binding) as device:
        grads = [torch.full((600,), value, device=device), torch.ones(3, device=device)]
        norm = grad_norm(grads)
        with fastllm.use_backend("reference"):
            assert grad_norm([g.cpu() for g in grads]) == norm.cpu() == float("inf")
    lists = [[torch.nn.Parameter(torch.ones(g.shape)) for g in grads] for _ in range(2)]
    for params in lists:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.cpu().clone()
    ours, stock = AdamW(lists[0], max_norm=1.0), torch.optim.AdamW(lists[1])
    ours.step()
    torch.nn.utils.clip_grad_norm_(lists[1], 1.0)
    stock.step()
    for a, b in zip(*lists, strict=True):
        assert torch.equal(a, b)

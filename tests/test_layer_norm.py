from __future__ import annotations

import torch
from norm_suite import NormSuite

from fastllm import nn, ops


class TestLayerNorm(NormSuite):
    name, biased, added = "layer_norm", True, False


def test_module_is_torchs_with_another_forward():
    for kwargs in ({}, {"elementwise_affine": False}, {"bias": False}, {"eps": 0.1, "dtype": torch.bfloat16}):
        ours, stock = nn.LayerNorm((4, 8), **kwargs), torch.nn.LayerNorm((4, 8), **kwargs)
        assert ours.state_dict().keys() == stock.state_dict().keys()
        stock.load_state_dict({name: torch.randn_like(value) for name, value in stock.state_dict().items()})
        ours.load_state_dict(stock.state_dict())
        assert repr(ours) == repr(stock)
        x = torch.randn(3, 4, 8, dtype=kwargs.get("dtype"))
        torch.testing.assert_close(ours(x), stock(x))
        normed, total = ours.add(x, 2 * x)
        torch.testing.assert_close(total, x + 2 * x)
        torch.testing.assert_close(normed, stock(x + 2 * x))


def test_variance_of_a_small_spread_around_a_large_mean():
    """One pass, E[x^2] - E[x]^2, returns 0 for the variance of 100 +- 0.01."""
    x = 100 + 0.01 * torch.tensor([[1.0, -1.0] * 512])
    y = ops.layer_norm(x, (1024,), eps=0.0)
    torch.testing.assert_close(y.abs(), torch.ones_like(y), rtol=2e-3, atol=0)

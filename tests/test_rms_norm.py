from __future__ import annotations

import torch
from norm_suite import NormSuite

from fastllm import nn, ops


class TestRMSNorm(NormSuite):
    name, biased, added = "rms_norm", False, False


def test_module_is_torchs_with_another_forward():
    for kwargs in ({}, {"elementwise_affine": False}, {"eps": 0.1, "dtype": torch.bfloat16}):
        ours, stock = nn.RMSNorm((4, 8), **kwargs), torch.nn.RMSNorm((4, 8), **kwargs)
        assert ours.state_dict().keys() == stock.state_dict().keys()
        stock.load_state_dict({name: torch.randn_like(value) for name, value in stock.state_dict().items()})
        ours.load_state_dict(stock.state_dict())
        assert repr(ours) == repr(stock)
        x = torch.randn(3, 4, 8, dtype=kwargs.get("dtype"))
        torch.testing.assert_close(ours(x), stock(x))
        normed, total = ours.add(x, 2 * x)
        torch.testing.assert_close(total, x + 2 * x)
        torch.testing.assert_close(normed, stock(x + 2 * x))


def test_default_eps_is_that_of_the_accumulation():
    """torch takes finfo(float32).eps for bfloat16 too."""
    x = torch.full((1, 16), 1e-4, dtype=torch.bfloat16)
    torch.testing.assert_close(ops.rms_norm(x, (16,)), torch.nn.functional.rms_norm(x, (16,)))
    assert ops.rms_norm(x, (16,)).float().mean() < 0.3

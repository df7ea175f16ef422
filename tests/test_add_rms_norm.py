from __future__ import annotations

import torch
from norm_suite import NormSuite

from fastllm import ops


class TestAddRMSNorm(NormSuite):
    name, biased, added = "add_rms_norm", False, True


def test_gradients_through_either_output_alone():
    x, r, w = (torch.randn(shape, requires_grad=True) for shape in ((3, 8), (3, 8), (8,)))
    normed, total = ops.add_rms_norm(x, r, (8,), w)
    assert [g is not None for g in torch.autograd.grad(total.sum(), (x, r, w), allow_unused=True)] == [
        True,
        True,
        False,
    ]
    normed, total = ops.add_rms_norm(x, r, (8,), w)
    got = torch.autograd.grad(normed.square().sum(), (x, r, w))
    expected = torch.autograd.grad(torch.nn.functional.rms_norm(x + r, (8,), w).square().sum(), (x, r, w))
    torch.testing.assert_close(got, expected)


def test_the_two_inputs_may_be_one():
    x = torch.randn(3, 8, requires_grad=True)
    _, total = ops.add_rms_norm(x, x, (8,))
    (grad,) = torch.autograd.grad(total.sum(), x)
    torch.testing.assert_close(total, 2 * x)
    torch.testing.assert_close(grad, torch.full_like(x, 2.0))

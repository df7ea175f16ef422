from __future__ import annotations

import torch
from norm_suite import NormSuite

from fastllm import ops


class TestAddLayerNorm(NormSuite):
    name, biased, added = "add_layer_norm", True, True


def test_gradients_through_either_output_alone():
    x, r, w, b = (torch.randn(shape, requires_grad=True) for shape in ((3, 8), (3, 8), (8,), (8,)))
    normed, total = ops.add_layer_norm(x, r, (8,), w, b)
    assert [g is not None for g in torch.autograd.grad(total.sum(), (x, r, w, b), allow_unused=True)] == [
        True,
        True,
        False,
        False,
    ]
    normed, total = ops.add_layer_norm(x, r, (8,), w, b)
    got = torch.autograd.grad(normed.square().sum(), (x, r, w, b))
    expected = torch.autograd.grad(torch.nn.functional.layer_norm(x + r, (8,), w, b).square().sum(), (x, r, w, b))
    torch.testing.assert_close(got, expected)


def test_mixed_dtypes_promote_as_addition_does():
    x, r = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    normed, total = ops.add_layer_norm(x, r, (8,))
    assert normed.dtype == total.dtype == torch.float32
    torch.testing.assert_close(total, x + r)
    (normed + total).sum().backward()
    assert (x.grad.dtype, r.grad.dtype) == (torch.bfloat16, torch.float32)

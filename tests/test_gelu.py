"""gelu on every binding that is built. Triton kernels: test_interpreter.py."""

from __future__ import annotations

import functools

import bindings
import eager
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastllm
from fastllm import ops
from fastllm.backends import OPS
from fastllm.testing import LAYOUTS, check_op, make, poisoned_allocations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = [f"cpu-{isa}" for isa in bindings.ISAS]
FORMS = ("none", "tanh")


def check(x: Tensor, bias: Tensor | None = None, grad_layout: str = "contiguous", forms: tuple = FORMS) -> None:
    for form in forms:
        ours, stock = (functools.partial(f, approximate=form) for f in (ops.gelu, eager.gelu))
        check_op(ours, stock, (x,), {} if bias is None else {"bias": bias}, grad_layout=grad_layout)


@pytest.mark.parametrize("binding", CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_dtypes(binding, dtype):
    with bindings.bound(binding):
        for n in (1, 3, 16, 127, 129, 1000, 8193):  # the last in two pieces
            check(make((5, n), dtype), make((n,), dtype, seed=1))
        check(make((2, 3, 129), dtype))
        check(make((33,), dtype), make((33,), dtype, seed=1))
        for other in {*DTYPES} - {dtype}:
            check(make((40, 129), dtype), make((129,), other, seed=1))  # rows in blocks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    for shape in ((4, 130), (2, 20, 33)):
        x, bias = make(shape), make(shape[-1:], seed=1)
        check(make(shape, layout=layout), make(shape[-1:], seed=1, layout=layout))
        check(x, bias, grad_layout=layout)


@pytest.mark.parametrize("binding", CPU)
@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])
def test_tiny_and_huge(binding, scale):
    with bindings.bound(binding):
        for dtype in (torch.float32, torch.bfloat16):
            check(make((5, 133), dtype) * scale, make((133,), dtype, seed=1))


@pytest.mark.parametrize("binding", CPU)
def test_special_values(binding):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 100.0, -100.0, 1e-40] * 5)
    known = ~x.isinf()  # there torch's own forms, and its vectors and scalars, do not agree
    with bindings.bound(binding):
        for form in FORMS:
            for bias in (None, torch.zeros_like(x)):
                ours = ops.gelu(x, form, bias=bias)
                torch.testing.assert_close(ours[known], F.gelu(x, approximate=form)[known], equal_nan=True)
                assert (ours[x == torch.inf] == torch.inf).all()


def test_large_outputs_go_around_the_cache():
    for shape in ((2048, 1056), (2050, 1055)):
        check(make(shape), make(shape[-1:], seed=1), forms=FORMS[:1])


def test_the_sum_is_not_rounded():
    x, bias = torch.full((1, 8), 256.0).bfloat16(), torch.full((8,), 0.5)
    assert torch.equal(ops.gelu(-x, bias=bias + 255), F.gelu(torch.full((1, 8), -0.5)).bfloat16())
    assert ops.gelu(x, bias=bias).dtype == torch.bfloat16


@bindings.needs_kernels
def test_the_number_of_threads_changes_nothing():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, bias = (make(shape, seed=i).requires_grad_() for i, shape in enumerate(((1001, 520), (520,))))
            found.append(torch.autograd.grad(ops.gelu(x, bias=bias).square().sum(), (x, bias)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for grads in found for a, b in zip(grads, found[0], strict=True))


def test_gradients_only_where_asked_for():
    op, x, bias = OPS["gelu_bwd"], make((20, 9)), make((9,), torch.float16)
    for given, wanted, size in ((bias, True, 9), (bias, False, 0), (None, True, 0), (None, False, 0)):
        dx, dbias = op(x, x, given, False, wanted)
        assert dx.shape == x.shape
        assert dbias.shape == (size,)
        assert dbias.dtype == (torch.float32 if given is None else torch.float16)
    found = []
    for leaves in ([x], [bias], [x, bias]):
        for leaf in (x, bias):
            leaf.requires_grad_(any(leaf is one for one in leaves))
        found.append(torch.autograd.grad(ops.gelu(x, bias=bias).sum(), leaves))
    assert torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[1][0], found[2][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_empty(dtype):
    for shape in ((0, 4), (3, 0), (2, 0, 4)):
        x, bias = torch.ones(shape, dtype=dtype), torch.ones(shape[-1], dtype=dtype)
        leaves = [x.requires_grad_(), bias.requires_grad_()]
        out = ops.gelu(x, bias=bias)
        assert out.shape == shape
        for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))


def test_a_scalar():
    x = torch.tensor(-0.7, requires_grad=True)
    ours, stock = ops.gelu(x, "tanh"), F.gelu(x, approximate="tanh")
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(*(torch.autograd.grad(y, x) for y in (ours, stock)))


def test_every_element_is_written():
    with poisoned_allocations():
        x, bias = torch.randn(37, 133, requires_grad=True), torch.randn(133, requires_grad=True)
        out = ops.gelu(x, bias=bias)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (x, bias)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_gradcheck_of_the_reference(form):
    x, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (4,)))
    assert torch.autograd.gradcheck(lambda x, bias: ops.gelu(x, form, bias=bias), (x, bias))


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_opcheck():
    x, bias, dy = torch.randn(3, 16)[:, ::2], torch.randn(8).bfloat16(), torch.randn(8, 3).t()
    for given in (bias, None):
        torch.library.opcheck(OPS["gelu_fwd"].call, (x, given, True))
        for wanted in (True, False):
            torch.library.opcheck(OPS["gelu_bwd"].call, (dy, x, given, False, wanted))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_fullgraph_compile(backend):
    torch.compiler.reset()

    def step(x, bias):
        return (ops.gelu(x, bias=bias) + ops.gelu(x, "tanh")).sin().sum()

    with fastllm.use_backend(backend):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for rows in (3, 5, 7):
            leaves = [torch.randn(shape, requires_grad=True) for shape in ((rows, 8), (8,))]
            torch.testing.assert_close(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step)))


def test_autocast_changes_nothing():
    for x in (make((3, 8)), make((3, 8), torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            found = ops.gelu(x, bias=make((8,)))
            assert found.dtype == F.gelu(x).dtype == x.dtype
        assert torch.equal(found, ops.gelu(x, bias=make((8,))))


def test_hostile_arguments():
    x, bias = torch.randn(3, 8), torch.randn(8)
    for args, kwargs, error, message in (
        (([1.0],), {}, TypeError, "input must be a tensor, got list"),
        ((x.int(),), {}, TypeError, "input must be float32, bfloat16, float16 or float64, got torch.int32"),
        ((x, "quick"), {}, ValueError, "approximate must be 'none' or 'tanh', got 'quick'"),
        ((x, bias), {}, ValueError, "approximate must be 'none' or 'tanh', got tensor"),
        ((x,), {"bias": 1.0}, TypeError, "bias must be a tensor or None, got float"),
        ((x,), {"bias": bias.int()}, TypeError, "bias must be float32, bfloat16, float16 or float64, got torch.int32"),
        ((x,), {"bias": bias[:1]}, ValueError, r"bias must have the shape .*, \(8,\), got \(1,\)"),
        ((x,), {"bias": x}, ValueError, r"bias must have the shape .*, \(8,\), got \(3, 8\)"),
        ((x[0, 0],), {"bias": bias[0]}, ValueError, r"bias must have the shape .*, \(\), got \(\)"),
        ((x,), {"bias": bias.to("meta")}, ValueError, "input is on cpu, bias on meta"),
    ):
        with pytest.raises(error, match=f"^gelu: .*{message}"):
            ops.gelu(*args, **kwargs)


@bindings.needs_kernels
def test_direct_calls_cannot_reach_foreign_memory():
    x, bias = torch.randn(3, 8), torch.randn(8)
    for name, args in (
        ("gelu_fwd", (x, bias[:7], False)),
        ("gelu_bwd", (x, x, bias[:7], False, True)),
        ("gelu_bwd", (x[:, :7], x, bias, False, True)),
        ("gelu_bwd", (x.bfloat16(), x, bias, False, True)),
    ):
        with pytest.raises(RuntimeError, match="must fit x in shape, dtype and device"):
            OPS[name].call(*args)

"""The error budget fails when it must, and the makers give what they claim."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

from fastllm import _ext, ops, testing
from fastllm.testing import (
    assert_within_budget,
    check_op,
    gradients,
    make,
    poisoned_allocations,
    rounding_floor,
    sample,
)


def errors(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A truth, an eager result in `dtype`, and the budget that they give."""
    truth = make((7, 33), torch.float64) * scale
    eager = (truth * (1 + 1e-3 * make((7, 33), torch.float64, seed=1))).to(dtype)
    rival = float((eager.double() - truth).abs().max())
    return truth, eager, 2 * rival + rounding_floor(truth, dtype)


# The budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_an_error_over_the_budget_fails(dtype, scale):
    truth, eager, budget = errors(scale, dtype)
    assert_within_budget(truth.to(dtype), truth, eager)
    assert_within_budget(eager, truth, eager)
    for times, passes in ((0.3, True), (4.0, False), (-4.0, False)):
        kernel = truth.clone()
        kernel[3, 4] += times * budget
        if passes:
            assert_within_budget(kernel.to(dtype), truth, eager)
        else:
            with pytest.raises(
                AssertionError, match=r"dweight .* \(7, 33\): error .* over the budget .* at \(3, 4\): kernel"
            ):
                assert_within_budget(kernel.to(dtype), truth, eager, name="dweight")


def test_a_correctly_rounded_result_passes_beside_an_exact_rival():
    truth = make((1000,), torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        exact = truth.to(dtype)
        step = torch.finfo(dtype).eps
        assert_within_budget(truth.to(dtype), truth, exact)
        with pytest.raises(AssertionError, match="over the budget"):
            assert_within_budget((truth * (1 + 16 * step)).to(dtype), truth, exact)


def test_a_result_of_another_shape_fails():
    truth, eager, _ = errors()
    with pytest.raises(AssertionError, match=r"\(33, 7\): truth has shape \(7, 33\)"):
        assert_within_budget(eager.T, truth, eager)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinities_must_be_where_they_belong(value):
    truth, eager, _ = errors()
    wrong = eager.clone()
    wrong[2, 5] = value
    with pytest.raises(AssertionError, match=r"1 infinities or NaN too many or too few, the first at \(2, 5\)"):
        assert_within_budget(wrong, truth, eager)
    assert_within_budget(wrong, truth, wrong)  # eager overflows there too
    truth = truth.clone()
    truth[2, 5] = value
    assert_within_budget(wrong, truth, wrong)
    with pytest.raises(AssertionError, match="too many or too few"):
        assert_within_budget(eager, truth, wrong)


def test_overflow_of_the_dtype_alone_is_no_error():
    truth = torch.tensor([1.0, 1e5], dtype=torch.float64)
    assert_within_budget(truth.half(), truth, torch.tensor([1.0, 65504.0], dtype=torch.float16))


def test_nothing_to_compare_passes():
    empty = torch.empty(0, 3)
    assert_within_budget(empty, empty.double(), empty)


# check_op, on an op that is wrong in one place


def broken(result: int | None = None, grad: int | None = None, factor: float = 1.001):
    """rms_norm with one element of an output or of a gradient off."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            y = y.clone()
            if result is not None and y.dtype != torch.float64:
                y.flatten()[result] *= factor
            return y

        @staticmethod
        def backward(ctx, dy):
            dy = dy.clone()
            if grad is not None and dy.dtype != torch.float64:
                dy.flatten()[grad] *= factor
            return dy

    def rms_norm(input, normalized_shape, weight=None, eps=None):
        return Wrong.apply(ops.rms_norm(Wrong.apply(input), normalized_shape, weight, eps))

    return rms_norm


def test_check_op_finds_a_wrong_output_and_a_wrong_gradient():
    args = (make((5, 64)), (64,), make((64,), seed=1))
    check_op(broken(), F.rms_norm, args)
    check_op(broken(), F.rms_norm, args[:2], {"weight": args[2], "eps": 1e-3})
    with pytest.raises(AssertionError, match="rms_norm: output 0 float32"):
        check_op(broken(result=70), F.rms_norm, args)
    with pytest.raises(AssertionError, match="rms_norm: gradient of input float32"):
        check_op(broken(grad=70), F.rms_norm, args)
    with pytest.raises(AssertionError, match=r"output 0 .* infinities or NaN"):
        check_op(broken(result=70, factor=float("nan")), F.rms_norm, args)


def test_check_op_mixes_dtypes_that_stock_functions_refuse():
    args = (make((5, 64), torch.bfloat16), (64,), make((64,), torch.float16, seed=1))
    check_op(ops.layer_norm, F.layer_norm, args)
    with pytest.raises(AssertionError, match="output 0 bfloat16"):
        check_op(broken(result=3, factor=1.2), F.rms_norm, args)


def test_gradients_of_arguments_and_keywords():
    x, w = make((3, 4), torch.float64), make((4,), torch.float64, seed=1)
    outputs, grads = gradients(
        lambda x, n, w=None: (x * w, n * x), (x, 2), {"w": w}, [torch.ones(3, 4), torch.ones(3, 4)]
    )
    torch.testing.assert_close(outputs, (x * w, 2 * x))
    torch.testing.assert_close(grads, (w.expand(3, 4) + 2, x.sum(0)))
    assert not x.requires_grad


# Makers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_are_what_they_claim(layout, dtype):
    x = make((4, 5, 6), dtype, layout=layout)
    assert x.shape == (4, 5, 6)
    assert x.dtype == dtype
    strides = {
        "contiguous": (30, 6, 1),
        "transposed": (1, 4, 20),
        "sliced": (45, 9, 1),
        "strided": (60, 12, 2),
        "expanded": (0, 6, 1),
        "scalar": (0, 0, 0),
        "misaligned": (30, 6, 1),
    }
    assert x.stride() == strides[layout]
    assert x.storage_offset() == (layout == "misaligned")
    assert torch.equal(x, make((4, 5, 6), dtype, layout=layout)), "the same seed gives the same values"
    assert not torch.equal(x, make((4, 5, 6), dtype, layout=layout, seed=1))
    assert make((0, 3), dtype, layout=layout).shape == (0, 3)
    assert make((3, 0), dtype, layout=layout).shape == (3, 0)
    assert make((7,), dtype, layout=layout).shape == (7,)
    assert make((), dtype, layout=layout).shape == ()


def test_unknown_layout():
    with pytest.raises(ValueError, match="unknown layout 'diagonal'; known are contiguous"):
        make((2, 2), layout="diagonal")


def test_every_dtype_rounds_the_same_values():
    assert torch.equal(make((100,), torch.float32).bfloat16(), make((100,), torch.bfloat16))


@pytest.mark.parametrize("op", ops.__all__)
def test_samples_are_valid_calls(op):
    args, kwargs = sample(op, "cpu", torch.float32)
    outputs = testing.outputs_of(getattr(ops, op)(*args, **kwargs))
    if not outputs:  # in place: what was given is the result
        outputs = tuple(x for arg in args for x in arg)
    assert outputs
    assert all(out.isfinite().all() for out in outputs)


def test_sample_of_an_unknown_op():
    with pytest.raises(ValueError, match="unknown op 'no_norm'; known are layer_norm"):
        sample("no_norm")


# Poison


def filled(call) -> int:
    """How many tensors ATen filled, as the profiler saw it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::fill_")


def test_poison_fills_what_is_allocated_and_ends():
    x = torch.ones(3)
    with poisoned_allocations():
        assert torch.empty(1000).isnan().all()
        assert x.new_empty(1000, dtype=torch.bfloat16).isnan().all()
        assert torch.empty_like(x).isnan().all()
        assert torch.equal(torch.empty(5, dtype=torch.int32), torch.full((5,), 2**31 - 1, dtype=torch.int32))
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(_ext.C is None, reason="fastllm was installed without kernels")
def test_poison_reaches_allocations_of_compiled_kernels():
    call = functools.partial(torch.ops.fastllm.rms_norm_fwd, torch.ones(4, 8), torch.ones(8), 1e-5)
    assert filled(call) == 0
    with poisoned_allocations():
        assert filled(call) == 2, "y and rstd"

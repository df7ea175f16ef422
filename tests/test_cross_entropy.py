"""cross_entropy on every binding that is built. Triton kernels: test_interpreter.py."""

from __future__ import annotations

import math

import bindings
import pytest
import torch
from eager import cross_entropy as eager
from torch.nn import functional as F

import fastllm
from fastllm import ops
from fastllm.backends import OPS
from fastllm.testing import LAYOUTS, check_op, make, poisoned_allocations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = [f"cpu-{isa}" for isa in bindings.ISAS]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0},
    {"softcap": 3.0, "label_smoothing": 0.2, "z_loss": 0.1},
]


def targets(rows: int, classes: int, ignored: bool = True) -> torch.Tensor:
    found = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(5))
    if ignored:
        found[::5] = -100
    return found


def check(shape=(7, 40), dtype=torch.float32, layout="contiguous", scale=1.0, offset=0.0, **kwargs) -> None:
    x = make(shape, dtype, seed=1, layout=layout)
    if (scale, offset) != (1.0, 0.0):
        x = x * scale + offset
    y = targets(*shape)
    # What the formula subtracts from each other: probabilities and 1 in the gradient, with z_loss squares of logits.
    largest = float(x.float().abs().max())
    check_op(
        lambda x: ops.cross_entropy(x, y, **kwargs),
        lambda x: eager(x, y, **kwargs),
        (x,),
        cancelling=1.0 + kwargs.get("z_loss", 0.0) * (largest + 10) ** 2,
    )


@pytest.mark.parametrize("binding", CPU)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(binding, options, dtype):
    with bindings.bound(binding):
        for reduction in ("mean", "sum", "none"):
            check(dtype=dtype, reduction=reduction, **options)
            check((5, 133), dtype=dtype, reduction=reduction, **options)


@pytest.mark.parametrize("binding", CPU)
@pytest.mark.parametrize("classes", [1, 2, 3, 17, 127, 129, 1000, 2049, 32000, 50257, 128256])
def test_class_counts(binding, classes):
    with bindings.bound(binding):
        for dtype in (torch.float32, torch.bfloat16):
            check((6, classes), dtype, reduction="none", label_smoothing=0.1)
            check((6, classes), dtype, softcap=5.0)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("expanded", "scalar")])
def test_layouts(layout):
    for dtype in (torch.float32, torch.bfloat16):
        check((9, 133), dtype, layout)


@pytest.mark.parametrize("binding", CPU)
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_huge_and_tiny_logits(binding, scale):
    with bindings.bound(binding):
        for dtype in (torch.float32, torch.bfloat16):
            check((9, 133), dtype, scale=scale)
            check((9, 133), dtype, scale=scale, softcap=30.0)


@pytest.mark.parametrize("binding", CPU)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_logits_far_from_zero(binding, offset):
    """Only their differences count."""
    with bindings.bound(binding):
        for dtype in (torch.float32, torch.bfloat16):
            for reduction in ("none", "mean"):
                check((9, 133), dtype, offset=offset, reduction=reduction)
                check((9, 133), dtype, offset=offset, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("binding", CPU)
@pytest.mark.parametrize("masked", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_masked_classes(binding, masked):
    """The first class, the last and all but one, far below the rest."""
    with bindings.bound(binding):
        check_masked(masked)


def check_masked(masked: float) -> None:
    for where in (slice(0, 1), slice(-1, None), slice(0, 2500)):
        x, y = torch.randn(3, 2600), torch.tensor([2590, 2595, -100])
        x[:, where] = masked
        for smoothing in (0.0, 0.1):
            if smoothing and masked < -1e30:
                continue  # the loss itself is infinite, or nearly so
            pairs = []
            for fn, leaf in ((ops.cross_entropy, x.clone()), (F.cross_entropy, x.double())):
                leaf.requires_grad_()
                loss = fn(leaf, y, reduction="none", label_smoothing=smoothing)
                pairs.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
            for got, wanted in zip(*pairs, strict=True):
                torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("binding", CPU)
@pytest.mark.parametrize("softcap", [1.0, 30.0, 200.0])
def test_the_cap_of_the_top_is_the_top(binding, softcap):
    with bindings.bound(binding):
        x, y = torch.randn(500, 37) * 3, torch.zeros(500, dtype=torch.int64)
        x[:, 0] = 2 * softcap
        assert bool((ops.cross_entropy(x, y, softcap=softcap, reduction="none") >= 0).all())
        assert float(ops.cross_entropy(torch.randn(50, 1), y[:50], softcap=softcap)) == 0
        nothing = ops.cross_entropy(torch.full((2, 8), -torch.inf), y[:2], softcap=softcap, reduction="none")
        torch.testing.assert_close(nothing, torch.full((2,), 8.0).log())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_ignored_row_may_hold_anything_under_a_softcap(backend):
    x = torch.randn(3, 6)
    x[1] = torch.nan
    x.requires_grad_()
    with fastllm.use_backend(backend):
        loss = ops.cross_entropy(x, torch.tensor([1, -100, 2]), softcap=30.0, z_loss=0.1)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite()
    assert not grad[1].any()


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_no_classes_at_all():
    x, y = torch.randn(3, 0, requires_grad=True), torch.full((3,), -100)
    loss = ops.cross_entropy(x, y, reduction="sum")
    loss.backward()
    assert float(loss.detach()) == 0
    assert x.grad.shape == (3, 0)


def test_large_gradients_go_around_the_cache():
    """From 8 MiB on, aligned rows do."""
    for columns in (32000, 32001):
        check((70, columns), reduction="sum")
        check((140, columns), torch.bfloat16, reduction="sum")


def test_classes_anywhere():
    """(V,), (N, V, d1, d2), and probabilities of the same shapes, as torch."""
    for shape, rest in (((11,), ()), ((3, 11, 4, 2), (3, 4, 2)), ((0, 11), (0,)), ((2, 11, 0), (2, 0))):
        x = torch.randn(shape, requires_grad=True)
        y = torch.randint(11, rest)
        q = torch.softmax(torch.randn(shape), 0 if len(shape) == 1 else 1)
        for target in (y, q):
            for reduction in ("mean", "sum", "none"):
                ours, theirs = (f(x, target, reduction=reduction) for f in (ops.cross_entropy, F.cross_entropy))
                torch.testing.assert_close(ours, theirs, equal_nan=True)
                torch.testing.assert_close(
                    *(torch.autograd.grad(loss.sum(), x) for loss in (ours, theirs)), equal_nan=True
                )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_class_weights_and_probabilities(reduction, label_smoothing):
    x = torch.randn(12, 9, dtype=torch.float64, requires_grad=True)
    q = torch.softmax(torch.randn(12, 9, dtype=torch.float64), 1).requires_grad_()
    weight = torch.rand(9, dtype=torch.float64)
    for target in (targets(12, 9), q):
        for w in (None, weight):
            kwargs = {"weight": w, "reduction": reduction, "label_smoothing": label_smoothing}
            losses = [f(x, target, **kwargs) for f in (ops.cross_entropy, F.cross_entropy)]
            torch.testing.assert_close(*losses)
            leaves = (x, q) if target is q else (x,)
            torch.testing.assert_close(*(torch.autograd.grad(loss.sin().sum(), leaves) for loss in losses))
    explanation = fastllm.explain(ops.cross_entropy, x.float(), q.float())
    assert explanation.backend == "reference"
    assert "computes class indices, not probabilities" in str(explanation)


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_gradcheck_of_the_reference():
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = targets(5, 4)
    for reduction in ("mean", "none"):

        def loss(x, reduction=reduction):
            return ops.cross_entropy(x, y, reduction=reduction, label_smoothing=0.1, z_loss=0.2, softcap=2.0)

        assert torch.autograd.gradcheck(loss, x)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_nothing_to_learn_from(backend):
    x, y = torch.randn(4, 7, requires_grad=True), torch.full((4,), -100)
    with fastllm.use_backend(backend):
        for reduction in ("mean", "sum", "none"):
            losses = [f(x, y, reduction=reduction) for f in (ops.cross_entropy, F.cross_entropy)]
            torch.testing.assert_close(*losses, equal_nan=True)
        (grad,) = torch.autograd.grad(losses[0].sum(), x)
    assert not grad.any()


def test_an_ignored_row_is_not_looked_at():
    x = torch.randn(3, 40)
    for value in (torch.nan, -torch.inf):
        x[1] = value
        leaf = x.clone().requires_grad_()
        for z_loss in (0.0, 0.1):
            loss = ops.cross_entropy(leaf, torch.tensor([3, -100, 5]), z_loss=z_loss)
            (grad,) = torch.autograd.grad(loss, leaf)
            assert loss.isfinite()
            assert not grad[1].any()
            assert grad.isfinite().all()


@pytest.mark.parametrize("binding", CPU)
def test_infinities_and_nan(binding):
    """As torch, where it says something: minus infinity is a class that cannot be, NaN stays NaN."""
    with bindings.bound(binding):
        for value in (-math.inf, math.nan, math.inf):
            x = make((3, 37), torch.float32)
            x[1, 20] = value
            x[2, 36] = value
            x.requires_grad_()
            losses = [f(x, torch.tensor([1, 2, 3]), reduction="none") for f in (ops.cross_entropy, F.cross_entropy)]
            torch.testing.assert_close(*losses, equal_nan=True)
            grads = [torch.autograd.grad(loss.sum(), x)[0] for loss in losses]
            assert torch.equal(grads[0].isnan(), grads[1].isnan())


def test_num_valid_is_of_the_whole_window():
    """Two halves with different numbers of valid targets add up to the whole."""
    x, y = torch.randn(10, 6, requires_grad=True), targets(10, 6)
    count = (y != -100).sum()
    parts = sum(ops.cross_entropy(x[part], y[part], num_valid=count) for part in (slice(0, 3), slice(3, 10)))
    whole = ops.cross_entropy(x, y)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(ops.cross_entropy(x, y, num_valid=int(count)), whole)
    torch.testing.assert_close(torch.autograd.grad(parts, x), torch.autograd.grad(whole, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_in_place(dtype, backend):
    """The same bits, in the logits' memory."""
    x, y = make((20, 133), dtype).requires_grad_(), targets(20, 133)
    with fastllm.use_backend(backend):
        (wanted,) = torch.autograd.grad(ops.cross_entropy(x, y, reduction="sum", softcap=5.0), x)
        logits = x * 1
        loss = ops.cross_entropy(logits, y, reduction="sum", softcap=5.0, inplace=True)
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(grad, wanted)
    assert grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_in_place_where_that_cannot_be(backend):
    """Rows that share memory or are not dense get a gradient of their own; float64 its reference."""
    for logits in (
        torch.randn(1, 7).expand(5, 7),
        torch.randn(20).unfold(0, 8, 3),
        torch.randn(7, 5).t(),
        torch.randn(5, 14)[:, ::2],
        torch.randn(5, 7, dtype=torch.float64),
    ):
        x, y = logits.clone().requires_grad_(), targets(*logits.shape)
        with fastllm.use_backend(backend):
            (wanted,) = torch.autograd.grad(ops.cross_entropy(x, y), x)
            view = _Laid.apply(x, logits)
            (grad,) = torch.autograd.grad(ops.cross_entropy(view, y, inplace=True), x)
        torch.testing.assert_close(grad, wanted)


class _Laid(torch.autograd.Function):
    """x in the memory of another tensor, as if that had been computed from it."""

    @staticmethod
    def forward(ctx, x, memory):
        return memory.data

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_overwritten_logits_are_an_error_for_others():
    x, y = torch.randn(5, 9, requires_grad=True), targets(5, 9)
    logits = x * 1
    other = logits.sin().sum()
    ops.cross_entropy(logits, y, inplace=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    for leaf in (x, x.view(5, 9), x[:, :4]):
        with pytest.raises(ValueError, match="would overwrite a leaf"):
            ops.cross_entropy(leaf, y.clamp(max=3), inplace=True)


def test_in_place_has_no_effect_in_a_compiled_graph():
    """Where nobody would be told that the logits are gone."""

    y = targets(5, 9)

    def step(x):
        logits = x * 1
        return logits.sin().sum() + ops.cross_entropy(logits, y, inplace=True)

    torch.compiler.reset()
    x = torch.randn(5, 9, requires_grad=True)
    (grad,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x), x)
    (wanted,) = torch.autograd.grad(x.sin().sum() + F.cross_entropy(x, y), x)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_targets_of_any_stride(dtype):
    x = torch.randn(6, 9)
    for y in (torch.randint(9, (12,))[::2], torch.randint(9, (6, 2))[:, 0], torch.tensor([4]).expand(6)):
        torch.testing.assert_close(ops.cross_entropy(x, y.to(dtype)), F.cross_entropy(x, y.long()))
    torch.testing.assert_close(ops.cross_entropy(x, y), F.cross_entropy(x, y))


def test_every_element_is_written():
    with poisoned_allocations():
        x, y = torch.randn(6, 133, requires_grad=True), targets(6, 133)
        for kwargs in OPTIONS:
            loss = ops.cross_entropy(x, y, reduction="none", **kwargs)
            assert loss.isfinite().all()
            assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("binding", CPU)
def test_the_same_bits_for_any_number_of_threads(binding):
    x, y = make((300, 1000), torch.float32).requires_grad_(), targets(300, 1000)
    threads, found = torch.get_num_threads(), []
    with bindings.bound(binding):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                loss = ops.cross_entropy(x, y, reduction="none", label_smoothing=0.1)
                found.append((loss, *torch.autograd.grad(loss.sum(), x)))
        finally:
            torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_autocast():
    x, y = torch.randn(5, 9, dtype=torch.bfloat16, requires_grad=True), targets(5, 9)
    assert ops.cross_entropy(x, y).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        for logits in (x, x.float()):
            losses = [f(logits, y) for f in (ops.cross_entropy, F.cross_entropy)]
            assert losses[0].dtype == losses[1].dtype == torch.float32
            torch.testing.assert_close(*losses)


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_opcheck():
    x, y = torch.randn(6, 11), targets(6, 11)
    stats = OPS["cross_entropy_fwd"].call(x, y, None, 2.0, True)
    torch.library.opcheck(OPS["cross_entropy_fwd"].call, (x, y, None, 2.0, True))
    torch.library.opcheck(OPS["cross_entropy_fwd"].call, (x, torch.rand(6, 11), torch.rand(11), 0.0, False))
    grads = (torch.randn(6), torch.randn(6), torch.randn(6))
    torch.library.opcheck(OPS["cross_entropy_bwd"].call, (*grads, x, y, None, *stats[:2], 2.0))
    torch.library.opcheck(OPS["cross_entropy_bwd_"].call, (*grads, x.clone(), y, *stats[:2], 2.0))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_fullgraph_compile(backend, inplace):
    torch.compiler.reset()
    x, y = torch.randn(6, 40, requires_grad=True), targets(6, 40)

    def step(x, y):
        return ops.cross_entropy(x * 1, y, label_smoothing=0.1, inplace=inplace)

    with fastllm.use_backend(backend):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, y), step(x, y))
        torch.testing.assert_close(*(torch.autograd.grad(f(x, y), x) for f in (compiled, step)))
        with pytest.raises(RuntimeError, match="out of bounds for 40 classes"):
            compiled(x, torch.full_like(y, 40))


def test_export_keeps_the_op():
    class Module(torch.nn.Module):
        def forward(self, x, y):
            return ops.cross_entropy(x, y)

    x, y = torch.randn(6, 40), targets(6, 40)
    rows = torch.export.Dim("rows", min=2, max=1024)
    program = torch.export.export(Module(), (x, y), dynamic_shapes=({0: rows}, {0: rows}))
    assert "fastllm.cross_entropy_fwd" in str(program.graph)
    torch.testing.assert_close(program.module()(x[:4], y[:4]), F.cross_entropy(x[:4], y[:4]))


def test_hostile_arguments():
    x, y = torch.randn(4, 7), targets(4, 7, ignored=False)
    for args, kwargs, error, message in (
        (([1.0], y), {}, TypeError, "input must be a tensor, got list"),
        ((x, 3), {}, TypeError, "target must be a tensor, got int"),
        ((x.int(), y), {}, TypeError, "input must be float32, bfloat16, float16 or float64, got torch.int32"),
        ((x, y.bool()), {}, TypeError, "target must be int64, int32, uint8 or floating probabilities, got torch.bool"),
        ((x, y[:3]), {}, ValueError, r"target must have shape \(4,\) for input \(4, 7\), got \(3,\)"),
        ((x, x[:, :5]), {}, ValueError, r"target must have shape \(4, 7\).*, got \(4, 5\)"),
        ((x[0, 0], y[0]), {}, ValueError, r"input must have shape \(V,\), \(N, V\)"),
        ((x, y.to("meta")), {}, ValueError, "input is on cpu, target on meta"),
        ((x, y + 7), {}, IndexError, r"target \d+ is out of bounds for 7 classes"),
        ((x, y - 9), {}, IndexError, r"target -\d+ is out of bounds for 7 classes"),
        ((x, y), {"weight": torch.ones(6)}, ValueError, r"weight must have shape \(7,\) on cpu, got \(6,\)"),
        ((x, y), {"weight": [1.0] * 7}, TypeError, "weight must be a tensor or None, got list"),
        ((x, y), {"weight": torch.ones(7, requires_grad=True)}, ValueError, "weight gets no gradient"),
        ((x, y), {"reduction": "max"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        ((x, y), {"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1, got 1.5"),
        ((x, y), {"z_loss": -1.0}, ValueError, "z_loss must be finite and not negative, got -1.0"),
        ((x, y), {"softcap": math.nan}, ValueError, "softcap must be finite and not negative, got nan"),
        ((x, y), {"num_valid": 0}, ValueError, "num_valid must be positive, got 0"),
        ((x, y), {"num_valid": torch.ones((), requires_grad=True)}, ValueError, "get no gradient"),
        ((x, x.softmax(1)), {"ignore_index": 1}, ValueError, "ignore_index is for class indices, got 1"),
        ((x, y), {"num_valid": 3, "reduction": "sum"}, ValueError, "num_valid is for reduction='mean'"),
    ):
        with pytest.raises(error, match=f"^cross_entropy: .*{message}"):
            ops.cross_entropy(*args, **kwargs)

"""linear_cross_entropy: the loss and gradients of the two steps, without the logits."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import sys
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
from eager import linear_cross_entropy as eager
from torch.nn import functional as F

import fastllm
from fastllm import ops
from fastllm.backends import OPS
from fastllm.testing import LAYOUTS, check_op, make, poisoned_allocations

module = sys.modules[ops.linear_cross_entropy.__module__]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0},
    {"softcap": 3.0, "label_smoothing": 0.2, "z_loss": 0.1},
]


def draw(rows=23, hidden=24, classes=41, dtype=torch.float32, layout="contiguous"):
    x = make((rows, hidden), dtype, seed=1, layout=layout)
    w, b = make((classes, hidden), dtype, seed=2, layout=layout) * 0.3, make((classes,), dtype, seed=3)
    y = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(4))
    y[::5] = -100
    return x, w, b, y


def check(x, w, b, y, **kwargs):
    def call(fn):
        return lambda x, w, b: fn(x, w, y, linear_bias=b, **kwargs)

    largest = float(x.float().abs().max() * w.float().abs().sum(1).max())
    check_op(
        call(ops.linear_cross_entropy),
        call(eager),
        (x, w, b),
        cancelling=largest + kwargs.get("z_loss", 0.0) * (largest + 10) ** 2,
        in_exponent=largest + 10,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, reduction, dtype):
    for chunk_size in (None, 1, 7, 23):
        check(*draw(dtype=dtype), reduction=reduction, chunk_size=chunk_size, **options)


@pytest.mark.parametrize("classes", [2, 127, 32000, 50257])
def test_class_counts(classes):
    for dtype in (torch.float32, torch.bfloat16):
        check(*draw(9, 16, classes, dtype), chunk_size=4)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("expanded", "scalar")])
def test_layouts(layout):
    for reduction in ("mean", "none"):
        check(*draw(layout=layout), reduction=reduction, chunk_size=5)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_huge_and_tiny_logits(scale):
    x, w, b, y = draw()
    check(x * scale, w, b * scale, y, chunk_size=5)


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_the_reference(reduction):
    x, w, b, y = draw(5, 3, 4, torch.float64)
    leaves = [t.contiguous().requires_grad_() for t in (x, w, b)]

    def loss(x, w, b):
        return ops.linear_cross_entropy(
            x, w, y, linear_bias=b, reduction=reduction, label_smoothing=0.1, z_loss=0.1, softcap=2.0
        )

    assert torch.autograd.gradcheck(loss, leaves)


def test_any_shape_and_tied_weights():
    """(B, T, H) hidden states, and the embedding's own weight as the classifier."""
    embedding = torch.nn.Embedding(30, 8)
    tokens, y = torch.randint(30, (2, 7)), torch.randint(30, (2, 7))
    losses = [fn(embedding(tokens), embedding.weight, y) for fn in (ops.linear_cross_entropy, eager)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, embedding.weight) for loss in losses))
    rows = ops.linear_cross_entropy(embedding(tokens), embedding.weight, y, reduction="none")
    assert rows.shape == (2, 7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("which", range(3))
def test_only_what_requires_grad(which, reduction):
    """And the other gradients are not computed."""
    x, w, b, y = draw()
    leaves = [t.clone().requires_grad_(i == which) for i, t in enumerate((x, w, b))]
    losses = [
        fn(*leaves[:2], y, linear_bias=leaves[2], reduction=reduction).sum() for fn in (ops.linear_cross_entropy, eager)
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves[which]) for loss in losses))
    with torch.no_grad():
        torch.testing.assert_close(
            ops.linear_cross_entropy(*leaves[:2], y, linear_bias=leaves[2]), eager(x, w, y, linear_bias=b)
        )


def test_class_weights():
    x, w, b, y = draw(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    weight = torch.rand(41)
    for reduction in ("mean", "sum", "none"):
        ours = ops.linear_cross_entropy(x, w, y, linear_bias=b, weight=weight, reduction=reduction)
        theirs = F.cross_entropy(F.linear(x, w, b), y, weight, reduction=reduction)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), leaves) for loss in (ours, theirs)))


def test_log_probabilities():
    x, w, b, y = draw()
    leaves = [t.requires_grad_() for t in (x, w, b)]
    loss, logprobs = ops.linear_cross_entropy(x, w, y, linear_bias=b, label_smoothing=0.1, return_logprobs=True)
    expected = torch.log_softmax(F.linear(x, w, b), -1).gather(1, y.clamp(min=0)[:, None])[:, 0].masked_fill(y < 0, 0)
    torch.testing.assert_close(logprobs, expected)
    stock = F.cross_entropy(F.linear(x, w, b), y, label_smoothing=0.1)
    torch.testing.assert_close(loss, stock)
    got = torch.autograd.grad(loss + logprobs.exp().sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(stock + expected.exp().masked_fill(y < 0, 0).sum(), leaves))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_backward_twice(backend, factor):
    """What the forward computed goes out once: a second backward computes it anew, and is right."""
    x, w, b, y = draw()
    leaves = [t.requires_grad_() for t in (x, w, b)]
    with fastllm.use_backend(backend):
        loss = ops.linear_cross_entropy(x, w, y, linear_bias=b, label_smoothing=0.1, z_loss=0.1) * factor
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        kept = [grad.clone() for grad in first]
        for grad in first:
            grad.mul_(3)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), tuple(kept))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn_from(reduction):
    for rows in (5, 0):
        x, w, b, y = draw(rows)
        y.fill_(-100)
        leaves = [t.requires_grad_() for t in (x, w, b)]
        losses = [fn(x, w, y, linear_bias=b, reduction=reduction) for fn in (ops.linear_cross_entropy, eager)]
        torch.testing.assert_close(*losses, equal_nan=True)
        if reduction != "mean":
            for grad in torch.autograd.grad(losses[0].sum(), leaves):
                assert not grad.any()


def test_num_valid_is_of_the_whole_window():
    x, w, b, y = draw()
    leaves = [t.requires_grad_() for t in (x, w, b)]
    count = (y != -100).sum()
    parts = sum(
        ops.linear_cross_entropy(x[part], w, y[part], linear_bias=b, num_valid=count)
        for part in (slice(0, 4), slice(4, 23))
    )
    whole = ops.linear_cross_entropy(x, w, y, linear_bias=b)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, leaves), torch.autograd.grad(whole, leaves))


def test_every_element_is_written():
    with poisoned_allocations():
        x, w, b, y = draw()
        leaves = [t.requires_grad_() for t in (x, w, b)]
        for reduction in ("mean", "none"):
            loss = ops.linear_cross_entropy(
                x, w, y, linear_bias=b, reduction=reduction, label_smoothing=0.1, chunk_size=9
            )
            for t in (loss, *torch.autograd.grad(loss.sum(), leaves)):
                assert t.isfinite().all()


def test_the_weights_gradient_is_summed_in_float32():
    """A thousand chunks: summed in bfloat16, what is below 1/256 of the sum so far would be lost."""
    rows, hidden, classes = 4096, 8, 16
    x = (make((rows, hidden), torch.float32, seed=1) + 2).bfloat16()
    w, y = (make((classes, hidden), torch.float32, seed=2) * 0.3).bfloat16(), torch.arange(rows) % 3
    chunked = functools.partial(ops.linear_cross_entropy, chunk_size=4)
    errors = []
    exact = w.double().requires_grad_()
    (truth,) = torch.autograd.grad(eager(x.double(), exact, y, reduction="sum"), exact)
    for fn in (chunked, eager):
        leaf = w.clone().requires_grad_()
        (grad,) = torch.autograd.grad(fn(x, leaf, y, reduction="sum"), leaf)
        errors.append(float((grad.double() - truth).abs().max() / truth.abs().max()))
    assert errors[0] <= 2 * errors[1] + 2**-9
    naive = torch.zeros(classes, hidden, dtype=torch.bfloat16)
    for part in range(0, rows, 4):
        leaf = w.clone().requires_grad_()
        at = slice(part, part + 4)
        naive += torch.autograd.grad(eager(x[at], leaf, y[at], reduction="sum"), leaf)[0]
    assert float((naive.double() - truth).abs().max() / truth.abs().max()) > 4 * errors[0], "the test can tell"


@pytest.mark.parametrize("chunk_size", [7, 23])
def test_the_weights_gradient_is_added_to_by_the_product_itself(monkeypatch, chunk_size):
    """Where torch can: as on a GPU, whose product is here computed in float32."""
    calls = []

    def addmm(total, a, b, *, beta, out_dtype=None, out):
        if out_dtype is None:
            return original(total, a, b, beta=beta, out=out)
        assert out_dtype == total.dtype == torch.float32
        assert a.dtype == b.dtype == torch.bfloat16
        calls.append(beta)
        return original(total, a.float(), b.float(), beta=beta, out=out)

    x, w, _, y = draw(dtype=torch.bfloat16)
    w.requires_grad_()
    (wanted,) = torch.autograd.grad(ops.linear_cross_entropy(x, w, y, chunk_size=chunk_size), w)
    original = torch.addmm
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(module, "_adds_in_float32", lambda x: True)
    with poisoned_allocations():
        (found,) = torch.autograd.grad(ops.linear_cross_entropy(x, w, y, chunk_size=chunk_size), w)
    assert calls == ([0, 1, 1, 1] if chunk_size == 7 else [])
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-3)  # products on a CPU are rounded


def test_a_product_that_cannot_add_is_told_and_done_without(monkeypatch):
    probe = (torch.device("cpu"), torch.bfloat16)
    module._tried_to_add.cache_clear()
    with pytest.warns(fastllm.FallbackWarning, match="the gradient of the weight takes a temporary one"):
        assert not module._tried_to_add(*probe)  # torch's product of this kind is CUDA's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not module._tried_to_add(*probe), "tried once, told once"
    module._tried_to_add.cache_clear()
    monkeypatch.setattr(torch, "addmm", lambda total, a, b, **kwargs: total)
    assert module._tried_to_add(*probe)
    module._tried_to_add.cache_clear()


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((8192, 4096, 151936, 2), 8192),
        ((8192, 4096, 128256, 2), 8192),
        ((16384, 4096, 128256, 2), 8192),
        ((16384, 768, 50257, 2), 5504),
        ((0, 8, 41, 4), 128),
        ((16384, 64, 2**20, 2), 512),
    ],
)
def test_chunks_on_a_gpu(shape, chunk):
    """One for as many rows as their logits take no more memory than the gradient's sum; then as many as fill a GPU."""
    _, hidden, classes, itemsize = shape
    found = module.default_chunk_size(*shape, "cuda", True)
    assert found == chunk
    assert module.default_chunk_size(*shape, "cuda", False) * classes * itemsize <= 2**30 + 127 * classes * itemsize
    assert found * classes * itemsize <= max(4 * hidden * classes, 2**30) + 127 * classes * itemsize


def test_rows_of_logits_are_aligned_on_a_gpu():
    """As the fast products want them; on a CPU they are dense."""
    for device, strides in (("meta", {64, 50304}), ("cpu", {41, 50257})):
        found = set()
        for classes in (41, 50257):
            x, w = torch.empty(3, 8, device=device), torch.empty(classes, 8, device=device)
            found |= {logits.stride(0) for _, logits in module._chunks(x, w, None, 2)}
        assert found == strides


@pytest.mark.parametrize("factor", [1 / 3, 0.1, 1 / 7])
def test_a_factor_scales_the_gradient_without_a_bias(factor):
    """Rounded to bfloat16 itself, it would shift all of them alike."""
    x, w, b, y = draw(200, 32, 50, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    for leaf in leaves:
        (plain,) = torch.autograd.grad(ops.linear_cross_entropy(x, w, y, linear_bias=b, dtype=torch.float32), leaf)
        loss = ops.linear_cross_entropy(x, w, y, linear_bias=b, dtype=torch.float32) * factor
        (scaled,) = torch.autograd.grad(loss, leaf)
        ratio = (scaled.double() * plain.double()).sum() / plain.double().square().sum() / factor
        assert abs(ratio - 1) < 4e-4 if leaf is not b else abs(ratio - 1) < 2e-3


def test_float16_gradients_are_scaled_before_they_are_rounded():
    """As a GradScaler needs it: unscaled, most of these are below float16's smallest number."""
    rows = 4096
    x, w, _, _ = draw(rows, 16, 32, torch.float32)
    y = torch.randint(32, (rows,), generator=torch.Generator().manual_seed(0))
    exact = w.clone().requires_grad_()
    (truth,) = torch.autograd.grad(eager(x, exact, y) * 32768.0, exact)
    for fn in (ops.linear_cross_entropy, eager):
        leaf = w.half().requires_grad_()
        (grad,) = torch.autograd.grad(fn(x.half(), leaf, y).float() * 32768.0, leaf)
        assert ((grad.float() - truth).abs().max() / truth.abs().max()) < 4e-3


def test_targets_of_any_stride():
    x, w, b, _ = draw(6)
    for y in (torch.randint(41, (12,))[::2], torch.randint(41, (6, 2))[:, 0], torch.tensor([4]).expand(6)):
        for reduction in ("mean", "none"):
            losses = [fn(x, w, y, linear_bias=b, reduction=reduction) for fn in (ops.linear_cross_entropy, eager)]
            torch.testing.assert_close(*losses)


def test_an_ignored_row_may_hold_anything():
    x, w, b, y = draw()
    x[0] = torch.inf  # y[0] is ignored
    leaf = x.requires_grad_()
    loss = ops.linear_cross_entropy(leaf, w, y, linear_bias=b, z_loss=0.1)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite()
    assert grad.isfinite().all()


def test_training_does_not_drift():
    """200 steps in bfloat16: the loss stays beside that of the two steps, as near as that is to float32's."""

    def losses(fn, dtype):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.nn.Linear(32, 32), torch.nn.GELU()).to(dtype)
        head = torch.nn.Parameter((torch.randn(300, 32) * 0.1).to(dtype))
        optimizer = fastllm.optim.AdamW(
            [*model.parameters(), head], lr=1e-2, master_weights="float32" if dtype == torch.bfloat16 else None
        )
        found = []
        for step in range(200):
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(64, (128,), generator=generator)
            loss = fn(model(tokens), head, tokens * 4 + 3)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss))
        return torch.tensor(found)

    chunked = functools.partial(ops.linear_cross_entropy, chunk_size=16)
    exact = losses(eager, torch.float32)
    torch.testing.assert_close(losses(chunked, torch.float32), exact, rtol=1e-3, atol=1e-5)
    stock = losses(eager, torch.bfloat16)
    assert (losses(chunked, torch.bfloat16) - exact).abs().max() <= 2 * (stock - exact).abs().max()


@pytest.mark.parametrize(
    ("rows", "classes", "chunk_size"), [(2048, 50257, 128), pytest.param(512, 262144, 32, marks=pytest.mark.slow)]
)
def test_the_logits_are_never_whole(rows, classes, chunk_size):
    """Peak memory, from /proc: beside the gradients, a chunk."""
    script = f"""
import torch
from fastllm import ops
torch.set_num_threads(1)
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
rows, hidden, classes = {rows}, 16, {classes}
x, w = torch.randn(rows, hidden, requires_grad=True), torch.randn(classes, hidden, requires_grad=True)
y = torch.randint(classes, (rows,))
ops.linear_cross_entropy(x[:8], w, y[:8], chunk_size=8).backward()
before = peak()
ops.linear_cross_entropy(x, w, y, chunk_size={chunk_size}).backward()
print(peak() - before)
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no /proc")
    import subprocess

    grown = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    logits = rows * classes * 4
    assert grown < logits / 8, f"{grown / 1e6:.0f} MB of {logits / 1e6:.0f} MB"


def test_autocast():
    x, w, b, y = draw()
    for reduction in ("mean", "none"):
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        with torch.autocast("cpu", torch.bfloat16):
            losses = [
                fn(*leaves[:2], y, linear_bias=leaves[2], reduction=reduction)
                for fn in (ops.linear_cross_entropy, eager)
            ]
        assert losses[0].dtype == losses[1].dtype == torch.float32
        torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)
        assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(losses[0].sum(), leaves))


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_opcheck():
    x, w, b, y = draw(6, 8, 11)
    torch.library.opcheck(OPS["linear_cross_entropy_fwd"].call, (x, w, b, y, 2.0, True, 4))
    top, lse, _, _ = OPS["linear_cross_entropy_fwd"].call(x, w, b, y, 2.0, True, 4)
    grads = (torch.randn(6), torch.randn(6), torch.randn(6))
    for wanted in ([True, True, True], [False, True, False]):
        torch.library.opcheck(OPS["linear_cross_entropy_bwd"].call, (*grads, x, w, b, y, top, lse, 2.0, 4, wanted))
        args = (x, w, b, y, torch.rand(6), 0.1, 0.1, 2.0, 4, wanted)
        torch.library.opcheck(OPS["linear_cross_entropy_fwd_bwd"].call, args)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_fullgraph_compile(backend, reduction):
    torch.compiler.reset()
    x, w, b, y = draw()
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def step(x, w, b):
        return ops.linear_cross_entropy(x * 1, w, y, linear_bias=b, reduction=reduction, chunk_size=8).sum()

    with fastllm.use_backend(backend):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*leaves), step(*leaves))
        torch.testing.assert_close(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step)))


def test_hostile_arguments():
    x, w, b, y = draw()
    for args, kwargs, error, message in (
        ((None, w, y), {}, TypeError, "input must be a tensor, got NoneType"),
        ((x, w.half(), y), {}, TypeError, "linear_weight must have input's dtype torch.float32, got torch.float16"),
        ((x, w[:, :3], y), {}, ValueError, r"linear_weight \(V, H\), got \(23, 24\) and \(41, 3\)"),
        ((x, w, y[:4]), {}, ValueError, r"target must have shape \(23,\).*, got \(4,\)"),
        ((x, w, y.float()), {}, TypeError, "target must be int64 or int32, got torch.float32"),
        ((x, w, y.to("meta")), {}, ValueError, "input is on cpu, target on meta"),
        ((x, w, y + 41), {}, IndexError, r"target -59 is out of bounds for 41 classes"),
        ((x, w, y), {"linear_bias": b[:3]}, ValueError, r"linear_bias must have shape \(41,\), got \(3,\)"),
        ((x, w, y), {"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ((x, w, y), {"weight": torch.ones(41), "z_loss": 0.1}, ValueError, "class weights do not go with"),
        ((x, w, y), {"reduction": "all"}, ValueError, "reduction must be"),
        ((x, w, y), {"num_valid": 3, "reduction": "none"}, ValueError, "num_valid is for"),
    ):
        with pytest.raises(error, match=f"^linear_cross_entropy: .*{message}"):
            ops.linear_cross_entropy(*args, **kwargs)


# A vocabulary that is cut over processes


def _part(rank: int, world: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    try:
        x, w, b, y = draw(classes=41)
        bounds = [0, 17, 41]
        mine = slice(bounds[rank], bounds[rank + 1])
        for reduction in ("mean", "none"):
            kwargs = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}
            whole = [t.clone().requires_grad_() for t in (x, w, b)]
            expected = ops.linear_cross_entropy(*whole[:2], y, linear_bias=whole[2], **kwargs)
            grads = torch.autograd.grad(expected.sin().sum(), whole)
            parts = [t.clone().requires_grad_() for t in (x, w[mine], b[mine])]
            loss, logprobs = ops.linear_cross_entropy(
                *parts[:2], y, linear_bias=parts[2], process_group=dist.group.WORLD, return_logprobs=True, **kwargs
            )
            torch.testing.assert_close(loss, expected)
            assert logprobs.shape == y.shape
            got = torch.autograd.grad(loss.sin().sum(), parts)
            torch.testing.assert_close(got, (grads[0], grads[1][mine], grads[2][mine]))
        loss = ops.linear_cross_entropy(*parts[:2], y, linear_bias=parts[2], process_group=dist.group.WORLD)
        with pytest.raises(RuntimeError, match="with a process_group, gradients have no gradients"):
            torch.autograd.grad(loss, parts, create_graph=True)
        # Hard rows: far from zero, one that is ignored and overflows, a rank that has nothing but masked classes.
        x[0], y = 3e38, torch.where(y < 0, y, y % 17)
        b = b - 1e3
        b[17:] = -torch.inf
        for bounds in ([0, 17, 41], [0, 41, 41]):
            mine = slice(bounds[rank], bounds[rank + 1])
            whole = [t.clone().requires_grad_() for t in (x, w, b)]
            expected = ops.linear_cross_entropy(*whole[:2], y, linear_bias=whole[2], reduction="none")
            grads = torch.autograd.grad(expected.sum(), whole)
            parts = [t.clone().requires_grad_() for t in (x, w[mine], b[mine])]
            loss = ops.linear_cross_entropy(
                *parts[:2], y, linear_bias=parts[2], process_group=dist.group.WORLD, reduction="none"
            )
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
            got = torch.autograd.grad(loss.sum(), parts)
            torch.testing.assert_close(got, (grads[0], grads[1][mine], grads[2][mine]))
        with pytest.raises(IndexError, match="for 41 classes"):
            ops.linear_cross_entropy(x, w[mine], y + 41, process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_vocabulary_in_parts():
    gc.collect()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_part, args=(rank, 2, f"{folder}/store")) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]

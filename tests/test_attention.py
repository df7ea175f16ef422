"""attention on the CPU: the reference, the torch backend, the op's manners. Kernels: test_attention_interpreter.py."""

from __future__ import annotations

import functools
import itertools
import math
import sys

import bindings
import pytest
import torch
import torch._dynamo.testing
from attention_suite import FEATURES, check, eager_attention, features, stock_attention
from torch.nn import functional as F

import fastllm
from fastllm import _ext, ops
from fastllm.backends import OPS
from fastllm.ops import _attention, _sdpa
from fastllm.ops._dropout import dropout_seed
from fastllm.reference import _attention as reference
from fastllm.reference._philox import philox
from fastllm.testing import poisoned_allocations

BY_TORCH = ("causal", "window", "bool_mask", "float_mask", "gqa", "bottom_right")
SHAPES = [(1, 2, 1, 1), (2, 2, 1, 9), (1, 2, 9, 1), (2, 4, 37, 53), (1, 2, 63, 20), (1, 1, 300, 520), (1, 1, 520, 300)]


def draw(*shape: int, dtype: torch.dtype = torch.float32, count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(count)]


# The reference


@pytest.mark.parametrize(
    "names", [(), ("causal", "gqa"), ("window", "sinks"), ("softcap", "alibi"), ("dropout", "bottom_right")]
)
def test_gradcheck_of_the_reference(names):
    extras = features(names, 1, 2, 4, 5)
    sinks = extras.pop("sinks", None)
    q, k, v = draw(1, 2, 4, 3, dtype=torch.float64)
    k, v = (torch.randn(1, 1 if "gqa" in names else 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sinks = None if sinks is None else sinks.double().requires_grad_()

    def call(*tensors):
        torch.manual_seed(3)
        return ops.attention(*tensors[:3], sinks=tensors[3] if sinks is not None else None, return_lse=True, **extras)

    with fastllm.use_backend("reference"):
        assert torch.autograd.gradcheck(call, (q, k, v, *([] if sinks is None else [sinks])))


def test_gradient_of_the_mask():
    q, k, v = draw(2, 2, 4, 3, dtype=torch.float64)
    mask = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    with fastllm.use_backend("reference"):
        assert torch.autograd.gradcheck(ops.attention, (q, k, v, mask))
    explanation = fastllm.explain(ops.attention, q.detach(), k, v, mask)
    assert explanation.backend == "reference"
    assert "gives attn_mask no gradient" in str(explanation)
    with torch.no_grad():  # nobody asks for it
        assert fastllm.explain(ops.attention, q.detach(), k, v, mask).backend == "torch"


def test_the_reference_is_torchs_function():
    q, k, v = (x.detach() for x in draw(2, 4, 9, 8, dtype=torch.float64))
    mask = torch.rand(9, 9) > 0.3
    with fastllm.use_backend("reference"):
        for kwargs in ({}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask * 1.5}, {"scale": 0.3}):
            found = ops.attention(q, k, v, **kwargs)
            if "attn_mask" in kwargs and kwargs["attn_mask"].dtype != torch.bool:
                kwargs = {"attn_mask": kwargs["attn_mask"].double()}
            torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, **kwargs))


@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masks_of_other_dtypes(dtype, mask_dtype):
    """On the torch backend as on the reference. (torch's fused kernel misreads a float32 mask beside float64.)"""
    q, k, v = (x.detach().to(dtype) for x in draw(2, 4, 9, 8))
    mask = (1.5 * (torch.rand(9, 9) > 0.3)).to(mask_dtype)
    results = []
    for backend in ("torch", "reference"):
        with fastllm.use_backend(backend):
            results.append(ops.attention(q, k, v, mask))
    tolerance = 1e-5 if dtype.itemsize > 2 else 2e-2
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_philox_against_published_vectors():
    """Random123's known answers for philox4x32-7."""

    def words(counters: list[int], seed: int) -> list[int]:
        return [int(word) for word in philox(torch.tensor(seed), *(torch.tensor(c) for c in counters))]

    assert words([0] * 4, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert words([0xFFFFFFFF] * 4, -1) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


@bindings.needs_kernels
@pytest.mark.parametrize("isa", bindings.ISAS)
@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 17, 33), (3, 2, 5, 64)])
def test_the_masks_of_the_cpu_kernel_are_the_references(isa, rate, shape):
    """To the bit, for seeds with high bits, and for a sequence that is not the first."""
    before = _ext.C.cpu_capability()
    _ext.C.set_cpu_capability(isa)
    try:
        for seed in (0, 5, 2**63 - 2):
            for first in (0, 7):
                arguments = torch.tensor([seed]), rate, *shape, first
                with poisoned_allocations():
                    found = _attention.drawn(*arguments)
                assert torch.equal(found, reference.dropout(*arguments).float())
    finally:
        _ext.C.set_cpu_capability(before)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("names", [(), ("causal", "gqa"), ("bool_mask",), ("window", "sinks"), ("softcap", "alibi")])
def test_dropout_on_the_cpu_is_torchs_products_around_our_masks(names, parts, monkeypatch):
    """The same output and gradients as the reference from the same seed, whatever the batch is cut into, and no word of
    a fallback."""
    if parts > 1:
        monkeypatch.setattr(sys.modules[ops.attention.__module__], "_PART_BYTES", 1)
    extras = features(names, 2, 4, 9, 13)
    if "sinks" in names:
        extras["sinks"].requires_grad_()
    found = {}
    for backend in ("torch", "reference"):
        torch.manual_seed(0)
        q = torch.randn(2, 4, 9, 8, requires_grad=True)
        k, v = (torch.randn(2, 2 if "gqa" in names else 4, 13, 8, requires_grad=True) for _ in range(2))
        with fastllm.use_backend(backend):
            out = ops.attention(q, k, v, dropout_p=0.3, **extras)
            leaves = (q, k, v, extras["sinks"]) if "sinks" in names else (q, k, v)
            found[backend] = out, *torch.autograd.grad(out.square().sum(), leaves)
    for ours, expected in zip(*found.values(), strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=1e-6 if ours.ndim == 1 else 0, atol=0)
    if set(names) <= {"causal", "gqa", "bool_mask"}:  # and the formula, written once more in float64
        torch.manual_seed(0)
        torch.randn(2, 4, 9, 8), torch.randn(2, k.shape[1], 13, 8), torch.randn(2, k.shape[1], 13, 8)
        z = reference.dropout(dropout_seed(q, 0.3), 0.3, 2, 4, 9, 13).double()
        doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
        wide_k, wide_v = (x.repeat_interleave(4 // k.shape[1], 1) for x in doubles[1:])
        scores = doubles[0] @ wide_k.mT / math.sqrt(8)
        seen = extras.get("attn_mask", torch.ones(9, 13, dtype=torch.bool))
        seen = seen.tril() if "causal" in names else seen
        out = (scores.masked_fill(~seen, -torch.inf).softmax(-1) * z) @ wide_v
        truth = out, *torch.autograd.grad(out.square().sum(), doubles)
        for ours, expected in zip(found["torch"], truth, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
    assert fastllm.explain(ops.attention, q, k, v, dropout_p=0.3, **extras).backend == "torch"


def test_dropout_drops_its_share_and_follows_the_seed():
    z = reference.dropout(torch.tensor([123456789]), 0.3, 2, 3, 64, 128)
    assert abs((z == 0).double().mean() - 0.3) < 0.01
    assert torch.allclose(z.unique(), torch.tensor([0.0, 1 / 0.7]))
    q, k, v = draw(1, 2, 16, 8)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(ops.attention(q, k, v, dropout_p=0.5))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# The torch backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_backend(shape, dtype):
    with fastllm.use_backend("torch"):
        for names in ((), ("causal",), ("causal", "bottom_right"), ("window",), ("window", "bottom_right", "gqa")):
            # On a CPU without AVX-512 torch's kernel rounds more in float16 than the formula does: that is its budget.
            rival = stock_attention if dtype == torch.float16 and "window" not in names else eager_attention
            check(names, shape=shape, dtype=dtype, lse=False, rival=rival)


@pytest.mark.parametrize("pair", [p for p in itertools.combinations(BY_TORCH, 2) if p != ("bool_mask", "float_mask")])
def test_torch_backend_features_in_pairs(pair):
    with fastllm.use_backend("torch"):
        check(pair, shape=(2, 2, 37, 53), lse=False)
        check(pair, shape=(2, 2, 37, 53), lse=False, bshd=True, value_size=8)


def test_torch_backend_corners(monkeypatch):
    monkeypatch.setattr(_sdpa, "ROWS", 16)
    with fastllm.use_backend("torch"):
        for window in ((0, 0), (5, 0), (0, 5), (-1, 3), (3, -1), (200, 200)):
            for shape in ((1, 1, 50, 50), (1, 1, 20, 50), (1, 1, 50, 20)):
                for names in ((), ("bottom_right",), ("causal",)):
                    check(names, shape=shape, window_size=window, lse=False)
        check(("causal",), size=8, value_size=24, lse=False)
        check(("causal",), layout="strided", grad_layout="scalar", lse=False)


def test_lse_of_the_torch_backend():
    q, k, v = (x.detach() for x in draw(2, 2, 20, 8))
    mask = torch.rand(20, 12) > 0.8
    mask[4] = False
    for kwargs in ({"is_causal": True, "causal_align": "bottom_right"}, {"attn_mask": mask}):
        results = []
        for backend in ("torch", "reference"):
            with fastllm.use_backend(backend):
                results.append(ops.attention(q, k[:, :, :12], v[:, :, :12], return_lse=True, **kwargs))
        torch.testing.assert_close(*results)
        assert (results[0][1] == -torch.inf).any()


def test_windows_are_not_materialised():
    """A window's masks stay as small as its blocks."""
    for part in _sdpa.parts(2048, 2048, 256, 0, False):
        assert part.k1 - part.k0 <= 256 + 2 * _sdpa.ROWS
    assert [p.causal for p in _sdpa.parts(64, 64, -1, 0, False)] == [True]
    assert [p.causal for p in _sdpa.parts(64, 64, 63, 0, False)] == [True]
    assert list(_sdpa.parts(70, 33, -1, 0, True)) == [_sdpa.Part(37, 70, 0, 33, causal=True)]


# The rest of the features, which on a CPU the reference computes


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_features_on_their_default_backend(feature):
    check((feature,), shape=(2, 2, 19, 23))


# Manners


def test_explain():
    q, k, v = (x.detach() for x in draw(1, 2, 8, 16))
    explanation = fastllm.explain(ops.attention, q, k, v, is_causal=True)
    assert [c.backend for c in explanation] == ["triton", "torch", "reference"]
    assert explanation.backend == "torch"
    assert explanation[0].reason == "runs on GPUs, the input is on cpu"
    assert fastllm.explain(ops.attention, q, k, v, softcap=2.0).backend == "reference"
    mask = torch.zeros(8, 8, requires_grad=True)
    with fastllm.use_backend("torch"), pytest.raises(fastllm.BackendUnavailable, match="gives attn_mask no gradient"):
        ops.attention(q, k, v, mask)


def test_fully_masked_rows():
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[3] = False
    for backend in ("torch", "reference"):
        for given in (mask, torch.zeros(20, 20).masked_fill(~mask, -torch.inf)):
            q, k, v = draw(1, 2, 20, 16)
            with fastllm.use_backend(backend):
                out, lse = ops.attention(q, k, v, given, return_lse=True)
                grads = torch.autograd.grad(out.sum(), (q, k, v))
            assert not out[:, :, 3].any()
            assert (lse[:, :, 3] == -torch.inf).all()
            assert not grads[0][:, :, 3].any()
            assert not any(x.isnan().any() for x in (out, *grads))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty(backend):
    for shape_q, shape_k in (((0, 2, 4, 8), (0, 2, 4, 8)), ((2, 2, 0, 8), (2, 2, 3, 8)), ((2, 2, 3, 8), (2, 2, 0, 8))):
        q, (k, v) = draw(*shape_q, count=1)[0], draw(*shape_k, count=2)
        with fastllm.use_backend(backend):
            out = ops.attention(q, k, v)
            out.sum().backward()
        assert out.shape == shape_q
        assert not out.any()
        assert all(not x.grad.any() and x.grad.shape == x.shape for x in (q, k, v))


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_layout_of_the_output(backend):
    x = torch.randn(2, 5, 3, 8).transpose(1, 2)
    with fastllm.use_backend(backend):
        assert ops.attention(x, x, x).transpose(1, 2).is_contiguous()
        assert ops.attention(*(x.contiguous(),) * 3).is_contiguous()


def test_every_element_is_written():
    with poisoned_allocations():
        for kwargs in ({}, {"is_causal": True, "causal_align": "bottom_right"}, {"window_size": (2, 2)}):
            q, (k, v) = draw(2, 2, 30, 8, count=1)[0], draw(2, 2, 13, 8, count=2)
            out, lse = ops.attention(q, k, v, return_lse=True, **kwargs)
            for x in (out, lse, *torch.autograd.grad(out.sum(), (q, k, v))):
                assert not x.isnan().any()


def test_torch_refuses_the_double_backward_of_its_own_attention():
    q, k, v = draw(1, 1, 4, 8)
    (grad,) = torch.autograd.grad(ops.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_autocast(backend, return_lse):
    """It casts the tensors, once: inside, the arithmetic is what it would be for bfloat16 tensors."""
    q, k, v = draw(1, 2, 8, 16)
    shorts = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    with fastllm.use_backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            found = ops.attention(q, k, v, return_lse=return_lse)
        wanted = ops.attention(*shorts, return_lse=return_lse)
        if not return_lse:
            found, wanted = (found,), (wanted,)
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        with torch.autocast("cpu", torch.bfloat16):  # some call backward inside
            grads = torch.autograd.grad(found[0].sum(), (q, k, v))
        for a, b in zip(grads, torch.autograd.grad(wanted[0].sum(), shorts), strict=True):
            assert torch.equal(a, b.float())


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"window_size": (2, 0)}], ids=str)
@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_scales_that_are_not_positive(scale, kwargs):
    """torch's CPU kernel makes NaN of them where something is masked."""
    q, k, v = draw(1, 2, 6, 8, dtype=torch.float64)
    out = ops.attention(q, k, v, scale=scale, **kwargs)
    expected = eager_attention(q, k, v, scale=scale, **kwargs)
    torch.testing.assert_close(out, expected)
    got, wanted = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, expected))
    torch.testing.assert_close(got, wanted)
    with fastllm.use_backend("torch"), pytest.raises(fastllm.BackendUnavailable, match="must be positive, got"):
        ops.attention(q, k, v, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_masks_keep_their_bits(dtype):
    """1 + 2^-10 is a float16 and no bfloat16: added to logits of zero, and then the logarithm of their sum."""
    q = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)
    mask = torch.full((4, 4), 1 + 2**-10, dtype=dtype)
    with fastllm.use_backend("torch"):
        _, lse = ops.attention(q, q, q, mask, return_lse=True)
    torch.testing.assert_close(lse, torch.full((1, 1, 4), 1 + 2**-10 + math.log(4)), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_a_sink_of_minus_infinity_is_none():
    q, k, v = draw(1, 2, 5, 8)
    sinks = torch.tensor([-torch.inf, 0.5], requires_grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    out, lse = ops.attention(q, k, v, mask, sinks=sinks, return_lse=True)
    grads = torch.autograd.grad(out.sum() + lse[:, :, [0, 1, 3, 4]].sum(), (q, k, v, sinks))
    assert lse[0, 0, 2] == -torch.inf
    assert lse[0, 1, 2] == 0.5
    assert not any(x.isnan().any() for x in (out, lse, *grads))
    assert grads[3][0] == 0
    assert grads[3][1] > 0


def _scores(dropout_p=0.0, left=-1, right=0, softcap=0.0):
    return dropout_p, 0.25, left, right, softcap, False


@pytest.mark.parametrize("case", ["plain", "everything", "mask"])
@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_opcheck(case):
    q, k, v = torch.randn(2, 6, 4, 16).transpose(1, 2), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 8)
    mask = sinks = slopes = seed = None
    scores = _scores()
    if case == "everything":
        sinks, slopes, seed = torch.randn(4), torch.rand(4).expand(2, 4), torch.tensor([5])
        scores = _scores(0.2, 3, 1, 2.0)
    if case == "mask":
        mask = torch.randn(1, 1, 6, 5).expand(2, 4, 6, 5)
    args = (q, k, v, mask, sinks, slopes, seed, case == "mask", *scores)
    out, lse = OPS["attention_fwd"].call(*args)
    torch.library.opcheck(OPS["attention_fwd"].call, args)
    dlse = torch.randn_like(lse) if case == "everything" else None
    back = (torch.randn_like(out), dlse, q, k, v, out, lse, *args[3:])
    torch.library.opcheck(OPS["attention_bwd"].call, back)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_fullgraph_compile_without_recompiling_for_each_length(backend):
    torch.compiler.reset()
    count, counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager"), []

    def step(q, k, v):
        return ops.attention(q, k, v, is_causal=True, window_size=(7, -1)).sin().sum()

    with fastllm.use_backend(backend):
        compiled = torch.compile(step, fullgraph=True, backend=count, dynamic=True)
        for rows in (12, 20, 33, 47):
            tensors = draw(2, 2, rows, 16)
            torch.testing.assert_close(
                torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(step(*tensors), tensors)
            )
            counts.append(count.frame_count)
    assert len(set(counts)) == 1, "compiled again for another length"


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_fullgraph_compile_of_everything():
    torch.compiler.reset()
    q, k, v = draw(2, 2, 9, 16)
    sinks, slopes = torch.randn(2, requires_grad=True), torch.rand(2)
    mask = torch.randn(9, 9, requires_grad=True)

    def step(q, k, v, mask, sinks):
        return ops.attention(q, k, v, mask, softcap=2.0, sinks=sinks, alibi_slopes=slopes).sin().sum()

    leaves = (q, k, v, mask, sinks)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(step(*leaves), leaves))
    dropped = torch.compile(functools.partial(ops.attention, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    assert dropped(q, k, v).shape == q.shape


def test_export_keeps_the_op():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.attention(q, k, v, is_causal=True)

    args = tuple(x.detach() for x in draw(1, 2, 8, 16))
    length = torch.export.Dim("length", min=2, max=1024)
    program = torch.export.export(Module(), args, dynamic_shapes=({2: length},) * 3)
    assert "fastllm.attention_fwd" in str(program.graph)
    other = tuple(x.detach() for x in draw(1, 2, 21, 16))
    torch.testing.assert_close(program.module()(*other), eager_attention(*other, is_causal=True))


def test_hostile_arguments():
    q = torch.randn(2, 4, 8, 16)
    half = torch.randn(2, 2, 8, 16)
    for args, kwargs, error, message in (
        (([1.0], q, q), {}, TypeError, "query must be a tensor, got list"),
        ((q.int(), q, q), {}, TypeError, "or float64, got torch.int32"),
        ((q, q.half(), q), {}, TypeError, "key must have query's dtype"),
        ((q[0], q, q), {}, ValueError, r"shape \(B, H, S, D\), got \(4, 8, 16\)"),
        ((q, q.to("meta"), q), {}, ValueError, "query is on cpu, key on meta"),
        ((q, half, half), {}, ValueError, "unless enable_gqa=True"),
        ((q, q[:, :3], q[:, :3]), {"enable_gqa": True}, ValueError, "must be a multiple of key's"),
        ((q, q[..., :8], q), {}, ValueError, "same head size"),
        ((q, q, q[:, :, :5]), {}, ValueError, "key and value must have the same shape"),
        ((q, q[:1], q[:1]), {}, ValueError, "query has batch size 2, key and value 1"),
        ((q, q, q, torch.ones(8, 7)), {}, ValueError, r"broadcast to \(2, 4, 8, 8\), got \(8, 7\)"),
        ((q, q, q, torch.ones(8, 8).int()), {}, TypeError, "attn_mask must be bool or floating"),
        ((q, q, q, 1.0), {}, TypeError, "attn_mask must be a tensor or None, got float"),
        ((q, q, q), {"window_size": ("a", 1)}, TypeError, "window_size must be an int, got 'a'"),
        ((q, q, q), {"window_size": (-2, 0)}, ValueError, r"at least 0, or -1 for no limit, got \(-2, 0\)"),
        ((q, q, q), {"window_size": 3}, TypeError, r"must be \(left, right\), got 3"),
        ((q, q, q), {"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
        ((q, q, q), {"softcap": -1.0}, ValueError, "softcap must be at least 0"),
        ((q, q, q), {"sinks": torch.ones(3)}, ValueError, r"sinks must have shape \(4,\), got \(3,\)"),
        ((q, q, q), {"alibi_slopes": torch.ones(3)}, ValueError, r"got \(3,\)"),
        ((q, q, q), {"alibi_slopes": torch.ones(4, requires_grad=True)}, ValueError, "get no gradient"),
        ((q, q, q), {"causal_align": "top"}, ValueError, "got 'top'"),
    ):
        with pytest.raises(error, match=f"^attention: .*{message}"):
            ops.attention(*args, **kwargs)

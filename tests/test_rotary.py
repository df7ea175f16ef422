"""rotary on every binding that is built. Triton kernels: test_interpreter.py."""

from __future__ import annotations

import functools

import bindings
import pytest
import torch
from eager import rotary as eager

import fastllm
from fastllm import ops
from fastllm.backends import OPS
from fastllm.testing import check_op, make, poisoned_allocations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = [f"cpu-{isa}" for isa in bindings.ISAS]


def tables(rows: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(rows, dtype=torch.float64), 100.0 ** -(torch.arange(half) / max(half, 1)))
    return angles.cos().float(), angles.sin().float()


def check(shape=(2, 4, 9, 32), kv_heads=2, half=None, dtype=torch.float32, bshd=False, layout="contiguous", **kwargs):
    batch, heads, seq, size = shape
    half = size // 2 if half is None else half

    def draw(heads: int, seed: int):
        if bshd:
            return make((batch, seq, heads, size), dtype, seed=seed, layout=layout).transpose(1, 2)
        return make((batch, heads, seq, size), dtype, seed=seed, layout=layout)

    if "cos" not in kwargs:
        cos, sin = tables(seq + 5, half)
        kwargs |= {"cos": cos, "sin": sin}

    def ours(q, k):
        return ops.rotary(q, k, **kwargs)

    check_op(ours, functools.partial(eager, **kwargs), (draw(heads, 0), draw(kv_heads, 1)))


@pytest.mark.parametrize("binding", CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("bshd", [False, True])
def test_layouts_of_pairs_and_heads(binding, dtype, interleaved, bshd):
    with bindings.bound(binding):
        for size, half in ((2, 1), (6, 3), (32, 16), (64, 32), (72, 36), (80, 10), (33, 16), (16, 0), (128, 64)):
            check((2, 3, 5, size), 1, half, dtype, bshd, interleaved=interleaved)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "expanded", "scalar", "misaligned"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_strides(layout, interleaved):
    for bshd in (False, True):
        check(layout=layout, bshd=bshd, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions(interleaved):
    cos, sin = tables(50, 16)
    for ids in (torch.arange(9) + 30, torch.randint(50, (2, 9)), torch.randint(50, (1, 9), dtype=torch.int32)):
        check(cos=cos, sin=sin, position_ids=ids, interleaved=interleaved)
    check(cos=torch.randn(2, 9, 16), sin=torch.randn(2, 9, 16), interleaved=interleaved)
    check(cos=torch.randn(1, 9, 16), sin=torch.randn(1, 9, 16), interleaved=interleaved)
    check(cos=torch.randn(16, 9).t(), sin=torch.randn(16, 9).t(), interleaved=interleaved)


def test_packed_sequences():
    """(total, H, D) with the positions of each document."""
    q, k = torch.randn(11, 4, 16, requires_grad=True), torch.randn(11, 2, 16, requires_grad=True)
    cos, sin = tables(8, 8)
    ids = torch.cat([torch.arange(4), torch.arange(7)])
    turned = ops.rotary(q, k, cos, sin, position_ids=ids)
    for part in (slice(0, 4), slice(4, 11)):
        alone = eager(*(x[part].transpose(0, 1)[None] for x in (q, k)), cos=cos, sin=sin)
        for a, b in zip(turned, alone, strict=True):
            torch.testing.assert_close(a[part], b[0].transpose(0, 1))
    assert turned[0].shape == q.shape
    assert turned[0].is_contiguous()
    assert all(
        grad.shape == x.shape
        for grad, x in zip(torch.autograd.grad(turned[0].sum() + turned[1].sum(), (q, k)), (q, k), strict=True)
    )


def test_as_transformers():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 4, 9, 32), torch.randn(2, 2, 9, 32)
    cos, sin = tables(9, 16)
    doubled = (torch.cat([t, t], -1)[None].expand(2, -1, -1) for t in (cos, sin))
    torch.testing.assert_close(ops.rotary(q, k, cos, sin), modeling.apply_rotary_pos_emb(q, k, *doubled))


@pytest.mark.parametrize("binding", CPU)
@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place(binding, interleaved):
    cos, sin = tables(9, 13)
    with bindings.bound(binding):
        for dtype in DTYPES:
            q, k = make((2, 4, 9, 32), dtype), make((2, 9, 2, 32), dtype, seed=1).transpose(1, 2)
            wanted = ops.rotary(q, k, cos, sin, interleaved=interleaved)
            found = ops.rotary(q, k, cos, sin, interleaved=interleaved, inplace=True)
            assert found[0].data_ptr() == q.data_ptr()
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_gradient_in_place():
    cos, sin = tables(9, 8)
    leaves = [torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(2)]
    grads = []
    for inplace in (True, False):
        q, k = (x * 1 for x in leaves)
        outs = ops.rotary(q, k, cos, sin, inplace=inplace)
        grads.append(torch.autograd.grad(outs[0].sin().sum() + outs[1].cos().sum(), leaves))
    torch.testing.assert_close(*grads)


def test_in_place_refuses_what_it_cannot_do():
    cos, sin = tables(9, 8)
    q, k = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    leaf = torch.randn(1, 9, 2, 16, requires_grad=True)
    for args, message in (
        ((q, q), "would turn one tensor twice"),
        ((q, k[:, :1].expand(1, 2, 9, 16)), r"k has strides"),
        (((leaf * 1).transpose(1, 2), k), "no views, and not packed; q is"),
        ((leaf[0] * 1, leaf[0] * 2), "no views, and not packed; q is"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.rotary(*args, cos, sin, inplace=True)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_in_place_on_heads_that_are_not_dense(backend):
    cos, sin = tables(9, 3)
    q, k = torch.randn(1, 2, 9, 16)[..., ::2], torch.randn(1, 2, 9, 16)[..., 1::2]
    wanted = ops.rotary(q, k, cos, sin)
    with fastllm.use_backend(backend):
        ops.rotary(q, k, cos, sin, inplace=True)
    for a, b in zip((q, k), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_only_one_is_used():
    cos, sin = tables(9, 8)
    q, k = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(2))
    (grad,) = torch.autograd.grad(ops.rotary(q, k, cos, sin)[0].sin().sum(), q)
    torch.testing.assert_close(grad, torch.autograd.grad(eager(q, k, cos=cos, sin=sin)[0].sin().sum(), q)[0])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_layout_of_the_output(backend):
    cos, sin = tables(9, 8)
    x = torch.randn(2, 9, 3, 16).transpose(1, 2)
    with fastllm.use_backend(backend):
        for turned in ops.rotary(x, x, cos, sin):
            assert turned.transpose(1, 2).is_contiguous()
        for turned in ops.rotary(x.contiguous(), x.contiguous(), cos, sin):
            assert turned.is_contiguous()


def test_empty():
    cos, sin = tables(9, 8)
    for shape in ((0, 2, 4, 16), (2, 2, 0, 16), (2, 0, 4, 16)):
        q = torch.randn(shape, requires_grad=True)
        ops.rotary(q, q.detach(), cos, sin)[0].sum().backward()
        assert q.grad.shape == shape


def test_every_element_is_written():
    with poisoned_allocations():
        for half in (16, 5, 0):
            cos, sin = tables(9, half)
            q = torch.randn(2, 4, 9, 33, requires_grad=True)
            outs = ops.rotary(q, q, cos, sin)
            assert all(x.isfinite().all() for x in (*outs, *torch.autograd.grad(outs[0].sum(), q)))


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_gradcheck_of_the_reference():
    q, k = (torch.randn(1, 2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cos, sin = tables(3, 2)
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(
            functools.partial(ops.rotary, cos=cos, sin=sin, interleaved=interleaved), (q, k)
        )


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_opcheck():
    q, k, (cos, sin) = torch.randn(2, 9, 3, 16).transpose(1, 2), torch.randn(2, 1, 9, 16), tables(12, 5)
    for positions in (None, torch.randint(12, (2, 9))):
        torch.library.opcheck(OPS["rotary_fwd"].call, (q, k, cos, sin, positions, True, False))
        torch.library.opcheck(OPS["rotary_"].call, (q.clone(), k.clone(), cos, sin, positions, False, True))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_fullgraph_compile(backend):
    torch.compiler.reset()
    cos, sin = tables(9, 8)

    def step(q, k, ids):
        a, b = ops.rotary(q, k, cos, sin, position_ids=ids)
        c, d = ops.rotary(q * 2, k * 2, cos, sin, inplace=True)
        return (a.sin() + c).sum() + (b.cos() + d).sum()

    leaves, ids = [torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(2)], torch.arange(9).flip(0)
    with fastllm.use_backend(backend):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(*(torch.autograd.grad(f(*leaves, ids), leaves) for f in (compiled, step)))
        with pytest.raises(RuntimeError, match="a position is outside the 9 of cos"):
            compiled(*leaves, ids + 1)


def test_hostile_arguments():
    q, k, (cos, sin) = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), tables(9, 8)
    ids = torch.arange(9)
    for args, kwargs, error, message in (
        ((None, k, cos, sin), {}, TypeError, "q must be a tensor, got NoneType"),
        ((q, k.half(), cos, sin), {}, TypeError, "k must have q's dtype"),
        ((q[0, 0], k, cos, sin), {}, ValueError, r"q must have shape \(B, H, S, D\)"),
        ((q, k[:, :, :3], cos, sin), {}, ValueError, "same shape but for the heads"),
        ((q, k, None, sin), {}, TypeError, "cos must be a tensor, got NoneType"),
        ((q, k, cos, sin[:3]), {}, ValueError, r"one shape, got \(9, 8\) and \(3, 8\)"),
        ((q, k, cos[:5], sin[:5]), {}, ValueError, "cos has 5 positions, q 9"),
        ((q, k, *tables(9, 9)), {}, ValueError, "cos turns 18 elements of a head, which has 16$"),
        (
            (q, k, *tables(9, 16)),
            {},
            ValueError,
            r"half as wide as transformers': pass cos\[..., : 8\] and sin\[..., : 8",
        ),
        (
            (q, k, *tables(9, 12)),
            {},
            ValueError,
            r"cos turns 24 .* half as wide as transformers': pass cos\[..., : 6\]",
        ),
        ((q, k, *tables(9, 16)), {"interleaved": True}, ValueError, "half as wide as transformers'$"),
        ((q, k, cos.expand(3, 9, 8), sin.expand(3, 9, 8)), {}, ValueError, r"or \(2, 9, R / 2\), got \(3, 9, 8\)"),
        ((q, k, cos.clone().requires_grad_(), sin), {}, ValueError, "cos gets no gradient"),
        ((q, k, cos, sin.to("meta")), {}, ValueError, "q is on cpu, sin on meta"),
        ((q, k, cos, sin), {"position_ids": ids.float()}, TypeError, "int32 or int64 tensor, got torch.float32"),
        ((q, k, cos, sin), {"position_ids": ids[:4]}, ValueError, r"shape \(9,\) or \(2, 9\), got \(4,\)"),
        ((q, k, cos, sin), {"position_ids": ids + 1}, IndexError, "position 9 is outside the 9 of cos"),
        ((q, k, cos, sin), {"position_ids": ids - 1}, IndexError, "position -1 is outside"),
        ((q, k, cos.expand(2, 9, 8), sin.expand(2, 9, 8)), {"position_ids": ids}, ValueError, "need cos of shape"),
    ):
        with pytest.raises(error, match=f"^rotary: .*{message}"):
            ops.rotary(*args, **kwargs)

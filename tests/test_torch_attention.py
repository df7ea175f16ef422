"""fastllm.compat.torch_attention: the switch, and what lies behind it, which asks for no GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import attention as switch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

import fastllm
from fastllm.compat import torch_attention
from fastllm.testing import make

aten = torch.ops.aten


def entries(key: str = "CUDA") -> list[bool]:
    names = (f"aten::{name}" for name in torch_attention.KERNELS)
    return [torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for name in names]


@pytest.fixture
def registered():
    torch_attention.register()
    yield
    switch.restore_flash_attention_impl(_raise_warn=False)
    switch._registry._FLASH_ATTENTION_IMPLS.pop("fastllm")


@pytest.fixture
def on_cpu():
    """The kernels under the CPU's key, where torch has none of these ops: its autograd and its compiler as on a GPU."""
    assert not any(entries("CPU"))
    handle = torch_attention._Handle("CPU")
    yield
    handle.remove()
    assert not any(entries("CPU"))


def draw(*shape: int, heads_last: bool = False) -> torch.Tensor:
    batch, heads, rows, size = shape
    x = torch.randn(batch, rows, heads, size).transpose(1, 2) if heads_last else torch.randn(shape)
    return x.requires_grad_()


def grads(out, inputs):
    return torch.autograd.grad(out.sin().sum(), inputs)


@pytest.mark.skipif(torch.version.cuda is not None, reason="a torch with CUDA has entries of its own")
def test_the_switch(registered):
    assert "fastllm" in switch.list_flash_attention_impls()
    assert switch.current_flash_attention_impl() is None
    assert not any(entries())
    switch.activate_flash_attention_impl("fastllm")
    assert switch.current_flash_attention_impl() == "fastllm"
    assert all(entries())
    switch.activate_flash_attention_impl("fastllm")
    assert all(entries())
    switch.restore_flash_attention_impl()
    assert switch.current_flash_attention_impl() is None
    assert not any(entries())


def test_importing_registers_nothing():
    assert "fastllm" not in switch.list_flash_attention_impls()


def test_a_torch_without_the_switch(monkeypatch):
    monkeypatch.delattr(switch, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"has no torch\.nn\.attention\.register_flash_attention_impl"):
        torch_attention.register()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_last", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_as_scaled_dot_product_attention(on_cpu, called, causal, heads_last, scale):
    q, k, v = (draw(2, heads, 37, 16, heads_last=heads_last) for heads in (4, 2, 2))
    result = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    promised = aten._scaled_dot_product_flash_attention(*(x.to("meta") for x in (q, k, v)), 0.0, causal, scale=scale)
    for got, fake in zip(result, promised, strict=True):
        if isinstance(fake, torch.Tensor):
            assert (got.shape, got.stride(), got.dtype) == (fake.shape, fake.stride(), fake.dtype)
        else:
            assert got == fake
    out, lse = result[:2]
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    scores = q @ k.repeat_interleave(2, 1).mT * (scale or 0.25)
    if causal:
        scores = scores.masked_fill(torch.ones(37, 37).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    found = grads(out, (q, k, v))
    torch.testing.assert_close(found, grads(expected, (q, k, v)))
    assert [x.stride() for x in found] == [x.stride() for x in (q, k, v)]
    assert called == ["attention_fwd", "attention_bwd"]


def test_the_diagonal_is_at_the_bottom_right(on_cpu):
    q, k, v = draw(1, 2, 3, 8), draw(1, 2, 5, 8), draw(1, 2, 5, 8)
    out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    mask = torch.ones(3, 5).tril(2).bool()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_dropout_has_one_mask_in_forward_and_backward(on_cpu):
    q, k, v = (draw(2, 2, 9, 8) for _ in range(3))
    torch.manual_seed(3)
    out = aten._scaled_dot_product_flash_attention(q, k, v, 0.4, True)[0]
    torch.manual_seed(3)
    expected = fastllm.ops.attention(q, k, v, dropout_p=0.4, is_causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads(out, (q, k, v)), grads(expected, (q, k, v)))
    again = aten._scaled_dot_product_flash_attention(q, k, v, 0.4, True)[0]
    assert not torch.equal(out, again)


def test_dense_with_a_window(on_cpu):
    q, k, v = (draw(2, 3, 11, 8) for _ in range(3))
    out, _, rng_state, *_ = aten._flash_attention_forward(
        *(x.transpose(1, 2) for x in (q, k, v)), None, None, 11, 11, 0.0, False, False,
        window_size_left=2, window_size_right=1,
    )  # fmt: skip
    expected = fastllm.ops.attention(q, k, v, window_size=(2, 1))
    torch.testing.assert_close(out.transpose(1, 2), expected)
    assert (rng_state.shape, rng_state.dtype) == ((2,), torch.uint64)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0)])
def test_varlen_attn(on_cpu, called, window):
    q, k, v = (torch.randn(12, 4, 8, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    out = varlen_attn(q, k, v, cu, cu, 7, 7, window_size=window)
    assert called == ["attention_varlen_fwd"]
    expected = fastllm.ops.attention_varlen(q, k, v, cu, cu, 7, 7, window_size=window)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads(out, (q, k, v)), grads(expected, (q, k, v)))
    assert called.count("attention_varlen_bwd") == 2


def test_compiled(on_cpu):
    q, k, v = (draw(2, 2, 9, 8, heads_last=True) for _ in range(3))

    def loss(q, k, v):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0].sin()

    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v).sum(), (q, k, v))
    torch.testing.assert_close(found, torch.autograd.grad(loss(q, k, v).sum(), (q, k, v)))


def test_a_forced_backend_is_the_one_that_runs(on_cpu):
    q = draw(1, 1, 4, 8)
    with fastllm.use_backend("cuda"), pytest.raises(fastllm.BackendUnavailable):
        aten._scaled_dot_product_flash_attention(q, q, q)


def test_what_is_not_supported_is_refused():
    q = torch.randn(1, 2, 4, 8)
    sdpa, flash = torch_attention._sdpa, torch_attention._flash
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="return_debug_mask"):
        sdpa(q, q, q, 0.0, False, True)
    with pytest.raises(TypeError, match="query must be float32"):
        sdpa(q.long(), q, q)
    with pytest.raises(TypeError, match="key must have query's dtype"):
        sdpa(q, q.half(), q)
    with pytest.raises(ValueError, match=r"query must have shape \(B, H, S, D\)"):
        sdpa(q[0], q[0], q[0])
    with pytest.raises(ValueError, match="multiple of key's"):
        sdpa(q, q.repeat(1, 2, 1, 1), q.repeat(1, 2, 1, 1))
    with pytest.raises(ValueError, match="one head size"):
        sdpa(q, q, q[..., :1])
    with pytest.raises(ValueError, match="one batch size"):
        sdpa(q.repeat(2, 1, 1, 1), q, q)
    packed = [q[0].transpose(0, 1)] * 3
    for name in ("seqused_k", "alibi_slopes", "block_table"):
        with pytest.raises(NotImplementedError, match=name):
            flash(*packed, cu, cu, 4, 4, 0.0, False, False, **{name: cu})
    with pytest.raises(NotImplementedError, match="num_splits"):
        flash(*packed, cu, cu, 4, 4, 0.0, False, False, num_splits=2)
    assert torch.equal(*(flash(*packed, cu, cu, 4, 4, 0.0, False, False, num_splits=n)[0] for n in (None, 1)))
    with pytest.raises(TypeError, match="must be int32 tensors of one shape"):
        flash(*packed, cu.long(), cu, 4, 4, 0.0, False, False)
    with pytest.raises(TypeError, match="must be int32 tensors of one shape"):
        flash(*packed, cu, None, 4, 4, 0.0, False, False)


def results(q, k, v, attention=F.scaled_dot_product_attention, **kwargs):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = attention(q, k, v, **kwargs)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product_attention_on_a_gpu(registered, called, causal, dtype):
    q, k, v = (make((2, 4, 300, 72), dtype, "cuda", seed).requires_grad_() for seed in range(3))
    stock = results(q, k, v, is_causal=causal)
    assert not called
    switch.activate_flash_attention_impl("fastllm")
    ours = results(q, k, v, is_causal=causal)
    assert called == ["attention_fwd", "attention_bwd"]
    wanted = fastllm.ops.attention(q, k, v, is_causal=causal, causal_align="bottom_right")
    assert torch.equal(ours[0], wanted)
    for a, b in zip(ours, stock, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert (a.float() - b.float()).abs().max() <= 2**-6 * b.float().abs().max()
    compiled = results(q, k, v, torch.compile(F.scaled_dot_product_attention), is_causal=causal)
    torch.testing.assert_close(compiled, ours)
    switch.restore_flash_attention_impl()
    called.clear()
    assert torch.equal(results(q, k, v, is_causal=causal)[0], stock[0])
    assert not called


@pytest.mark.gpu
def test_dropout_and_varlen_on_a_gpu(registered, called):
    switch.activate_flash_attention_impl("fastllm")
    q, k, v = (make((2, 4, 256, 64), torch.bfloat16, "cuda", seed).requires_grad_() for seed in range(3))
    for _ in range(2):
        torch.manual_seed(1)
        found = results(q, k, v, dropout_p=0.2)
        torch.manual_seed(1)
        out = fastllm.ops.attention(q, k, v, dropout_p=0.2, causal_align="bottom_right")
        wanted = (out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    packed = [x.detach()[0].transpose(0, 1) for x in (q, k, v)]
    cu = torch.tensor([0, 100, 256], dtype=torch.int32, device="cuda")
    out = varlen_attn(*packed, cu, cu, 156, 156, window_size=(-1, 0))
    assert torch.equal(out, fastllm.ops.attention_varlen(*packed, cu, cu, 156, 156, is_causal=True))
    assert called.count("attention_varlen_fwd") == 2

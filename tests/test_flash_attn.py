"""fastllm.compat.flash_attn: flash-attn's layout, names and rules."""

from __future__ import annotations

import inspect

import pytest
import torch
from attention_suite import cumulative, eager_attention

import fastllm
from fastllm.compat import flash_attn


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def stock(q, k, v, **kwargs):
    out = eager_attention(*(x.transpose(1, 2) for x in (q, k, v)), causal_align="bottom_right", **kwargs)
    return out.transpose(1, 2)


def test_argument_names():
    names = list(inspect.signature(flash_attn.flash_attn_func).parameters)
    assert names == [
        "q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes",
        "deterministic", "return_attn_probs",
    ]  # fmt: skip
    varlen = list(inspect.signature(flash_attn.flash_attn_varlen_func).parameters)
    assert varlen[:7] == ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert varlen[7:-1] == names[3:]


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_func():
    q, k, v = draw(2, 5, 4, 8), draw(2, 9, 2, 8), draw(2, 9, 2, 8)
    slopes = torch.rand(4)
    for ours, theirs in (
        ({}, {}),
        ({"causal": True, "softmax_scale": 0.2}, {"is_causal": True, "scale": 0.2}),
        ({"window_size": (2, 1)}, {"window_size": (2, 1)}),
        (
            {"causal": True, "softcap": 3.0, "alibi_slopes": slopes},
            {"is_causal": True, "softcap": 3.0, "alibi_slopes": slopes},
        ),
    ):
        out, expected = flash_attn.flash_attn_func(q, k, v, **ours), stock(q, k, v, **theirs)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.sin().sum(), (q, k, v)), torch.autograd.grad(expected.sin().sum(), (q, k, v))
        )
    out, lse, nothing = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert lse.shape == (2, 4, 5)
    assert not lse.requires_grad
    assert nothing is None


def test_the_backward_is_torchs_kernel_when_compiled():
    """It has none for lse, which is asked for with return_attn_probs only."""
    q, k, v = (draw(2, 9, 2, 8) for _ in range(3))
    compiled = torch.compile(flash_attn.flash_attn_func, fullgraph=True, backend="aot_eager")
    with fastllm.use_backend("torch"):
        grads = torch.autograd.grad(compiled(q, k, v, causal=True).sin().sum(), (q, k, v))
    wanted = torch.autograd.grad(stock(q, k, v, is_causal=True).sin().sum(), (q, k, v))
    torch.testing.assert_close(grads, wanted)


def test_packed():
    qkv = draw(2, 6, 3, 4, 8)
    q, k, v = qkv.unbind(2)
    expected = stock(q, k, v, is_causal=True)
    out = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sin().sum(), qkv) for x in (out, expected)))
    torch.testing.assert_close(flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=True), expected)


def test_varlen():
    q, k, v = draw(10, 4, 8), draw(14, 2, 8), draw(14, 2, 8)
    cu_q, cu_k = cumulative((4, 6)), cumulative((8, 6))
    out = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 8, causal=True)
    parts = [
        stock(q[None, :4], k[None, :8], v[None, :8], is_causal=True),
        stock(q[None, 4:], k[None, 8:], v[None, 8:], is_causal=True),
    ]
    torch.testing.assert_close(out, torch.cat(parts, 1)[0])
    kv = torch.stack([k, v], 1)
    packed = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, 6, 8, causal=True)
    torch.testing.assert_close(packed, out)
    qkv = draw(10, 3, 4, 8)
    packed = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu_q, 6, causal=True)
    torch.testing.assert_close(packed, flash_attn.flash_attn_varlen_func(*qkv.unbind(1), cu_q, cu_q, 6, 6, causal=True))
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 8, block_table=cu_q)


def test_with_kvcache():
    q, k, v = (torch.randn(2, 3, heads, 8) for heads in (4, 2, 2))
    k_cache, v_cache = (torch.randn(2, 20, 2, 8) for _ in range(2))
    before = k_cache.clone(), v_cache.clone()
    seqlens = torch.tensor([5, 11], dtype=torch.int32)
    out, _ = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=seqlens, causal=True, return_softmax_lse=True
    )
    for b, length in enumerate((5, 11)):
        whole = [
            torch.cat([cache[b : b + 1, :length], new[b : b + 1]], 1) for cache, new in zip(before, (k, v), strict=True)
        ]
        torch.testing.assert_close(out[b : b + 1], stock(q[b : b + 1], *whole, is_causal=True))
        assert torch.equal(k_cache[b : b + 1, : length + 3], whole[0])
        assert torch.equal(k_cache[b, length + 3 :], before[0][b, length + 3 :])
    torch.testing.assert_close(flash_attn.flash_attn_with_kvcache(q, *before), stock(q, *before))
    with pytest.raises(ValueError, match="need cache_seqlens"):
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v)
    with pytest.raises(NotImplementedError, match="rotary_cos"):
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, rotary_cos=q)

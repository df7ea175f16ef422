"""attention_kvcache on the CPU. Kernels: test_attention_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from attention_suite import check_kvcache, eager_attention

import fastllm
from fastllm import ops
from fastllm.backends import OPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [
    {"lengths": (1, 50, 99)},
    {"lengths": (0, 5, 100), "size": 40},
    {"lengths": (70, 70, 70)},
    {"lengths": (40, 50, 60), "rows": 3, "new": 3, "names": ("causal",)},
    {"lengths": (0, 50, 60), "rows": 5, "new": 5, "names": ("causal",), "bshd": True},
    {"lengths": (30, 90), "names": ("window",)},
    {"lengths": (30, 90), "rows": 4, "names": ("window", "causal"), "kv_heads": 1},
], ids=str)  # fmt: skip
def test_torch_backend(case, dtype):
    case = dict(case)
    with fastllm.use_backend("torch"):
        check_kvcache(case.pop("lengths"), case.pop("names", ()), dtype=dtype, **case)


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_what_the_reference_computes():
    check_kvcache((30, 90), ("softcap", "sinks", "alibi"), rows=2)


@pytest.mark.parametrize(
    ("length", "rows", "new"), [(0, 5, 5), (7, 1, 1), (7, 1, 0), (6, 4, 4), (0, 20, 20), (19, 1, 1)]
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_one_length_for_all_may_go_straight_to_torch(length, rows, new, is_causal):
    """The same as through the op, caches included, where one call of torch's does it and where not."""
    q = torch.randn(2, 4, rows, 8)
    k, v = (torch.randn(2, 2, new, 8) if new else None for _ in range(2))
    caches = [torch.randn(2, 2, 20, 8) for _ in range(2)]
    results = []
    for lengths in (length, torch.full((2,), length)):
        copies = [c.clone() for c in caches]
        results.append((ops.attention_kvcache(q, *copies, lengths, k, v, is_causal=is_causal, scale=0.3), *copies))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_decoding_token_by_token_is_attention_over_the_whole():
    q, k, v = (torch.randn(2, heads, 12, 8) for heads in (4, 2, 2))
    caches = [torch.zeros(2, 2, 20, 8) for _ in range(2)]
    outs = [
        ops.attention_kvcache(q[:, :, t : t + 1], *caches, t, k[:, :, t : t + 1], v[:, :, t : t + 1]) for t in range(12)
    ]
    torch.testing.assert_close(torch.cat(outs, 2), eager_attention(q, k, v, is_causal=True, enable_gqa=True))


@pytest.mark.parametrize("rows", [1, 80])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_no_gradient(rows, which):
    tensors = {name: torch.randn(1, 2, rows, 8, requires_grad=name == which) for name in "qkv"}
    caches = [torch.zeros(1, 2, 99, 8) for _ in range(2)]
    out = ops.attention_kvcache(tensors["q"], *caches, 5, tensors["k"], tensors["v"])
    assert not any(cache.requires_grad for cache in caches)
    assert torch.equal(caches[0][:, :, 5 : 5 + rows], tensors["k"])
    if which == "q":
        with pytest.raises(RuntimeError, match="for generation and has no gradient"):
            out.sum().backward()


@pytest.mark.parametrize("kwargs", [{}, {"window_size": (30, 0)}, {"is_causal": False}, {"return_lse": True}], ids=str)
def test_long_prompts(kwargs):
    """They go through `attention`; the same as sequence by sequence."""
    q, k, v = (torch.randn(2, heads, 70, 8) for heads in (4, 2, 2))
    caches = [torch.randn(2, 2, 120, 8) for _ in range(2)]
    assert fastllm.explain(ops.attention_kvcache, q, *caches, 9, k, v, **kwargs)[0].op == "attention_fwd"
    copies = [[c.clone() for c in caches] for _ in range(2)]
    with fastllm.use_backend("torch"):
        found = ops.attention_kvcache(q, *copies[0], 9, k, v, **kwargs)
        wanted = ops.attention_kvcache(q, *copies[1], torch.tensor([9, 9]), k, v, **kwargs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*copies)


@pytest.mark.parametrize("lengths", [3, torch.tensor([3, 4])], ids=["int", "tensor"])
@pytest.mark.parametrize("rows", [1, 2])
def test_autocast_casts_to_the_caches_dtype(lengths, rows):
    caches = [torch.randn(2, 2, 9, 8) for _ in range(2)]
    q, k, v = (torch.randn(2, heads, rows, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    copies = [[c.clone() for c in caches] for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.attention_kvcache(q, *copies[0], lengths, k, v)
    wanted = ops.attention_kvcache(q.float(), *copies[1], lengths, k.float(), v.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*copies)


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_scales_that_are_not_positive():
    q, cache = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8)
    out = ops.attention_kvcache(q, cache, cache, 5, scale=0.0)
    torch.testing.assert_close(out, cache[:, :, :5].mean(2, keepdim=True).repeat_interleave(2, 1))


def test_opcheck_and_compile():
    q, cache, lengths = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.tensor([3, 9])
    args = (q, cache, cache, lengths, None, None, 0.3, -1, 0, 0.0)
    torch.library.opcheck(OPS["attention_kvcache_fwd"].call, args)

    def step(q, k_cache, v_cache, lengths, k, v):
        return ops.attention_kvcache(q, k_cache, v_cache, lengths, k, v).sin()

    torch.compiler.reset()
    new = torch.randn(2, 2, 1, 8)
    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        caches = [cache.clone(), cache.clone()]
        results.append((fn(q, *caches, lengths - 1, new, new), *caches))
    torch.testing.assert_close(*results)


def test_hostile_arguments():
    q, cache, new = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 2, 8)
    before = cache.clone()
    for args, kwargs, error, message in (
        ((q, cache[:1], cache[:1], 3), {}, ValueError, "q has batch size 2, k_cache 1"),
        ((q, cache, cache, 3.0), {}, TypeError, "cache_seqlens must be an int"),
        ((q, cache, cache, torch.tensor([1])), {}, ValueError, r"cache_seqlens must have shape \(2,\)"),
        ((q, cache, cache, 3, cache), {}, ValueError, "k and v go together"),
        ((q, cache, cache, 3, cache[:, :1], cache), {}, ValueError, "k must have the cache's shape"),
        ((q[:, :3], cache, cache, 3), {}, ValueError, "must be a multiple of key's"),
        ((q, None, cache, 3), {}, TypeError, "k_cache must be a tensor, got NoneType"),
        ((q, cache, cache, -1), {}, ValueError, "cache_seqlens of -1 do not fit into a cache of 9 tokens"),
        ((q, cache, cache, 10), {}, ValueError, "cache_seqlens of 10 do not fit"),
        ((q, cache, cache, torch.tensor([3, -2])), {}, ValueError, "cache_seqlens of -2 do not fit"),
        ((q, cache, cache, 8, new, new), {}, ValueError, "of 8 and 2 new ones do not fit into a cache of 9 tokens"),
        ((q, cache, cache, torch.tensor([7, 8]), new, new), {}, ValueError, "of 8 and 2 new ones"),
        ((q, cache, cache, 3, new, new[:, :, :1]), {}, ValueError, "k has 2 tokens, v 1"),
        ((q, cache, cache, 3, new.half(), new), {}, TypeError, "k must have q's dtype"),
        ((q, cache, cache, 3, new, new.to("meta")), {}, ValueError, "q is on cpu, v on meta"),
    ):
        with pytest.raises(error, match=f"^attention_kvcache: .*{message}"):
            ops.attention_kvcache(*args, **kwargs)
    assert torch.equal(cache, before), "nothing was written"

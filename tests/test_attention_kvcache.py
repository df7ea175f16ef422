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


def test_no_gradient():
    q = torch.randn(1, 2, 1, 8, requires_grad=True)
    cache = torch.randn(1, 2, 9, 8)
    out = ops.attention_kvcache(q, cache, cache, 5)
    with pytest.raises(RuntimeError, match="for generation and has no gradient"):
        out.sum().backward()


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
    q, cache = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8)
    for args, kwargs, error, message in (
        ((q, cache[:1], cache[:1], 3), {}, ValueError, "q has batch size 2, k_cache 1"),
        ((q, cache, cache, 3.0), {}, TypeError, "cache_seqlens must be an int"),
        ((q, cache, cache, torch.tensor([1])), {}, ValueError, r"cache_seqlens must have shape \(2,\)"),
        ((q, cache, cache, 3, cache), {}, ValueError, "k and v go together"),
        ((q, cache, cache, 3, cache[:, :1], cache), {}, ValueError, "k must have the cache's shape"),
        ((q[:, :3], cache, cache, 3), {}, ValueError, "must be a multiple of key's"),
    ):
        with pytest.raises(error, match=f"^attention_kvcache: .*{message}"):
            ops.attention_kvcache(*args, **kwargs)

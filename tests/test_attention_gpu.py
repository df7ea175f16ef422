"""Attention on a GPU, at real sizes. Truth is the reference in float32."""

from __future__ import annotations

import pytest
import torch
from attention_suite import FEATURES, GROUPS, check, check_kvcache, check_varlen, cumulative
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastllm
from fastllm import ops
from fastllm.testing import make

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _triton():
    with fastllm.use_backend(None):
        yield


# What is compiled anew for each call is what takes the time here: 147 kernels in the next two tests, spread over the
# processes of pytest-xdist. float16 takes bfloat16's tiles; one row, or a block of them, specialises integers to 1.
SIZES = [
    *((size, torch.bfloat16, 513) for size in (16, 40, 64, 72, 80, 96, 128, 160, 256)),
    *((size, torch.float32, 513) for size in (16, 72, 128, 256)),
    *((size, torch.float16, 513) for size in (64, 256)),
    *((64, dtype, rows) for dtype in (torch.bfloat16, torch.float32) for rows in (1, 127)),
]


@pytest.mark.parametrize(("size", "dtype", "rows"), SIZES, ids=str)
def test_head_sizes(size, dtype, rows):
    check(("causal", "gqa"), shape=(2, 4, rows, rows), size=size, dtype=dtype, device="cuda", bshd=True)


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        *(((feature,), torch.bfloat16) for feature in FEATURES),
        *((group, torch.bfloat16) for group in GROUPS),
        *((group, torch.float16) for group in GROUPS[::4]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_features(names, dtype):
    check(names, shape=(2, 4, 300, 385), size=64, dtype=dtype, device="cuda")


@pytest.mark.parametrize("size", [64, 128])
def test_varlen(size):
    for names in ((), ("causal",), ("window", "gqa"), ("softcap", "alibi", "sinks", "dropout")):
        check_varlen((5, 0, 700, 333), (500, 4, 0, 333), names, heads=4, size=size, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("size", [64, 128, 256])
def test_kvcache(size):
    check_kvcache((1, 5000, 8000), capacity=8192, heads=16, size=size, dtype=torch.bfloat16, device="cuda")
    check_kvcache(
        (10, 500), ("causal", "window"), rows=4, new=4, capacity=600, size=size, dtype=torch.bfloat16, device="cuda"
    )


@pytest.mark.parametrize("rows", [4096, 32768])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_against_cudnn_and_flash(rows, causal):
    shape = (1, 4, rows, 128)
    tensors = [make(shape, torch.bfloat16, "cuda", seed).requires_grad_() for seed in range(3)]
    grad = make(shape, torch.bfloat16, "cuda", 9)

    def results(fn):
        out = fn(*tensors, is_causal=causal)
        return (out.detach(), *torch.autograd.grad(out, tensors, grad))

    ours = results(ops.attention)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                theirs = results(F.scaled_dot_product_attention)
        except RuntimeError as error:  # not on this GPU, or not in this build
            print(f"{backend}: {error}")
            continue
        for a, b in zip(ours, theirs, strict=True):
            # Each is within one rounding of bfloat16, and what a sum of rounded P costs, of the truth.
            assert (a.float() - b.float()).abs().max() <= 2**-6 * b.float().abs().max()


def test_the_same_bits_a_thousand_times():
    q, k, v = (make((2, 8, 1024, 64), torch.bfloat16, "cuda", seed).requires_grad_() for seed in range(3))
    first = None
    for _ in range(1000):
        torch.manual_seed(0)
        out = ops.attention(q, k, v, is_causal=True, dropout_p=0.1)
        bits = (out.detach(), *torch.autograd.grad(out, (q, k, v), q.detach()))
        first = first or bits
        assert all(torch.equal(a, b) for a, b in zip(first, bits, strict=True))


def test_explain_chooses_triton():
    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    assert fastllm.explain(ops.attention, q, q, q).backend == "triton"
    mask = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    explanation = fastllm.explain(ops.attention, q, q, q, mask)
    assert explanation.backend == "reference"
    assert "attn_mask requires grad" in str(explanation)


def test_cuda_graph():
    q, k, v = (make((1, 4, 512, 64), torch.bfloat16, "cuda", seed) for seed in range(3))
    packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    cu = cumulative((100, 412), "cuda")

    def step():
        return ops.attention(q, k, v, is_causal=True), ops.attention_varlen(*packed, cu, cu, 412, 412, is_causal=True)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)

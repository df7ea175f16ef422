"""attention_varlen on the CPU. Kernels: test_attention_interpreter.py."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from attention_suite import check_varlen, cumulative
from torch.nn import functional as F

import fastllm
from fastllm import ops
from fastllm.backends import OPS


def packed(total: int, heads: int = 2, size: int = 16, count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(total, heads, size, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize(
    "names", [(), ("causal",), ("window",), ("gqa", "causal"), ("window", "causal", "gqa")], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_backend(names, dtype):
    with fastllm.use_backend("torch"):
        check_varlen((5, 0, 70, 33), (50, 4, 0, 33), names, lse=False, dtype=dtype)
        check_varlen((1, 300), None, names, lse=False, dtype=dtype)


@pytest.mark.parametrize("names", [("softcap", "alibi"), ("sinks", "causal"), ("dropout", "gqa")], ids=str)
@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_what_the_reference_computes(names):
    check_varlen((5, 0, 20, 9), (7, 4, 0, 9), names)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rows_behind_the_last_sequence_are_zero(backend):
    q, k, v = packed(20)
    cu = cumulative((5, 9))
    with fastllm.use_backend(backend):
        out, lse = ops.attention_varlen(q, k, v, cu, cu, 9, 9, return_lse=True)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not out[14:].any()
    assert (lse[:, 14:] == -torch.inf).all()
    assert not any(grad[14:].any() for grad in grads)


def test_gradient_of_the_sinks_behind_the_last_sequence():
    """lse is the sink itself there."""
    q, k, v = (x.detach().double() for x in packed(20))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    cu = cumulative((5, 9))

    def lse(sinks):
        return ops.attention_varlen(q, k, v, cu, cu, 9, 9, sinks=sinks, return_lse=True)[1]

    assert torch.autograd.gradcheck(lse, sinks)
    assert torch.equal(lse(sinks)[:, 14:], sinks[:, None].expand(2, 6))


def test_no_sequences():
    q, k, v = packed(3)
    cu = torch.zeros(1, dtype=torch.int32)
    with fastllm.use_backend("reference"):
        out = ops.attention_varlen(q, k, v, cu, cu, 0, 0, alibi_slopes=torch.ones(0, 2))
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_packing_gives_the_loss_and_gradients_of_the_documents_one_by_one():
    """A whole block: projections, attention, cross-entropy. What packing must not change."""
    torch.manual_seed(0)
    lengths, heads, size, vocabulary = (17, 1, 40, 6), 4, 8, 50
    embedding = torch.nn.Embedding(vocabulary, heads * size)
    project, back = torch.nn.Linear(heads * size, 3 * heads * size), torch.nn.Linear(heads * size, vocabulary)
    parameters = [*embedding.parameters(), *project.parameters(), *back.parameters()]
    tokens = torch.randint(0, vocabulary, (sum(lengths),))
    labels = torch.randint(0, vocabulary, (sum(lengths),))

    def attend(x, attention):
        q, k, v = project(x).unflatten(-1, (3, heads, size)).unbind(-3)
        return back(attention(q, k, v).flatten(-2))

    cu = cumulative(lengths)
    logits = attend(embedding(tokens), lambda q, k, v: ops.attention_varlen(q, k, v, cu, cu, 40, 40, is_causal=True))
    packed_loss = F.cross_entropy(logits, labels)
    packed_grads = torch.autograd.grad(packed_loss, parameters)

    def alone(q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True).transpose(0, 1)

    parts = [attend(embedding(part), alone) for part in tokens.split(lengths)]
    loss = F.cross_entropy(torch.cat(parts), labels)
    torch.testing.assert_close(packed_loss, loss)
    torch.testing.assert_close(packed_grads, torch.autograd.grad(loss, parameters))


@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_opcheck():
    q, k, v = (x.detach() for x in packed(12))
    cu = cumulative((5, 7))
    for extras in (
        (None, None, None, 7, 7, 0.0),
        (torch.randn(2), torch.rand(2).expand(2, 2), torch.tensor([3]), 7, 7, 0.3),
    ):
        args = (q, k, v, cu, cu, *extras, 0.25, -1, 0, 0.0, True)
        torch.library.opcheck(OPS["attention_varlen_fwd"].call, args)
        out, lse = OPS["attention_varlen_fwd"].call(*args)
        torch.library.opcheck(
            OPS["attention_varlen_bwd"].call, (torch.randn_like(out), None, q, k, v, out, lse, *args[3:])
        )


def test_fullgraph_compile_without_recompiling_for_each_length():
    torch.compiler.reset()
    count, counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager"), []

    def step(q, k, v, cu, longest):
        return ops.attention_varlen(q, k, v, cu, cu, longest, longest, is_causal=True).sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend=count, dynamic=True)
    for lengths in ((5, 7), (9, 2, 4), (20, 3, 3, 8)):
        tensors, cu = packed(sum(lengths)), cumulative(lengths)
        got = torch.autograd.grad(compiled(*tensors, cu, max(lengths)), tensors)
        torch.testing.assert_close(got, torch.autograd.grad(step(*tensors, cu, max(lengths)), tensors))
        counts.append(count.frame_count)
    assert len(set(counts)) == 1, "compiled again for another length"


def test_export_keeps_the_op():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, cu):
            return ops.attention_varlen(q, k, v, cu, cu, 7, 7, is_causal=True)

    args = (*(x.detach() for x in packed(12)), cumulative((5, 7)))
    program = torch.export.export(Module(), args)
    assert "fastllm.attention_varlen_fwd" in str(program.graph)
    torch.testing.assert_close(program.module()(*args), Module()(*args))


def test_hostile_arguments():
    q, k, v = packed(12)
    cu = cumulative((5, 7))
    for args, kwargs, error, message in (
        ((q[0], k, v, cu, cu, 7, 7), {}, ValueError, r"shape \(S, H, D\), got \(2, 16\)"),
        (
            (q, k, v, cu.float(), cu, 7, 7),
            {},
            TypeError,
            "cu_seq_q must be an int32 or int64 tensor, got torch.float32",
        ),
        ((q, k, v, [0, 12], cu, 7, 7), {}, TypeError, "cu_seq_q must be an int32 or int64 tensor"),
        ((q, k, v, cu, cu[:2], 7, 7), {}, ValueError, r"cu_seq_k must have shape \(N \+ 1,\), got \(2,\)"),
        ((q, k[:, :1], v[:, :1], cu, cu, 7, 7), {}, ValueError, "unless enable_gqa=True"),
        ((q, k, v, cu, cu, 7, 7), {"alibi_slopes": torch.ones(3, 2)}, ValueError, r"\(2,\) or \(2, 2\), got \(3, 2\)"),
    ):
        with pytest.raises(error, match=f"^attention_varlen: .*{message}"):
            ops.attention_varlen(*args, **kwargs)

"""What every op says of arguments of a wrong type, and what it makes of one tensor in two places."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from fastllm import ops
from fastllm.testing import outputs_of, sample, seeded

LOSSES = ("cross_entropy", "linear_cross_entropy")
NORMS = [op for op in ops.__all__ if op.endswith("_norm")]
ATTENTIONS = [op for op in ops.__all__ if op.startswith("attention")]
NUMBERS = [
    *((op, label) for op in LOSSES for label in ("label_smoothing", "z_loss", "softcap", "num_valid")),
    *((op, "eps") for op in NORMS),
    *((op, "p") for op in NORMS if "dropout" in op),
    *((op, label) for op in ATTENTIONS for label in ("softcap", "scale")),
    ("attention", "dropout_p"),
    ("attention_varlen", "dropout_p"),
]
INTEGERS = [
    ("cross_entropy", "ignore_index", -100),
    ("linear_cross_entropy", "ignore_index", -100),
    ("linear_cross_entropy", "chunk_size", 2),
]


def call(op: str, **changed):
    args, kwargs = sample(op)
    return outputs_of(seeded(getattr(ops, op))(*args, **{**kwargs, **changed}))


@pytest.mark.parametrize(("op", "label"), NUMBERS)
@pytest.mark.parametrize("value", ["0.5", [0.5], 1j, np.ones(2)], ids=str)
def test_what_is_no_number(op, label, value):
    with pytest.raises(TypeError, match=f"^{op}: {label} must be a number, got {re.escape(repr(value))}$"):
        call(op, **{label: value})


@pytest.mark.parametrize(("op", "label"), NUMBERS)
@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), 1, np.int64(1)], ids=repr)
@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_what_torch_takes_for_a_number(op, label, value):
    torch.testing.assert_close(call(op, **{label: value}), call(op, **{label: float(value)}), rtol=0, atol=0)


@pytest.mark.parametrize(("op", "label", "valid"), INTEGERS)
@pytest.mark.parametrize("value", ["1", [1], 1.0, True, torch.tensor(1.0)], ids=repr)
def test_what_is_no_integer(op, label, valid, value):
    with pytest.raises(TypeError, match=f"^{op}: {label} must be an int, got {re.escape(repr(value))}$"):
        call(op, **{label: value})


@pytest.mark.parametrize(("op", "label", "valid"), INTEGERS)
@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_what_torch_takes_for_an_integer(op, label, valid, kind):
    torch.testing.assert_close(call(op, **{label: kind(valid)}), call(op, **{label: valid}), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("op", "label", "value"),
    [
        *((op, "softcap", 0.0) for op in (*LOSSES, *ATTENTIONS)),
        *((op, "z_loss", 0.0) for op in LOSSES),
        ("linear_cross_entropy", "ignore_index", -100),
    ],
)
def test_none_is_none(op, label, value):
    torch.testing.assert_close(call(op, **{label: None}), call(op, **{label: value}), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("op", "label"),
    [*((op, "label_smoothing") for op in LOSSES), ("layer_norm", "eps"), ("cross_entropy", "ignore_index")],
)
def test_none_is_no_number_where_torch_has_none(op, label):
    with pytest.raises(TypeError, match=f"^{op}: {label} must be an? (number|int), got None$"):
        call(op, **{label: None})


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e5m2, "float32", float], ids=str
)
def test_dtype_of_the_loss(op, dtype):
    message = f"^{op}: dtype must be float32, bfloat16, float16 or float64, got {re.escape(repr(dtype))}$"
    with pytest.raises(TypeError, match=message):
        call(op, dtype=dtype)


@pytest.mark.parametrize("op", [op for op in ops.__all__ if op != "adamw"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8(op, dtype):
    args, kwargs = sample(op)
    floating = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.is_floating_point()]
    for chosen in (*([i] for i in floating), floating):
        changed = [arg.to(dtype) if i in chosen else arg for i, arg in enumerate(args)]
        with pytest.raises(TypeError, match=rf"^{op}: \w+ must be float32, bfloat16, float16 or float64, got {dtype}$"):
            getattr(ops, op)(*changed, **kwargs)


def test_float8_where_stock_attention_would_be_called():
    q = torch.randn(1, 2, 1, 16).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"^attention_kvcache: q must be float32.* got torch.float8_e4m3fn"):
        ops.attention_kvcache(q, q, q, 1)


CU = torch.tensor([0, 4])
TARGET = torch.tensor([0, 3, 1, -100])
TWICE = {
    # Of x (4, 4) in as many places as take it. A mask of that p is all ones.
    "layer_norm": lambda x: ops.layer_norm(x[0], (4,), v := x[1], v),
    "rms_norm": lambda x: ops.rms_norm(v := x[0], (4,), v),
    "add_layer_norm": lambda x: ops.add_layer_norm(v := x[0], v, (4,), v, v),
    "add_rms_norm": lambda x: ops.add_rms_norm(x, x, (4,)),
    "dropout_add_layer_norm": lambda x: ops.dropout_add_layer_norm(v := x[0], v, (4,), v, v, p=1e-9),
    "dropout_add_rms_norm": lambda x: ops.dropout_add_rms_norm(x, x, (4,), p=1e-9),
    "swiglu": lambda x: ops.swiglu(x, x),
    "geglu": lambda x: ops.geglu(x, x),
    "gelu": lambda x: ops.gelu(v := x[0], bias=v),
    "rotary": lambda x: ops.rotary(q := x.view(1, 2, 2, 4), q, t := x.detach()[:, :2], t),
    "attention": lambda x: ops.attention(q := x.view(1, 4, 2, 2), q, q, q),
    "attention_varlen": lambda x: ops.attention_varlen(q := x.view(4, 1, 4), q, q, CU, CU, 4, 4),
    "cross_entropy": lambda x: ops.cross_entropy(x, x, weight=x[0].detach(), label_smoothing=0.1),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(
        x, x, TARGET, linear_bias=(v := x[0]), weight=v.detach()
    ),
}


@pytest.mark.parametrize("op", [op for op in ops.__all__ if op not in ("adamw", "attention_kvcache")])
@pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
def test_one_tensor_twice_in_a_compiled_graph(op):
    torch.compiler.reset()
    x = torch.rand(4, 4, requires_grad=True)
    outputs = [outputs_of(f(x)) for f in (TWICE[op], torch.compile(TWICE[op], fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(sum(out.sin().sum() for out in outs), x) for outs in outputs))


def test_symbolic_numbers():
    """Settings that follow from a dynamic shape, in a compiled graph and in an exported one."""

    class Loss(torch.nn.Module):
        def forward(self, x, weight, target):
            rows = x.shape[0]
            return ops.linear_cross_entropy(x, weight, target, num_valid=rows, chunk_size=rows // 2)

    def args(rows: int):
        return torch.randn(rows, 4), torch.randn(9, 4), torch.arange(rows)

    torch.compiler.reset()
    rows = torch.export.Dim("rows", min=2, max=9)
    exported = torch.export.export(Loss(), args(8), dynamic_shapes=({0: rows}, None, {0: rows})).module()
    compiled = torch.compile(Loss(), fullgraph=True, backend="aot_eager", dynamic=True)
    for given in (args(4), args(6), args(7)):
        for call in (exported, compiled):
            torch.testing.assert_close(call(*given), Loss()(*given))

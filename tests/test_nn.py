"""fastllm.nn against the modules of torch and transformers whose constructors and state_dicts it has."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import torch

import fastllm.nn as fnn


@pytest.mark.parametrize(
    "kwargs", [{}, {"weight": torch.linspace(0.2, 1, 7)}, {"label_smoothing": 0.1, "reduction": "sum"}], ids=str
)
def test_cross_entropy_loss(kwargs):
    ours, stock = fnn.CrossEntropyLoss(**kwargs), torch.nn.CrossEntropyLoss(**kwargs)
    x, y = torch.randn(5, 7), torch.tensor([0, 3, -100, 6, 6])
    torch.testing.assert_close(ours(x, y), stock(x, y))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    parameters = list(inspect.signature(torch.nn.CrossEntropyLoss).parameters)
    assert list(inspect.signature(fnn.CrossEntropyLoss).parameters)[: len(parameters)] == parameters
    torch.testing.assert_close(ours(x, y), copy.deepcopy(ours)(x, y))


@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_loss(bias):
    ours = fnn.LinearCrossEntropyLoss(6, 9, bias=bias, label_smoothing=0.1)
    x, y = torch.randn(5, 6, requires_grad=True), torch.tensor([0, 3, -100, 6, 8])
    linear, stock = ours.linear, torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    torch.testing.assert_close(ours(x, y), stock(linear(x), y))
    loss, logprobs = ours(x, y, return_logprobs=True)
    torch.testing.assert_close(loss, stock(linear(x), y))
    assert logprobs.shape == y.shape
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(6, 9, bias=bias, label_smoothing=0.1)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x, y), theirs(x, y))


LOSSES = [fnn.CrossEntropyLoss, functools.partial(fnn.LinearCrossEntropyLoss, 6, 9)]


@pytest.mark.parametrize("make", LOSSES, ids=["CrossEntropyLoss", "LinearCrossEntropyLoss"])
def test_losses_show_their_settings(make):
    text = repr(make(reduction="sum", ignore_index=3, label_smoothing=0.25, z_loss=0.5, softcap=30.0))
    assert "reduction='sum', ignore_index=3, label_smoothing=0.25, z_loss=0.5, softcap=30.0" in text
    assert "z_loss=0.0, softcap=0.0" in repr(make(z_loss=None, softcap=None))
    assert "inplace=True" in repr(fnn.CrossEntropyLoss(inplace=True))
    assert "chunk_size=16" in repr(fnn.LinearCrossEntropyLoss(6, 9, chunk_size=16))


@pytest.mark.parametrize("make", LOSSES, ids=["CrossEntropyLoss", "LinearCrossEntropyLoss"])
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"reduction": "max"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1, got 1.5"),
        ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number, got '0.1'"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be finite and not negative, got -1.0"),
        ({"softcap": [30.0]}, TypeError, r"softcap must be a number, got \[30.0\]"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got 0.5"),
    ],
    ids=str,
)
def test_losses_refuse_settings_at_once(make, kwargs, error, message):
    with pytest.raises(error, match=f"^(Linear)?CrossEntropyLoss: {message}$"):
        make(**kwargs)


def test_linear_cross_entropy_loss_refuses_settings_at_once():
    for kwargs, error, message in (
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be an int, got 2.0"),
        ({"weight": torch.ones(9), "z_loss": 0.1}, ValueError, "class weights do not go with"),
    ):
        with pytest.raises(error, match=f"^LinearCrossEntropyLoss: {message}"):
            fnn.LinearCrossEntropyLoss(6, 9, **kwargs)


@pytest.mark.parametrize(("name", "act"), [("SwiGLU", "silu"), ("GEGLU", "gelu_pytorch_tanh")])
@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlps(name, act, bias):
    llama = pytest.importorskip("transformers.models.llama")
    config = llama.LlamaConfig(
        hidden_size=8, intermediate_size=20, num_attention_heads=2, hidden_act=act, mlp_bias=bias
    )
    theirs = llama.modeling_llama.LlamaMLP(config)
    ours = getattr(fnn, name)(8, 20, bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(ours(x), theirs(x))


SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.8},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False, "beta_fast": 20},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.7},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("length", [9, 100])
def test_rotary_embedding_is_transformers(scaling, length):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=64,
        rope_parameters={"rope_theta": 500.0, "rope_type": "default", **(scaling or {})},
    )  # fmt: skip
    theirs = llama.LlamaRotaryEmbedding(config)
    ours = fnn.RotaryEmbedding(32, 64, 500.0, scaling=scaling)
    assert not ours.state_dict()
    q, k = torch.randn(2, 2, length, 32), torch.randn(2, 1, length, 32)
    ids = torch.arange(length)[None]
    expected = llama.apply_rotary_pos_emb(q, k, *theirs(q, ids))
    torch.testing.assert_close(ours(q, k), expected)
    torch.testing.assert_close(ours(q, k, ids), expected)
    torch.testing.assert_close(ours.inv_freq, theirs.inv_freq, rtol=1e-6, atol=0)
    assert ours.attention_scaling == pytest.approx(theirs.attention_scaling)
    short = torch.randn(1, 2, 5, 32)  # the dynamic type goes back
    ids = torch.arange(5)[None]
    torch.testing.assert_close(ours(short, short)[0], llama.apply_rotary_pos_emb(short, short, *theirs(short, ids))[0])


def test_rotary_embedding_in_part_and_packed():
    rope = fnn.RotaryEmbedding(32, 8, partial_rotary_factor=0.25, interleaved=True)
    q = torch.randn(11, 2, 32)
    turned, _ = rope(q, q)
    assert torch.equal(turned[..., 8:], q[..., 8:])
    assert not torch.equal(turned[1:, :, :8], q[1:, :, :8])
    torch.testing.assert_close(rope(q, q, torch.arange(11))[0], turned)
    copied = copy.deepcopy(rope).bfloat16()
    torch.testing.assert_close(copied(q, q)[0], turned)
    shorter = fnn.RotaryEmbedding(32, 8, partial_rotary_factor=0.25, interleaved=True).bfloat16()
    torch.testing.assert_close(shorter(q, q)[0], turned)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scaling": {"rope_type": "longrope"}}, "rope_type must be one of"),
        ({"scaling": {"rope_type": "linear"}}, r"'linear' needs \['factor'\]"),
        ({"scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, r"does not know \['beta'\]"),
        ({"scaling": {"rope_type": "linear", "factor": 0.5}}, "factor at least 1"),
        ({"base": -1.0}, "base must be positive"),
        ({"partial_rotary_factor": 0.1}, "must be even and at most dim"),
    ],
)
def test_rotary_embedding_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        fnn.RotaryEmbedding(32, **kwargs)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("make", [fnn.LayerNorm, fnn.RMSNorm])
def test_add_is_a_call_of_the_norm(make, dropout):
    """Hooks run, those of FSDP2 too, which gather the parameters."""
    norm, calls = make(8), []
    norm.register_forward_pre_hook(lambda module, args: calls.append("before"))
    norm.register_forward_hook(lambda module, args, output: calls.append(type(output)))
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    torch.manual_seed(0)
    normed, total = norm.add(x, residual, dropout)
    assert calls == ["before", tuple]
    torch.testing.assert_close(norm(total), normed)
    if not dropout:
        torch.testing.assert_close(total, x + residual)


def test_the_classifier_is_called_for_its_loss():
    loss, calls = fnn.LinearCrossEntropyLoss(8, 11, bias=True), []
    loss.linear.register_forward_pre_hook(lambda module, args: calls.append(1))
    x, target = torch.randn(5, 8), torch.randint(11, (5,))
    value = loss(x, target)
    assert calls == [1]
    logits = loss.linear(x)
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(logits, target))
    plain = torch.nn.Linear(8, 11)
    plain.load_state_dict(loss.linear.state_dict())
    loss.linear = plain  # another's, which only has logits to give
    assert torch.equal(loss(x, target), value)

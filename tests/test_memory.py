"""Parameters, operations and memory that follow from a configuration, against models that were built."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from fastllm.models import GPT, Bert, BertConfig, GPTConfig, Transformer, TransformerConfig
from fastllm.trainer.flops import peak_flops
from fastllm.trainer.memory import check_memory, memory_by_part

SMALL = {"vocab_size": 61, "context": 24, "layers": 3, "heads": 4, "width": 32}
GATED = {"mlp": "swiglu", "norm": "rms_norm", "bias": False, "position": "rotary"}
HEADS = ("mlm", "pretraining", "classification", "tokens", "span", None)
CONFIGS = [
    *(
        GPTConfig(**SMALL, **changes)
        for changes in (
            {},
            {"tie_embeddings": False, "hidden": 7, "bias": False},
            {**GATED, "kv_heads": 2, "qk_norm": True},
            {"mlp": "geglu", "kv_heads": 1, "head_size": 6, "sinks": True, "window": 5, "qk_norm": True},
            {"position": "sinusoidal", "norm": "rms_norm"},
        )
    ),
    *(BertConfig(**SMALL, head=head, labels=3) for head in HEADS),
    *(BertConfig(**SMALL, head=head, labels=3, token_types=0, norm_first=True, **GATED) for head in HEADS),
    BertConfig(**SMALL, head="tokens", pooler=True, bias=False),
    *(
        TransformerConfig(**SMALL, **changes)
        for changes in (
            {},
            {"encoder_layers": 1, "tie_embeddings": False, "kv_heads": 2, "sinks": True},
            {"position": "learned", "position_offset": 2, "embedding_norm": True, "logits_bias": True},
            {"position": "relative", "relative_buckets": 8, "norm": "rms_norm", "bias": False, "norm_first": True},
            {**GATED, "source_vocab_size": 70, "qk_norm": True, "norm_first": True},
        )
    ),
]


def build(config):
    return {GPTConfig: GPT, BertConfig: Bert, TransformerConfig: Transformer}[type(config)](config)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_parameters_are_those_of_the_model(config):
    assert config.num_parameters() == build(config).num_parameters()


def test_deep_models_take_no_longer():
    started = time.perf_counter()
    one, deep = (GPTConfig(**{**SMALL, "layers": layers}).num_parameters() for layers in (1, 10**6 + 1))
    assert deep - one == 10**6 * sum(p.numel() for p in GPT(GPTConfig(**SMALL)).blocks[0].parameters())
    assert time.perf_counter() - started < 1


def products(model: torch.nn.Module, length: int, *args) -> int:
    """Multiplications and additions of linear layers' and the loss's products for a row, by their shapes."""
    total = 0

    def count(module, args, output):
        nonlocal total
        total += 2 * args[0].numel() // module.in_features * module.weight.numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    model(*args)
    return total


@pytest.mark.parametrize("changes", [{"tie_embeddings": False}, {**GATED, "kv_heads": 2}])
def test_operations_of_a_gpt(changes):
    config = GPTConfig(**SMALL, **{**changes, "bias": False})
    forward = products(GPT(config), 24, torch.zeros(1, 24, dtype=torch.int64)) / 24
    forward += 2 * 61 * 32 * config.tie_embeddings
    forward += 2 * 2 * 24 * 32 * 3  # queries by keys and weights by values, of all heads, in each layer
    vectors = sum(p.numel() for p in GPT(config).parameters() if p.ndim == 1)
    assert config.flops_per_token(24) == 3 * forward + 6 * vectors


def test_operations_by_hand():
    """GPT-2's smallest size: 6 x (124.4 million less 1024 positions x 768) + 12 x 12 layers x 768 x 1024."""
    assert GPTConfig.gpt2().flops_per_token(1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    llama = GPTConfig.llama(window=256)
    lookup = llama.vocab_size * llama.width
    assert llama.flops_per_token(1024) == 6 * (llama.num_parameters() - lookup) + 12 * 12 * 768 * 256
    assert llama.flops_per_token(100) == 6 * (llama.num_parameters() - lookup) + 12 * 12 * 768 * 100
    for head in ("tokens", None):
        bert = BertConfig(head=head, labels=5, pooler=False)
        blocks = sum(p.numel() for p in build(replace(bert, layers=1)).blocks.parameters()) * 12
        assert bert.flops_per_token(128) == 6 * (blocks + 5 * 768 * (head == "tokens")) + 12 * 12 * 768 * 128
    small = TransformerConfig(**SMALL, encoder_layers=1)
    blocks = sum(p.numel() for name, p in build(small).named_parameters() if "blocks" in name)
    attention = 12 * 32 * (1 + 3 + 3)  # of the encoder, the decoder, and across
    assert small.flops_per_token(24) == (6 * (blocks + 61 * 32) + attention * 24) // 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [3, 5])
@pytest.mark.parametrize(
    "config",
    [
        GPTConfig.gpt2(vocab_size=300, context=64, layers=3, heads=4, width=128),
        GPTConfig.gpt2(vocab_size=300, context=64, layers=2, heads=3, width=96, dropout=0.1),
        GPTConfig.llama(vocab_size=300, context=64, layers=3, heads=4, kv_heads=2, width=128),
        GPTConfig.llama(vocab_size=300, context=64, layers=2, heads=4, width=64, qk_norm=True),
        BertConfig(vocab_size=300, context=64, layers=3, heads=4, width=128),
        TransformerConfig(vocab_size=300, context=64, layers=2, heads=4, width=128),
    ],
    ids=lambda config: f"{type(config).__name__}-{config.mlp}-{config.width}",
)
def test_activations_are_those_that_autograd_keeps(config, rows, precision):
    model = build(config)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        copy = x.dtype == torch.bfloat16 and x.ndim == 2 and x.shape[0] != rows * 64  # of a weight, by autocast
        if storage.data_ptr() not in own and not copy:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    tokens = torch.randint(2, 300, (rows, 64))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(tokens, tokens)
    estimate = memory_by_part(config, batch_size=rows, length=64, precision=precision)["activations"]
    assert loss.requires_grad
    assert estimate == pytest.approx(sum(kept.values()), rel=0.15)


def test_memory_by_part():
    config = GPTConfig.gpt2()
    n = 124_439_808
    parts = memory_by_part(config, batch_size=4, length=1024)
    assert parts["weights"] == parts["gradients"] == 4 * n
    assert parts["optimizer"] == 8 * n
    assert parts["master_weights"] == parts["ema"] == 0
    tuned = memory_by_part(
        config, batch_size=4, length=1024, optimizer_bytes=2.03, master_weights="remainder", ema=True,
        precision="bfloat16", activation_checkpointing=True, world_size=8, sharded=True,
    )  # fmt: skip
    assert tuned["weights"] == tuned["gradients"] == tuned["master_weights"] == 2 * n // 8
    assert tuned["ema"] == 4 * n // 8
    assert tuned["optimizer"] == int(n // 8 * 2.03)
    assert tuned["activations"] < parts["activations"] / 6
    autocast = memory_by_part(config, batch_size=4, length=1024, precision="bfloat16", world_size=8)
    assert autocast["weights"] == 6 * n
    assert autocast["gradients"] == 4 * n
    stock = memory_by_part(replace(config, ops="torch"), batch_size=4, length=1024)
    assert stock["loss"] == 4096 * 50257 * 12
    assert parts["loss"] < stock["loss"] / 4
    for wrong in ({"precision": "float8"}, {"master_weights": "bfloat16"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be .*, got '{next(iter(wrong.values()))}'"):
            memory_by_part(config, batch_size=1, length=8, **wrong)


@pytest.mark.parametrize("make", [GPTConfig.llama, BertConfig, TransformerConfig])
def test_what_cannot_fit_is_refused(make):
    check_memory(make(**SMALL), torch.device("cpu"), batch_size=4, accumulate=4)
    for large in ({"layers": 10**9}, {"width": 4 * 10**9}, {"vocab_size": 10**12}, {"context": 10**12}):
        with pytest.raises(ValueError, match=r"a model of [\d,]+ parameters .* takes more than [\d,]+ GiB"):
            check_memory(make(**{**SMALL, **large}), torch.device("cpu"), batch_size=1)
    with pytest.raises(ValueError, match="to train by steps of 1 x 1000000000 x 24 tokens"):
        check_memory(make(**SMALL), torch.device("cpu"), batch_size=10**9)


H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        (H100, torch.bfloat16, (989e12, "H100, bfloat16")),
        (H100, torch.float32, (67e12, "H100, float32")),
        ("NVIDIA H100 PCIe", torch.float16, (756e12, "H100 PCIe, float16")),
        ("NVIDIA H200", torch.bfloat16, (989e12, "H200, bfloat16")),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, (312e12, "A100, bfloat16")),
        ("NVIDIA L40S", torch.bfloat16, (362e12, "L40S, bfloat16")),
        ("NVIDIA L4", torch.bfloat16, (121e12, "L4, bfloat16")),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, (165e12, "RTX 4090, bfloat16")),
        ("Tesla V100-SXM2-16GB", torch.float16, (125e12, "V100, float16")),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, None),
        ("NVIDIA L40", torch.bfloat16, None),
        ("NVIDIA RTX A1000", torch.bfloat16, None),
        (f"{H100} MIG 1g.10gb", torch.bfloat16, None),
        (H100, torch.float64, None),
    ],
)
def test_peaks_of_chips(monkeypatch, name, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    found = peak_flops(torch.device("cuda"), dtype)
    assert found == (None if expected is None else (pytest.approx(expected[0]), expected[1]))
    assert peak_flops(torch.device("cpu"), dtype) is None


def test_the_peak_of_float32_is_that_of_tf32_where_it_is_allowed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(torch.device("cuda"), torch.float32) == (pytest.approx(494e12), "H100, TF32")

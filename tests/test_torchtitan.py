"""fastllm.compat.torchtitan, with stand-ins for what torchtitan does: it builds on the meta device, converts,
parallelizes, makes room and initializes."""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastllm
from fastllm.compat.torchtitan import FastllmConverter, register


class FeedForward(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*sizes, bias=False) for sizes in ((size, 40), (40, size), (size, 40)))

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Model(nn.Module):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config:
        size: int = 16
        layers: int = 2

        def build(self, **kwargs):
            return Model(dataclasses.replace(self), **kwargs)

    def __init__(self, config: Config):
        super().__init__()
        self.tok_embeddings = nn.Embedding(32, config.size)
        self.norms = nn.ModuleList(nn.RMSNorm(config.size, eps=1e-5) for _ in range(config.layers))
        self.feeds = nn.ModuleList(FeedForward(config.size) for _ in range(config.layers))
        self.output = nn.Linear(config.size, 32, bias=False)

    def forward(self, tokens):
        x = self.tok_embeddings(tokens)
        for norm, feed in zip(self.norms, self.feeds, strict=True):
            x = x + feed(norm(x))
        return self.output(x)


def initialized(model: nn.Module) -> nn.Module:
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def results(model: nn.Module) -> list[torch.Tensor]:
    tokens = torch.arange(12).view(2, 6)
    out = model(tokens)
    return [out, *torch.autograd.grad(F.cross_entropy(out.flatten(0, 1), tokens.flatten()), list(model.parameters()))]


def patched(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


EVERYTHING = {"norms.0", "norms.1", "feeds.0", "feeds.1"}


@pytest.fixture
def torchtitan(monkeypatch):
    """The registry of torchtitan 0.2."""
    registry = {}
    module = ModuleType("torchtitan.protocols.model_converter")
    module.register_model_converter = lambda cls, name: registry.setdefault(name, cls)
    for name in ("torchtitan", "torchtitan.protocols"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return registry


def test_registered_by_name(torchtitan, caplog):
    register()
    assert torchtitan == {"fastllm": FastllmConverter}
    with torch.device("meta"):
        model = Model(Model.Config())
    before = initialized(copy.deepcopy(model))
    converter = torchtitan["fastllm"](SimpleNamespace(model=object()), SimpleNamespace(tp_enabled=False))
    with caplog.at_level(logging.INFO):
        converter.convert(model)
    assert patched(model) == EVERYTHING
    assert "swiglu" in caplog.text
    assert "rms_norm" in caplog.text
    assert {entry.now for entry in converter.report} == {"rms_norm", "swiglu"}
    torch.testing.assert_close(results(initialized(model)), results(before))
    converter.post_optimizer_hook(model)
    converter.post_optimizer_hook([model])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_built_from_its_configuration(dtype):
    config = FastllmConverter.Config(only=["rms_norm"])
    assert dataclasses.asdict(config) == {"only": ["rms_norm"], "exclude": None, "strict": False}
    for kwargs in ({}, {"parallel_dims": SimpleNamespace(tp_enabled=False), "model_compile_enabled": True}):
        found = config.build(**kwargs).convert(Model.Config(size=24))
        assert isinstance(found, Model.Config)
        assert dataclasses.asdict(found) == {"size": 24, "layers": 2}
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                model = copy.deepcopy(found).build()
        finally:
            torch.set_default_dtype(default)
        assert all(parameter.is_meta and parameter.dtype == dtype for parameter in model.parameters())
        assert patched(model) == {"norms.0", "norms.1"}


def test_a_built_model_trains_as_its_like():
    config = FastllmConverter.Config().build().convert(Model.Config())
    with torch.device("meta"):
        ours, stock = config.build(), Model.Config().build()
    assert patched(ours) == EVERYTHING
    assert not patched(stock)
    ours, stock = initialized(ours), initialized(stock)
    torch.testing.assert_close(results(ours), results(stock))
    torch.testing.assert_close(results(torch.compile(ours, backend="aot_eager", fullgraph=True)), results(stock))


def test_gate_and_up_are_told_apart_on_the_meta_device():
    class Swapped(FeedForward):
        def forward(self, x):
            return self.w2(self.w1(x) * F.silu(self.w3(x)))

    with torch.device("meta"):
        model = nn.Sequential(Swapped(16), FeedForward(16))
    stock = initialized(copy.deepcopy(model))
    fastllm.patch(model)
    assert patched(model) == {"0", "1"}
    x = torch.randn(3, 16)
    torch.testing.assert_close(initialized(model)(x), stock(x), rtol=1e-3, atol=1e-3)


def test_tensor_parallelism_leaves_all_but_norms():
    parallel = SimpleNamespace(tp_enabled=True)
    converter = FastllmConverter(None, parallel)
    converter.convert(nn.Sequential(nn.RMSNorm(16), FeedForward(16)))
    assert [entry.now for entry in converter.report] == ["rms_norm"]
    converter = FastllmConverter(FastllmConverter.Config(only=["swiglu", "rms_norm"]), parallel)
    with pytest.raises(NotImplementedError, match="DTensors"):
        converter.convert(nn.RMSNorm(8))


def test_strict():
    class Odd(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(fastllm.patching.PatchError):
        FastllmConverter.Config(strict=True).build().convert(Odd(8, eps=1e-5))


@pytest.mark.parametrize("present", [False, True])
def test_without_a_registry(monkeypatch, present):
    monkeypatch.setitem(sys.modules, "torchtitan", ModuleType("torchtitan") if present else None)
    monkeypatch.delitem(sys.modules, "torchtitan.protocols.model_converter", raising=False)
    with pytest.raises(ImportError, match=r"converters=\[FastllmConverter.Config\(\)\]"):
        register()

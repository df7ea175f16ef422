"""fastllm.compat.kernels: fastllm's ops as layers of the kernels library."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from fastllm.compat import kernels as ours


@pytest.fixture
def library():
    # Its submodule: at the root of the repository, `kernels` alone would be found without the library.
    pytest.importorskip("kernels.layer")
    return sys.modules["kernels"]


@pytest.fixture
def llama(library):
    """A model whose norms are declared by their name, as transformers does where it finds a library of its liking."""
    transformers = pytest.importorskip("transformers")
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm
    declared = hasattr(norm, "kernel_layer_name")
    if not declared:
        library.replace_kernel_forward_from_hub(norm, "RMSNorm")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    yield model
    if not declared:
        del norm.kernel_layer_name, norm.kernel_condition


def kernelized(library, model, training=True):
    mode = (library.Mode.TRAINING if training else library.Mode.INFERENCE) | library.Mode.TORCH_COMPILE
    with library.use_kernel_mapping(ours.mapping(), inherit_mapping=False):
        return library.kernelize(model, mode=mode, device="cpu")


def results(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def test_the_llama_of_transformers(library, llama, called):
    ids = torch.randint(64, (2, 9))
    before = results(llama, ids)
    assert not called
    assert kernelized(library, llama) is llama
    torch.testing.assert_close(results(llama, ids), before)
    assert called.count("rms_norm_fwd") == called.count("rms_norm_bwd") == 5
    llama.eval()
    with torch.no_grad():
        inferred = llama(input_ids=ids).logits
        torch.testing.assert_close(kernelized(library, llama, training=False)(input_ids=ids).logits, inferred)


def test_compiled(library, llama):
    ids = torch.randint(64, (2, 9))
    before = results(llama, ids)
    compiled = torch.compile(kernelized(library, llama), backend="aot_eager")
    torch.testing.assert_close(results(compiled, ids), [*before], rtol=1e-4, atol=1e-5)


class Norm(nn.Module):
    """RMSNorm as most models of transformers write it: the result widens to the weight's dtype."""

    def __init__(self, size=16):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.variance_epsilon = 1e-5

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class ZeroCentered(nn.Module):
    def __init__(self, size=16):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.eps = 1e-5

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("name", ["RMSNorm", "RMSNormZeroCentered"])
def test_layers(library, called, name, dtypes):
    dtype, weight_dtype = dtypes
    cls = {"RMSNorm": Norm, "RMSNormZeroCentered": ZeroCentered}[name]
    module = library.use_kernel_forward_from_hub(name)(type(name, (cls,), {}))().to(weight_dtype)
    x = torch.randn(2, 3, 16).to(dtype).requires_grad_()

    def computed():
        out = module(x)
        return out, *torch.autograd.grad(out.float().sin().sum(), (x, module.weight))

    before = computed()
    kernelized(library, module)
    assert module.forward.__func__ is ours.LAYERS[name].forward
    tolerance = {} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(computed(), before, **tolerance)  # dtypes, too
    original = name == "RMSNorm" and dtype != weight_dtype  # whose result only the layer itself knows
    assert called == ([] if original else ["rms_norm_fwd", "rms_norm_bwd"])


def test_the_mapping():
    mapping = ours.mapping()
    assert {name: set(devices) for name, devices in mapping.items()} == {
        "RMSNorm": {"cpu", "cuda"},
        "RMSNormZeroCentered": {"cpu", "cuda"},
    }
    repository = mapping["RMSNorm"]["cuda"]
    assert repository.load() is ours.RMSNorm
    assert copy.deepcopy(repository) == repository
    assert hash(repository) == hash(mapping["RMSNorm"]["cpu"])
    assert ours.mapping(["rocm"])["RMSNorm"].keys() == {"rocm"}


def test_register(library):
    found = sys.modules["kernels.layer.globals"]._KERNEL_MAPPING
    token = found.set({})
    try:
        ours.register()
        assert set(found.get()) == set(ours.LAYERS)
    finally:
        found.reset(token)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.delitem(sys.modules, "kernels.layer", raising=False)
    with pytest.raises(ImportError, match=r"kernels is not installed; .*fastllm-kernels\[kernels\]"):
        ours.register()

"""What decides whether something is replaced: the module itself, and nothing around it."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastllm.patching import patch


class Attend(nn.Module):
    """One projection for all, or three."""

    def __init__(self, width, separate=False):
        super().__init__()
        self.heads, self.out = width // 16, nn.Linear(width, width)
        self.into = nn.ModuleList(
            [nn.Linear(width, width) for _ in range(3)] if separate else [nn.Linear(width, 3 * width)]
        )

    def forward(self, x):
        parts = [y for into in self.into for y in into(x).chunk(3 // len(self.into), -1)]
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense, self.drop, self.norm = nn.Linear(width, width), nn.Dropout(0.1), nn.LayerNorm(width)

    def forward(self, x, residual):
        return self.norm(self.drop(self.dense(x)) + residual)


MODULES = {
    "one projection": (Attend, {"attention"}),
    "three projections": (lambda width: Attend(width, separate=True), {"attention"}),
    "MultiheadAttention": (lambda width: nn.MultiheadAttention(width, width // 16, batch_first=True), {"attention"}),
    "encoder layer": (
        lambda width: nn.TransformerEncoderLayer(width, width // 16, 2 * width, batch_first=True),
        {"dropout_add_layer_norm", "attention", "layer_norm"},
    ),
    "gated": (Feed, {"swiglu"}),
    "end of a block": (Block, {"dropout_add_layer_norm"}),
    "layer norm": (nn.LayerNorm, {"layer_norm"}),
    "RMS norm": (nn.RMSNorm, {"rms_norm"}),
}


@pytest.mark.parametrize("width", [32, 768, pytest.param(2048, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODULES)
def test_width_decides_nothing(name, width):
    make, expected = MODULES[name]
    report = patch(make(width))
    assert not report.left, report
    assert {entry.now for entry in report} == expected


def test_the_widest():
    for norm in (nn.LayerNorm(16384), nn.RMSNorm(16384, eps=1e-6)):
        assert patch(norm).replaced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_values_and_seeds_decide_nothing(name, dtype):
    """Ranks hold other values and have drawn other numbers, and decide alike."""
    make, expected = MODULES[name]
    for seed in range(3):
        torch.manual_seed(seed)
        module = make(32).to(dtype)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(10.0**seed)
        torch.manual_seed(100 - seed)
        report = patch(module)
        assert {entry.now for entry in report} == expected, report


class Passing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def global_hook():
    handle = register_module_forward_hook(lambda module, args, output: None)
    try:
        yield
    finally:
        handle.remove()


AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "device": lambda: torch.device("meta"),
    "default device": default_device,
    "default dtype": default_dtype,
    "function mode": Passing,
    "counting": lambda: FlopCounterMode(display=False),
    "global hook": global_hook,
}


def ambient():
    """What a mode around this would change."""
    return [
        torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled(),
        torch.empty(1).device.type, torch.get_default_dtype(), torch._C._len_torch_function_stack(),
    ]  # fmt: skip


@pytest.mark.parametrize("name", AROUND)
def test_nothing_around_the_patch_decides(name):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(Attend(32), Feed(32), nn.LayerNorm(32), nn.RMSNorm(32))

    expected = str(patch(make()))
    model = make()
    with AROUND[name]() as mode:
        before = ambient()
        report = patch(model)
        assert ambient() == before
    assert str(report) == expected
    if name == "counting":
        assert not mode.get_total_flops()
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(model(x), make()(x))


def test_the_callers_random_state_decides_nothing_and_stays():
    model = nn.Sequential(Attend(32), Block(32))
    before = torch.get_rng_state()
    patch(model)
    assert torch.equal(torch.get_rng_state(), before)


class TestTransformers:
    @pytest.fixture(autouse=True)
    def _transformers(self):
        pytest.importorskip("transformers")

    @pytest.mark.parametrize("name", ["autocast", "inference mode", "default device", "counting"])
    def test_nothing_around_the_patch_decides(self, name):
        from patch_models import batch, tiny_of

        expected = str(patch(tiny_of("llama")))
        model = tiny_of("llama").train()
        with AROUND[name]():
            report = patch(model)
        assert str(report) == expected
        inputs = batch(model)
        torch.testing.assert_close(model(**inputs).loss, tiny_of("llama").train()(**inputs).loss)

    def test_parameters_made_in_inference_mode(self):
        from patch_models import batch, tiny_of

        model = tiny_of("llama").eval()
        with torch.inference_mode():
            model = copy.deepcopy(model)
        assert next(model.parameters()).is_inference()
        inputs = {"input_ids": batch(model)["input_ids"]}
        with torch.inference_mode():
            expected = model(**inputs).logits
            report = patch(model)
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        assert "attention" in {entry.now for entry in report.replaced}
        assert "inference mode" in report.left[0].reason

    @pytest.mark.parametrize("name", ["deepseek_v4", "pegasus_x", "nllb-moe", "bigbird_pegasus"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_an_attention_that_does_more_is_refused_in_every_dtype(self, name, dtype):
        from patch_models import tiny_of

        (entry,) = patch(tiny_of(name).to(dtype), only="attention")
        assert entry.now is None
        assert "of the whole model differs by" in entry.reason

    @pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4"])
    def test_an_attention_that_is_another_by_its_name_is_refused(self, name):
        """However few tokens there are, and how many the model chooses of them."""
        from patch_models import tiny_of

        (entry,) = patch(tiny_of(name), only="attention")
        assert "does something else where its attention is called" in entry.reason

    def llama(self, change):
        """A Llama whose output is changed if its attention is not its own."""
        from patch_models import tiny_of

        model = tiny_of("llama")
        own = type(model).forward

        def forward(self, *args, **kwargs):
            out = own(self, *args, **kwargs)
            if self.model.config._attn_implementation == "fastllm":
                change(out, kwargs.get("attention_mask"))
            return out

        model.__class__ = type("Changed", (type(model),), {"forward": forward})
        return model

    def test_padding_is_tried(self):
        def change(out, mask):
            if mask is not None and not mask.all():
                out.logits = out.logits * 1.5

        (entry,) = patch(self.llama(change), only="attention")
        assert "output logits of the whole model differs" in entry.reason

    def test_hidden_tokens_may_differ(self):
        def change(out, mask):
            if mask is not None:
                out.logits = out.logits * mask[..., None]

        (entry,) = patch(self.llama(change), only="attention")
        assert entry.now == "attention"

    def test_all_outputs_are_looked_at(self):
        def change(out, mask):
            out["second"] = torch.ones(3)

        model = self.llama(change)
        own = type(model).forward

        def forward(self, *args, **kwargs):
            out = own(self, *args, **kwargs)
            out["second"] = out.get("second", torch.zeros(3))
            return out

        type(model).forward = forward
        (entry,) = patch(model, only="attention")
        assert "output second of the whole model differs" in entry.reason

    def test_an_attention_under_any_name(self):
        from patch_models import tiny_of

        model = tiny_of("llama")
        for layer in model.model.layers:
            layer.self_attn.__class__ = type("Mixer", (type(layer.self_attn),), {})
        assert [entry.now for entry in patch(model, only="attention")] == ["attention"]
        assert not list(patch(tiny_of("mamba"), only="attention"))

    def test_what_trials_leave_in_a_model(self):
        """Positions of Qwen2-VL's last call, by which the next one goes on."""
        from input_models import MODELS

        model = MODELS["qwen2_vl"]()
        before = [dict(vars(m)) for m in model.modules()]
        patch(model).revert()
        after = [dict(vars(m)) for m in model.modules()]
        for a, b in zip(after, before, strict=True):
            plain = {name for name in a.keys() | b.keys() if name[0] != "_"}
            assert all(a.get(name) is b.get(name) for name in plain), plain

    def test_masks_that_are_drawn_by_numpy(self):
        import numpy as np
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        small = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "vocab_size": 99, "num_mel_bins": 8}
        small |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48}
        small |= {"decoder_ffn_dim": 48, "max_source_positions": 60, "pad_token_id": 0, "bos_token_id": 1}
        small |= {"eos_token_id": 2, "apply_spec_augment": True, "mask_time_prob": 0.5, "decoder_start_token_id": 1}
        np.random.seed(5)
        before = np.random.get_state()[1].copy()
        report = patch(WhisperForConditionalGeneration(WhisperConfig(**small)))
        assert "linear_cross_entropy" in {entry.now for entry in report.replaced}, report
        assert (np.random.get_state()[1] == before).all()

    def test_compiled_layers_stay_compiled(self):
        from patch_models import batch, tiny_of
        from torch._dynamo.utils import counters

        def compiled(graph, inputs):
            runs.append(0)

            def run(*args):
                runs[-1] += 1
                return graph(*args)

            return run

        runs: list[int] = []
        model = tiny_of("llama").train()
        inputs = batch(model)
        torch.compiler.reset()
        for layer in model.model.layers:
            layer.compile(backend=compiled)
        counters.clear()
        patch(model)
        assert not counters["frames"]
        model(**inputs).loss.backward()
        assert sum(runs) == len(model.model.layers)
        model(**inputs).loss.backward()
        assert sum(runs) == 2 * len(model.model.layers)
        torch.compiler.reset()

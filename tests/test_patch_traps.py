"""Modules and models that look like something that `fastllm.patch` replaces, and are not quite that."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastllm.patching import Comparison, PatchError, patch

pytestmark = pytest.mark.filterwarnings("ignore")


def same(model, x):
    """Patches the model; its outputs are the same."""
    before = model(x)
    report = patch(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    return report


class RMS(nn.Module):
    def __init__(self, unit=False, eps=1e-5):
        super().__init__()
        self.weight, self.unit, self.eps = nn.Parameter(torch.rand(16)), unit, eps

    def forward(self, x):
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return y * (1 + self.weight if self.unit else self.weight)


class Feed(nn.Module):
    def __init__(self, act=F.silu, clamp=None):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act, self.clamp = act, clamp

    def forward(self, x):
        gate, up = self.gate(x), self.up(x)
        if self.clamp is not None:
            gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp)
        return self.down(self.act(gate) * up)


class Out(nn.Module):
    def __init__(self, norm=None, scale=1.0):
        super().__init__()
        self.dense, self.drop, self.norm, self.scale = nn.Linear(16, 16), nn.Dropout(0.0), norm or RMS(), scale

    def forward(self, x, residual):
        return self.norm(self.drop(self.dense(x)) * self.scale + residual)


class Both(nn.Module):
    """Two modules that differ in something small, one after the other."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        if isinstance(self.first, Out):
            return self.second(self.first(x, x), x)
        return self.second(self.first(x))


@pytest.mark.parametrize(
    "pair",
    [
        lambda: (RMS(unit=True), RMS(unit=False)),
        lambda: (RMS(eps=1e-5), RMS(eps=1e-2)),
        lambda: (Feed(F.silu), Feed(F.gelu)),
        lambda: (Feed(nn.SiLU()), Feed(nn.GELU())),
        lambda: (Out(RMS(eps=1e-5)), Out(RMS(eps=1e-2))),
        lambda: (Out(scale=1.0), Out(scale=0.1)),
        lambda: (Out(nn.LayerNorm(16, eps=1e-5)), Out(nn.LayerNorm(16, eps=0.1))),
    ],
    ids=["flag", "eps", "function", "activation", "norm", "scale", "child"],
)
def test_modules_that_differ_in_one_setting(pair):
    same(Both(*pair()), torch.randn(3, 16) / 30)


def test_clamps_are_seen():
    assert not same(Feed(clamp=7.0), 30 * torch.randn(3, 16)).replaced

    class Clamped(nn.Module):
        def forward(self, x):
            return (0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))).clamp(max=10)

    assert not same(nn.Sequential(Clamped()), 30 * torch.randn(3, 16)).replaced


def test_zeros_hide_nothing():
    """What a module computes is found out off the values that it was initialized with."""
    feed, norm = Feed(F.gelu), nn.LayerNorm(16, bias=False)
    with torch.no_grad():
        feed.gate.weight.zero_()
        feed.gate.bias.zero_()
        norm.weight.zero_()
    norm.requires_grad_(False)
    model = nn.Sequential(norm, feed)
    assert [entry.now for entry in patch(model)] == ["layer_norm", "geglu"]
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = torch.randn(3, 16)
    torch.testing.assert_close(other(x), Feed.forward(other[1], nn.LayerNorm.forward(other[0], x)))


class TwoNumbers(RMS):
    """One of them is eps."""

    def __init__(self):
        super().__init__(eps=1e-6)
        self.before = self.after = 1e-2

    def forward(self, x):
        return super().forward(x)


def test_which_number_is_eps():
    assert [entry.now for entry in same(TwoNumbers(), torch.randn(3, 16) / 300)] == ["rms_norm"]


@pytest.mark.parametrize("when", [True, False])
def test_what_differs_in_one_mode_is_left(when):
    class Modes(RMS):
        def forward(self, x):
            return super().forward(x) * (1.5 if self.training == when else 1.0)

    report = patch(Modes())
    assert "differs" in report.left[0].reason


def test_a_replacement_that_is_worse_than_the_module_is_refused():
    from fastllm.patching._probe import Differs, judge

    true = torch.ones(4, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    stock = true.float()
    judge("output", stock + 2 * eps, stock, true, eps, cancelling=1.0)
    with pytest.raises(Differs, match="error"):
        judge("output", stock + 200 * eps, stock, true, eps, cancelling=1.0)
    with pytest.raises(Differs, match="differs"):
        judge("output", stock, stock + 200 * eps, true, eps, cancelling=1.0)


def test_hooks_on_an_activation_that_is_no_longer_called():
    feed, x, seen = Feed(nn.SiLU()), torch.randn(3, 16), []
    assert patch(feed).replaced
    expected = feed(x)
    feed.act.register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(feed(x), expected)
    assert seen == [1]


class Gated(RMS):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * F.silu(gate))


def test_more_arguments_and_names():
    model, x, gate = Gated(), torch.randn(3, 16), torch.randn(3, 16)
    expected = model(x), model(x, gate), model(x=x), model(x, gate=gate)
    assert patch(model).replaced
    torch.testing.assert_close((model(x), model(x, gate), model(x=x), model(x, gate=gate)), expected)
    feed, out = Feed(), Out()
    expected = feed(x=x), out(x, residual=gate)
    patch(feed)
    patch(out)
    torch.testing.assert_close((feed(x=x), out(x, residual=gate)), expected)


def test_dropout_inside_is_left():
    class Drops(Feed):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(super().forward(x))

    report = patch(Drops())
    assert "it drops out, with p = 0.5" in report.left[0].reason


def test_probes_leave_buffers_alone():
    norm = nn.BatchNorm1d(16)
    feed = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
    model = nn.Sequential(norm, feed)
    before = copy.deepcopy(model.state_dict())
    patch(model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_patch_that_fails_leaves_nothing(monkeypatch):
    from fastllm.patching import _whole_model

    model = nn.Sequential(RMS(), Feed())

    def fail(op, device, dtype):
        if op == "swiglu":
            raise RuntimeError("no")
        return "cpu"

    monkeypatch.setattr(_whole_model, "backend", fail)
    with pytest.raises(RuntimeError, match="no"):
        patch(model)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_comparison_does_not_hide_nan():
    assert Comparison(loss=(1e-7, 1.0), logits=(float("nan"), 1.0)).worst != 0
    assert str(Comparison(loss=(1e-7, 1.0), logits=(float("nan"), 1.0)).worst) == "nan"


class TestLosses:
    """Models of transformers whose loss is more than that of their head."""

    @pytest.fixture(autouse=True)
    def _transformers(self):
        pytest.importorskip("transformers")

    def model(self):
        from patch_models import tiny_of

        return tiny_of("llama").train()

    def inputs(self):
        from patch_models import batch

        return batch(self.model())

    def left(self, model):
        (entry,) = patch(model, only="linear_cross_entropy")
        return entry.reason

    def subclass(self, forward):
        model = self.model()
        model.__class__ = type("Odd", (type(model),), {"forward": forward})
        return model

    def test_a_penalty_on_logits(self):
        from transformers import LlamaForCausalLM

        def forward(self, *args, **kwargs):
            out = LlamaForCausalLM.forward(self, *args, **kwargs)
            if out.loss is not None:
                out.loss = out.loss + 1e-2 * out.logits.logsumexp(-1).square().mean()
            return out

        assert self.left(self.subclass(forward)) is not None

    def test_a_scale_that_is_learned(self):
        from transformers.modeling_outputs import CausalLMOutputWithPast

        def forward(self, input_ids=None, labels=None, **kwargs):
            hidden = self.model(input_ids=input_ids).last_hidden_state
            logits = self.lm_head(hidden) * self.scale
            loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
            return CausalLMOutputWithPast(loss=loss, logits=logits)

        model = self.subclass(forward)
        model.scale = nn.Parameter(torch.ones(()))
        assert "gradient of scale" in self.left(model)

    def test_a_loss_that_smooths_in_training(self):
        model = self.model()

        def loss(logits, labels, vocab_size, **kwargs):
            smoothing = 0.3 if model.training else 0.0
            shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()
            return F.cross_entropy(logits.flatten(0, -2), shifted, label_smoothing=smoothing)

        model.loss_function = loss
        assert self.left(model) is not None

    def test_a_loss_with_more_arguments(self):
        model, inputs = self.model(), self.inputs()

        def loss(logits, labels, vocab_size, label_smoothing=0.0, **kwargs):
            shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()
            return F.cross_entropy(logits.flatten(0, -2).float(), shifted, label_smoothing=label_smoothing)

        model.loss_function = loss
        expected = [model(**inputs, **kwargs).loss for kwargs in ({}, {"label_smoothing": 0.3})]
        assert patch(model).replaced
        found = [model(**inputs, **kwargs).loss for kwargs in ({}, {"label_smoothing": 0.3})]
        torch.testing.assert_close(found, expected)

    def test_a_loss_that_is_set_afterwards(self):
        model, inputs, seen = self.model(), self.inputs(), []
        report = patch(model)

        def loss(logits, labels, vocab_size, **kwargs):
            seen.append(logits.shape[-1])
            return logits.float().square().mean()

        model.loss_function = loss
        model(**inputs)
        assert seen == [model.config.vocab_size]
        with pytest.raises(PatchError, match="loss_function"):
            report.revert()
        assert model.loss_function is loss

    @pytest.mark.parametrize("name", ["llama", "bart", "bert", "t5"])
    @pytest.mark.parametrize("first", ["LoRA", "patch"])
    def test_lora_on_the_head(self, name, first):
        peft = pytest.importorskip("peft")
        from patch_models import batch, tiny_of

        def adapted(patching):
            torch.manual_seed(0)
            model = tiny_of(name).train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            head = model.get_output_embeddings()
            path = next(p for p, m in model.named_modules() if m is head)
            config = peft.LoraConfig(r=4, target_modules=[path.rpartition(".")[2]])
            if patching and first == "patch":
                patch(model)
            model = peft.inject_adapter_in_model(config, model)
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
            if patching and first == "LoRA":
                patch(model)
            loss = model(**batch(tiny_of(name))).loss
            loss.backward()
            return [loss, *(p.grad for n, p in model.named_parameters() if "lora" in n)]

        torch.testing.assert_close(adapted(True), adapted(False), rtol=1e-4, atol=1e-5)

    def test_resized_embeddings(self):
        model, inputs = self.model(), self.inputs()
        patch(model)
        model.resize_token_embeddings(120)
        found = model(**inputs)
        model.eval()
        torch.testing.assert_close(found.loss, model(**inputs).loss)

    def test_inference_mode_with_padding(self):
        from patch_models import batch

        model = self.model().eval()
        inputs = batch(model, padded=True)
        expected = model(**inputs).logits
        patch(model)
        with torch.inference_mode():
            found = model(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

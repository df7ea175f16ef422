"""What `fastllm.patch` promises beside equal numbers: it can be taken back, and nothing else notices."""

from __future__ import annotations

import copy
import io
import pickle
import re
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastllm
from fastllm.backends import FallbackWarning
from fastllm.patching import PatchError, compare, patch, patched


class RMS(nn.Module):
    """An RMSNorm of nobody's, in the ways that models write it."""

    def __init__(self, size=16, offset=0.0, native=False):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(size) * 0.1 + (1 - offset))
        self.tiny, self.offset, self.native = 1e-4, offset, native

    def forward(self, hidden):
        x = hidden.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.tiny)
        if self.native:
            return (self.offset + self.scale) * x.to(hidden.dtype)
        return ((self.offset + self.scale.float()) * x).to(hidden.dtype)


class Center(RMS):
    """Looks like one and is none: the mean is taken off, the deviation is not."""

    def forward(self, hidden):
        return self.scale * (hidden - hidden.mean(-1, keepdim=True)) + self.tiny


class Feed(nn.Module):
    def __init__(self, act=F.silu, order="gate", packed=False):
        super().__init__()
        self.wide = nn.Linear(16, 48 if packed else 24)
        self.other = None if packed else nn.Linear(16, 24)
        self.back = nn.Linear(24, 16)
        self.act_fn, self.order, self.packed = act, order, packed

    def forward(self, x):
        a, b = self.wide(x).chunk(2, -1) if self.packed else (self.wide(x), self.other(x))
        return self.back(self.act_fn(a) * b if self.order == "gate" else a * self.act_fn(b))


class Dropping(Feed):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


def results(module, x, train=True):
    module.train(train)
    x = x.clone().requires_grad_()
    out = module(x)
    leaves = [x, *module.parameters()]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("native", [False, True])
def test_norms_under_any_name(dtype, offset, native):
    module = RMS(offset=offset, native=native).to(dtype)
    x = torch.randn(3, 16).to(dtype)
    before = results(module, x)
    report = patch(module)
    assert [entry.now for entry in report] == ["rms_norm"], report
    tolerance = {} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(results(module, x), before, **tolerance)  # dtypes, too


def test_a_weight_of_float32_and_an_input_of_16_bits():
    for native, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        module = RMS(native=native)
        x = torch.randn(3, 16).bfloat16()
        assert module(x).dtype == dtype
        patch(module)
        assert module(x).dtype == dtype


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(16), nn.LayerNorm(16, bias=False), nn.RMSNorm(16), nn.RMSNorm(16, eps=0.1)]
)
def test_norms_of_torch(norm):
    x = torch.randn(4, 16)
    before = results(norm, x)
    assert patch(norm).replaced
    torch.testing.assert_close(results(norm, x), before)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["gate", "up"])
@pytest.mark.parametrize(
    ("act", "op"),
    [(F.silu, "swiglu"), (F.gelu, "geglu"), (lambda x: F.gelu(x, approximate="tanh"), "geglu"), (F.relu, None)],
)
def test_gated_feed_forwards(act, op, order, packed):
    module = Feed(act, order, packed)
    x = torch.randn(3, 16)
    before = results(module, x)
    report = patch(module)
    if op is None or (packed and order == "up"):
        assert not report.replaced
        assert "differs" in report.left[0].reason
        return
    assert [entry.now for entry in report] == [op]
    torch.testing.assert_close(results(module, x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_activations_are_told_apart_in_16_bits(dtype):
    tanh = lambda x: F.gelu(x, approximate="tanh")  # noqa: E731
    quick = lambda x: x * torch.sigmoid(1.702 * x)  # noqa: E731
    for act, kind in ((F.silu, "silu"), (F.gelu, "gelu"), (tanh, "gelu_tanh"), (quick, None), (F.mish, None)):
        module = Feed(act).to(dtype)
        report = patch(module)
        assert bool(report.replaced) == (kind is not None), report
        if kind:
            assert module.forward.found[0].activation == kind


class Scaled(RMS):
    def forward(self, hidden):
        return 1.05 * super().forward(hidden)


class Act(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def test_16_bits_hide_nothing():
    assert not patch(Scaled().bfloat16()).replaced
    model = nn.Sequential(nn.Linear(4, 4), Act()).bfloat16()
    assert not patch(model).replaced


def test_what_only_looks_like_it_is_left_and_said_so():
    model = nn.Sequential(Center(), Dropping(), RMS())
    report = patch(model)
    assert [entry.path for entry in report.replaced] == ["2"]
    assert {entry.path for entry in report.left} == {"0", "1"}
    assert "left: output differs by" in str(report)
    assert report.to_dict()["entries"][0]["reason"] == report[0].reason
    report.revert()
    with pytest.raises(PatchError, match="not everything that matched was replaced"):
        patch(model, strict=True)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert patch(model, strict=True, only="*2").replaced


def test_only_and_exclude():
    model = nn.ModuleDict({"a": RMS(), "b": nn.LayerNorm(16), "c": Feed()})
    for kwargs, expected in (
        ({"only": "rms_norm"}, {"a"}),
        ({"only": ["layer_norm", "c"]}, {"b", "c"}),
        ({"exclude": ["a", "swiglu"]}, {"b"}),
        ({"exclude": "*"}, set()),
    ):
        with patched(model, **kwargs) as report:
            assert {entry.path for entry in report.replaced} == expected
    for wrong in ({"only": "foo"}, {"exclude": ["*.nothing"]}):
        with pytest.raises(ValueError, match=r"is no op .* and matches no module"):
            patch(model, **wrong)
    with pytest.raises(TypeError, match="got 3"):
        patch(model, only=[3])
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        patch("gpt2")


def test_one_instance_and_no_other():
    one, two = RMS(), RMS()
    with patched(one):
        assert "forward" in one.__dict__
        assert "forward" not in two.__dict__
        assert type(one) is RMS
        assert patch(one).left[0].reason == "its forward was replaced already"
    assert "forward" not in one.__dict__


def test_hooks_stay_and_run():
    module, seen = RMS(), []
    module.register_forward_hook(lambda *args: seen.append("forward"))
    module.register_full_backward_hook(lambda *args: seen.append("backward"))
    report = patch(module)
    assert seen == []  # probes are not seen
    module(torch.randn(2, 16, requires_grad=True)).sum().backward()
    report.revert()
    module(torch.randn(2, 16))
    assert seen == ["forward", "backward", "forward"]


def test_a_forward_of_somebody_else_is_not_taken_away():
    module = RMS()
    report = patch(module)
    module.forward = lambda x: x
    with pytest.raises(PatchError, match="replaced by somebody else"):
        report.revert()
    assert module(torch.ones(16)).sum() == 16


def test_random_state_modes_and_gradients_stay():
    model = nn.Sequential(RMS(), Feed(), nn.LayerNorm(16))
    model[1].eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model[0].training, model[1].training) == (True, False)
    assert all(p.grad is None for p in model.parameters())


def test_one_probe_for_equal_layers():
    layers = [m for _ in range(24) for m in (RMS(256), Feed())]
    model = nn.Sequential(*layers)
    start = time.perf_counter()
    patch(model)
    assert time.perf_counter() - start < 2


def test_parameters_are_looked_up_when_it_runs():
    """Optimizers, weight tying and loaders exchange them."""
    module = RMS()
    patch(module)
    module.scale = nn.Parameter(torch.full((16,), 2.0))
    x = torch.randn(3, 16)
    torch.testing.assert_close(module(x), RMS.forward(module, x))


# Models of transformers

transformers = pytest.importorskip("transformers")
from patch_models import assert_same, batch, model_of, run  # noqa: E402

transformers.utils.logging.set_verbosity_error()


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    return model_of(request.param).train()


def test_copies_and_pickles_of_a_patched_model(model):
    inputs = batch(model)
    expected = run(model, inputs, True)
    patch(model)
    clone = copy.deepcopy(model)
    thawed = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the copies must not look here
    for other in (clone, thawed):
        assert sum("forward" in m.__dict__ for m in other.modules()) > 4
        assert_same(run(other, inputs, True), expected)
        assert "logits" not in other(**inputs)
    buffer = io.BytesIO()
    torch.save(thawed, buffer)
    buffer.seek(0)
    assert_same(run(torch.load(buffer, weights_only=False), inputs, True), expected)


def test_saving_and_loading(model, tmp_path):
    inputs = batch(model)
    expected = run(model, inputs, False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    report = patch(model)
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation != "fastllm"
    assert_same(run(loaded, inputs, False), expected)
    report.revert()
    assert model.config._attn_implementation == implementation


def test_an_optimizer_made_before(model):
    inputs = batch(model)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    patch(model)
    losses = []
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        losses.append([])
        for _ in range(5):
            loss = m(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.5


def test_logits_in_training_only_when_asked_for(model):
    inputs = batch(model)
    wanted = model(**inputs)
    patch(model)
    assert model(**inputs).logits is None
    torch.testing.assert_close(model(**inputs, output_logits=True).logits, wanted.logits)
    torch.testing.assert_close(model.eval()(**inputs).logits, wanted.logits)
    model.train()
    torch.testing.assert_close(model(input_ids=inputs["input_ids"]).logits, wanted.logits)
    loss, logits = model(**inputs, return_dict=False)[:2]
    torch.testing.assert_close((loss, logits), (wanted.loss, wanted.logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite"])
def test_models_of_16_bits(name, dtype):
    model = model_of(name).to(dtype).train()
    inputs = batch(model)
    exact = run(model_of(name).double(), inputs, True)["loss"]
    before = run(model, inputs, True)["loss"].double()
    report = patch(model)
    assert "linear_cross_entropy" in {entry.now for entry in report.replaced}, report
    after = run(model, inputs, True)["loss"].double()
    assert abs(after - exact) <= 2 * abs(before - exact) + 2e-2 * (1 if dtype == torch.bfloat16 else 0.125)
    if name == "gemma2":
        assert "geglu" in {entry.now for entry in report.replaced}


def test_patched_twice_and_reverted_twice(model):
    first, second = patch(model), patch(model)
    assert not second.replaced, second
    first.revert()
    second.revert()
    assert model.config._attn_implementation != "fastllm"
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_the_loss_of_an_accumulation_window(model):
    inputs = batch(model)
    wanted = model(**inputs, num_items_in_batch=torch.tensor(50)).loss
    patch(model)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=torch.tensor(50)).loss, wanted)


def test_gradient_checkpointing(model):
    inputs = batch(model)
    expected = run(model, inputs, True)
    patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(model, inputs, True), expected)


@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)], indirect=True)
def test_compile_breaks_the_graph_nowhere_new(model):
    from torch._dynamo.utils import counters

    inputs = batch(model)

    def breaks(m):
        torch.compiler.reset()
        counters.clear()
        loss = torch.compile(m, backend="aot_eager")(**inputs).loss
        loss.backward()
        return sum(counters["graph_break"].values()), float(loss.detach())

    before = breaks(copy.deepcopy(model))
    patch(model)
    after = breaks(model)
    assert after[0] <= before[0]
    assert abs(after[1] - before[1]) < 1e-4


@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)], indirect=True)
def test_patching_a_compiled_model(model):
    """What the patch is proven with compiles nothing."""
    from torch._dynamo.utils import counters

    inputs = batch(model)
    expected = float(model(**inputs).loss.detach())
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    report = patch(compiled)
    assert len(report.replaced) > 4
    assert not counters["frames"]
    assert abs(float(compiled(**inputs).loss.detach()) - expected) < 1e-4


def test_export_of_a_patched_model():
    model = model_of("gpt2").eval()
    ids = batch(model)["input_ids"]
    wanted = model(ids, use_cache=False).logits
    patch(model)
    program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    assert "fastllm.layer_norm_fwd" in str(program.graph)
    torch.testing.assert_close(program.module()(ids, use_cache=False).logits, wanted)


def test_compare(model):
    model.eval()
    comparison = compare(model, batch(model))
    assert comparison.worst < 1e-4
    assert comparison.loss is not None
    assert comparison.logits is not None
    assert len(comparison.gradients) == len(list(model.parameters()))
    assert any("mlp" in path for path in comparison.layers)
    assert "loss" in str(comparison)
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compare_takes_the_loss_that_is_patched(name):
    pytest.importorskip("transformers")
    from patch_models import batch, tiny_of

    model = tiny_of(name).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)  # a loss of logits that somebody asked for
        comparison = compare(model, batch(model))
    assert comparison.loss is not None
    assert comparison.worst < 1e-4
    assert comparison.layers
    assert not comparison.random


def test_compare_says_when_random_numbers_differ():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.dropout = RMS(), nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(self.norm(x))

    model = Model()
    assert "random numbers" in str(compare(model, {"x": torch.randn(3, 16)}))
    assert "random numbers" not in str(compare(model.eval(), {"x": torch.randn(3, 16)}))


def test_compare_refuses_what_it_cannot_compare(model):
    ids = torch.randint(10, 50, (1, 5))
    with pytest.raises(TypeError, match=r"model must be a .*, got function"):
        compare(F.relu, {})
    with pytest.raises(TypeError, match=r"batch must be a mapping .*, got Tensor"):
        compare(model, ids)
    with patched(model), pytest.raises(ValueError, match="patched already"):
        compare(model, {"input_ids": ids})


def test_the_report_names_a_single_module_and_counts_equal_ones():
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Sequential(RMS(), RMS()))
    lines = [line.split() for line in str(patch(model)).splitlines()]
    assert [line[:3] for line in lines[1:]] == [["1", "1", "LayerNorm"], ["2", "2.*", "RMS"]] or lines[2][1] == "*.*"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_hooks_on_the_head_get_logits(name):
    from patch_models import batch, tiny_of

    model, seen = tiny_of(name).train(), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = batch(model)

    def hook(module, args, output):
        seen.append(output.shape[-1])
        return torch.tanh(output) * 5

    head = model.get_output_embeddings()
    handle = head.register_forward_hook(hook)
    expected = model(**inputs).loss
    handle.remove()
    assert "linear_cross_entropy" in {entry.now for entry in patch(model).replaced}
    plain = model(**inputs).loss
    handle = head.register_forward_hook(hook)
    torch.testing.assert_close(model(**inputs).loss, expected)
    handle.remove()
    torch.testing.assert_close(model(**inputs).loss, plain)
    assert seen == [head.weight.shape[0]] * 2


def test_models_that_share_a_configuration():
    from patch_models import model_of

    first = model_of("llama")
    config = first.config
    second = type(first)(config)
    before = dict(vars(config))
    report = patch(first)
    assert first.config._attn_implementation == "fastllm"
    assert first.model.layers[0].self_attn.config is first.config
    assert second.config is config
    assert vars(config) == before
    other = patch(second)
    assert "attention" in {entry.now for entry in other.replaced}
    first.config.use_cache = not before["use_cache"]
    report.revert()
    assert first.config is config
    assert first.model.layers[0].self_attn.config is config
    assert vars(config) == before | {"use_cache": not before["use_cache"]}
    assert second.config._attn_implementation == "fastllm"
    other.revert()
    assert second.config is config
    assert config._attn_implementation == before["_attn_implementation_internal"]


def test_an_attention_that_cannot_be_set(model, monkeypatch):
    config = model.config

    def fail(self, name):
        raise RuntimeError("no")

    monkeypatch.setattr(type(model), "set_attn_implementation", fail)
    report = patch(model, only="attention")
    assert "cannot be set: RuntimeError: no" in report.left[0].reason
    assert model.config is config


def test_attention_weights_of_models_that_only_look_for_them():
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(**small, attn_implementation="eager")).eval()
    ids = torch.randint(10, 90, (2, 7))
    before = model(ids, output_attentions=True)
    patch(model)
    after = model(ids, output_attentions=True)
    torch.testing.assert_close(after.attentions, before.attentions)
    torch.testing.assert_close(after.logits, before.logits)


class WritesItsEps(nn.Module):
    """As nanoGPT has it."""

    def __init__(self, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_with_eps_in_its_code(bias):
    module, x = WritesItsEps(bias), torch.randn(4, 16)
    before = results(module, x)
    assert [entry.now for entry in patch(module)] == ["layer_norm"]
    torch.testing.assert_close(results(module, x), before)


def test_proofs_do_not_warn():
    from patch_models import tiny_of

    with warnings.catch_warnings():
        warnings.simplefilter("error", fastllm.FallbackWarning)
        for name in ("bert", "t5", "llama"):
            patch(tiny_of(name))
        patch(nn.TransformerEncoderLayer(16, 4, 24))


def test_compare_takes_tuples_and_tensors():
    class Model(nn.Module):
        def __init__(self, loss):
            super().__init__()
            self.norm, self.out, self.loss = RMS(), nn.Linear(16, 8), loss

        def forward(self, x):
            logits = self.out(self.norm(x))
            return (logits, logits.square().mean()) if self.loss else logits

    found = compare(Model(True), {"x": torch.randn(3, 16)})
    assert found.loss is not None
    assert found.logits is not None
    assert set(found.gradients) == {"norm.scale", "out.weight", "out.bias"}
    assert found.worst < 1e-5
    assert f"{found.worst:.1e}" in str(found).splitlines()[0]
    found = compare(Model(False), {"x": torch.randn(3, 16)})
    assert found.loss is None
    assert found.logits is not None


def test_a_report_that_was_taken_back_says_so():
    report = patch(RMS())
    report.revert()
    assert str(report) == "RMS: reverted"


@pytest.mark.parametrize("order", ["patch first", "LoRA first"])
def test_lora(order):
    peft = pytest.importorskip("peft")
    inputs = batch(model_of("llama"))

    def adapted(patching: bool):
        model = model_of("llama").train()
        if patching and order == "patch first":
            patch(model)
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "gate_proj"], lora_dropout=0.0, init_lora_weights=False
        )
        model = peft.get_peft_model(model, config)
        if patching and order == "LoRA first":
            assert len(patch(model).replaced) > 4
        return model

    assert_same(run(adapted(True), inputs, True), run(adapted(False), inputs, True))


def test_attention_weights_where_they_are_asked_for():
    model = model_of("llama").eval()
    inputs = {k: v for k, v in batch(model, padded=True).items() if k != "labels"}
    model.set_attn_implementation("eager")
    wanted = model(**inputs, output_attentions=True)
    patch(model)
    got = model(**inputs, output_attentions=True)
    assert len(got.attentions or ()) == len(wanted.attentions)
    torch.testing.assert_close(got.attentions, wanted.attentions)


def test_wrong_attention_is_noticed(monkeypatch):
    """The trap: without a mask, causality is lost. The check of the whole model sees it."""
    from fastllm.patching import _attention

    model = model_of("llama")
    blind = lambda module, q, k, v, mask, **kwargs: (F.scaled_dot_product_attention(q, k, v, enable_gqa=True).mT, None)  # noqa: E731
    monkeypatch.setattr(_attention, "attention", blind)
    report = patch(model)
    monkeypatch.undo()
    _attention.register()
    reasons = [entry.reason for entry in report.left if entry.was.startswith("attention")]
    assert len(reasons) == 1
    assert model.config._attn_implementation != "fastllm"


def test_the_readmes_example(capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code, shown = re.search(r"```python\n(import torch, fastllm.*?)```\n\n```\n(.*?)```", readme, re.S).groups()
    exec(code, {})
    assert capsys.readouterr().out == shown


def test_it_is_exported():
    assert fastllm.patch is patch
    assert fastllm.patched is patched
    assert fastllm.compare is compare

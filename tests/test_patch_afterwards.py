"""What happens to a patched model afterwards: modules are exchanged, hooked, offloaded, unpickled elsewhere."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from fastllm.backends import FallbackWarning
from fastllm.patching import patch


class Block(nn.Module):
    """As BERT's blocks end."""

    def __init__(self, dense=True):
        super().__init__()
        self.dense = nn.Linear(16, 16) if dense else None
        self.drop, self.norm = nn.Dropout(0.0), nn.LayerNorm(16)

    def forward(self, x, residual):
        return self.norm(self.drop(x if self.dense is None else self.dense(x)) + residual)


class Feed(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Scaled(nn.LayerNorm):
    def forward(self, x):
        return 3 * super().forward(x)


class Outer(nn.Module):
    """Calls a module, as an adapter does, and has its weight."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, x):
        return 2 * self.inner(x)


def double_forward(x):
    return 2 * torch.sigmoid(x) * x


EXCHANGES = {
    "identity": lambda m: setattr(m, "norm", nn.Identity()),
    "subclass": lambda m: setattr(m, "norm", Scaled(16)),
    "eps": lambda m: setattr(m, "norm", nn.LayerNorm(16, eps=0.5)),
    "wrapper": lambda m: setattr(m, "norm", Outer(m.norm)),
    "class": lambda m: setattr(m.norm, "__class__", Scaled),
    "dropout": lambda m: setattr(m, "drop", nn.Threshold(0.1, 20.0)),
    "dense": lambda m: setattr(m, "dense", Outer(m.dense)),
}


@pytest.mark.filterwarnings("ignore::fastllm.backends.FallbackWarning")
@pytest.mark.parametrize("name", EXCHANGES)
def test_an_exchanged_part_of_a_block_is_called(name):
    x, residual = torch.randn(3, 16), torch.randn(3, 16)
    block = Block()
    other = copy.deepcopy(block)
    assert [entry.now for entry in patch(block)] == ["dropout_add_layer_norm"]
    copied = copy.deepcopy(block)
    before = block(x, residual)
    for module in (block, other, copied):
        EXCHANGES[name](module)
    assert not torch.allclose(before, other(x, residual), atol=1e-3)
    torch.testing.assert_close(block(x, residual), other(x, residual))
    torch.testing.assert_close(copied(x, residual), other(x, residual))


def test_an_exchange_is_warned_of():
    block = Block()
    patch(block)
    block.norm = nn.LayerNorm(16)
    with pytest.warns(FallbackWarning, match="Block has another norm than when it was patched"):
        block(torch.randn(2, 16), torch.randn(2, 16))


@pytest.mark.filterwarnings("ignore::fastllm.backends.FallbackWarning")
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", ["norm1", "norm2", "dropout1", "dropout2", "self_attn", "linear1"])
def test_an_exchanged_part_of_an_encoder_layer(name, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=norm_first)
    other = copy.deepcopy(layer)
    patch(layer)
    for module in (layer, other):
        torch.manual_seed(1)
        part = getattr(module, name)
        if "norm" in name:
            setattr(module, name, Scaled(16))
        elif "dropout" in name:
            setattr(module, name, nn.Tanh())
        else:
            setattr(module, name, copy.deepcopy(part))
            nn.init.normal_(next(getattr(module, name).parameters()))
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(layer(x), other(x))


@pytest.mark.filterwarnings("ignore::fastllm.backends.FallbackWarning")
@pytest.mark.parametrize(("before", "after"), [(nn.SiLU(), nn.ReLU()), (F.silu, double_forward)])
def test_an_exchanged_activation(before, after):
    feed, x = Feed(before), torch.randn(3, 16)
    assert patch(feed).replaced
    other = Feed(after)
    other.load_state_dict(feed.state_dict())
    feed.act = after
    torch.testing.assert_close(feed(x), other(x))


class Silu:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x):
        return self.scale * F.silu(x)


INSIDE = {
    "an object": (lambda: Silu(1.0), lambda feed: setattr(feed, "act", Silu(2.0))),
    "a partial": (
        lambda: functools.partial(F.silu, inplace=False),
        lambda feed: setattr(feed, "act", functools.partial(F.gelu, approximate="none")),
    ),
    "in a Sequential": (lambda: nn.Sequential(nn.SiLU()), lambda feed: feed.act.__setitem__(0, nn.ReLU())),
    "a hook in a Sequential": (
        lambda: nn.Sequential(nn.SiLU()),
        lambda feed: feed.act[0].register_forward_hook(lambda module, args, output: 2 * output),
    ),
}


@pytest.mark.filterwarnings("ignore::fastllm.backends.FallbackWarning")
@pytest.mark.parametrize("name", INSIDE)
def test_an_activation_in_whatever_it_is_kept(name):
    make, change = INSIDE[name]
    feed, x = Feed(make()), torch.randn(3, 16)
    other = copy.deepcopy(feed)
    assert patch(feed).replaced
    for module in (feed, other):
        change(module)
    torch.testing.assert_close(feed(x), other(x))


class Named(nn.Module):
    """Its activation is called as the op calls it."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.silu = nn.SiLU()

    def forward(self, x):
        return self.down(self.silu(self.gate(x)) * self.up(x))


@pytest.mark.filterwarnings("ignore::fastllm.backends.FallbackWarning")
def test_an_activation_by_the_name_of_the_ops():
    feed, x = Named(), torch.randn(3, 16)
    other = copy.deepcopy(feed)
    assert patch(feed).replaced
    feed.silu = other.silu = nn.ReLU()
    torch.testing.assert_close(feed(x), other(x))


class Buffered(nn.RMSNorm):
    def __init__(self):
        super().__init__(16, eps=1e-6)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


class Masked(Feed):
    def __init__(self):
        super().__init__(nn.SiLU())
        self.register_buffer("mask", torch.ones(24))

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x) * self.mask)


@pytest.mark.parametrize("make", [Buffered, Masked])
def test_buffers_may_change(make):
    (entry,) = patch(make())
    assert entry.reason == "it has buffers, which may change"


def test_an_exchange_in_a_compiled_graph_breaks_it_nowhere():
    block, x = Block(), torch.randn(3, 16)
    patch(block)
    block.norm = Scaled(16)
    torch.compiler.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x), Block.forward(block, x, x))
    torch.compiler.reset()


class WeightsType(nn.Module):
    """As T5's norm: what it gives has the dtype of its weight."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(16)), 1e-6

    def forward(self, x):
        y = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (y.to(self.weight.dtype) if self.weight.dtype != torch.float32 else y)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_norms_that_were_not_tried(weight):
    for make in (WeightsType, lambda: nn.LayerNorm(16), lambda: nn.RMSNorm(16, eps=1e-6)):
        norm = make().to(weight)
        other = copy.deepcopy(norm)
        assert patch(norm).replaced
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64):
            x = (10 * torch.randn(3, 16)).to(dtype)
            try:
                expected = other(x)
            except RuntimeError:
                continue  # torch's own take no mixture
            assert norm(x).dtype == expected.dtype
            torch.testing.assert_close(norm(x), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore")
def test_nested_tensors():
    x = torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(5, 16)], layout=torch.jagged)
    for module in (nn.LayerNorm(16), Feed(nn.SiLU())):
        expected = module(x).values()
        assert patch(module).replaced
        torch.testing.assert_close(module(x).values(), expected)


def test_a_single_weight_for_all_channels():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(1)), 1e-6

        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    assert not patch(One()).replaced


@pytest.mark.filterwarnings("ignore::fastllm.backends.FallbackWarning")
def test_a_class_whose_forward_is_exchanged(monkeypatch):
    block, x = Block(), torch.randn(3, 16)
    patch(block)
    monkeypatch.setattr(Block, "forward", lambda self, x, residual: x - residual)
    assert torch.equal(block(x, x), torch.zeros_like(x))


def renamed(self, x):
    return nn.LayerNorm.forward(self, x)


renamed.__qualname__ = "made.<locals>.forward"


class Renamed(nn.LayerNorm):
    forward = renamed


def test_pickles_of_a_class_whose_forward_pickle_does_not_find():
    module, x = nn.Sequential(Renamed(8)), torch.randn(3, 8)
    assert patch(module).replaced
    read = pickle.loads(pickle.dumps(module))
    assert "forward" in vars(read[0])
    assert torch.equal(read(x), module(x))


@pytest.mark.filterwarnings("ignore::fastllm.backends.FallbackWarning")
def test_a_copy_remembers_what_was_proven(monkeypatch):
    norm, x = nn.RMSNorm(8), torch.randn(3, 8)
    patch(norm)
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, x: x - 1)
    assert torch.equal(copy.deepcopy(norm)(x), x - 1)


def test_a_sum_that_broadcasts():
    block, x = Block(), torch.randn(2, 3, 16)
    residual = torch.randn(16)
    expected = block(x, residual), block(residual, x)
    patch(block)
    torch.testing.assert_close((block(x, residual), block(residual, x)), expected)


def test_hooks_of_all_modules_see_what_they_saw():
    pytest.importorskip("transformers")
    from patch_models import batch, tiny_of

    for name in ("bert", "llama", "t5"):
        model = tiny_of(name).train()
        inputs = batch(model)

        def shapes(model=model, inputs=inputs):
            seen = []

            def hook(module, args, output):
                values = output.values() if isinstance(output, dict) else output
                values = [values] if isinstance(values, torch.Tensor) else values
                seen.append((type(module).__name__, [x.shape for x in values if isinstance(x, torch.Tensor)]))

            handle = register_module_forward_hook(hook)
            loss = model(**inputs).loss
            handle.remove()
            return seen, float(loss.detach())

        expected, loss = shapes()
        patch(model)
        found, ours = shapes()
        assert found == expected
        assert abs(ours - loss) < 1e-5


class Queries(nn.Module):
    """Queries that are the same for all rows: their batch is broadcast."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, x, first=False):
        q = self.q(x[:1] if first else x).unflatten(-1, (2, 8)).transpose(1, 2)
        k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Ranks(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(-2, -3) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


def test_attention_of_other_ranks_than_in_the_trial():
    model = Ranks()
    other = copy.deepcopy(model)
    assert [entry.now for entry in patch(model)] == ["attention"]
    for shape in ((5, 16), (2, 5, 16), (2, 3, 5, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("rows", [1, 3])
def test_queries_of_batch_one(rows):
    model = Queries()
    other = copy.deepcopy(model)
    assert [entry.now for entry in patch(model)] == ["attention"]
    x = torch.randn(rows, 5, 16)
    torch.testing.assert_close(model(x, first=True), other(x, first=True))


class TestTransformers:
    @pytest.fixture(autouse=True)
    def _transformers(self):
        pytest.importorskip("transformers")

    @pytest.mark.filterwarnings("ignore::fastllm.backends.FallbackWarning")
    @pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
    @pytest.mark.parametrize("train", [True, False])
    def test_weights_that_are_brought_while_their_module_runs(self, name, train):
        accelerate = pytest.importorskip("accelerate")
        from patch_models import batch, tiny_of

        losses = []
        for patching in (False, True):
            model = tiny_of(name).train(train)
            inputs = batch(model)
            if patching:
                patch(model)
            accelerate.cpu_offload(model, execution_device="cpu")
            losses.append(model(**inputs).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses)

    def test_what_accelerate_unwraps(self, request):
        accelerate = pytest.importorskip("accelerate")
        from accelerate.state import AcceleratorState
        from patch_models import batch, tiny_of

        AcceleratorState._reset_state(reset_partial_state=True)  # another test's, whose precision would stay
        request.addfinalizer(lambda: AcceleratorState._reset_state(reset_partial_state=True))
        model = tiny_of("llama").train()
        inputs = batch(model)
        expected = model(**inputs).loss
        report = patch(model)
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        prepared = accelerator.prepare(model)
        assert prepared(**inputs).loss.dtype == torch.float32
        copied, other = copy.deepcopy(prepared), accelerator.prepare(tiny_of("llama").train())
        for changed in (copied, other):  # a copy has weights of its own
            with torch.no_grad():
                changed.lm_head.weight.mul_(3)
        torch.testing.assert_close(copied(**inputs).loss, other(**inputs).loss, rtol=1e-2, atol=1e-2)
        assert list(inspect.signature(prepared.forward).parameters) == list(inspect.signature(other.forward).parameters)
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        torch.testing.assert_close(unwrapped(**inputs).loss, expected)
        torch.testing.assert_close(copy.deepcopy(unwrapped)(**inputs).loss, expected)
        report.revert()
        assert "forward" not in vars(model)

    def test_a_pickle_in_another_process(self, tmp_path):
        """Which has imported nothing but torch."""
        from patch_models import tiny_of

        tokens = torch.arange(10, 15)[None]
        for only in ("attention", None):  # first that of which nothing but a name is in the pickle
            model = tiny_of("llama").eval()
            patch(model, only=only)
            torch.save(model, tmp_path / f"{only}.model")
            torch.save(model(input_ids=tokens).logits, tmp_path / f"{only}.logits")
        code = (
            "import torch, sys\n"
            "for name in ('attention', 'None'):\n"
            "    model = torch.load(f'{sys.argv[1]}/{name}.model', weights_only=False)\n"
            "    found = model(input_ids=torch.arange(10, 15)[None]).logits\n"
            "    torch.testing.assert_close(found, torch.load(f'{sys.argv[1]}/{name}.logits'))\n"
            "    assert model.model.config._attn_implementation == 'fastllm'\n"
        )
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_attention_weights_by_the_configuration(self, when, tmp_path):
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
        model = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
        tokens = torch.arange(10, 15)[None]
        expected = model(input_ids=tokens, output_attentions=True).attentions
        if when == "before":
            model.config.output_attentions = True
        report = patch(model)
        if when == "after":
            model.config.output_attentions = True
        torch.testing.assert_close(model(input_ids=tokens).attentions, expected)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded.config) is type(config)
        report.revert()
        assert model.config is config
        assert config.output_attentions

    def test_what_is_changed_in_place_in_a_configuration_stays(self):
        from patch_models import tiny_of

        model = tiny_of("llama")
        report = patch(model)
        model.config.id2label[7] = "seven"
        report.revert()
        assert model.config.id2label[7] == "seven"

    def test_a_configuration_that_cannot_be_copied(self):
        from patch_models import tiny_of

        model = tiny_of("llama")
        model.config.lock = threading.Lock()
        (entry,) = patch(model, only="attention")
        assert "its configuration cannot be copied" in entry.reason

    def test_a_head_called_by_name(self):
        from patch_models import tiny_of

        model, hidden = tiny_of("llama"), torch.randn(1, 3, 32)
        expected = model.lm_head(hidden)
        patch(model)
        torch.testing.assert_close(model.lm_head(input=hidden), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_a_model_of_16_bits_with_a_part_of_32(self, dtype):
        """As transformers loads T5."""
        from patch_models import batch, tiny_of

        model = tiny_of("t5").to(dtype)
        for path, module in model.named_modules():
            if path.endswith(".wo"):
                module.float()
        inputs = batch(model)
        expected = model(**inputs).loss
        patch(model)
        torch.testing.assert_close(model(**inputs).loss, expected, rtol=2e-2, atol=2e-2)

    def test_attention_weights_that_the_model_refuses(self):
        from patch_models import tiny_of

        model = tiny_of("llama").eval()
        patch(model)
        with pytest.raises(ValueError, match="output_attentions"):
            model.config.output_attentions = True
        assert model.config._attn_implementation == "fastllm"

    @pytest.mark.filterwarnings("ignore")
    def test_continuous_batching(self):
        import transformers
        from patch_models import tiny_of

        model = tiny_of("llama").eval()
        small = {"num_blocks": 8, "max_batch_tokens": 64}  # as it would otherwise fill the memory
        config = transformers.GenerationConfig(
            max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=-1, **small
        )
        given = {"generation_config": config}
        if hasattr(transformers, "ContinuousBatchingConfig"):  # which took over from the other
            given["continuous_batching_config"] = transformers.ContinuousBatchingConfig(**small)

        def tokens():
            out = model.generate_batch(inputs=[[15, 16, 17, 18], [19, 18]], **given)
            return [x.generated_tokens for x in out.values()]

        expected = tokens()
        report = patch(model)
        assert tokens() == expected
        assert model.config._attn_implementation == "fastllm"
        report.revert()
        assert "init_continuous_batching" not in vars(model)

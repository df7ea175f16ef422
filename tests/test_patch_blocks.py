"""What `fastllm.patch` makes of blocks: norms behind dropout and a sum, torch's encoder layers and attention modules,
modules that call scaled_dot_product_attention."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastllm
from fastllm.patching import patch, patched


def gradients(module, *inputs, **kwargs):
    """Output and the gradients of inputs and parameters."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = module(*inputs, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    leaves = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad((out * weights).float().sum(), leaves)]


def kinds(report):
    return sorted({entry.now for entry in report.replaced})


class RMS(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.rand(size) + 0.5), 1e-5

    def forward(self, x):
        wide = x.float()
        return self.scale * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Out(nn.Module):
    """As the blocks of BERT end."""

    def __init__(self, norm=nn.LayerNorm, p=0.25, inner=24, projection=True):
        super().__init__()
        self.dense = nn.Linear(inner, 16) if projection else nn.Identity()
        self.norm, self.drop = norm(16), nn.Dropout(p)
        if not projection:
            del self.dense

    def forward(self, hidden, residual):
        hidden = self.dense(hidden) if hasattr(self, "dense") else hidden
        return self.norm(self.drop(hidden) + residual)


class Swapped(Out):
    def forward(self, residual, hidden):
        return super().forward(hidden, residual)


class DropsTheSum(Out):
    def forward(self, hidden, residual):
        return self.norm(self.drop(self.dense(hidden) + residual))


class DropsTheResidual(Out):
    def forward(self, hidden, residual):
        return self.norm(self.dense(hidden) + self.drop(residual))


class DropsTheResult(Out):
    def forward(self, hidden, residual):
        return self.drop(self.norm(self.dense(hidden) + residual))


class Subtracts(Out):
    def forward(self, hidden, residual):
        return self.norm(self.drop(self.dense(hidden)) - residual)


class TestResidual:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("cls", [Out, Swapped])
    @pytest.mark.parametrize(
        ("norm", "op"), [(nn.LayerNorm, "dropout_add_layer_norm"), (RMS, "dropout_add_rms_norm")], ids=["layer", "rms"]
    )
    def test_equal_in_evaluation(self, cls, norm, op, dtype):
        module = cls(norm).to(dtype).eval()
        inputs = [torch.randn(3, 5, 24).to(dtype), torch.randn(3, 5, 16).to(dtype)]
        inputs = inputs[::-1] if cls is Swapped else inputs
        before = gradients(module, *inputs)
        with patched(module) as report:
            assert [(entry.path, entry.now) for entry in report] == [("", op)], report
            tolerance = {} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
            torch.testing.assert_close(gradients(module, *inputs), before, **tolerance)
        assert all(map(torch.equal, gradients(module, *inputs), before))

    def test_without_a_projection(self):
        module = Out(projection=False, p=0.0)
        inputs = [torch.randn(3, 16), torch.randn(3, 16)]
        before = gradients(module, *inputs)
        assert kinds(patch(module)) == ["dropout_add_layer_norm"]
        torch.testing.assert_close(gradients(module, *inputs), before)

    def test_drops_the_branch_in_training(self):
        """At p = 1 nothing is left of it; between, the kept are scaled, and the share of them is right."""
        module = Out(p=0.25, projection=False)
        assert patch(module).replaced
        residual = torch.zeros(200, 16)
        torch.manual_seed(0)
        out = module(torch.ones(200, 16), residual)
        kept = (out > 0).float().mean().item()
        assert abs(kept - 0.75) < 0.03
        module.drop.p = 1.0
        torch.testing.assert_close(module(torch.randn(200, 16), residual), torch.zeros(200, 16))
        module.eval()
        x = torch.randn(200, 16)
        torch.testing.assert_close(module(x, residual), module.norm(x))

    @pytest.mark.parametrize("cls", [DropsTheSum, DropsTheResidual, DropsTheResult, Subtracts])
    def test_others_are_left(self, cls):
        module = cls()
        report = patch(module)
        assert kinds(report) == ["layer_norm"], report
        assert "differs" in report.left[0].reason

    def test_hooks_on_what_it_no_longer_calls(self):
        module, seen = Out(p=0.0), []
        assert patch(module).replaced
        inputs = [torch.randn(3, 24), torch.randn(3, 16)]
        fused = module(*inputs)
        handle = module.norm.register_forward_hook(lambda *args: seen.append(1))
        torch.testing.assert_close(module(*inputs), fused)
        handle.remove()
        module(*inputs)
        assert seen == [1]

    def test_an_exchanged_projection_is_used(self):
        module = Out(p=0.0)
        assert patch(module).replaced
        module.dense = nn.Linear(24, 16)
        inputs = [torch.randn(3, 24), torch.randn(3, 16)]
        torch.testing.assert_close(module(*inputs), Out.forward(module, *inputs))

    def test_copies_and_pickles(self):
        module = Out(p=0.0)
        patch(module)
        inputs = [torch.randn(3, 24), torch.randn(3, 16)]
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            with torch.no_grad():
                copied.dense.weight.zero_()
                copied.norm.bias.fill_(1.0)
            torch.testing.assert_close(copied(*inputs), Out.forward(copied, *inputs))

    def test_only_and_exclude(self):
        assert kinds(patch(Out(), only="layer_norm")) == ["layer_norm"]
        assert kinds(patch(Out(), exclude="dropout_add_layer_norm")) == ["layer_norm"]
        assert kinds(patch(Out(), only="dropout_add_layer_norm")) == ["dropout_add_layer_norm"]

    def test_autocast(self):
        module = Out(p=0.0)
        inputs = [torch.randn(3, 24), torch.randn(3, 16)]
        with torch.autocast("cpu", torch.bfloat16):
            before = module(*inputs)
            patch(module)
            after = module(*inputs)
        assert after.dtype == before.dtype
        torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)


ENCODERS = [
    {"norm_first": norm_first, "batch_first": batch_first, "activation": activation, "bias": bias}
    for norm_first in (False, True)
    for batch_first, activation, bias in ((True, "relu", True), (False, "gelu", True), (True, F.silu, False))
]


def encoder(dropout=0.0, layers=2, **kwargs):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=dropout, **kwargs)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def masks(batch_first):
    batch, length = (3, 5) if batch_first else (5, 3)
    causal = nn.Transformer.generate_square_subsequent_mask(length)
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[1, -1:] = True
    yield {}
    yield {"mask": causal, "is_causal": True}
    yield {"mask": causal}
    yield {"src_key_padding_mask": padding}
    yield {"mask": causal < 0, "src_key_padding_mask": padding}


class TestEncoderLayer:
    @pytest.mark.parametrize(
        "kwargs",
        ENCODERS,
        ids=lambda kwargs: " ".join(getattr(value, "__name__", str(value)) for value in kwargs.values()),
    )
    def test_equal(self, kwargs):
        model, x = encoder(**kwargs), torch.randn(3, 5, 16)
        for train in (True, False):
            model.train(train)
            calls = list(masks(kwargs["batch_first"]))
            before = [gradients(model, x, **call) for call in calls]
            with torch.no_grad():
                inferred = [model(x, **call) for call in calls]
            with patched(model) as report:
                assert kinds(report) == ["attention", "dropout_add_layer_norm", "layer_norm"], report
                for call, expected in zip(calls, before, strict=True):
                    torch.testing.assert_close(gradients(model, x, **call), expected, rtol=1e-4, atol=1e-5)
                with torch.no_grad():
                    for call, expected in zip(calls, inferred, strict=True):
                        torch.testing.assert_close(model(x, **call), expected)
            again = gradients(model, x, **calls[0])
            assert all(map(torch.equal, again, before[0]))

    def test_runs_our_ops(self):
        model, x = encoder(layers=1, dropout=0.1), torch.randn(3, 5, 16)
        patch(model)
        with torch.profiler.profile() as profile:
            model(x).sum().backward()
        names = [event.key for event in profile.key_averages()]
        assert "fastllm::dropout_add_layer_norm_fwd" in names
        assert "fastllm::dropout_add_layer_norm_bwd" in names
        assert "fastllm::attention_fwd" not in names  # with dropout on a CPU torch's own is faster
        assert "aten::layer_norm" not in names

    def test_dropout_is_drawn_from_the_seed(self):
        model, x = encoder(dropout=0.3), torch.randn(3, 5, 16)
        patch(model)

        def drawn(seed):
            torch.manual_seed(seed)
            return model(x)

        assert torch.equal(drawn(1), drawn(1))
        assert not torch.equal(drawn(1), drawn(2))

    def test_compile_breaks_the_graph_nowhere(self):
        model, x = encoder(dropout=0.1), torch.randn(3, 5, 16)
        patch(model)
        assert torch.compile(model, fullgraph=True, backend="aot_eager")(x).shape == x.shape

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_16_bits(self, dtype):
        model, x = encoder().to(dtype), torch.randn(3, 5, 16).to(dtype)
        before = model(x)
        assert "dropout_add_layer_norm" in kinds(patch(model))
        torch.testing.assert_close(model(x), before, rtol=3e-2, atol=6e-2)


class TestMultiheadAttention:
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("sizes", [{}, {"kdim": 12, "vdim": 20}, {"bias": False}], ids=str)
    def test_equal(self, batch_first, sizes):
        torch.manual_seed(0)
        module = nn.MultiheadAttention(16, 4, batch_first=batch_first, **sizes)
        batch, rows, keys = 3, 5, 7
        shapes = [(batch, rows, 16), (batch, keys, sizes.get("kdim", 16)), (batch, keys, sizes.get("vdim", 16))]
        inputs = [torch.randn(s if batch_first else (s[1], s[0], s[2])) for s in shapes]
        hidden, padding = torch.rand(rows, keys) < 0.3, torch.zeros(batch, keys, dtype=torch.bool)
        hidden[:, 0], padding[1, 4:] = False, True
        each = (torch.rand(batch * 4, rows, keys) < 0.3).logical_and(torch.arange(keys) > 0)
        calls = [
            {},
            {"attn_mask": hidden},
            {"attn_mask": torch.randn(rows, keys)},
            {"attn_mask": each, "key_padding_mask": padding},
            {"attn_mask": torch.randn(rows, keys), "key_padding_mask": padding.float() * -9},
            {"key_padding_mask": padding},
        ]
        before = [gradients(module, *inputs, need_weights=False, **call) for call in calls]
        weights = module(*inputs)[1]
        with patched(module) as report:
            assert [entry.now for entry in report] == ["attention"], report
            for call, expected in zip(calls, before, strict=True):
                after = gradients(module, *inputs, need_weights=False, **call)
                torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(module(*inputs)[1], weights)

    def test_self_attention_of_one_tensor_and_of_one_sequence(self):
        module, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 6, 16)
        before = [module(y, y, y, need_weights=False)[0] for y in (x, x[0])]
        patch(module)
        torch.testing.assert_close([module(y, y, y, need_weights=False)[0] for y in (x, x[0])], before)

    def test_errors_are_torchs(self):
        module, x = nn.MultiheadAttention(16, 4), torch.randn(6, 2, 16)
        patch(module)
        with pytest.raises(RuntimeError, match="is_causal"):
            module(x, x, x, need_weights=False, is_causal=True)

    def test_keys_of_its_own_are_left(self):
        report = patch(nn.MultiheadAttention(16, 4, add_bias_kv=True))
        assert "keys of its own" in report.left[0].reason

    def test_runs_our_op(self):
        module, x = nn.MultiheadAttention(16, 4), torch.randn(6, 2, 16)
        patch(module)
        with fastllm.use_backend("reference"), torch.profiler.profile() as profile:
            module(x, x, x, need_weights=False)
        names = [event.key for event in profile.key_averages()]
        assert "aten::scaled_dot_product_attention" not in names


class Calls(nn.Module):
    def __init__(self, dropout=0.1):
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(16, 48), nn.Linear(16, 16), dropout

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class NeedsMore(Calls):
    def forward(self, x, table):
        return F.scaled_dot_product_attention(x, x, x) + table


class TestCalls:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_equal_and_ours(self, dtype):
        module, x = Calls().to(dtype).eval(), torch.randn(2, 6, 16).to(dtype)
        before = gradients(module, x)
        with patched(module) as report:
            assert [entry.now for entry in report] == ["attention"], report
            torch.testing.assert_close(gradients(module, x), before, rtol=2e-2, atol=2e-2)
            with fastllm.use_backend("reference"), torch.profiler.profile() as profile:
                module(x)
            assert "aten::scaled_dot_product_attention" not in [event.key for event in profile.key_averages()]
        assert all(map(torch.equal, gradients(module, x), before))

    def test_dropout(self):
        module, x = Calls(dropout=0.5).train(), torch.randn(2, 6, 16)
        patch(module)
        torch.manual_seed(0)
        first = module(x)
        torch.manual_seed(0)
        assert torch.equal(module(x), first)
        assert not torch.equal(module(x), first)

    def test_what_cannot_be_run_by_itself_is_left(self):
        report = patch(NeedsMore())
        assert "cannot be run by itself" in report.left[0].reason

    def test_a_compiled_graph_is_not_broken(self):
        module, x = Calls().eval(), torch.randn(2, 6, 16)
        patch(module)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x))

    def test_other_threads_and_modules_keep_torchs(self):
        ours, theirs, x = Calls().eval(), Calls().eval(), torch.randn(2, 6, 16)
        patch(ours)
        ours(x)
        with fastllm.use_backend("reference"), torch.profiler.profile() as profile:
            theirs(x)
        assert "aten::scaled_dot_product_attention" in [event.key for event in profile.key_averages()]

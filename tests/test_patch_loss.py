"""Models whose forward calls cross_entropy itself: in training their logits are promised, and never made."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")

from patch_models import VOCABULARY, batch, tiny_of
from transformers.modeling_outputs import MaskedLMOutput

from fastllm.backends import FallbackWarning
from fastllm.patching import patch
from fastllm.patching._head import Head
from fastllm.patching._own_loss import Logits

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ["bert", "roberta", "modernbert", "t5", "bart", "marian"]


def trained(name):
    model = tiny_of(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_training_only_when_asked_for(name):
    model, inputs = trained(name), batch(tiny_of(name))
    before = model(**inputs)
    report = patch(model)
    assert "linear_cross_entropy" in {entry.now for entry in report.replaced}, report
    after = model(**inputs)
    assert after.get("logits") is None
    assert not any(isinstance(value, Logits) for value in after.values())
    torch.testing.assert_close(after.loss, before.loss)
    asked = model(**inputs, output_logits=True)
    torch.testing.assert_close(asked.logits, before.logits, rtol=1e-4, atol=1e-5)
    unlabelled = model(**{k: v for k, v in inputs.items() if k != "labels"})
    assert unlabelled.logits.shape == before.logits.shape
    assert torch.is_tensor(model(**inputs, return_dict=False)[1])
    model.eval()
    assert type(model(**inputs).logits) is torch.Tensor
    report.revert()
    model.train()
    assert torch.equal(model(**inputs).loss, before.loss)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_no_product_makes_all_logits(name):
    model, inputs = trained(name), batch(tiny_of(name))
    patch(model)
    head, called = model.get_output_embeddings(), []
    original = F.linear

    def linear(x, weight, bias=None):
        called.append(weight is head.weight)
        return original(x, weight, bias)

    F.linear = linear
    try:
        model(**inputs).loss.backward()
    finally:
        F.linear = original
    assert called
    assert not any(called)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_of_16_bits(name, dtype):
    model, inputs = trained(name).to(dtype), batch(tiny_of(name))
    before = model(**inputs)
    report = patch(model)
    assert "linear_cross_entropy" in {entry.now for entry in report.replaced}, report
    after = model(**inputs)
    assert after.loss.dtype == before.loss.dtype
    torch.testing.assert_close(after.loss, before.loss, rtol=2e-2, atol=2e-2)


def test_two_losses():
    """Next-sentence prediction stays torch's."""
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForPreTraining(BertConfig(vocab_size=VOCABULARY, **small, **drop)).train()
    inputs = batch(tiny_of("bert")) | {"next_sentence_label": torch.tensor([0, 1])}
    before = model(**inputs)
    before.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    report = patch(model)
    after = model(**inputs)
    after.loss.backward()
    torch.testing.assert_close(after.loss, before.loss)
    torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=1e-4, atol=1e-6)
    # Both labels are needed for a loss, which random inputs do not have.
    head = [entry for entry in report if entry.path == "cls.predictions.decoder"]
    assert "0 times" in head[0].reason


def test_copies_and_pickles():
    model, inputs = trained("bert"), batch(tiny_of("bert"))
    patch(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            copied.get_output_embeddings().weight.mul_(2)
        loss = copied(**inputs).loss
        torch.testing.assert_close(loss, copied(**inputs, output_logits=True).loss)
        assert not torch.equal(loss, model(**inputs).loss)


def test_a_bias_that_changes_after_the_patch():
    model, inputs = trained("bart"), batch(tiny_of("bart"))
    report = patch(model)
    model.final_logits_bias.copy_(3 * torch.randn_like(model.final_logits_bias))
    loss = model(**inputs).loss
    report.revert()
    torch.testing.assert_close(loss, model(**inputs).loss)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_an_exception_in_a_forward_leaves_the_next_one_right(name):
    model, inputs = trained(name), batch(tiny_of(name))
    loss = model(**inputs).loss
    patch(model)
    with pytest.raises(IndexError):
        model(**{**inputs, "labels": inputs["labels"] + 10**6})
    assert model.eval()(**inputs).logits is not None
    torch.testing.assert_close(model.train()(**inputs).loss, loss)


@pytest.mark.slow
def test_compile_breaks_the_graph_nowhere_new():
    model, inputs = trained("bert"), batch(tiny_of("bert"))
    before = torch._dynamo.explain(model)(**inputs).graph_break_count
    loss = model(**inputs).loss
    patch(model)
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(**inputs).graph_break_count <= before
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(**inputs).loss, loss)


class TestPromise:
    def promise(self):
        module = nn.Linear(8, 11)
        hidden = torch.randn(2, 5, 8, requires_grad=True)
        like = torch.empty(2, 5, 11, device="meta")
        return module, hidden, Logits.promise(like, Head(), module, hidden)

    def test_has_shape_dtype_and_device(self):
        _, hidden, logits = self.promise()
        assert logits.shape == (2, 5, 11)
        assert logits.device == hidden.device
        assert logits.size(-1) == 11
        assert logits.float().bfloat16().dtype == torch.bfloat16
        assert logits.view(-1, 11).contiguous().shape == (10, 11)
        assert logits[:, :-1].reshape(-1, 11).shape == logits[..., :-1, :].reshape(-1, 11).shape == (8, 11)

    @pytest.mark.parametrize(
        "kwargs", [{}, {"ignore_index": 3}, {"reduction": "none"}, {"label_smoothing": 0.1}], ids=str
    )
    @pytest.mark.parametrize("shift", [False, True])
    def test_loss_and_gradients(self, shift, kwargs):
        module, hidden, logits = self.promise()
        target = torch.randint(11, (8 if shift else 10,))

        def taken(logits):
            logits = logits[:, :-1] if shift else logits
            loss = F.cross_entropy(logits.reshape(-1, 11), target, **kwargs)
            return [loss, *torch.autograd.grad(loss.sum(), (hidden, module.weight, module.bias))]

        torch.testing.assert_close(taken(logits), taken(module(hidden)))
        assert taken(logits)[0].shape == taken(module(hidden))[0].shape

    def test_a_bias_may_be_added(self):
        module, hidden, logits = self.promise()
        target, bias = torch.randint(11, (10,)), torch.randn(1, 11, requires_grad=True)

        def taken(logits):
            loss = F.cross_entropy((logits + bias).view(-1, 11), target)
            return [loss, *torch.autograd.grad(loss, (hidden, module.weight, module.bias, bias))]

        torch.testing.assert_close(taken(logits), taken(module(hidden)))

    def test_modules_of_torch_take_it(self):
        module, hidden, logits = self.promise()
        target = torch.randint(11, (10,))
        loss = nn.CrossEntropyLoss()(logits.view(-1, 11), target)
        torch.testing.assert_close(loss, F.cross_entropy(module(hidden).view(-1, 11), target))

    @pytest.mark.parametrize(
        "use",
        [
            lambda x: x.sum(),
            lambda x: torch.from_numpy(x.detach().numpy()),
            lambda x: F.cross_entropy(x.transpose(1, 2), torch.zeros(2, 5, dtype=torch.long)),
            lambda x: F.cross_entropy(x[:, 1:].reshape(-1, 11), torch.zeros(8, dtype=torch.long)),
            lambda x: x * 2,
            lambda x: x + 1,
            lambda x: x + torch.zeros(5, 11),
            lambda x: x.flip(1),
            lambda x: x.masked_fill(torch.zeros(2, 5, 11, dtype=torch.bool), 0.0),
            lambda x: x.logsumexp(-1),
            lambda x: F.cross_entropy(x.view(-1, 11), torch.zeros(10, dtype=torch.long), size_average=True),
            lambda x: x.requires_grad,
            lambda x: x.data,
            lambda x: x.to("cpu"),
            lambda x: x.view(torch.int32),
            lambda x: F.cross_entropy(x.view(-1, 11), torch.full((10, 11), 1 / 11)),
            lambda x: torch.where(torch.ones(2, 5, 1, dtype=torch.bool), 1.0, x),
            lambda x: F.cross_entropy(
                x.view(-1, 11), torch.arange(10), weight=torch.arange(1.0, 12.0), label_smoothing=0.1
            ),
        ],
        ids=[
            "sum",
            "numpy",
            "transposed",
            "other rows",
            *["times", "plus", "rows", "flip", "fill", "lse", "legacy"],
            "attribute",
            "data",
            "device",
            "elsewhere",
            "probabilities",
            "second argument",
            "classes",
        ],
    )
    def test_what_else_it_is_used_for_makes_it(self, use):
        module, _, logits = self.promise()
        with pytest.warns(FallbackWarning, match="Linear makes its logits for"):
            found = use(logits)
        assert type(found) is not Logits
        torch.testing.assert_close(found, use(module(logits.hidden)))

    def test_what_is_written_to_it_stays(self):
        module, hidden, logits = self.promise()
        target = torch.randint(11, (10,))
        expected = module(hidden)
        with pytest.warns(FallbackWarning):
            logits[..., 0] = 5.0
        expected[..., 0] = 5.0
        loss = [F.cross_entropy(x.view(-1, 11), target) for x in (logits, expected)]
        torch.testing.assert_close(*loss)


@pytest.mark.parametrize("name", [*NAMES, "llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_what_it_gave(name, dtype):
    """Losses are of float32, where a GradScaler's scale would overflow 16 bits."""
    inputs = batch(tiny_of(name))

    def run(model, **kwargs):
        with torch.autocast("cpu", dtype):
            return model(**inputs, **kwargs)

    model = trained(name)
    before, exact = run(model), model(**inputs).loss
    patch(model)
    after, asked = run(model), run(model, output_logits=True)
    assert after.loss.dtype == before.loss.dtype == asked.loss.dtype == torch.float32
    assert asked.logits.dtype == before.logits.dtype
    assert abs(after.loss - exact) <= 2 * abs(before.loss - exact) + 1e-2
    scales = []
    for m, loss in ((trained(name), None), (model, after.loss)):
        scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(m.parameters(), lr=1e-3)
        scaler.scale(run(m).loss if loss is None else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales[1] == scales[0]
    assert scales[0] == 2.0**16 or name == "gemma2"


def masked_lm(forward):
    """A BERT that does more with its logits."""
    from transformers import BertForMaskedLM

    model = trained("bert")
    model.__class__ = type("Odd", (BertForMaskedLM,), {"forward": forward})
    return model


def penalized(self, *args, attention_mask=None, **kwargs):
    """Where there is a mask, the loss is that of the tokens it shows, and their logits are kept small."""
    labels = kwargs.pop("labels", None)
    logits = self.cls(self.bert(*args, attention_mask=attention_mask, **kwargs).last_hidden_state)
    loss = None
    if labels is not None:
        shown = slice(None) if attention_mask is None else attention_mask.bool()
        logits_shown, labels_shown = (logits, labels) if attention_mask is None else (logits[shown], labels[shown])
        loss = F.cross_entropy(logits_shown.reshape(-1, VOCABULARY), labels_shown.reshape(-1))
        if attention_mask is not None:
            loss = loss + 1e-2 * logits_shown.logsumexp(-1).square().mean()
    return MaskedLMOutput(loss=loss, logits=logits)


def test_a_loss_that_uses_the_mask_is_tried_with_one():
    (entry,) = patch(masked_lm(penalized), only="linear_cross_entropy")
    assert entry.reason == "its loss is not that of its head's own logits"


def scaled_in_training(self, *args, scaled=False, **kwargs):
    labels = kwargs.pop("labels", None)
    logits = self.cls(self.bert(*args, **kwargs).last_hidden_state)
    loss = None
    if labels is not None:
        if scaled == "in place":
            logits[..., 0] = -20.0
        elif scaled:
            logits = logits * 3
        loss = F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))
    return MaskedLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("scaled", [True, "in place"])
def test_logits_that_are_used_for_more_than_in_the_trial_are_made(scaled):
    model, inputs = masked_lm(scaled_in_training), batch(tiny_of("bert"))

    def results():
        model.zero_grad()
        loss = model(**inputs, scaled=scaled).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = results()
    assert "linear_cross_entropy" in {entry.now for entry in patch(model).replaced}
    with pytest.warns(FallbackWarning, match="makes its logits for"):
        found = results()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_loss_that_differs_in_training_is_refused_in_every_dtype(name, dtype):
    model = trained(name).to(dtype)
    own = type(model).forward

    def forward(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        if out.loss is not None and self.training:
            penalty = 1e-2 * next(self.get_output_embeddings().parameters()).float().square().mean()
            out.loss = out.loss + penalty + 0.01 * out.logits.float().logsumexp(-1).square().mean()
        return out

    model.__class__ = type("Penalized", (type(model),), {"forward": forward})
    (entry,) = patch(model, only="linear_cross_entropy")
    assert entry.now is None, entry
    assert name == "llama" or entry.reason == "its loss uses its logits in logsumexp"


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.value = model, nn.Linear(4, 1)

    def forward(self, **kwargs):
        return self.model(**kwargs)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_head_of_a_model_inside_of_another(name):
    peft = pytest.importorskip("peft")

    def wrapped(kind, model):
        if kind == "PEFT":
            targets = ["q_proj"] if name == "llama" else ["query"]
            return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
        return Holder(model) if kind == "holder" else torch.compile(model)

    inputs = batch(tiny_of(name))
    for kind in ("PEFT", "holder", "compiled"):
        model = wrapped(kind, trained(name))
        keys = [set(vars(m)) for m in model.modules()]
        report = patch(model)
        found = {entry.now: entry.path for entry in report.replaced}
        assert {"attention", "linear_cross_entropy"} <= set(found), report
        assert found["linear_cross_entropy"] in dict(model.named_modules())
        if kind != "compiled":
            torch.testing.assert_close(model(**inputs).loss, wrapped(kind, trained(name))(**inputs).loss)
            assert model(**inputs).get("logits") is None
        report.revert()
        assert [set(vars(m)) for m in model.modules()] == keys
        if kind != "compiled":
            pickle.dumps(model)


def test_two_models_in_one_module():
    model = nn.ModuleDict({"policy": trained("llama"), "value": trained("bert")})
    report = patch(model)
    heads = [entry.path for entry in report if entry.now == "linear_cross_entropy"]
    attentions = [entry.path for entry in report if entry.now == "attention"]
    assert heads == ["policy.lm_head", "value.cls.predictions.decoder"]
    assert attentions == ["policy", "value"]
    assert {entry.path.partition(".")[0] for entry in patch(nn.ModuleDict({"a": trained("llama")}), only="a")} == {"a"}

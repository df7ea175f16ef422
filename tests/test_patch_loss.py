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

from fastllm.patching import patch
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
        return module, hidden, Logits.promise(like, hidden, module)

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
            lambda x: float(x.sum()),
            lambda x: x.numpy(),
            lambda x: F.cross_entropy(x.transpose(1, 2), torch.zeros(2, 5, dtype=torch.long)),
            lambda x: F.cross_entropy(x[:, 1:].reshape(-1, 11), torch.zeros(8, dtype=torch.long)),
            lambda x: x * 2,
            lambda x: x + 1,
            lambda x: x + torch.zeros(5, 11),
            lambda x: x.flip(1),
            lambda x: x.masked_fill(torch.zeros(2, 5, 11, dtype=torch.bool), 0.0),
            lambda x: x.logsumexp(-1),
            lambda x: F.cross_entropy(x.view(-1, 11), torch.zeros(10, dtype=torch.long), size_average=True),
        ],
        ids=["float", "numpy", "transposed", "other rows", *["times", "plus", "rows", "flip", "fill", "lse", "legacy"]],
    )
    def test_what_it_cannot_be_used_for_says_so(self, use):
        with pytest.raises(NotImplementedError, match="output_logits=True"):
            use(self.promise()[2])

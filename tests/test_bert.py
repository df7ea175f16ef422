"""Bert: padding, heads, pre-training and fine-tuning. (Against transformers' model: test_hf.py.)"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_suite import away_from_initial_values, losses_of_training, rows, same_gradients, text_windows

from fastllm.models import Bert, BertConfig, mask_tokens

SMALL = {"vocab_size": 61, "context": 24, "layers": 2, "heads": 4, "width": 32, "dropout": 0.0}
LENGTHS = [9, 24, 1, 16]
HEADS = ("mlm", "pretraining", "classification", "tokens", "span", None)


def make(**changes) -> Bert:
    torch.manual_seed(0)
    return away_from_initial_values(Bert(BertConfig(**{**SMALL, **changes})))


def batch() -> torch.Tensor:
    return rows(3, 61, LENGTHS, pad=0)


def targets_of(head: str | None):
    labels = rows(3, 61, LENGTHS, pad=-100, seed=1)
    labels[:, ::2] = -100
    labels[2, 0] = 5  # of the row of one token
    return {
        "mlm": labels,
        "pretraining": (labels, torch.tensor([0, 1, 1, 0])),
        "classification": torch.tensor([1, 0, 2, 2]),
        "tokens": labels.where(labels == -100, labels % 3),
        "span": torch.tensor([[0, 8], [3, 20], [0, 0], [15, 15]]),
    }.get(head)


@pytest.mark.parametrize("style", [{}, {"norm_first": True, "mlp": "swiglu", "norm": "rms_norm", "bias": False}])
@pytest.mark.parametrize("position", ["learned", "rotary", "sinusoidal"])
def test_fastllm_and_torch_ops_agree_on_padded_rows(position, style):
    """One leaves padding out, the other masks it: loss and every gradient are the same."""
    models = [make(position=position, ops=ops, **style) for ops in ("fastllm", "torch")]
    models[1].load_state_dict(models[0].state_dict())
    losses = [model(batch(), targets_of("mlm")) for model in models]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    same_gradients(*models)


@pytest.mark.parametrize("ops", ["fastllm", "torch"])
@pytest.mark.parametrize("head", HEADS)
def test_padding_changes_nothing(head, ops):
    """A batch is worth what its rows are one by one, without padding."""
    model = make(head=head, labels=3, ops=ops).eval()
    tokens = batch()
    together = model(tokens)
    together = together if isinstance(together, tuple) else (together,)
    for row, length in enumerate(LENGTHS):
        alone = model(tokens[row : row + 1, :length])
        for a, b in zip(together, alone if isinstance(alone, tuple) else (alone,), strict=True):
            a = a[row : row + 1]
            if head == "span":
                assert (a[..., length:] == -torch.inf).all()
                a = a[..., :length]
            elif a.ndim == 3:
                a = a[:, :length]
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_mask_says_what_padding_is_wherever_it_lies():
    model = make().eval()
    tokens = batch()[:1]
    left = torch.cat((torch.full((1, 5), 7), tokens[:, :9]), 1)
    mask = torch.arange(14)[None] >= 5
    stock = make(ops="torch").eval()
    stock.load_state_dict(model.state_dict())
    found = model(left, mask_BT=mask)[mask]
    torch.testing.assert_close(found, stock(left, mask_BT=mask)[mask], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, model(left)[mask], atol=1e-2)


def test_order_within_a_row_matters_and_rows_do_not_see_each_other():
    model = make().eval()
    tokens = batch()
    turned = tokens.clone()
    turned[1] = tokens[1].flip(0)
    before, after = model(tokens), model(turned)
    torch.testing.assert_close(before[[0, 2, 3]], after[[0, 2, 3]], rtol=0, atol=1e-6)
    assert not torch.allclose(before[1], after[1].flip(0), atol=1e-2)


@pytest.mark.parametrize("head", HEADS[:-1])
def test_a_small_batch_is_learned_by_heart(head):
    torch.manual_seed(0)
    model = Bert(BertConfig(**SMALL, head=head, labels=3))
    losses = losses_of_training(model, lambda step: (batch(), targets_of(head)), 100)
    assert losses[-1] < 0.15 < 0.6 < losses[0]


def test_pre_training_and_fine_tuning_on_real_text():
    """Masked bytes of Python's help texts; then whether a window has a digit, from the same encoder."""
    windows = text_windows(256, 32)
    torch.manual_seed(0)
    model = Bert(BertConfig(vocab_size=257, context=32, layers=2, heads=4, width=64, pad_token=None, dropout=0.0))
    generator = torch.Generator().manual_seed(0)

    def masked(step: int):
        some = windows[torch.randint(256, (32,), generator=generator)]
        return mask_tokens(some, mask_token=256, vocab_size=257, generator=generator)

    losses = losses_of_training(model, masked, 60)
    assert sum(losses[-5:]) / 5 < 3.2 < 5 < losses[0]
    digits = ((windows >= 48) & (windows < 58)).any(1).long()
    tuned = model.with_head("classification", labels=2)
    assert torch.equal(tuned.embedding.weight, model.embedding.weight)
    losses = losses_of_training(
        tuned, lambda step: (windows[step % 4 * 64 :][:64], digits[step % 4 * 64 :][:64]), 40, 1e-3
    )
    assert sum(losses[-4:]) / 4 < 0.8 * sum(losses[:4]) / 4


def test_masking_follows_its_shares():
    tokens = torch.randint(3, 1000, (200, 200), generator=torch.Generator().manual_seed(0))
    special = tokens < 100
    found = mask_tokens(tokens, 1, 1000, special=special, generator=torch.Generator().manual_seed(1))
    chosen = found.targets != -100
    assert not (chosen & special).any()
    assert torch.equal(found.targets[chosen], tokens[chosen])
    assert torch.equal(found.tokens[~chosen], tokens[~chosen])
    assert chosen[~special].float().mean().item() == pytest.approx(0.15, abs=0.006)
    now = found.tokens[chosen]
    assert (now == 1).float().mean().item() == pytest.approx(0.8, abs=0.015)
    assert (now == tokens[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.012)
    again = mask_tokens(tokens, 1, 1000, special=special, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.tokens, again.tokens)
    other = mask_tokens(tokens, 1, 1000, special=special, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(found.tokens, other.tokens)


@pytest.mark.parametrize("seed", range(20))
def test_of_a_small_batch_something_is_chosen(seed):
    tokens = torch.tensor([[5, 6, 7], [8, 0, 0]])
    found = mask_tokens(tokens, 1, 61, special=tokens == 0, generator=torch.Generator().manual_seed(seed))
    assert (found.targets != -100).any()
    assert (found.targets[tokens == 0] == -100).all()
    nothing = mask_tokens(tokens, 1, 61, special=torch.ones_like(tokens, dtype=torch.bool))
    assert torch.equal(nothing.tokens, tokens)
    with pytest.raises(ValueError, match=r"special has shape \(3,\), tokens \(2, 3\)"):
        mask_tokens(tokens, 1, 61, special=tokens[0] == 0)


@pytest.mark.parametrize("ops", ["fastllm", "torch"])
@pytest.mark.parametrize("head", ["mlm", "tokens"])
def test_padding_has_no_target(head, ops):
    model, targets = make(head=head, labels=3, ops=ops), targets_of(head)
    everywhere = targets.where(batch() != 0, 1)
    torch.testing.assert_close(model(batch(), everywhere), model(batch(), targets))


@pytest.mark.parametrize(
    ("head", "smoothing"), [(head, s) for head in HEADS[:-1] for s in (0.0, 0.2) if head != "span" or s == 0]
)
def test_sum_by_count_is_the_mean(head, smoothing):
    model, targets = make(head=head, labels=3, label_smoothing=smoothing), targets_of(head)
    if head == "span":
        targets[1] = -100  # a row without an answer
    count = {"classification": 4, "span": 3, "pretraining": model.count(targets)}.get(head)
    assert model.count(targets) == (count or (targets != -100).sum())
    options = model.prepare(batch(), targets)
    total = model(batch(), targets, reduction="sum", **options)
    torch.testing.assert_close(total / model.count(targets), model(batch(), targets))


def test_label_smoothing_is_of_training_alone():
    model, targets = make(label_smoothing=0.2), targets_of("mlm")
    for training, smoothing in ((True, 0.2), (False, 0.0)):
        logits = model.train(training)(batch()).flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)
        torch.testing.assert_close(model(batch(), targets), expected)
    assert model.with_head("span", label_smoothing=0.0).config.label_smoothing == 0


def test_options_are_those_that_a_forward_finds():
    model, targets = make(head="pretraining"), targets_of("pretraining")
    types = (torch.arange(24) > 7).long().expand(4, 24)
    mask = batch() != 0
    mask[1, 20:] = False
    options = model.prepare(batch(), targets, types_BT=types, mask_BT=mask)
    assert sorted(options) == ["chosen_M", "layout", "types_BT"]
    found = model(batch(), targets, **options)
    assert torch.equal(found, model(batch(), targets, types_BT=types, mask_BT=mask))
    assert not torch.equal(found, model(batch(), targets))


def test_whole_words_are_masked_whole():
    words = torch.arange(60).div(3, rounding_mode="floor").expand(50, 60).contiguous()
    tokens = torch.randint(3, 1000, (50, 60), generator=torch.Generator().manual_seed(0))
    found = mask_tokens(tokens, 1, 1000, words_BT=words, generator=torch.Generator().manual_seed(1))
    chosen = (found.targets != -100).view(50, 20, 3)
    assert torch.equal(chosen.any(-1), chosen.all(-1))
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.04)


@pytest.mark.parametrize("ops", ["fastllm", "torch"])
def test_vectors(ops):
    model = make(ops=ops, dropout=0.5).train()
    tokens = batch()
    each = model.vectors(tokens, pool=None)
    assert each.shape == (4, 24, 32)
    for row, length in enumerate(LENGTHS):
        assert not each[row, length:].any()
        torch.testing.assert_close(model.vectors(tokens)[row], each[row, :length].mean(0))
        torch.testing.assert_close(model.vectors(tokens, pool="first")[row], each[row, 0])
    assert model.training
    with pytest.raises(ValueError, match="pool must be 'mean', 'first' or None, got 'max'"):
        model.vectors(tokens, pool="max")


@pytest.mark.parametrize("head", ["mlm", "classification", "span"])
def test_compiles_without_graph_breaks(head):
    model = make(head=head, labels=3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens, targets = batch(), targets_of(head)
    for turned in (0, 1):
        tokens, targets = tokens.roll(turned, 0), targets.roll(turned, 0)
        layout = model.layout(tokens)
        loss = compiled(tokens, targets, layout=layout)
        torch.testing.assert_close(loss, model(tokens, targets))
        if head == "mlm":
            loss = compiled(tokens, targets, layout=layout, chosen_M=model.chosen(targets, layout))
            torch.testing.assert_close(loss, model(tokens, targets))


TWO = torch.tensor([[1, 2]])
PADDED = torch.tensor([[1, 2], [3, 0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.tensor([[1, 61]])), "token 61 is outside the vocabulary of 61"),
        (lambda m: m(torch.tensor([[-1, 5]])), "token -1 is outside"),
        (lambda m: m(torch.ones(1, 25, dtype=torch.int64)), "25 positions do not fit into the context of 24"),
        (lambda m: m(torch.ones(2, 0, dtype=torch.int64)), r"not empty, got \(2, 0\)"),
        (lambda m: m(torch.ones(4, dtype=torch.int64)), r"shape \(B, T\), not empty, got \(4,\)"),
        (lambda m: m(torch.tensor([[1, 2], [0, 0]])), "row 1 is all padding"),
        (
            lambda m: m(torch.tensor([[1, 2]]), types_BT=torch.tensor([[0, 2]])),
            r"token types must be in \[0, 2\), got 2",
        ),
        (
            lambda m: m(torch.tensor([[1, 2]]), types_BT=torch.tensor([[0]])),
            r"types have shape \(1, 1\), tokens \(1, 2\)",
        ),
        (lambda m: m(torch.tensor([[1, 2]]), mask_BT=torch.ones(1, 3)), r"mask has shape \(1, 3\), tokens \(1, 2\)"),
        (lambda m: mask_tokens(torch.tensor([[61]]), 1, 61), "token 61 is outside the vocabulary of 61"),
        (lambda m: mask_tokens(torch.tensor([[6]]), 1, 61, share=1.0), r"share must be in \(0, 1\), got 1.0"),
        (lambda m: m(TWO, torch.tensor([[1, 2, 3]])), r"must have shape \[\(1, 2\)\], got \[\(1, 3\)\]"),
        (lambda m: m(TWO, TWO, reduction="none"), "reduction must be 'mean' or 'sum', got 'none'"),
        (lambda m: m(TWO, layout=m.layout(batch())), r"the layout is of \(4, 24\) tokens, not \(1, 2\)"),
        (lambda m: m(torch.tensor([[1, 61]]), layout=m.layout(TWO)), "token 61 is outside the vocabulary of 61"),
        (lambda m: make(head="span")(PADDED, torch.tensor([[0, 1], [0, 1]])), "the answer of row 1 lies in padding"),
        (lambda m: make(head="classification")(PADDED.flip(1)), "row 1 begins with padding, but head='classification'"),
        (lambda m: make(head=None)(TWO, TWO), "a model without a head has no targets"),
        (lambda m: mask_tokens(TWO, 61, 61), "mask_token 61 is outside the vocabulary of 61"),
        (lambda m: mask_tokens(TWO, 1, 61, words_BT=TWO), "words must be from 0 to 1, got 2"),
        (lambda m: mask_tokens(TWO[:, :0], 1, 61), r"not empty, got \(1, 0\)"),
        (lambda m: m(TWO, types_BT=torch.tensor([[-1, 1]])), r"token types must be in \[0, 2\), got -1"),
        (lambda m: BertConfig(tie_embeddings=False), "tie_embeddings=False is not there"),
        (lambda m: m.with_head("span", heads=2, labels=3), "heads is the encoder's, which stays"),
        (lambda m: BertConfig(head="nothing"), "head must be one of .* or None, got 'nothing'"),
        (lambda m: BertConfig(head="classification", pooler=False), "head='classification' needs a pooler"),
        (
            lambda m: BertConfig(head="span", label_smoothing=0.1),
            "label_smoothing must be 0 for head='span', .* got 0.1",
        ),
        (lambda m: BertConfig(labels=0), "BertConfig: labels must be a positive int, got 0"),
        (lambda m: BertConfig(pad_token=30522), "pad_token must be a token, below vocab_size=30522, got 30522"),
        (lambda m: BertConfig.preset("bert"), "there is no preset 'bert', only bert-base, "),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())


def test_tokens_that_are_no_integers_are_an_error():
    with pytest.raises(TypeError, match=r"tokens must be a tensor of int64 or int32, got torch\.float32"):
        make()(torch.ones(1, 2))


def test_the_base_size_has_its_number_of_parameters():
    with torch.device("meta"):
        model = Bert(BertConfig.preset("bert-base", head="pretraining"))
    assert model.num_parameters() == 110_106_428  # that of BertForPreTraining
    assert replace(model.config, head=None).head is None

"""The encoder-decoder Transformer: padding, caches, greedy and beam search. (Its weights in test_hf.py.)"""

from __future__ import annotations

import itertools

import pytest
import torch
from model_suite import away_from_initial_values, losses_of_training, rows, same_gradients, text_windows

from fastllm.models import Transformer, TransformerConfig, beam_search, load_hf

SMALL = {"vocab_size": 61, "context": 24, "layers": 2, "heads": 4, "width": 32, "dropout": 0.0}
STYLES = {
    "vaswani": {},
    "pre-norm": {"norm_first": True, "encoder_layers": 1},
    "bart": {"position": "learned", "position_offset": 2, "embedding_norm": True, "mlp": "gelu_erf", "start_token": 2},
    "t5": {
        "position": "relative",
        "norm": "rms_norm",
        "norm_first": True,
        "bias": False,
        "mlp": "geglu",
        "head_size": 6,
    },
    "rotary": {"position": "rotary", "kv_heads": 2, "qk_norm": True, "tie_embeddings": False},
    "two vocabularies": {"source_vocab_size": 70, "logits_bias": True},
}
SOURCES, TARGETS = [9, 24, 1, 16], [5, 1, 17, 12]


@pytest.fixture(params=STYLES)
def style(request) -> dict:
    return STYLES[request.param]


def make(**changes) -> Transformer:
    torch.manual_seed(0)
    return away_from_initial_values(Transformer(TransformerConfig(**{**SMALL, **changes})))


def sources() -> torch.Tensor:
    return rows(3, 61, SOURCES, pad=0)


def targets() -> torch.Tensor:
    return rows(3, 61, TARGETS, pad=-100, seed=1)


def test_fastllm_and_torch_ops_agree_on_padded_rows(style):
    models = [make(**style, ops=ops) for ops in ("fastllm", "torch")]
    models[1].load_state_dict(models[0].state_dict())
    losses = [model(sources(), targets()) for model in models]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    same_gradients(*models, atol=2e-5)


@pytest.mark.parametrize("ops", ["fastllm", "torch"])
def test_padding_changes_nothing(style, ops):
    model = make(**style, ops=ops).eval()
    source, target = sources(), targets()
    logits = model(source, tokens_BT=model.shifted(target))
    total = model(source, target, reduction="sum")
    alone = 0
    for row, (s, t) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        one, wanted = source[row : row + 1, :s], target[row : row + 1, :t]
        torch.testing.assert_close(
            logits[row : row + 1, :t], model(one, tokens_BT=model.shifted(wanted)), rtol=1e-4, atol=1e-4
        )
        alone = alone + model(one, wanted, reduction="sum")
    torch.testing.assert_close(total, alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("padded_source", "padded_target"), [(True, False), (False, True), (False, False)])
def test_one_side_alone_may_be_padded(padded_source, padded_target):
    ours, stock = make(), make(ops="torch")
    stock.load_state_dict(ours.state_dict())
    source = sources() if padded_source else rows(3, 61, [11] * 4, pad=0)
    target = targets() if padded_target else rows(3, 61, [7] * 4, pad=-100)
    torch.testing.assert_close(ours(source, target), stock(source, target), rtol=1e-5, atol=1e-6)


def test_the_decoder_sees_no_future_and_all_of_the_source():
    model = make().eval()
    source, tokens = sources(), rows(3, 61, [10] * 4, pad=0)
    later = tokens.clone()
    later[:, 6:] = 9
    a, b = model(source, tokens_BT=tokens), model(source, tokens_BT=later)
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=0, atol=1e-6)
    other = source.clone()
    other[:, 0] = 8
    assert (model(other, tokens_BT=tokens) - a).abs().amax(-1).min() > 1e-4


def test_label_smoothing_is_of_training_alone():
    model = make(label_smoothing=0.2)
    source, target = sources(), targets()
    logits = model(source, tokens_BT=model.shifted(target)).flatten(0, 1)
    for training, smoothing in ((True, 0.2), (False, 0.0)):
        model.train(training)
        expected = torch.nn.functional.cross_entropy(logits, target.flatten(), label_smoothing=smoothing)
        torch.testing.assert_close(model(source, target), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model(source, target, label_smoothing=0.1),
        torch.nn.functional.cross_entropy(logits, target.flatten(), label_smoothing=0.1),
    )


@pytest.mark.parametrize("ops", ["fastllm", "torch"])
def test_sum_by_count_is_the_mean_and_every_weight_is_trained(style, ops):
    model, target = make(**style, ops=ops), targets()
    target[3, 4] = 0  # a pad token amid others
    assert model.count(target) == sum(TARGETS) - 1
    options = model.prepare(sources(), target)
    total = model(sources(), target, reduction="sum", **options)
    torch.testing.assert_close(total / model.count(target), model(sources(), target))
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_a_layout_without_targets_is_enough_for_given_tokens():
    model = make().eval()
    tokens = model.shifted(targets())
    mask = sources() != 0
    mask[1, 5:] = False
    options = model.prepare(sources(), None, source_mask_BS=mask)
    found = model(sources(), tokens_BT=tokens, **options)
    assert torch.equal(found, model(sources(), tokens_BT=tokens, source_mask_BS=mask))


@pytest.mark.parametrize("ops", ["fastllm", "torch"])
def test_pad_tokens_are_no_targets(ops):
    model = make(ops=ops)
    padded = targets().masked_fill(targets() == -100, 0)
    torch.testing.assert_close(model(sources(), padded), model(sources(), targets()), rtol=0, atol=0)


def test_targets_start_with_the_start_token():
    assert make(start_token=2).shifted(torch.tensor([[5, 6, -100]])).tolist() == [[2, 5, 6]]
    assert make().shifted(torch.tensor([[5, -100, -100]])).tolist() == [[0, 5, 0]]


@pytest.mark.parametrize("ops", ["fastllm", "torch"])
def test_greedy_search_with_caches_is_the_loop_without(style, ops):
    model = make(**style, ops=ops).eval()
    source = sources()
    tokens = torch.full((4, 1), model.config.first_token)
    scores, done = torch.zeros(4), torch.zeros(4, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(15):
            logits = model(source, tokens_BT=tokens)[:, -1]
            logits[:, 0] = -torch.inf
            best = logits.log_softmax(-1).max(-1)
            scores += best.values.masked_fill(done, 0)
            tokens = torch.cat((tokens, best.indices.masked_fill(done, 0)[:, None]), 1)
            done |= best.indices == 1
    found = model.generate(source, 15)
    length = found.tokens.shape[2]
    assert torch.equal(found.tokens[:, 0], tokens[:, 1 : length + 1])
    assert not tokens[:, length + 1 :].any()
    lengths = (tokens[:, 1:] != 0).sum(1)
    torch.testing.assert_close(found.scores[:, 0], scores / lengths, rtol=1e-4, atol=1e-4)


def test_sampling_depends_on_its_seed_alone():
    model = make()
    first = model.generate(sources(), 8, temperature=1.0, seed=3)
    torch.manual_seed(5)
    assert torch.equal(first.tokens, model.generate(sources(), 8, temperature=1.0, seed=3).tokens)
    assert not torch.equal(first.tokens, model.generate(sources(), 8, temperature=1.0, seed=4).tokens)
    assert model.training


def test_beams_as_wide_as_everything_find_the_best():
    """Over a vocabulary of 5 and up to 4 tokens, all continuations are tried."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 5, generator=generator).mul(1.5).log_softmax(-1)  # log p(next | last); 1 is the end
    best = []
    for length in range(1, 5):
        for tokens in itertools.product(range(5), repeat=length):
            if 1 in tokens[:-1] or (tokens[-1] != 1 and length < 4):
                continue
            chain = (0, *tokens)
            score = sum(table[a, b].item() for a, b in itertools.pairwise(chain))
            best.append((score / length**0.7, [*tokens, *[0] * (4 - length)]))
    best.sort(reverse=True)

    def step(tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        return table[tokens[:, 0]]

    found = beam_search(
        step, torch.zeros(2, dtype=torch.int64), beams=250, max_new_tokens=4, end_token=1, pad_token=0,
        length_penalty=0.7, n_best=6,
    )  # fmt: skip
    assert found.tokens.shape == (2, 6, 4)
    for row in range(2):
        assert found.scores[row].tolist() == pytest.approx([score for score, _ in best[:6]], abs=1e-5)
        for score, tokens in zip(found.scores[row].tolist(), found.tokens[row].tolist(), strict=True):
            assert score == pytest.approx(next(s for s, t in best if t == tokens), abs=1e-5)


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    """transformers' Marian with random weights, away from zero so that beams differ, and ours."""
    transformers = pytest.importorskip("transformers")
    from test_hf import MARIAN

    config = transformers.MarianConfig(**{**MARIAN, "scale_embedding": True, "max_position_embeddings": 40})
    torch.manual_seed(0)
    theirs = away_from_initial_values(transformers.MarianMTModel(config).eval(), 0.3)
    theirs.final_logits_bias.normal_()[0, 0] = 3  # so that some hypotheses end early
    folder = tmp_path_factory.mktemp("marian")
    theirs.save_pretrained(folder)
    return theirs, load_hf(folder)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(("beams", "n_best"), [(2, 1), (4, 4), (7, 3)])
@pytest.mark.parametrize("force_end", [False, True])
def test_beam_search_is_that_of_transformers(marian, beams, n_best, length_penalty, force_end):
    theirs, ours = marian
    source = rows(1, 30, [11, 4, 7, 1, 9], pad=30)
    expected = theirs.generate(
        input_ids=source,
        attention_mask=(source != 30).long(),
        num_beams=beams,
        num_return_sequences=n_best,
        length_penalty=length_penalty,
        max_new_tokens=12,
        do_sample=False,
        early_stopping=False,
        bad_words_ids=[[30]],
        forced_eos_token_id=0 if force_end else None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = ours.generate(source, 12, beams=beams, n_best=n_best, length_penalty=length_penalty, force_end=force_end)
    sequences = expected.sequences.view(5, n_best, -1)[:, :, 1:]
    assert found.tokens.tolist() == sequences.tolist()
    if length_penalty < 2:
        assert ((found.tokens == 0).int().argmax(2) < 11).any(), "no hypothesis ended before the limit"
    torch.testing.assert_close(found.scores.flatten(), expected.sequences_scores, rtol=1e-4, atol=1e-4)


def test_one_beam_is_transformers_greedy_search(marian):
    theirs, ours = marian
    source = rows(1, 30, [11, 4, 7, 1, 9], pad=30)
    expected = theirs.generate(
        input_ids=source, attention_mask=(source != 30).long(), num_beams=1, do_sample=False, max_new_tokens=12,
        bad_words_ids=[[30]], forced_eos_token_id=None,
    )  # fmt: skip
    assert ours.generate(source, 12).tokens[:, 0].tolist() == expected[:, 1:].tolist()


def test_a_small_batch_is_learned_by_heart_and_translated(style):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**{**SMALL, **style}, label_smoothing=0.0))
    source, target = sources(), targets()
    for row, length in enumerate(TARGETS):
        target[row, length - 1] = 1
    losses = losses_of_training(model, lambda step: (source, target), 80)
    assert losses[-1] < 0.2 < 2 < losses[0]
    found = model.generate(source, 20, beams=3).tokens[:, 0]
    for row, length in enumerate(TARGETS):
        assert found[row, :length].tolist() == target[row, :length].tolist()


def test_loss_falls_on_real_text():
    """Lines of Python's help texts to the same in capitals."""
    text = text_windows(256, 24)
    capitals = torch.where((text >= 97) & (text < 123), text - 32, text)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=256, context=24, layers=1, heads=4, width=64, dropout=0.0))
    losses = losses_of_training(model, lambda step: (text[step % 8 * 32 :][:32], capitals[step % 8 * 32 :][:32]), 60)
    assert losses[-1] < 0.6 * losses[0]


def test_compiles_without_graph_breaks():
    model = make()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for turned in (0, 1):
        source, target = sources().roll(turned, 0), targets().roll(turned, 0)
        loss = compiled(source, target, layouts=model.layouts(source, target))
        torch.testing.assert_close(loss, model(source, target))


ONE = torch.tensor([[3, 4]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.tensor([[3, 61]]), ONE), "token 61 is outside the vocabulary of 61"),
        (lambda m: m(ONE, torch.tensor([[61, 3]])), "token 61 is outside the vocabulary of 61"),
        (lambda m: m(torch.ones(1, 25, dtype=torch.int64), ONE), "25 positions do not fit into the context of 24"),
        (lambda m: m(ONE, torch.ones(1, 25, dtype=torch.int64)), "25 positions do not fit into the context of 24"),
        (lambda m: m(ONE), "give targets, or tokens for the decoder"),
        (lambda m: m(torch.ones(1, 0, dtype=torch.int64), ONE), r"source must have shape .* got \(1, 0\)"),
        (
            lambda m: m(ONE, torch.ones(1, 0, dtype=torch.int64)),
            r"targets must have .* not empty, got \(1, 0\)",
        ),
        (lambda m: m(torch.tensor([[3, 4], [0, 0]]), ONE.expand(2, 2)), "source: row 1 is all padding"),
        (lambda m: m(ONE, torch.tensor([[-100, -100]])), "targets: row 0 is all padding"),
        (lambda m: m(ONE, ONE.expand(2, 2)), r"source has shape \(1, 2\), targets \(2, 2\)"),
        (lambda m: m(ONE, ONE, source_mask_BS=torch.ones(1, 3)), r"source has shape \(1, 2\), its mask \(1, 3\)"),
        (lambda m: m(ONE, ONE, tokens_BT=ONE[:, :1]), r"targets have shape \(1, 2\), the decoder's tokens \(1, 1\)"),
        (lambda m: m(ONE, ONE, layouts=m.layouts(sources(), targets())), r"the layout is of \(4, 24\) tokens"),
        (lambda m: m(ONE, ONE, reduction="none"), "Transformer: reduction must be 'mean' or 'sum', got 'none'"),
        (lambda m: m.generate(ONE, 5, forbidden=(61,)), "forbidden token 61 is outside the vocabulary of 61"),
        (lambda m: m.generate(ONE, 5, beams=2, length_penalty=float("nan")), "length_penalty must be finite, got nan"),
        (lambda m: TransformerConfig(relative_buckets=2), "relative_buckets is at least 4"),
        (lambda m: TransformerConfig(position_offset=2), "position_offset is at least 0, and for learned positions"),
        (lambda m: m.generate(ONE, 25), r"max_new_tokens must be in \[1, 24\], got 25"),
        (lambda m: m.generate(ONE, 5, beams=0), "beams must be at least 1"),
        (lambda m: m.generate(ONE, 5, beams=2, n_best=3), r"n_best in \[1, beams\], got 2 and 3"),
        (lambda m: m.generate(ONE, 5, n_best=2), "n_best=2 needs as many beams, got 1"),
        (lambda m: m.generate(ONE, 5, beams=2, temperature=1.0), "are for one beam, got beams=2"),
        (lambda m: TransformerConfig(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda m: TransformerConfig(end_token=37000), "end_token must be a token, below vocab_size=37000"),
        (lambda m: TransformerConfig(encoder_layers=0), "num_encoder_layers must be a positive int, got 0"),
        (lambda m: TransformerConfig.preset("base"), "there is no preset 'base', only transformer-base"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())

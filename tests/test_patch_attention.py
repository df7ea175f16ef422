"""Padded and packed batches of transformers' models, whose attention runs sequence by sequence."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from patch_models import VOCABULARY, tiny_of
from transformers import masking_utils

import fastllm
from fastllm import ops
from fastllm.patching import _attention

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of attention_varlen, which also short rows take."""
    seen, original = [], ops.attention_varlen
    monkeypatch.setattr(_attention, "UNPADDED_ON_CPU", 0)
    monkeypatch.setattr(ops, "attention_varlen", lambda *a, **k: seen.append(k) or original(*a, **k))
    return seen


def tokens(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows with 9, 4 and 1 tokens; of one with holes, too."""
    ids = torch.randint(10, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 4, 1)):
        if side == "right":
            mask[row, length:] = 0
        elif side == "left":
            mask[row, : 9 - length] = 0
        elif length < 9:
            mask[row, 1::length] = 0
    return ids, mask


def training(model, ids, mask):
    """Loss of the tokens that are there, their logits, and every gradient."""
    model.zero_grad()
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), labels=None, use_cache=False
    )
    logits = out.logits[mask.bool()]
    loss = torch.logsumexp(logits, -1).sum()
    loss.backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_oss", "granite"])
def test_padding(name, side, calls):
    model = tiny_of(name).train()
    ids, mask = tokens(side)
    before = training(model, ids, mask)
    with fastllm.patched(model):
        calls.clear()
        after = training(model, ids, mask)
        assert calls, "padding went through a mask"
        assert all(call["is_causal"] for call in calls)
        calls.clear()
        training(model, ids, torch.ones_like(mask))
        assert not calls
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_encoders(side, calls):
    model = tiny_of("bert").eval()
    ids, mask = tokens(side)
    before = model(input_ids=ids, attention_mask=mask).logits
    with fastllm.patched(model):
        calls.clear()
        after = model(input_ids=ids, attention_mask=mask).logits
    assert calls
    assert not any(call["is_causal"] for call in calls)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)  # of hidden tokens, too


def bert_decoder():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(vocab_size=VOCABULARY, **small, **drop, is_decoder=True, add_cross_attention=True))


@pytest.mark.parametrize("length", [9, 5])
@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("name", ["bart", "marian", "mbart", "pegasus", "m2m_100", "t5", "bert decoder"])
def test_padding_of_an_encoder_hides_no_query_of_the_decoder(name, side, length, calls):
    model = (bert_decoder() if name == "bert decoder" else tiny_of(name)).eval()
    ids, mask = tokens(side)
    target = torch.randint(10, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target}
    if name == "bert decoder":
        memory = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(2))
        inputs = {"input_ids": target, "encoder_hidden_states": memory, "encoder_attention_mask": mask}

    def results():
        model.zero_grad()
        out = model(**inputs)[0]
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    before = results()
    with fastllm.patched(model, only="attention") as report:
        assert report.replaced, report
        calls.clear()
        after = results()
    assert bool(calls) == (name != "t5")  # whose bias is a mask to add
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


def mask_of(tokens, **kwargs):
    given = {"batch_size": tokens.shape[0], "q_length": tokens.shape[1], "kv_length": tokens.shape[1]}
    given |= {"mask_function": masking_utils.causal_mask_function, "attention_mask": tokens, **kwargs}
    return _attention.mask(**given)


class TestWhatIsKnownOfAMask:
    tokens = tokens("right")[1].bool()

    def test_padding_and_nothing_else(self):
        mask = mask_of(self.tokens)
        known = _attention._sequences(mask, None, None)
        assert known.cu_seq.tolist() == [0, 9, 13, 14]
        assert known.longest == 9
        assert known.causal
        assert known.rows.tolist() == self.tokens.flatten().nonzero().flatten().tolist()

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"mask_function": masking_utils.sliding_window_causal_mask_function(3)},
            {"mask_function": masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 2)},
            {"kv_length": 12},
            {"q_length": 1, "q_offset": 8},
        ],
        ids=["window", "prefix", "static cache", "decoding"],
    )
    def test_others_keep_their_mask(self, kwargs):
        assert _attention._sequences(mask_of(self.tokens, **kwargs), None, None) is None

    def test_what_is_made_of_it_is_another(self):
        mask = mask_of(self.tokens)
        for other in (mask & True, mask[:, :, :, :5], mask.clone(), ~mask):
            assert _attention._sequences(other, None, None) is None

    def test_written_to_it_is_another(self):
        mask = mask_of(self.tokens)
        mask[..., 0] = False
        assert _attention._sequences(mask, None, None) is None

    def test_documents(self):
        cu = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
        place = torch.arange(9)
        document = torch.bucketize(place, cu[1:], right=True)
        same, back = document[:, None] == document, place[:, None] - place
        for mask, causal, window in (
            (same & (back >= 0), True, (-1, -1)),
            (same & (back >= 0) & (back < 2), True, (1, 0)),
            (same, False, (-1, -1)),
        ):
            known = _attention._sequences(mask[None, None], cu, 2)
            assert (known.causal, known.window) == (causal, window)
            assert known.rows is None
        for mask in (back >= 0, same & (back > 0), same & (back >= 0) & (back < 3)):
            assert _attention._sequences(mask[None, None], cu, 2) is None
        assert _attention._sequences((same & (back >= 0))[None, None], cu[:3], None) is None
        assert _attention._sequences(None, cu, None) is None


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen3_moe"])
def test_packed_documents_from_their_lengths(name, calls):
    model = tiny_of(name).train()
    ids = torch.randint(10, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(6))
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 7, "max_length_k": 7}

    def gradients(**kwargs):
        model.zero_grad()
        logits = model(input_ids=ids, position_ids=positions, use_cache=False, **kwargs).logits
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    before = gradients()
    with fastllm.patched(model):
        calls.clear()
        after = gradients(**lengths)
        assert calls
        calls.clear()
        gradients()
        assert not calls
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


def test_lengths_without_their_positions_change_nothing(calls):
    """The unpatched model does not look at them either."""
    model = tiny_of("llama").eval()
    ids = torch.randint(10, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(6))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 7, "max_length_k": 7}
    before = model(input_ids=ids, **lengths).logits
    with fastllm.patched(model):
        calls.clear()
        torch.testing.assert_close(model(input_ids=ids, **lengths).logits, before, rtol=1e-4, atol=1e-5)
    assert not calls


def test_short_rows_keep_their_padding_on_a_cpu(monkeypatch):
    model, (ids, mask) = tiny_of("llama").eval(), tokens("right")
    monkeypatch.setattr(ops, "attention_varlen", lambda *a, **k: pytest.fail("called"))
    with fastllm.patched(model):
        model(input_ids=ids, attention_mask=mask)


def test_compiled(calls):
    model, (ids, mask) = tiny_of("llama").eval(), tokens("right")
    before = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with fastllm.patched(model):
        calls.clear()
        compiled = torch.compile(model, backend="aot_eager")
        after = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert not calls
    torch.testing.assert_close(after[mask.bool()], before[mask.bool()], rtol=1e-4, atol=1e-5)


def test_parts_that_have_a_copy_of_the_configuration(monkeypatch):
    """transformers 5.17 sets the attention of none of them."""
    model = tiny_of("t5")
    parts = [model, model.encoder, model.decoder]
    assert len({id(part.config) for part in parts}) == 3

    def alone(self, name):
        self.config._attn_implementation_internal = name

    monkeypatch.setattr(type(model), "set_attn_implementation", alone)
    with fastllm.patched(model, only="attention") as report:
        assert report.replaced, report
        assert [part.config._attn_implementation for part in parts] == ["fastllm"] * 3
    assert [part.config._attn_implementation for part in parts] == ["sdpa"] * 3

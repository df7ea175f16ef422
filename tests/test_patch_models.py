"""Models of transformers, patched and not: those that matter most in depth, and every type that can be made small."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from patch_models import VOCABULARY, assert_same, batch, build, model_of, run, sweep, tiny_of
from transformers.utils import logging

import fastllm

logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

CAUSAL = [
    "gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "olmo2",
    "gpt_oss", "granite", "gpt_neox", "falcon", "deepseek_v3", "smollm3",
]  # fmt: skip
OTHERS = ["bert", "roberta", "modernbert", "t5", "bart", "marian"]
# What each must have replaced, at the least.
NORMS = dict.fromkeys(CAUSAL, "rms_norm") | dict.fromkeys(("gpt2", "gpt_neox", "falcon"), "layer_norm")


def kinds(report) -> set[str]:
    return {entry.now for entry in report.replaced}


@pytest.mark.parametrize("name", CAUSAL + OTHERS)
def test_loss_logits_and_every_gradient(name):
    model = tiny_of(name)
    inputs = [batch(model), batch(model, padded=True)]
    before = [[run(model, b, train) for train in (False, True)] for b in inputs]
    keys, ids = list(model.state_dict()), [id(p) for p in model.parameters()]
    with fastllm.patched(model) as report:
        for b, results in zip(inputs, before, strict=True):
            for train, expected in zip((False, True), results, strict=True):
                assert_same(run(model, b, train), expected, lambda b=b, train=train: double(name, b, train))
        assert list(model.state_dict()) == keys
        assert [id(p) for p in model.parameters()] == ids
        if name in CAUSAL:
            assert {NORMS[name], "linear_cross_entropy"} <= kinds(report), report
            # falcon calls torch's attention by itself
            assert "attention" in kinds(report) or name == "falcon", report
    for b, results in zip(inputs, before, strict=True):
        for train, expected in zip((False, True), results, strict=True):
            again = run(model, b, train)
            assert all(torch.equal(again[key], expected[key]) for key in expected)


def double(name: str, inputs: dict, train: bool) -> dict:
    return run(tiny_of(name).double(), inputs, train)


def prompts() -> dict[str, torch.Tensor]:
    """Two, one of them padded on the left."""
    ids = torch.randint(10, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", CAUSAL)
def test_generation(name):
    model = tiny_of(name).eval()

    def generate(**kwargs):
        with torch.no_grad():
            out = model.generate(
                **prompts(), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True, **kwargs,
            )  # fmt: skip
        return out.sequences, torch.stack(out.logits)

    caches = [{}, {"cache_implementation": "static"}, {"use_cache": False}]
    if name == "deepseek_v3":  # its static cache wants one head size
        caches.remove({"cache_implementation": "static"})
    before = [generate(**cache) for cache in caches]
    with fastllm.patched(model):
        after = [generate(**cache) for cache in caches]
    for (tokens, logits), (wanted, exact) in zip(after, before, strict=True):
        assert torch.equal(tokens, wanted)
        torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in ("gpt2", "gpt_neox", "falcon")])
def test_packed_documents(name):
    """Positions that start anew make documents: one row of two is worth the two of them."""
    model = tiny_of(name).train()
    ids = torch.randint(10, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(6))
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    flattened = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 7, "max_length_k": 7}

    def logits(**kwargs):
        with torch.no_grad():
            return model(input_ids=ids, position_ids=positions, use_cache=False, **kwargs).logits

    def alone():
        with torch.no_grad():
            return torch.cat([model(input_ids=part, use_cache=False).logits for part in (ids[:, :5], ids[:, 5:])], 1)

    before, parts = logits(), alone()
    with fastllm.patched(model):
        for got in (logits(), logits(**flattened)):
            torch.testing.assert_close(got, before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone(), parts, rtol=1e-4, atol=1e-5)
    if name != "gpt_oss":  # which sees across documents by itself
        torch.testing.assert_close(before, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "t5", "bart", "marian", "modernbert"])
def test_encoders_see_both_ways_and_decoders_do_not(name):
    model = tiny_of(name).eval()
    inputs = {k: v for k, v in batch(model, padded=True).items() if k != "labels"}
    with fastllm.patched(model) as report, torch.no_grad():
        assert "attention" in kinds(report), report
        logits = model(**inputs).logits
        last = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
        inputs[last] = inputs[last].clone()
        inputs[last][1, -1] = 11
        changed = model(**inputs).logits
    moved = (logits - changed)[1, 0].abs().max() > 1e-6
    assert bool(moved) == (last == "input_ids")


def test_whisper_and_vit():
    from transformers import ViTConfig, ViTForImageClassification, WhisperConfig, WhisperForConditionalGeneration

    small = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "vocab_size": 99, "num_mel_bins": 8}
    small |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    small |= {"max_source_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    whisper = build(WhisperForConditionalGeneration, WhisperConfig(**small, decoder_start_token_id=1))
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vit = build(ViTForImageClassification, ViTConfig(**small, image_size=16, patch_size=8))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    cases = [
        (whisper, {"input_features": features, "labels": torch.randint(10, 99, (2, 6))}),
        (vit, {"pixel_values": pixels, "labels": torch.tensor([0, 1])}),
    ]
    for model, inputs in cases:
        before = run(model, inputs, True)
        with fastllm.patched(model) as report:
            assert "layer_norm" in kinds(report)
            assert_same(run(model, inputs, True), before)


def test_the_mask_is_not_lost():
    """An attention function without its mask function would see what comes later, and padding."""
    model = model_of("llama").eval()
    ids = torch.randint(10, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with fastllm.patched(model), torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        later = ids.clone()
        later[:, 8], later[0, 6:] = 12, 13
        after = model(input_ids=later, attention_mask=mask).logits
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=0, atol=0)


@pytest.mark.slow
def test_types_of_transformers():
    """One in seven; `make models` tries all, and writes docs/models.md."""
    results = sweep(7)
    failed = [f"{r.task} {r.name}: {r.failed}" for r in results if r.failed]
    assert not failed, "\n".join(failed)
    assert sum(bool(r.replaced) for r in results) >= 25
    assert all(r.replaced or r.left or r.unbuilt for r in results), "nothing replaced, and the report does not say why"

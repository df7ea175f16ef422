"""Checkpoints in Hugging Face's format, both ways, against transformers' own models."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from model_suite import away_from_initial_values
from torch.nn.functional import cross_entropy

transformers = pytest.importorskip("transformers")

from fastllm.models import GPT, Bert, BertConfig, GPTConfig, Transformer, TransformerConfig, load_hf, save_hf  # noqa: E402

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 31, "n_positions": 24}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"vocab_size": 31, "intermediate_size": 24, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31, "intermediate_size": 24}
BERT |= {"max_position_embeddings": 24}
PAIR = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "vocab_size": 31, "max_position_embeddings": 24}
PAIR |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
MARIAN = {**PAIR, "pad_token_id": 30, "decoder_start_token_id": 30, "eos_token_id": 0, "forced_eos_token_id": 0}
BART = {**PAIR, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
T5 = {"vocab_size": 31, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0}

MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "tie_word_embeddings": False, "n_inner": 40}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama3": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-bias": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 6}),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", BERT),
    "bert-pretraining": ("BertForPreTraining", "BertConfig", BERT),
    "bert-classification": ("BertForSequenceClassification", "BertConfig", {**BERT, "num_labels": 3}),
    "bert-tokens": ("BertForTokenClassification", "BertConfig", {**BERT, "num_labels": 5, "hidden_act": "gelu_new"}),
    "bert-span": ("BertForQuestionAnswering", "BertConfig", BERT),
    "bert": ("BertModel", "BertConfig", {**BERT, "hidden_act": "relu"}),
    "marian": ("MarianMTModel", "MarianConfig", {**MARIAN, "activation_function": "swish", "scale_embedding": True}),
    "marian-two-vocabularies": (
        "MarianMTModel", "MarianConfig",
        {**MARIAN, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 33, "vocab_size": 31},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
}  # fmt: skip


def theirs_of(name: str) -> torch.nn.Module:
    """transformers' model, without dropout, its weights away from their initial values."""
    model_class, config_class, sizes = MODELS[name]
    config = getattr(transformers, config_class)(**sizes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    away_from_initial_values(model)
    with torch.no_grad():
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> tuple[str, torch.nn.Module, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = theirs_of(request.param)
    theirs.save_pretrained(folder)
    return request.param, theirs, folder


def inputs() -> dict[str, torch.Tensor]:
    """Three rows, two of them padded; labels of all kinds."""
    generator = torch.Generator().manual_seed(1)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(3, high, shape, generator=generator)

    mask = torch.arange(11) < torch.tensor([[11], [7], [4]])
    labels = draw(30, 3, 11).masked_fill(~mask, -100)
    return {"tokens": draw(30, 3, 11), "mask": mask, "types": draw(5, 3, 11) % 2, "labels": labels}


def named(key: str):
    return lambda text: f"{key}: {text}"


def of_five(labels: torch.Tensor) -> torch.Tensor:
    return torch.where(labels == -100, -100, labels % 5)


def their_outputs(name: str, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits where there is no padding, flat, and the loss."""
    given = inputs()
    tokens, mask, labels = given["tokens"], given["mask"], given["labels"]
    if isinstance(model.config, transformers.BertConfig):
        common = {"input_ids": tokens, "attention_mask": mask.long(), "token_type_ids": given["types"]}
        if name == "bert":
            return model(**common).last_hidden_state[mask], None
        if name == "bert-pretraining":
            out = model(**common, labels=labels, next_sentence_label=torch.tensor([0, 1, 1]))
            return torch.cat((out.prediction_logits[mask].flatten(), out.seq_relationship_logits.flatten())), out.loss
        if name == "bert-classification":
            out = model(**common, labels=torch.tensor([2, 0, 1]))
            return out.logits, out.loss
        if name == "bert-span":
            out = model(**common)
            ends = (out.start_logits, [1, 0, 3]), (out.end_logits, [4, 6, 3])
            # Theirs lets an answer lie in the padding; ours gives that no probability.
            losses = [cross_entropy(x.masked_fill(~mask, -torch.inf), torch.tensor(at)) for x, at in ends]
            return torch.cat((out.start_logits[mask], out.end_logits[mask])), sum(losses) / 2
        out = model(**common, labels=of_five(labels) if name == "bert-tokens" else labels)
        return out.logits[mask], out.loss
    if model.config.is_encoder_decoder:
        out = model(input_ids=tokens, attention_mask=mask.long(), labels=labels[:, :9].contiguous())
        return out.logits[mask[:, :9]], out.loss
    out = model(input_ids=tokens)
    loss = cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    return out.logits, loss


def our_outputs(name: str, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    given = inputs()
    tokens, mask, labels = given["tokens"], given["mask"], given["labels"]
    if isinstance(model, GPT):
        return model(tokens), model(tokens, labels)
    if isinstance(model, Transformer):
        targets = labels[:, :9]
        logits = model(tokens, tokens_BT=model.shifted(targets), source_mask_BS=mask)
        return logits[mask[:, :9]], model(tokens, targets, source_mask_BS=mask)
    common = {"types_BT": given["types"], "mask_BT": mask}
    if name == "bert":
        return model(tokens, **common)[mask], None
    if name == "bert-pretraining":
        masked, follows = model(tokens, **common)
        loss = model(tokens, (labels, torch.tensor([0, 1, 1])), **common)
        return torch.cat((masked[mask].flatten(), follows.flatten())), loss
    if name == "bert-classification":
        return model(tokens, **common), model(tokens, torch.tensor([2, 0, 1]), **common)
    if name == "bert-span":
        logits = model(tokens, **common)
        assert (logits[~mask[:, None].expand_as(logits)] == -torch.inf).all()
        loss = model(tokens, torch.tensor([[1, 4], [0, 6], [3, 3]]), **common)
        return torch.cat((logits[:, 0][mask], logits[:, 1][mask])), loss
    targets = of_five(labels) if name == "bert-tokens" else labels
    return model(tokens, **common)[mask], model(tokens, targets, **common)


@pytest.mark.parametrize("ops", ["fastllm", "torch"])
def test_logits_loss_and_gradients_are_theirs(pair, ops, tmp_path):
    name, theirs, folder = pair
    theirs.zero_grad()
    ours = load_hf(folder, ops=ops)
    expected, found = their_outputs(name, theirs), our_outputs(name, ours)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=2e-5)
    if expected[1] is None:
        return
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
    expected[1].backward()
    found[1].backward()
    # Gradients travel by the names that weights have: as a model whose weights they are.
    before = copy.deepcopy(theirs.state_dict())
    with torch.no_grad():
        for parameter in [*theirs.parameters(), *ours.parameters()]:
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path)
    theirs.load_state_dict(before)
    gradients = load_hf(tmp_path).state_dict()
    for key, value in ours.state_dict().items():
        if key != "logits_bias":
            torch.testing.assert_close(value, gradients[key], rtol=1e-4, atol=2e-5, msg=named(key))


@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
def test_what_we_save_they_load(pair, tmp_path, shard_bytes):
    name, theirs, folder = pair
    ours = load_hf(folder)
    save_hf(ours, tmp_path, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes == 10**9)
    loaded, info = type(theirs).from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not [key for key in info["missing_keys"] if not key.endswith("embed_positions.weight")]
    assert not info["unexpected_keys"]
    for key, value in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    torch.testing.assert_close(their_outputs(name, loaded.eval())[0], their_outputs(name, theirs)[0])
    again = load_hf(tmp_path)
    assert again.config == ours.config
    for key, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    theirs_of("gpt2").save_pretrained(folder)
    return folder


def edited(source: Path, target: Path, **changes) -> Path:
    if source != target:
        shutil.copytree(source, target, dirs_exist_ok=True)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **changes}))
    return target


def with_weights(source: Path, target: Path, change) -> Path:
    from safetensors.torch import load_file, save_file

    if source != target:
        shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors")
    return target


def test_a_missing_and_a_left_over_weight_are_named(gpt2, tmp_path):
    lost = with_weights(gpt2, tmp_path / "a", lambda w: w.pop("transformer.h.1.mlp.c_fc.bias"))
    with pytest.raises(ValueError, match=r"lacks transformer\.h\.1\.mlp\.c_fc\.bias$"):
        load_hf(lost)
    more = with_weights(gpt2, tmp_path / "b", lambda w: w.update({"transformer.h.2.ln_1.bias": torch.ones(16)}))
    with pytest.raises(ValueError, match=r"has transformer\.h\.2\.ln_1\.bias, which the model of config\.json has not"):
        load_hf(more)
    other = with_weights(gpt2, tmp_path / "c", lambda w: w.update({"lm_head.weight": torch.ones(31, 16)}))
    with pytest.raises(ValueError, match=r"has lm_head\.weight"):  # a copy that is none
        load_hf(other)


def test_mismatched_vocabularies_are_an_error(gpt2, tmp_path):
    with pytest.raises(ValueError, match=r"embedding\.weight has shape \(31, 16\), config\.json makes it \(32, 16\)"):
        load_hf(edited(gpt2, tmp_path, vocab_size=32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported, only gpt2, llama"),
        ({"activation_function": "tanh"}, "the activation 'tanh' is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ({"n_head": 3}, "heads must divide width, got heads=3, width=16"),
    ],
)
def test_what_these_models_do_not_have_is_an_error(gpt2, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_hf(edited(gpt2, tmp_path, **changes))


def test_damage_is_named(gpt2, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not there .* are not downloaded"):
        load_hf(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json is not there"):
        load_hf(tmp_path)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got 'bfloat16'"):
        load_hf(gpt2, dtype="bfloat16")
    shutil.copytree(gpt2, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_hf(tmp_path / "a")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is not there, nor .*index\.json"):
        load_hf(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_hf(tmp_path / "a")


def test_a_configuration_that_transformers_has_not_is_an_error(tmp_path):
    small = {"vocab_size": 31, "context": 8, "layers": 1, "heads": 2, "width": 16}
    for config, message in (
        (GPTConfig.gpt2(**small, norm="rms_norm"), "gpt2 has no norm='rms_norm', only 'layer_norm'"),
        (GPTConfig.gpt2(**small, kv_heads=1), "gpt2 has no kv_heads=1, only 2"),
        (GPTConfig.llama(**small, softcap=30.0), r"llama has no softcap=30\.0, only 0\.0"),
        (GPTConfig.llama(**small, window=4), "llama has no window=4, only None"),
        (GPTConfig.gpt2(**small, mlp="swiglu"), "the activation 'swiglu' is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            save_hf(GPT(config), tmp_path)
    with pytest.raises(ValueError, match="marian has no norm_first=True"):
        save_hf(Transformer(TransformerConfig(**small, norm_first=True)), tmp_path)
    with pytest.raises(ValueError, match="bert has no pooler=True, only False"):
        save_hf(Bert(BertConfig(**small, pooler=True)), tmp_path)
    with pytest.raises(TypeError, match="must be a GPT, Bert or Transformer, got Linear"):
        save_hf(torch.nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_fields_of_training_come_back(tmp_path):
    config = GPTConfig.llama(vocab_size=31, context=8, layers=1, heads=2, width=16, document_token=3, ops="torch")
    save_hf(GPT(config), tmp_path)
    assert load_hf(tmp_path).config.document_token == 3
    assert load_hf(tmp_path).config.ops == "fastllm"
    assert load_hf(tmp_path, document_token=None).config.document_token is None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert-classification", {"problem_type": "regression"}, "problem_type='regression' is not supported"),
        ("bert-classification", {"id2label": {"0": "x"}}, "one label is a regression"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
        ("llama3", {}, "context=32 would change what rope_scaling means"),
    ],
)
def test_what_would_be_another_function_is_an_error(name, changes, message, tmp_path):
    theirs_of(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_hf(edited(tmp_path, tmp_path, **changes), **({} if changes else {"context": 32}))


@pytest.mark.parametrize(
    ("name", "body"), [("llama3", "model"), ("gpt2", "transformer"), ("bart", "model"), ("marian", "model")]
)
def test_files_of_a_model_without_its_head(name, body, tmp_path):
    theirs = theirs_of(name)
    if hasattr(theirs, "final_logits_bias"):
        theirs.final_logits_bias.zero_()
    getattr(theirs, body).save_pretrained(tmp_path)
    torch.testing.assert_close(
        our_outputs(name, load_hf(tmp_path))[0], their_outputs(name, theirs)[0], rtol=1e-4, atol=2e-5
    )


def test_bert_files_with_the_names_of_tensorflow(tmp_path):
    theirs = theirs_of("bert-mlm")
    theirs.save_pretrained(tmp_path)

    def rename(weights):
        for key in list(weights):
            old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            weights[old] = weights.pop(key)

    ours = load_hf(with_weights(tmp_path, tmp_path, rename))
    torch.testing.assert_close(
        our_outputs("bert-mlm", ours)[0], their_outputs("bert-mlm", theirs)[0], rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("equal", [True, False])
def test_t5s_output_layer_is_its_own_where_it_differs(equal, tmp_path):
    theirs = theirs_of("t5-gated")
    theirs.save_pretrained(tmp_path)
    head = theirs.shared.weight.detach() + (0 if equal else 1)
    ours = load_hf(with_weights(tmp_path, tmp_path, lambda weights: weights.update({"lm_head.weight": head})))
    assert (ours.head is None) == equal


def test_what_the_models_do_not_use_travels_on(tmp_path):
    """Special tokens and names of labels; and fields of training that the family's config.json has no name for."""
    theirs = theirs_of("llama")
    theirs.config.eos_token_id, theirs.config.pad_token_id = [5, 6], 8
    theirs.save_pretrained(tmp_path)
    save_hf(load_hf(tmp_path, dropout=0.25), tmp_path / "again")
    values = json.loads((tmp_path / "again/config.json").read_text())
    assert (values["eos_token_id"], values["pad_token_id"]) == ([5, 6], 8)
    assert load_hf(tmp_path / "again").config.dropout == 0.25
    older = {"rope_parameters": None, "rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    model = load_hf(edited(tmp_path, tmp_path, **older, torch_dtype="bfloat16"))
    values = json.loads((save_hf(model, tmp_path / "again") / "config.json").read_text())
    assert values["rope_parameters"] == {"rope_theta": 77.0, "rope_type": "linear", "factor": 2.0}
    assert not values.keys() & {"torch_dtype", "rope_scaling", "rope_theta"}
    edited(tmp_path, tmp_path, rope_parameters={"rope_type": "default"}, rope_scaling=None)
    assert load_hf(tmp_path).config.dropout == 0.0
    config = TransformerConfig(vocab_size=31, context=8, layers=1, heads=2, width=16, label_smoothing=0.1)
    assert load_hf(save_hf(Transformer(config), tmp_path / "pair")).config.label_smoothing == 0.1
    theirs = theirs_of("bert-tokens")
    theirs.config.id2label = dict(enumerate("abcde"))
    theirs.save_pretrained(tmp_path / "bert")
    save_hf(load_hf(tmp_path / "bert"), tmp_path / "bert2")
    assert json.loads((tmp_path / "bert2/config.json").read_text())["id2label"]["1"] == "b"


def test_a_failed_save_leaves_what_was_there(gpt2, tmp_path, monkeypatch):
    import safetensors.torch

    shutil.copytree(gpt2, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    model = load_hf(gpt2)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_hf(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_weights_in_16_bits(gpt2, tmp_path):
    theirs_of("gpt2").bfloat16().save_pretrained(tmp_path)
    assert load_hf(tmp_path).embedding.weight.dtype == torch.bfloat16
    assert load_hf(tmp_path, dtype=torch.float32).embedding.weight.dtype == torch.float32


def test_fine_tuning_starts_from_a_checkpoint_of_pre_training(tmp_path):
    theirs_of("bert-pretraining").save_pretrained(tmp_path)
    model = load_hf(tmp_path).with_head("classification", labels=4)
    assert isinstance(model, Bert)
    assert model(inputs()["tokens"]).shape == (3, 4)
    assert torch.equal(model.pooler.dense.weight, load_hf(tmp_path).pooler.dense.weight)
    theirs_of("bert-mlm").save_pretrained(tmp_path / "mlm")
    assert load_hf(tmp_path / "mlm").with_head("classification").eval()(inputs()["tokens"]).shape == (3, 2)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ValueError, match=r"has bert\.pooler\.dense\.bias, .*head=\"pretraining\""):
        load_hf(tmp_path)
    assert load_hf(tmp_path, head="pretraining").config.head == "pretraining"
    with pytest.raises(ValueError, match="vocab_size is the encoder's, which stays"):
        Bert(BertConfig(vocab_size=31, layers=1, heads=2, width=16)).with_head("mlm", vocab_size=32)

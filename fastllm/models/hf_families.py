"""Hugging Face's names: what config.json and the weights of each kind of model are called there and here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from fastllm.models.bert import Bert, BertConfig
from fastllm.models.config import ModelConfig
from fastllm.models.gpt import GPT, LLAMA, GPTConfig
from fastllm.models.transformer import Transformer, TransformerConfig

Values = dict[str, Any]


class Weight(NamedTuple):
    """A weight here, and those there that it consists of, one above the other."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()  # of each of theirs; one alone has all
    transposed: bool = False


class Family(NamedTuple):
    """One model_type."""

    model: type
    read: Callable[[Values], ModelConfig]
    write: Callable[[Any], Values]
    weights: Callable[[Any], Iterator[Weight]]
    prefix: str = ""  # which the weights of the bare model, without its head, lack
    tied: Mapping[str, tuple[str, ...]] = {}  # copies that files may have, and of what one of them is
    ignored: tuple[str, ...] = ()  # how names end that hold nothing that was trained


def _expect(values: Values, model_type: str, **expected: tuple[Any, ...]) -> None:
    """Raises ValueError for a value that this package's models do not have."""
    for name, allowed in expected.items():
        if name in values and values[name] not in allowed:
            raise ValueError(f"{model_type} with {name}={values[name]!r} is not supported, only {allowed}")


def _linear(ours: str, *theirs: str, rows: tuple[int, ...] = (), bias: bool, transposed: bool = False):
    yield Weight(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), rows, transposed)
    if bias:
        yield Weight(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), rows)


def _norm(ours: str, theirs: str, bias: bool = True) -> Iterator[Weight]:
    yield from _linear(ours, theirs, bias=bias)


def _qkv(config: ModelConfig) -> tuple[int, int, int]:
    kv = config.num_kv_heads * config.head_dim
    return config.heads * config.head_dim, kv, kv


_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf", "relu": "relu", "silu": "silu"}
_ACTIVATIONS["swish"] = "silu"
_THEIR_ACTIVATIONS = {"gelu": "gelu_new", "gelu_erf": "gelu", "relu": "relu", "silu": "silu"}


def _activation(values: Values, key: str, default: str) -> str:
    name = values.get(key, default)
    if name not in _ACTIVATIONS:
        raise ValueError(f"the activation {name!r} is not supported, only {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


# GPT-2


def _read_gpt2(values: Values) -> GPTConfig:
    _expect(values, "gpt2", scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,))
    _expect(values, "gpt2", add_cross_attention=(False,))
    return GPTConfig(
        vocab_size=values.get("vocab_size", 50257),
        context=values.get("n_positions", 1024),
        layers=values.get("n_layer", 12),
        heads=values.get("n_head", 12),
        width=values.get("n_embd", 768),
        hidden=values.get("n_inner"),
        mlp=_activation(values, "activation_function", "gelu_new"),
        dropout=values.get("resid_pdrop", 0.1),
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=values.get("tie_word_embeddings", True),
    )


def _write_gpt2(config: GPTConfig) -> Values:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_embd": config.width,
        "n_inner": config.hidden,
        "activation_function": _THEIR_ACTIVATIONS.get(config.mlp, config.mlp),
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _gpt2_weights(config: GPTConfig) -> Iterator[Weight]:
    yield Weight("embedding.weight", ("transformer.wte.weight",))
    yield Weight("positions.weight", ("transformer.wpe.weight",))
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        yield from _norm(f"{ours}.attention_norm", f"{theirs}.ln_1")
        yield from _norm(f"{ours}.mlp_norm", f"{theirs}.ln_2")
        for mine, their in (
            ("attention.qkv_proj", "attn.c_attn"),
            ("attention.out_proj", "attn.c_proj"),
            ("mlp.up_proj", "mlp.c_fc"),
            ("mlp.down_proj", "mlp.c_proj"),
        ):
            yield from _linear(f"{ours}.{mine}", f"{theirs}.{their}", bias=True, transposed=True)
    yield from _norm("norm", "transformer.ln_f")
    if not config.tie_embeddings:
        yield Weight("head.weight", ("lm_head.weight",))


# Llama and Qwen3


def _read_llama(values: Values, qk_norm: bool = False) -> GPTConfig:
    name = "qwen3" if qk_norm else "llama"
    _expect(values, name, hidden_act=("silu",), mlp_bias=(values.get("attention_bias", False),))
    if qk_norm:
        _expect(values, name, attention_bias=(False,), use_sliding_window=(False,))
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    theta = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
    return GPTConfig(
        **{
            **LLAMA,
            "vocab_size": values.get("vocab_size", 32000),
            "context": values.get("max_position_embeddings", 2048),
            "layers": values.get("num_hidden_layers", 32),
            "heads": values.get("num_attention_heads", 32),
            "width": values.get("hidden_size", 4096),
            "kv_heads": values.get("num_key_value_heads"),
            "head_size": values.get("head_dim"),
            "hidden": values.get("intermediate_size", 11008),
            "bias": values.get("attention_bias", False),
            "norm_eps": values.get("rms_norm_eps", 1e-6),
            "rope_theta": theta,
            "rope_scaling": None if rope["rope_type"] == "default" else rope,
            "tie_embeddings": values.get("tie_word_embeddings", False),
            "qk_norm": qk_norm,
        }
    )


def _write_llama(config: GPTConfig) -> Values:
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_size": config.width,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})},
        "tie_word_embeddings": config.tie_embeddings,
    }


def _llama_weights(config: GPTConfig) -> Iterator[Weight]:
    yield Weight("embedding.weight", ("model.embed_tokens.weight",))
    for i in range(config.layers):
        ours, theirs, bias = f"blocks.{i}", f"model.layers.{i}", config.bias
        yield from _norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm", bias=False)
        yield from _norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", bias=False)
        qkv = tuple(f"{theirs}.self_attn.{letter}_proj" for letter in "qkv")
        yield from _linear(f"{ours}.attention.qkv_proj", *qkv, rows=_qkv(config), bias=bias)
        yield from _linear(f"{ours}.attention.out_proj", f"{theirs}.self_attn.o_proj", bias=bias)
        if config.qk_norm:
            yield from _norm(f"{ours}.attention.q_norm", f"{theirs}.self_attn.q_norm", bias=False)
            yield from _norm(f"{ours}.attention.k_norm", f"{theirs}.self_attn.k_norm", bias=False)
        both = f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj"
        yield from _linear(f"{ours}.mlp.up_proj", *both, rows=(config.mlp_width,) * 2, bias=bias)
        yield from _linear(f"{ours}.mlp.down_proj", f"{theirs}.mlp.down_proj", bias=bias)
    yield from _norm("norm", "model.norm", bias=False)
    if not config.tie_embeddings:
        yield Weight("head.weight", ("lm_head.weight",))


# BERT

_BERT_HEADS = {
    "BertForMaskedLM": "mlm",
    "BertForPreTraining": "pretraining",
    "BertForSequenceClassification": "classification",
    "BertForTokenClassification": "tokens",
    "BertForQuestionAnswering": "span",
    "BertModel": None,
}


def _read_bert(values: Values) -> BertConfig:
    _expect(values, "bert", is_decoder=(False,), add_cross_attention=(False,), tie_word_embeddings=(True,))
    _expect(values, "bert", position_embedding_type=("absolute",))
    _expect(values, "bert", problem_type=(None, "single_label_classification"))
    architecture = (values.get("architectures") or ["BertModel"])[0]
    if architecture not in _BERT_HEADS:
        raise ValueError(f"the architecture {architecture!r} is not supported, only {', '.join(_BERT_HEADS)}")
    labels = len(values.get("id2label") or range(values.get("num_labels", 2)))
    if labels == 1 and architecture == "BertForSequenceClassification":
        raise ValueError("bert with one label is a regression, which is not supported")
    return BertConfig(
        vocab_size=values.get("vocab_size", 30522),
        context=values.get("max_position_embeddings", 512),
        layers=values.get("num_hidden_layers", 12),
        heads=values.get("num_attention_heads", 12),
        width=values.get("hidden_size", 768),
        hidden=values.get("intermediate_size", 3072),
        mlp=_activation(values, "hidden_act", "gelu"),
        dropout=values.get("hidden_dropout_prob", 0.1),
        norm_eps=values.get("layer_norm_eps", 1e-12),
        token_types=values.get("type_vocab_size", 2),
        pad_token=values.get("pad_token_id", 0),
        head=_BERT_HEADS[architecture],
        labels=labels,
        head_dropout=values.get("classifier_dropout"),
    )


def _write_bert(config: BertConfig) -> Values:
    return {
        "architectures": [next(name for name, head in _BERT_HEADS.items() if head == config.head)],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "hidden_act": _THEIR_ACTIVATIONS.get(config.mlp, config.mlp),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.token_types,
        "pad_token_id": config.pad_token,
        "id2label": {str(i): f"LABEL_{i}" for i in range(config.labels)},
        "label2id": {f"LABEL_{i}": i for i in range(config.labels)},
        "classifier_dropout": config.head_dropout,
        "tie_word_embeddings": True,
    }


def _bert_weights(config: BertConfig) -> Iterator[Weight]:
    embeddings = "bert.embeddings"
    yield Weight("embedding.weight", (f"{embeddings}.word_embeddings.weight",))
    yield Weight("positions.weight", (f"{embeddings}.position_embeddings.weight",))
    yield Weight("token_types.weight", (f"{embeddings}.token_type_embeddings.weight",))
    yield from _norm("embedding_norm", f"{embeddings}.LayerNorm")
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}", f"bert.encoder.layer.{i}"
        qkv = tuple(f"{theirs}.attention.self.{name}" for name in ("query", "key", "value"))
        yield from _linear(f"{ours}.attention.qkv_proj", *qkv, rows=_qkv(config), bias=True)
        yield from _linear(f"{ours}.attention.out_proj", f"{theirs}.attention.output.dense", bias=True)
        yield from _norm(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm")
        yield from _linear(f"{ours}.mlp.up_proj", f"{theirs}.intermediate.dense", bias=True)
        yield from _linear(f"{ours}.mlp.down_proj", f"{theirs}.output.dense", bias=True)
        yield from _norm(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm")
    if config.has_pooler:
        yield from _linear("pooler.dense", "bert.pooler.dense", bias=True)
    if config.head in ("mlm", "pretraining"):
        yield Weight("masked_head.bias", ("cls.predictions.bias",))
        yield from _linear("masked_head.dense", "cls.predictions.transform.dense", bias=True)
        yield from _norm("masked_head.norm", "cls.predictions.transform.LayerNorm")
    if config.head == "pretraining":
        yield from _linear("next_head", "cls.seq_relationship", bias=True)
    elif config.head in ("classification", "tokens", "span"):
        yield from _linear("head", "qa_outputs" if config.head == "span" else "classifier", bias=True)


# Marian and BART


def _read_marian(values: Values, bart: bool = False) -> TransformerConfig:
    name = "bart" if bart else "marian"
    _expect(values, name, tie_word_embeddings=(True,))
    shared = values.get("share_encoder_decoder_embeddings", True)
    for field in ("attention_heads", "ffn_dim"):
        _expect(values, name, **{f"encoder_{field}": (values.get(f"decoder_{field}"),)})
    _expect(values, name, normalize_before=(False,), add_final_layer_norm=(False,), static_position_embeddings=(True,))
    _expect(values, name, normalize_embedding=(bart,), is_encoder_decoder=(True,))
    vocab_size = values.get("vocab_size", 50265 if bart else 58101)
    pad = values.get("pad_token_id", 1 if bart else 58100)
    start = values.get("decoder_start_token_id", 2 if bart else 58100)
    return TransformerConfig(
        vocab_size=vocab_size if shared else values.get("decoder_vocab_size") or vocab_size,
        source_vocab_size=None if shared else vocab_size,
        context=values.get("max_position_embeddings", 1024),
        layers=values.get("decoder_layers", 12),
        encoder_layers=values.get("encoder_layers", 12),
        heads=values.get("decoder_attention_heads", 16),
        width=values.get("d_model", 1024),
        hidden=values.get("decoder_ffn_dim", 4096),
        mlp=_activation(values, "activation_function", "gelu"),
        dropout=values.get("dropout", 0.1),
        position="learned" if bart else "sinusoidal",
        position_offset=2 if bart else 0,
        embedding_norm=bart,
        scale_embedding=bool(values.get("scale_embedding", False)),
        logits_bias=True,
        pad_token=pad,
        start_token=start,
        end_token=values.get("eos_token_id", 2 if bart else 0),
        label_smoothing=0.0,
    )


def _write_marian(config: TransformerConfig) -> Values:
    bart = config.position == "learned"
    values = {
        "architectures": ["BartForConditionalGeneration" if bart else "MarianMTModel"],
        "vocab_size": config.num_source_tokens,
        "max_position_embeddings": config.context,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.layers,
        "d_model": config.width,
        "activation_function": _THEIR_ACTIVATIONS.get(config.mlp, config.mlp),
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "scale_embedding": config.scale_embedding,
        "pad_token_id": config.pad_token,
        "decoder_start_token_id": config.first_token,
        "eos_token_id": config.end_token,
        "forced_eos_token_id": config.end_token,
        "tie_word_embeddings": config.tie_embeddings,
        "is_encoder_decoder": True,
    }
    for side in ("encoder", "decoder"):
        values |= {f"{side}_attention_heads": config.heads, f"{side}_ffn_dim": config.mlp_width}
    if not bart:
        shared = config.source_vocab_size is None
        values |= {"decoder_vocab_size": config.vocab_size, "share_encoder_decoder_embeddings": shared}
    return values


def _marian_weights(config: TransformerConfig) -> Iterator[Weight]:
    if config.source_vocab_size is None:
        yield Weight("embedding.weight", ("model.shared.weight",))
    else:
        yield Weight("embedding.weight", ("model.decoder.embed_tokens.weight",))
        yield Weight("source_embedding.weight", ("model.encoder.embed_tokens.weight",))
    for side in ("encoder", "decoder"):
        if config.position == "learned":
            yield Weight(f"{side}.positions.weight", (f"model.{side}.embed_positions.weight",))
        if config.embedding_norm:
            yield from _norm(f"{side}.embedding_norm", f"model.{side}.layernorm_embedding")
        for i in range(config.layers if side == "decoder" else config.num_encoder_layers):
            ours, theirs = f"{side}.blocks.{i}", f"model.{side}.layers.{i}"
            qkv = tuple(f"{theirs}.self_attn.{letter}_proj" for letter in "qkv")
            yield from _linear(f"{ours}.attention.qkv_proj", *qkv, rows=_qkv(config), bias=True)
            yield from _linear(f"{ours}.attention.out_proj", f"{theirs}.self_attn.out_proj", bias=True)
            yield from _norm(f"{ours}.attention_norm", f"{theirs}.self_attn_layer_norm")
            if side == "decoder":
                cross = f"{theirs}.encoder_attn"
                yield from _linear(f"{ours}.cross_attention.q_proj", f"{cross}.q_proj", bias=True)
                kv = f"{cross}.k_proj", f"{cross}.v_proj"
                yield from _linear(f"{ours}.cross_attention.kv_proj", *kv, rows=_qkv(config)[1:], bias=True)
                yield from _linear(f"{ours}.cross_attention.out_proj", f"{cross}.out_proj", bias=True)
                yield from _norm(f"{ours}.cross_norm", f"{theirs}.encoder_attn_layer_norm")
            yield from _linear(f"{ours}.mlp.up_proj", f"{theirs}.fc1", bias=True)
            yield from _linear(f"{ours}.mlp.down_proj", f"{theirs}.fc2", bias=True)
            yield from _norm(f"{ours}.mlp_norm", f"{theirs}.final_layer_norm")
    yield Weight("logits_bias", ("final_logits_bias",))


# T5


def _read_t5(values: Values) -> TransformerConfig:
    kind = values.get("feed_forward_proj", "relu")
    kinds = {"relu": "relu", "gelu": "gelu_erf", "gated-gelu": "geglu", "gated-silu": "swiglu"}
    if kind not in kinds:
        raise ValueError(f"t5 with feed_forward_proj={kind!r} is not supported, only {tuple(kinds)}")
    layers = values.get("num_layers", 6)
    pad = values.get("pad_token_id", 0)
    return TransformerConfig(
        vocab_size=values.get("vocab_size", 32128),
        # T5 has no last position; longer inputs than this are an error here.
        context=values.get("n_positions", 512),
        layers=values.get("num_decoder_layers") or layers,
        encoder_layers=layers,
        heads=values.get("num_heads", 8),
        width=values.get("d_model", 512),
        head_size=values.get("d_kv", 64),
        hidden=values.get("d_ff", 2048),
        mlp=kinds[kind],
        norm="rms_norm",
        norm_first=True,
        norm_eps=values.get("layer_norm_epsilon", 1e-6),
        bias=False,
        dropout=values.get("dropout_rate", 0.1),
        position="relative",
        relative_buckets=values.get("relative_attention_num_buckets", 32),
        relative_distance=values.get("relative_attention_max_distance", 128),
        scale_embedding=False,
        scale_logits=values.get("scale_decoder_outputs", values.get("tie_word_embeddings") is not False),
        tie_embeddings=values.get("tie_word_embeddings", True),
        pad_token=pad,
        start_token=values.get("decoder_start_token_id", pad),
        end_token=values.get("eos_token_id", 1),
        label_smoothing=0.0,
    )


def _write_t5(config: TransformerConfig) -> Values:
    kinds = {"relu": "relu", "gelu_erf": "gelu", "geglu": "gated-gelu", "swiglu": "gated-silu"}
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.layers,
        "num_heads": config.heads,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_width,
        "feed_forward_proj": kinds.get(config.mlp, config.mlp),
        "layer_norm_epsilon": config.norm_eps,
        "dropout_rate": config.dropout,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "pad_token_id": config.pad_token,
        "decoder_start_token_id": config.first_token,
        "eos_token_id": config.end_token,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_logits,
        "is_encoder_decoder": True,
    }


def _t5_weights(config: TransformerConfig) -> Iterator[Weight]:
    yield Weight("embedding.weight", ("shared.weight",))
    for side in ("encoder", "decoder"):
        yield Weight(
            f"{side}.relative.table.weight", (f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",)
        )
        for i in range(config.layers if side == "decoder" else config.num_encoder_layers):
            ours, theirs = f"{side}.blocks.{i}", f"{side}.block.{i}.layer"
            qkv = tuple(f"{theirs}.0.SelfAttention.{letter}" for letter in "qkv")
            yield from _linear(f"{ours}.attention.qkv_proj", *qkv, rows=_qkv(config), bias=False)
            yield from _linear(f"{ours}.attention.out_proj", f"{theirs}.0.SelfAttention.o", bias=False)
            yield from _norm(f"{ours}.attention_norm", f"{theirs}.0.layer_norm", bias=False)
            last = 1
            if side == "decoder":
                cross, last = f"{theirs}.1.EncDecAttention", 2
                yield from _linear(f"{ours}.cross_attention.q_proj", f"{cross}.q", bias=False)
                kv = f"{cross}.k", f"{cross}.v"
                yield from _linear(f"{ours}.cross_attention.kv_proj", *kv, rows=_qkv(config)[1:], bias=False)
                yield from _linear(f"{ours}.cross_attention.out_proj", f"{cross}.o", bias=False)
                yield from _norm(f"{ours}.cross_norm", f"{theirs}.1.layer_norm", bias=False)
            mlp = f"{theirs}.{last}.DenseReluDense"
            ups = (f"{mlp}.wi_0", f"{mlp}.wi_1") if config.gated else (f"{mlp}.wi",)
            yield from _linear(f"{ours}.mlp.up_proj", *ups, rows=(config.mlp_width,) * len(ups), bias=False)
            yield from _linear(f"{ours}.mlp.down_proj", f"{mlp}.wo", bias=False)
            yield from _norm(f"{ours}.mlp_norm", f"{theirs}.{last}.layer_norm", bias=False)
        yield from _norm(f"{side}.norm", f"{side}.final_layer_norm", bias=False)
    if not config.tie_embeddings:
        yield Weight("head.weight", ("lm_head.weight",))


def _copies(of: tuple[str, ...], *names: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(names, of)


_SIDES = "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"
_SHARED = _copies(("model.shared.weight", *_SIDES), "model.shared.weight", *_SIDES, "lm_head.weight")
_T5 = _copies(("shared.weight",), "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
_BERT = {
    "cls.predictions.decoder.weight": ("bert.embeddings.word_embeddings.weight",),
    "cls.predictions.decoder.bias": ("cls.predictions.bias",),
}
_GPT2 = _copies(("transformer.wte.weight",), "lm_head.weight")
_LLAMA = _copies(("model.embed_tokens.weight",), "lm_head.weight")


def _read_qwen3(values: Values) -> GPTConfig:
    return _read_llama(values, qk_norm=True)


def _read_bart(values: Values) -> TransformerConfig:
    return _read_marian(values, bart=True)


FAMILIES = {
    "gpt2": Family(GPT, _read_gpt2, _write_gpt2, _gpt2_weights, "transformer.", _GPT2, (".attn.bias", ".masked_bias")),
    "llama": Family(GPT, _read_llama, _write_llama, _llama_weights, "model.", _LLAMA, ("rotary_emb.inv_freq",)),
    "qwen3": Family(GPT, _read_qwen3, _write_llama, _llama_weights, "model.", _LLAMA),
    "bert": Family(Bert, _read_bert, _write_bert, _bert_weights, "bert.", _BERT, ("embeddings.position_ids",)),
    "marian": Family(
        Transformer, _read_marian, _write_marian, _marian_weights, "model.", _SHARED, ("embed_positions.weight",)
    ),
    "bart": Family(Transformer, _read_bart, _write_marian, _marian_weights, "model.", _SHARED),
    "t5": Family(Transformer, _read_t5, _write_t5, _t5_weights, "", _T5),
}


def family_of(config: ModelConfig) -> str:
    """The model_type that a model of this configuration would be; whether it is one in truth is to be tried."""
    if isinstance(config, BertConfig):
        return "bert"
    if isinstance(config, TransformerConfig):
        return {"relative": "t5", "learned": "bart"}.get(config.position, "marian")
    return "qwen3" if config.qk_norm else "gpt2" if config.position == "learned" else "llama"

"""The random inputs on which whole models are proven: they run, reach all of the model, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers as tf
from input_models import ENCODER_DECODER, LLAMA, MODELS, TEXT
from patch_models import build
from transformers.utils import logging

import fastllm
from fastllm.patching._inputs import candidates, decoded_shape, random_inputs, unreached, vocabulary
from fastllm.patching._media import Maker

logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

CPU = torch.device("cpu")
MEDIA = {"pixel_values", "pixel_values_videos", "input_features", "input_values"}

INPUTS = {
    "input_features decoder_input_ids": ["whisper", "speech_to_text", "seamless_m4t"],
    "input_values": ["wav2vec2", "hubert", "ast"],
    "input_features": ["wav2vec2-bert"],
    "input_features is_longer input_ids": ["clap"],
    "input_features feature_attention_mask input_ids": ["qwen2_audio"],
    "pixel_values": ["vit", "vit_mae", "dinov2", "beit", "swin", "segformer", "videomae"],
    "pixel_values_videos": ["vjepa2"],
    "pixel_values input_points": ["sam"],
    "pixel_values input_ids": ["clip", "siglip", "blip", "blip-2", "llava", "idefics3"],
    "pixel_values pixel_attention_mask spatial_shapes input_ids": ["siglip2"],
    "pixel_values input_ids decoder_input_ids": ["blip-2 of t5", "florence2"],
    "pixel_values image_grid_thw pixel_values_videos video_grid_thw input_ids mm_token_type_ids": ["qwen2_vl"],
    "pixel_values image_attention_mask input_ids": ["idefics"],
    "pixel_values decoder_input_ids": ["trocr", "donut"],
    "input_ids": ["llama", "bert", "bart for sequences", "gpt2 for sequences", "perceiver"],
    "input_ids decoder_input_ids": ["bart", "t5"],
}
GIVEN = {name: set(inputs.split()) for inputs, names in INPUTS.items() for name in names}
# Given speech it reads no text, and it speaks only in `generate`.
ASIDE = {"seamless_m4t": {"SeamlessM4TEncoder", "SeamlessM4TTextToUnitForConditionalGeneration"}}
ASIDE["seamless_m4t"] |= {"SeamlessM4TCodeHifiGan"}
IMAGE_TOKENS = {"blip-2": 3, "blip-2 of t5": 3, "llava": 4, "idefics3": 1, "florence2": 17, "qwen2_vl": 4}
OWN_ATTENTION = {"clap", "blip", "perceiver", "donut"}


def run(model, inputs) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        output = model.eval()(**inputs)

    def tensors(output) -> list[Tensor]:
        values = list(output.values())
        found = [x.clone() for x in values if isinstance(x, Tensor)]
        return found + [x for value in values if isinstance(value, dict) for x in tensors(value)]

    return tensors(output)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-6, atol=1e-7) for x, y in zip(a, b, strict=True))


def test_every_model_has_its_expectation():
    assert MODELS.keys() == GIVEN.keys()


@pytest.mark.parametrize("name", MODELS)
def test_all_of_the_model_runs(name):
    model = MODELS[name]()
    inputs = random_inputs(model, CPU)
    assert inputs.keys() == GIVEN[name]
    assert {type(m).__name__ for m in unreached(model, inputs)} == ASIDE.get(name, set())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_every_input_reaches_the_output(name):
    model = MODELS[name]()
    inputs = random_inputs(model, CPU)
    before = run(model, inputs)
    assert same(run(model, inputs), before)
    for key, x in inputs.items():
        if key in MEDIA:
            other = x + torch.linspace(-1, 1, x.numel()).view(x.shape)
        elif key in ("input_ids", "decoder_input_ids"):
            other = x.clone()
            other[:, 0] = x[0, :3][x[0, :3] != x[0, 0]][0]
        else:
            continue
        assert not same(run(model, inputs | {key: other}), before), key


@pytest.mark.parametrize("name", [name for name, given in GIVEN.items() if "input_ids" in given])
def test_special_tokens_stand_where_they_mean_something(name):
    model = MODELS[name]()
    ids = random_inputs(model, CPU)["input_ids"]
    special = Maker(model, 1).special()
    ends = [getattr(c, "eos_token_id", None) for c in (model.config, model.config.get_text_config())]
    middle = ids[:, 4:-4]
    assert not special & set(torch.cat((ids[:, :4], ids[:, -4:-1]), 1).flatten().tolist())
    assert ids.max() < vocabulary(model)
    if IMAGE_TOKENS.get(name):
        token = model.config.image_token_id
        assert (middle == token).sum(1).tolist() == [IMAGE_TOKENS[name]] * 2
        assert (ids == token).sum() == (middle == token).sum()
    if ends[1] is not None and ends[1] != model.config.get_text_config().pad_token_id and ends[1] < vocabulary(model):
        assert ids[:, -1].tolist() == [ends[1]] * len(ids)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_inputs_each_time_and_no_trace(name):
    model = MODELS[name]().train()
    model.get_submodule(next(path for path, _ in model.named_modules() if path)).eval()
    modes = [m.training for m in model.modules()]
    attributes = [{k for k, v in vars(m).items() if isinstance(v, Tensor)} for m in model.modules()]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = random_inputs(model, CPU)
    unreached(model, one)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [{k for k, v in vars(m).items() if isinstance(v, Tensor)} for m in model.modules()] == attributes
    torch.manual_seed(2)
    two = random_inputs(model, CPU)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


# Their masks do nothing, or they have none: a single row, images, spectra of a fixed length.
UNMASKED = {"whisper", "gpt2 for sequences", *(n for n, g in GIVEN.items() if not g & {"input_ids", "input_features"})}
UNMASKED -= {"wav2vec2", "hubert"}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNMASKED])
def test_padding_hides_something(name):
    model = MODELS[name]()
    inputs = random_inputs(model, CPU, padded=True)
    mask = inputs["attention_mask"]
    assert mask[0].all()
    assert 0 < mask[1].sum() < mask.shape[1]
    assert mask[1].tolist() == sorted(mask[1].tolist(), reverse=True)
    seen = run(model, inputs)
    bare = run(model, inputs | {"attention_mask": torch.ones_like(mask)})
    assert not same(seen, bare)
    if "input_ids" in inputs and "decoder_input_ids" not in inputs:
        text = model.config.get_text_config()
        hidden = inputs["input_ids"][1][mask[1] == 0].tolist()
        pad = getattr(text, "pad_token_id", None)
        assert set(hidden) == {hidden[0] if pad is None else pad}


@pytest.mark.parametrize("name", ["vit", "ast", "gpt2 for sequences"])
def test_what_takes_no_mask_is_not_padded(name):
    model = MODELS[name]()
    plain, padded = random_inputs(model, CPU), random_inputs(model, CPU, padded=True)
    assert plain.keys() == padded.keys()


def test_what_is_hidden_is_not_seen():
    for name, key in (("bert", "input_ids"), ("llama", "input_ids"), ("wav2vec2-bert", "input_features")):
        model = MODELS[name]()
        inputs = random_inputs(model, CPU, padded=True)
        other = inputs[key].clone()
        other[1, inputs["attention_mask"][1] == 0] = 11
        seen = int(inputs["attention_mask"][1].sum())
        a, b = (run(model, x)[0][1, :seen] for x in (inputs, inputs | {key: other}))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["clip", "whisper", "wav2vec2", "llava", "videomae", "qwen2_vl"])
def test_models_of_16_bits(name):
    model = MODELS[name]().bfloat16()
    inputs = random_inputs(model, CPU)
    assert inputs.keys() == GIVEN[name]
    assert {inputs[key].dtype for key in MEDIA & inputs.keys()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["clip", "llava", "qwen2_audio", "whisper"])
def test_the_first_error_is_raised(name):
    tried = []

    def refuse(inputs):
        tried.append(inputs.keys())
        raise RuntimeError(f"attempt {len(tried)}")

    with pytest.raises(RuntimeError, match="attempt 1"):
        random_inputs(MODELS[name](), CPU, refuse)
    assert tried[0] == GIVEN[name]
    assert 1 < len(tried) <= 8


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("llava", "CLIPVisionModel"),
        ("qwen2_vl", "Qwen2VisionTransformerPretrainedModel"),
        ("qwen2_audio", "Qwen2AudioEncoder"),
    ],
)
def test_text_alone_does_not_reach_the_tower(name, tower):
    model = MODELS[name]()

    def text_only(inputs):
        assert not MEDIA & inputs.keys()
        assert inputs.keys() == {"input_ids"}
        model(**inputs)

    inputs = random_inputs(model, CPU, text_only)
    assert inputs["input_ids"].shape == (2, 8)
    assert [type(m).__name__ for m in unreached(model, inputs)] == [tower]


def test_gradients_whatever_is_around():
    model = MODELS["llama"]()
    seen = []
    random_inputs(model, CPU, lambda inputs: seen.append(model(**inputs).logits.requires_grad))
    with torch.no_grad():
        random_inputs(model, CPU, lambda inputs: seen.append(model(**inputs).logits.requires_grad))
    assert seen == [True, True]


def test_a_decoders_shape():
    assert decoded_shape(random_inputs(MODELS["t5"](), CPU)) == (2, 6)
    assert decoded_shape(random_inputs(MODELS["llama"](), CPU)) == (2, 8)
    assert decoded_shape(random_inputs(MODELS["llava"](), CPU)) == (2, 12)
    with pytest.raises(ValueError, match="takes no tokens"):
        decoded_shape(random_inputs(MODELS["vit"](), CPU))


def test_wrappers_that_take_anything():
    model = MODELS["clip"]()
    compiled = torch.compile(model, backend="eager")
    assert next(candidates(compiled, CPU)).keys() == GIVEN["clip"]
    assert random_inputs(compiled, CPU).keys() == GIVEN["clip"]


@pytest.mark.parametrize(
    ("model_class", "config", "shapes"),
    [
        ("WhisperForConditionalGeneration", "WhisperConfig", {"input_features": (2, 80, 3000)}),
        ("Wav2Vec2ForCTC", "Wav2Vec2Config", {"input_values": (2, 5200)}),
        ("ViTModel", "ViTConfig", {"pixel_values": (2, 3, 224, 224)}),
        ("VideoMAEModel", "VideoMAEConfig", {"pixel_values": (2, 16, 3, 224, 224)}),
        ("ClapModel", "ClapConfig", {"input_features": (2, 1, 1024, 64), "input_ids": (2, 8)}),
        ("ASTModel", "ASTConfig", {"input_values": (2, 1024, 128)}),
    ],
)
def test_sizes_as_they_are(model_class, config, shapes):
    with torch.device("meta"):
        model = getattr(tf, model_class)(getattr(tf, config)())
    inputs = next(candidates(model, CPU))
    assert {key: tuple(inputs[key].shape) for key in shapes} == shapes


def test_texts_of_clip_mean_more_than_their_first_word():
    """Its oldest checkpoints look for the largest token, and name the end wrongly."""
    with torch.device("meta"):
        model = tf.CLIPTextModel(tf.CLIPTextConfig(eos_token_id=2))
    ids = next(candidates(model, CPU))["input_ids"]
    assert ids.argmax(-1).max() > 0


def test_a_small_vocabulary():
    model = build(tf.LlamaForCausalLM, tf.LlamaConfig(**{**LLAMA, "vocab_size": 6}))
    ids = random_inputs(model, CPU)["input_ids"]
    assert set(ids[:, :-1].flatten().tolist()) <= {3, 4, 5}
    short = build(tf.BertForMaskedLM, tf.BertConfig(**{**TEXT, "max_position_embeddings": 4}))
    assert random_inputs(short, CPU)["input_ids"].shape == (2, 4)
    half = {**ENCODER_DECODER, "vocab_size": 60, "decoder_vocab_size": 20, "share_encoder_decoder_embeddings": False}
    half |= {"max_position_embeddings": 64, "tie_word_embeddings": False}
    inputs = random_inputs(build(tf.MarianMTModel, tf.MarianConfig(**half)), CPU)
    assert inputs["decoder_input_ids"].max() < 20 <= inputs["input_ids"].max()


@pytest.mark.parametrize("name", MODELS)
def test_attention(name):
    """Replaced, and the model's outputs are as before, of padded inputs, too."""
    model = MODELS[name]()
    batches = [random_inputs(model, CPU), random_inputs(model, CPU, padded=True)]
    before = [run(model, inputs) for inputs in batches]
    with fastllm.patched(model, only="attention") as report:
        now = {entry.path: entry.now for entry in report if entry.was.startswith("attention")}
        assert now.pop("") == (None if name in OWN_ATTENTION else "attention"), report
        assert now == ({"t2u_model": None} if name == "seamless_m4t" else {}), report  # which nothing is known to reach
        for inputs, expected in zip(batches, before, strict=True):
            for a, b in zip(run(model, inputs), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for inputs, expected in zip(batches, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), expected, strict=True))

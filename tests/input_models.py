"""Small models of transformers that take images, videos, sound and text, of each kind one at least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as tf
from patch_models import build
from torch import nn

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {
    **SIZE,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {**TEXT, "num_key_value_heads": 2}
VISION = {**SIZE, "image_size": 16, "patch_size": 8}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
WAVES = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 16}
WAVES |= {"num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2, "vocab_size": 40}


def _llava() -> nn.Module:
    text = tf.LlamaConfig(**LLAMA)
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=text, image_token_id=5, vision_feature_layer=-1
    )
    return build(tf.LlavaForConditionalGeneration, config)


def _blip2(text: Any) -> nn.Module:
    qformer = {**SIZE, "vocab_size": 99, "encoder_hidden_size": 32}
    config = tf.Blip2Config(
        vision_config=tf.Blip2VisionConfig(**VISION), qformer_config=tf.Blip2QFormerConfig(**qformer),
        text_config=text, num_query_tokens=3, image_token_id=5,
    )  # fmt: skip
    return build(tf.Blip2ForConditionalGeneration, config)


def _qwen2_vl() -> nn.Module:
    text = {**LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    tokens = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    return build(tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))


def _qwen2_audio() -> nn.Module:
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    audio = tf.Qwen2AudioEncoderConfig(**audio, num_mel_bins=8, max_source_positions=20)
    config = tf.Qwen2AudioConfig(audio_config=audio, text_config=tf.Qwen2Config(**LLAMA), audio_token_id=5)
    return build(tf.Qwen2AudioForConditionalGeneration, config)


def _idefics3() -> nn.Module:
    vision = tf.Idefics3VisionConfig(**VISION)
    config = tf.Idefics3Config(
        vision_config=vision, text_config=tf.LlamaConfig(**LLAMA), image_token_id=5, scale_factor=2
    )
    return build(tf.Idefics3ForConditionalGeneration, config)


def _idefics() -> nn.Module:
    vision = {"embed_dim": 32, "image_size": 16, "patch_size": 8, "num_attention_heads": 4, "num_hidden_layers": 2}
    resampler = {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8}
    config = tf.IdeficsConfig(
        **TEXT, vision_config={**vision, "intermediate_size": 48}, perceiver_config=resampler, use_resampler=True,
        additional_vocab_size=0, cross_layer_interval=1,
    )  # fmt: skip
    return build(tf.IdeficsForVisionText2Text, config)


def _florence2() -> nn.Module:
    vision = {"depths": (1, 1), "embed_dim": (16, 32), "num_heads": (2, 4), "num_groups": (2, 4), "window_size": 4}
    vision |= {"patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1), "patch_prenorm": (False, True)}
    vision |= {"projection_dim": 32, "max_temporal_embeddings": 4, "max_position_embeddings": 10, "image_size": 32}
    text = tf.BartConfig(**ENCODER_DECODER, max_position_embeddings=100)
    config = tf.Florence2Config(text_config=text, vision_config=tf.Florence2VisionConfig(**vision), image_token_id=5)
    return build(tf.Florence2ForConditionalGeneration, config)


def _sam() -> nn.Module:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    vision |= {"mlp_dim": 48, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8}
    prompts = {
        "hidden_size": 16,
        "image_size": 32,
        "patch_size": 8,
        "image_embedding_size": 4,
        "mask_input_channels": 4,
    }
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    return build(
        tf.SamModel, tf.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    )


def _clap() -> nn.Module:
    audio = {"num_mel_bins": 8, "spec_size": 32, "window_size": 2, "patch_size": 2, "patch_stride": (2, 2)}
    audio |= {"patch_embeds_hidden_size": 16, "depths": [2, 2], "num_attention_heads": [2, 2], "hidden_size": 32}
    return build(tf.ClapModel, tf.ClapConfig(text_config=TEXT, audio_config=audio, projection_dim=16))


def _seamless() -> nn.Module:
    sizes = {"speech_encoder_layers": 1, "speech_encoder_attention_heads": 4, "speech_encoder_intermediate_size": 48}
    sizes |= {
        "hidden_size": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "adaptor_kernel_size": 4,
        "adaptor_stride": 4,
    }
    names = ("encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim")
    sizes |= dict(zip(names, (4, 4, 48, 48), strict=True)) | {"feature_projection_input_dim": 16, "vocab_size": 99}
    names = ("t2u_encoder_layers", "t2u_decoder_layers", "t2u_encoder_ffn_dim", "t2u_decoder_ffn_dim")
    sizes |= dict(zip(names, (1, 1, 48, 48), strict=True)) | {"conv_depthwise_kernel_size": 5, "t2u_vocab_size": 50}
    sizes |= {"t2u_encoder_attention_heads": 4, "t2u_decoder_attention_heads": 4, "t2u_max_new_tokens": 5}
    sizes |= {"unit_hifi_gan_vocab_size": 50, "unit_embed_dim": 8, "lang_embed_dim": 4, "spkr_embed_dim": 4}
    sizes |= {
        "upsample_initial_channel": 16,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "variance_predictor_kernel_size": 3,
    }
    sizes |= {"upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4]}
    return build(tf.SeamlessM4TModel, tf.SeamlessM4TConfig(**sizes))


def _vision_decoder(vision: Any) -> nn.Module:
    decoder = tf.TrOCRConfig(
        d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=99,
        cross_attention_hidden_size=32,
    )  # fmt: skip
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, decoder)
    return build(tf.VisionEncoderDecoderModel, config)


def _segformer() -> nn.Module:
    sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
    sizes |= {"num_attention_heads": [2, 4], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    return build(tf.SegformerForSemanticSegmentation, tf.SegformerConfig(**sizes, decoder_hidden_size=16))


def _speech() -> Any:
    sizes = {**ENCODER_DECODER, "num_conv_layers": 2, "conv_channels": 16, "input_feat_per_channel": 16}
    return tf.Speech2TextConfig(**sizes, max_source_positions=100, max_target_positions=50)


def _of(model_class: Any, config: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: build(model_class, config())


_CLIP = {"vision_config": VISION, "text_config": TEXT, "projection_dim": 16}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "whisper": _of(
        tf.WhisperForConditionalGeneration,
        lambda: tf.WhisperConfig(**ENCODER_DECODER, num_mel_bins=8, max_source_positions=20, max_target_positions=20),
    ),
    "speech_to_text": _of(tf.Speech2TextForConditionalGeneration, _speech),
    "wav2vec2": _of(tf.Wav2Vec2ForCTC, lambda: tf.Wav2Vec2Config(**SIZE, **WAVES)),
    "hubert": _of(tf.HubertModel, lambda: tf.HubertConfig(**SIZE, **WAVES)),
    "wav2vec2-bert": _of(
        tf.Wav2Vec2BertForCTC, lambda: tf.Wav2Vec2BertConfig(**SIZE, vocab_size=40, feature_projection_input_dim=16)
    ),
    "ast": _of(
        tf.ASTForAudioClassification, lambda: tf.ASTConfig(**SIZE, patch_size=4, max_length=24, num_mel_bins=16)
    ),
    "clap": _clap,
    "seamless_m4t": _seamless,
    "qwen2_audio": _qwen2_audio,
    "vit": _of(tf.ViTForImageClassification, lambda: tf.ViTConfig(**VISION)),
    "vit_mae": _of(
        tf.ViTMAEForPreTraining,
        lambda: tf.ViTMAEConfig(
            **VISION, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
            decoder_intermediate_size=48,
        ),
    ),
    "dinov2": _of(tf.Dinov2Model, lambda: tf.Dinov2Config(**VISION)),
    "beit": _of(tf.BeitModel, lambda: tf.BeitConfig(**VISION, vocab_size=99)),
    "swin": _of(tf.SwinForImageClassification, lambda: tf.SwinConfig(**_SWIN)),
    "segformer": _segformer,
    "videomae": _of(tf.VideoMAEForVideoClassification, lambda: tf.VideoMAEConfig(**VISION, num_frames=4)),
    "vjepa2": _of(
        tf.VJEPA2Model,
        lambda: tf.VJEPA2Config(
            patch_size=8, crop_size=16, frames_per_clip=4, hidden_size=32, num_attention_heads=4, num_hidden_layers=2,
            pred_hidden_size=32, pred_num_attention_heads=4, pred_num_hidden_layers=2, pred_num_mask_tokens=2,
        ),
    ),
    "sam": _sam,
    "clip": _of(tf.CLIPModel, lambda: tf.CLIPConfig(**_CLIP)),
    "siglip": _of(tf.SiglipModel, lambda: tf.SiglipConfig(text_config=TEXT, vision_config=VISION)),
    "siglip2": _of(
        tf.Siglip2Model,
        lambda: tf.Siglip2Config(
            text_config=TEXT, vision_config={**SIZE, "patch_size": 8, "num_patches": 16}
        ),
    ),
    "blip": _of(
        tf.BlipForConditionalGeneration,
        lambda: tf.BlipConfig(
            text_config={**TEXT, "encoder_hidden_size": 32, "sep_token_id": 3}, vision_config=VISION, projection_dim=16
        ),
    ),
    "blip-2": lambda: _blip2(
        tf.OPTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=99,
            word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ),
    "blip-2 of t5": lambda: _blip2(
        tf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "idefics": _idefics,
    "idefics3": _idefics3,
    "florence2": _florence2,
    "trocr": lambda: _vision_decoder(tf.ViTConfig(**VISION)),
    "donut": lambda: _vision_decoder(tf.DonutSwinConfig(**_SWIN)),
    "llama": _of(tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**LLAMA)),
    "bert": _of(tf.BertForMaskedLM, lambda: tf.BertConfig(**TEXT)),
    "bart": _of(tf.BartForConditionalGeneration, lambda: tf.BartConfig(**ENCODER_DECODER, max_position_embeddings=64)),
    "bart for sequences": _of(
        tf.BartForSequenceClassification, lambda: tf.BartConfig(**ENCODER_DECODER, max_position_embeddings=64)
    ),
    "gpt2 for sequences": _of(
        tf.GPT2ForSequenceClassification,
        lambda: tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64),
    ),
    "t5": _of(
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    ),
    "perceiver": _of(
        tf.PerceiverForMaskedLM,
        lambda: tf.PerceiverConfig(
            num_latents=4, d_latents=32, d_model=32, num_blocks=1, num_self_attends_per_block=2, vocab_size=99,
            num_self_attention_heads=4, num_cross_attention_heads=4, max_position_embeddings=16,
        ),
    ),
}  # fmt: skip

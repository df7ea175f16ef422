"""A few random tokens for a model of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LENGTH = 8


def vocabulary(model: Any) -> int:
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", None) or model.config.get_text_config().vocab_size)


def random_inputs(model: Any, device: torch.device) -> dict[str, Tensor]:
    """What the model's forward takes: tokens, with a decoder's where it has an encoder too, or an image; else its own
    dummies.

    Raises:
        Exception: whatever a model without tokens raises.
    """
    generator = torch.Generator().manual_seed(0)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = 1, model.config.num_channels, height, width
        return {"pixel_values": torch.randn(shape, generator=generator).to(device)}
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return {name: value.to(device) for name, value in model.dummy_inputs.items()}
    size = vocabulary(model)
    low = min(10, size - 1)  # special tokens stand first; some models look for them

    def tokens() -> Tensor:
        return torch.randint(low, size, (1, LENGTH), generator=generator).to(device)

    inputs = {"input_ids": tokens()}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens()
    return inputs


def decoded_length(inputs: dict[str, Tensor]) -> int:
    """For how many positions the model gives logits."""
    return next(x for name, x in inputs.items() if "decoder" in name or name == "input_ids").shape[1]

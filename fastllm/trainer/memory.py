"""What a model takes at least, so that one that cannot fit is an error at once, not a machine that hangs."""

from __future__ import annotations

import os

import torch

from fastllm.models import GPTConfig

_BLOCK = 20_000  # bytes that Python takes for the modules of a block


def count_parameters(config: GPTConfig) -> int:
    """How many parameters a `GPT` of this shape has; builds nothing."""
    width, bias = config.width, config.bias
    norm = 2 if config.norm == "layer_norm" and bias else 1
    inner, kv_width = config.heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    up = config.mlp_width * (2 if config.gated else 1)
    block = 2 * width * norm + width * (inner + kv_width) + inner * width + width * (up + config.mlp_width)
    block += (inner + kv_width + width + up + width) * bias + 2 * config.head_dim * norm * config.qk_norm
    block += config.heads * config.sinks
    embeddings = config.vocab_size * (1 if config.tie_embeddings else 2)
    embeddings += config.context if config.position == "learned" else 0
    return embeddings * width + config.layers * block + width * norm


def check_memory(config: GPTConfig, device: torch.device, *, batch_size: int = 0, accumulate: int = 1) -> None:
    """Refuses a model that is larger than the memory there is, for sure: the estimate is far below what is needed.

    Args:
        config: of the model.
        device: "cpu" or "cuda".
        batch_size, accumulate: of a training step, as in `TrainConfig`; 0 for a model that is not trained.

    Raises:
        ValueError: with the sizes.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parameters = count_parameters(config)
    # Trained, a weight has a gradient and two moments.
    need = parameters * (16 if batch_size else 4) + config.layers * _BLOCK + 8 * config.context * config.head_dim
    # Inputs and targets of a step in 64 bits, and what a block keeps of a batch for its backward.
    tokens = batch_size * config.context
    need += tokens * 16 * accumulate + tokens * config.width * config.layers * 4
    if need > memory:
        step = f" by steps of {accumulate} x {batch_size} x {config.context} tokens" if batch_size else ""
        raise ValueError(
            f"a model of {parameters:,} parameters (layers={config.layers}, width={config.width}, "
            f"context={config.context}, vocab_size={config.vocab_size}) takes more than {need >> 30:,} GiB"
            f"{' to train' if batch_size else ''}{step}; there are {memory >> 30:,} GiB"
        )

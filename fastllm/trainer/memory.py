"""What a model takes, by part, so that one that cannot fit is an error at once, not a machine that hangs."""

from __future__ import annotations

import os
from typing import Any

import torch

from fastllm.models import BertConfig, TransformerConfig
from fastllm.models.config import ModelConfig
from fastllm.models.layers import loss_bytes

_MODULES = 20_000  # bytes that Python takes for the modules of a block
_PRECISIONS = ("float32", "bfloat16", "pure_bfloat16")
_MASTERS = {None: 0, "remainder": 2, "float32": 4}


def memory_by_part(
    config: ModelConfig,
    *,
    batch_size: int,
    length: int,
    optimizer_bytes: float = 8,
    master_weights: str | None = None,
    ema: bool = False,
    precision: str = "float32",
    activation_checkpointing: bool = False,
    world_size: int = 1,
    sharded: bool = False,
    device: str = "cpu",
) -> dict[str, int]:
    """Bytes that training takes on each device.

    Args:
        config: of any model.
        batch_size, length: rows of a forward pass, and their positions; of an encoder-decoder both source and target.
        optimizer_bytes: of state for each parameter, without master weights: AdamW's are 8, 4 with moments in bfloat16,
            2.03 in 8 bits.
        master_weights: None, "float32" or "remainder", as `fastllm.optim.AdamW`; weights are then in bfloat16.
        ema: whether an average of the weights is kept, in float32.
        precision: "float32"; "bfloat16": by autocast, which copies the weights; "pure_bfloat16": they are so already,
            which master weights imply.
        activation_checkpointing: as `Model.checkpoint_activations`.
        world_size, sharded: whether weights, gradients and all state are shared out over so many devices (FSDP2).
        device: "cpu" or "cuda", whose losses cut their logits differently.

    Returns:
        "weights" (with autocast's copies), "gradients", "optimizer", "master_weights", "ema": exact, but for copies of
        what is no matrix. "activations": an estimate, of what a block's products, norms, activation and attention keep
        for the backward on fastllm's ops, padding and dropout not counted; checkpointed, the input of each block and
        the inside of one. "loss": logits and the gradients that are computed with it (`layers.loss_bytes`).

    Raises:
        ValueError: for an unknown precision or master_weights.
    """
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {_PRECISIONS}, got {precision!r}")
    if master_weights not in _MASTERS:
        raise ValueError(f"master_weights must be one of {tuple(_MASTERS)}, got {master_weights!r}")
    held = config.num_parameters()
    held = -(-held // world_size) if sharded else held
    weight = 2 if master_weights or precision == "pure_bfloat16" else 4
    compute = 4 if precision == "float32" and not master_weights else 2
    tokens = batch_size * length
    return {
        "weights": held * (weight + 2 * (compute < weight)),
        "gradients": held * weight,
        "optimizer": int(held * optimizer_bytes),
        "master_weights": held * _MASTERS[master_weights],
        "ema": held * 4 * ema,
        "activations": tokens * _activations(config, compute, weight, activation_checkpointing),
        "loss": _loss(config, tokens, compute, device),
    }


def _activations(config: ModelConfig, compute: int, residual: int, checkpointed: bool) -> int:
    """Bytes that a token leaves for the backward: in the dtype of products, and in that of what blocks add up to."""
    sides = [(config.layers, False)]
    if isinstance(config, TransformerConfig):
        sides = [(config.num_encoder_layers, False), (config.layers, True)]
    inside = [_block(config, compute, residual, cross) for _, cross in sides]
    ends = len(sides) * config.width * (compute + residual)  # norms of embeddings, and the last
    if not checkpointed:
        return sum(layers * block for (layers, _), block in zip(sides, inside, strict=True)) + ends
    handed_on = config.width * (residual + compute * config.norm_first)
    return sum(layers for layers, _ in sides) * handed_on + max(inside) + ends


def _block(config: ModelConfig, compute: int, residual: int, cross: bool) -> int:
    inner, keys = config.heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    attention = config.width + inner + keys + inner  # input, queries, keys and values, output
    turned = inner + keys // 2 if config.position == "rotary" or config.qk_norm else 0
    mlp = config.width + config.mlp_width * (3 if config.gated else 1 if config.mlp == "relu" else 2)
    return compute * ((1 + cross) * attention + turned + mlp) + residual * (2 + cross) * config.width


def _loss(config: ModelConfig, tokens: int, compute: int, device: str) -> int:
    if isinstance(config, BertConfig):
        if config.head not in ("mlm", "pretraining"):
            return 0
        tokens = -(-tokens * 15 // 100)  # as many as mask_tokens chooses
    return loss_bytes(config, tokens, compute, device)


def check_memory(
    config: ModelConfig, device: torch.device, *, batch_size: int = 0, accumulate: int = 1, **training: Any
) -> None:
    """Refuses a model that is larger than the memory there is, for sure: the estimate is far below what is needed.

    Args:
        config: of the model.
        device: "cpu" or "cuda".
        batch_size, accumulate: of a training step, as in `TrainConfig`; 0 for a model that is not trained.
        training: options of `memory_by_part`.

    Raises:
        ValueError: with the sizes.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parameters = config.num_parameters()
    if batch_size:
        training = {**training, "activation_checkpointing": True}  # whether or not: what is there at least
        parts = memory_by_part(config, batch_size=batch_size, length=config.context, **training)
        # Inputs and targets of a step in 64 bits.
        need = sum(parts.values()) - parts["loss"] + batch_size * config.context * 16 * accumulate
    else:
        need = parameters * 4
    need += config.layers * _MODULES
    need += config.context * {"rotary": 8 * config.head_dim, "sinusoidal": 4 * config.width}.get(config.position, 0)
    if need > memory:
        step = f" by steps of {accumulate} x {batch_size} x {config.context} tokens" if batch_size else ""
        raise ValueError(
            f"a model of {parameters:,} parameters (layers={config.layers}, width={config.width}, "
            f"context={config.context}, vocab_size={config.vocab_size}) takes more than {need >> 30:,} GiB"
            f"{' to train' if batch_size else ''}{step}; there are {memory >> 30:,} GiB"
        )

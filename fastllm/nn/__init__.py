"""Modules over `fastllm.ops`: the constructors and state_dicts of torch.nn's and transformers', another forward."""

from fastllm.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastllm.nn.mlp import GEGLU, SwiGLU
from fastllm.nn.norm import LayerNorm, RMSNorm
from fastllm.nn.rotary import RotaryEmbedding

__all__ = [
    "GEGLU",
    "CrossEntropyLoss",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
]

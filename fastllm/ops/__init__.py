"""Fused ops. Each takes the arguments of the torch function that it replaces."""

from fastllm.ops.adamw import adamw
from fastllm.ops.add_layer_norm import add_layer_norm
from fastllm.ops.add_rms_norm import add_rms_norm
from fastllm.ops.attention import attention
from fastllm.ops.attention_kvcache import attention_kvcache
from fastllm.ops.attention_varlen import attention_varlen
from fastllm.ops.cross_entropy import cross_entropy
from fastllm.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastllm.ops.dropout_add_rms_norm import dropout_add_rms_norm
from fastllm.ops.geglu import geglu
from fastllm.ops.gelu import gelu
from fastllm.ops.layer_norm import layer_norm
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.rms_norm import rms_norm
from fastllm.ops.rotary import rotary
from fastllm.ops.swiglu import swiglu

__all__ = [
    "adamw",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_kvcache",
    "attention_varlen",
    "cross_entropy",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "swiglu",
]

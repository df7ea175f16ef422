"""Modules over `fastllm.ops`: the constructors and state_dicts of torch.nn's, another forward."""

from fastllm.nn.norm import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "RMSNorm"]

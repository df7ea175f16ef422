"""Optimizers over fused ops."""

from fastllm.optim.adamw import AdamW

__all__ = ["AdamW"]

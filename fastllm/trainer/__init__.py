"""A trainer small enough to read: one process, one device."""

from fastllm.trainer.schedule import warmup_cosine
from fastllm.trainer.trainer import TrainConfig, Trainer, evaluate, make_optimizer, resolve_device

__all__ = ["TrainConfig", "Trainer", "evaluate", "make_optimizer", "resolve_device", "warmup_cosine"]

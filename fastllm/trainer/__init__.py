"""A trainer small enough to read: one process, one device."""

from fastllm.trainer.memory import check_memory
from fastllm.trainer.schedule import warmup_cosine
from fastllm.trainer.trainer import TrainConfig, Trainer, evaluate, make_optimizer, resolve_device, saved_config

__all__ = [
    "TrainConfig",
    "Trainer",
    "check_memory",
    "evaluate",
    "make_optimizer",
    "resolve_device",
    "saved_config",
    "warmup_cosine",
]

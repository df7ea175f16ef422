"""A trainer small enough to read: any model of `fastllm.models`, on one device or, under `torchrun`, on many."""

from fastllm.trainer.checkpoint import saved_config
from fastllm.trainer.config import DataConfig, RunConfig, TrainConfig
from fastllm.trainer.distributed import resolve_device
from fastllm.trainer.evaluation import Evaluation, evaluate
from fastllm.trainer.memory import check_memory
from fastllm.trainer.optimizers import make_optimizer
from fastllm.trainer.trainer import Trainer

__all__ = [
    "DataConfig",
    "Evaluation",
    "RunConfig",
    "TrainConfig",
    "Trainer",
    "check_memory",
    "evaluate",
    "make_optimizer",
    "resolve_device",
    "saved_config",
]

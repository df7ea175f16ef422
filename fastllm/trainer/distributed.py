"""The ranks of a run, as `torchrun` starts them: DDP or FSDP2, and the numbers that they tell each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """The processes that train together; one, unless `torchrun` started more.

    Attributes:
        rank, size: this one's number, and how many there are.
        host: a group of processes that talk through the host, so that a number is exchanged without a wait for the
            device; None where there is one process.
    """

    rank: int = 0
    size: int = 1
    host: Any = None

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Joins the others that `torchrun` started, if it did; a group of processes that is there already is taken."""
        if not dist.is_available() or (not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) < 2):
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        host = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), host)

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes files and shows progress."""
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """The sums of these numbers over all ranks."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.host)
        return sums.tolist()

    def gathered(self, value: Any) -> list[Any]:
        """What each rank gave, by rank."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value, group=self.host)
        return found

    def from_first(self, value: Any) -> Any:
        """What rank 0 gave."""
        return self.gathered(value if self.first else None)[0]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor on the device over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def leave(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is "cuda" where there is one, else "cpu".

    Raises:
        ValueError: for a name that torch does not know, a device that fastllm does not run on, and a GPU that is not
            there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"unknown device {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r}: fastllm trains on cpu and cuda")
    count = 1
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r}: torch {torch.__version__} sees no GPU")
        count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ValueError(f"device {name!r}: there is only {device.type}:0" + (f" to {count - 1}" if count > 1 else ""))
    return device


def local_device(device: torch.device) -> torch.device:
    """This rank's GPU, where it is `cuda` without a number and `torchrun` gave the rank one.

    Raises:
        ValueError: for a rank that has none.
    """
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if rank >= count:
            raise ValueError(f"rank {rank} of this machine has no GPU of its own: there are {count}")
        device = torch.device("cuda", rank)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def shard(model: nn.Module) -> None:
    """FSDP2: weights, gradients and optimizer state of each block, and of the rest, over all ranks (Zhao et al., 2023).

    Blocks are what a `ModuleList` named `blocks` holds.
    """
    from torch.distributed.fsdp import fully_shard

    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "blocks":
            for block in module:
                fully_shard(block)
    fully_shard(model)

"""Cross-entropy modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm import ops
from fastllm.ops import _cross_entropy
from fastllm.ops._arguments import integer


def _settings(module: torch.nn.Module, *names: str) -> str:
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on `fastllm.ops.cross_entropy`: same arguments, same state_dict.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as torch's.
        z_loss, softcap, inplace: as `fastllm.ops.cross_entropy`.

    Raises:
        TypeError, ValueError: for settings that `fastllm.ops.cross_entropy` would refuse.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float | None = 0.0,
        softcap: float | None = 0.0,
        inplace: bool = False,
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        name = "CrossEntropyLoss"
        self.ignore_index = integer(name, "ignore_index", ignore_index)
        self.label_smoothing, self.z_loss, self.softcap = _cross_entropy.check_options(
            name, self.reduction, label_smoothing, z_loss, softcap
        )
        self.inplace = inplace

    def forward(self, input: Tensor, target: Tensor, *, num_valid: float | Tensor | None = None) -> Tensor:
        return ops.cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            num_valid=num_valid,
            inplace=self.inplace,
        )

    def extra_repr(self) -> str:
        return _settings(self, "reduction", "ignore_index", "label_smoothing", "z_loss", "softcap", "inplace")


class _Classifier(torch.nn.Linear):
    """A Linear that computes the loss too: FSDP2 gathers what it shards around `forward` alone."""

    def forward(self, input: Tensor, target: Tensor | None = None, **kwargs: Any) -> Any:
        """The classes' logits; with targets, their loss."""
        return super().forward(input) if target is None else _loss(self, input, target, **kwargs)


def _loss(linear: torch.nn.Linear, input: Tensor, target: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
    return ops.linear_cross_entropy(input, linear.weight, target, linear_bias=linear.bias, **kwargs)


class LinearCrossEntropyLoss(torch.nn.Module):
    """The classifier and its loss on `fastllm.ops.linear_cross_entropy`, arguments and state_dict ("linear.weight",
    "linear.bias", "weight") as `torch.nn.LinearCrossEntropyLoss` of torch 2.13 on.

    Args:
        in_features, num_classes: H and V.
        bias, device, dtype: of the classifier.
        reduction, weight, ignore_index, label_smoothing: as torch's.
        z_loss, softcap, chunk_size: as `fastllm.ops.linear_cross_entropy`.

    Raises:
        TypeError, ValueError: for settings that `fastllm.ops.linear_cross_entropy` would refuse.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float | None = 0.0,
        softcap: float | None = 0.0,
        chunk_size: int | None = None,
    ):
        super().__init__()
        self.linear: torch.nn.Linear = _Classifier(in_features, num_classes, bias, device, dtype)
        self.register_buffer("weight", weight)
        name = "LinearCrossEntropyLoss"
        self.reduction = reduction
        self.ignore_index = -100 if ignore_index is None else integer(name, "ignore_index", ignore_index)
        self.label_smoothing, self.z_loss, self.softcap = _cross_entropy.check_options(
            name, reduction, label_smoothing, z_loss, softcap
        )
        self.chunk_size = _cross_entropy.check_linear_options(
            name, weight, self.label_smoothing, self.z_loss, chunk_size
        )

    def forward(self, input: Tensor, target: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of hidden states (..., H) and targets (...); `num_valid`, `dtype`, `return_logprobs` and
        `process_group` as `fastllm.ops.linear_cross_entropy`."""
        kwargs |= {
            "weight": self.weight,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "chunk_size": self.chunk_size,
        }
        if isinstance(self.linear, _Classifier):
            return self.linear(input, target, **kwargs)
        return _loss(self.linear, input, target, **kwargs)  # somebody put another there

    def extra_repr(self) -> str:
        return _settings(self, "reduction", "ignore_index", "label_smoothing", "z_loss", "softcap", "chunk_size")

"""Where a number that is not finite comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (tuple, list)) else []


class Fault(NamedTuple):
    """Whether it is a gradient that is not finite, and what is, such as "the output of blocks.3.mlp"."""

    gradient: bool
    what: str


def first_fault(model: nn.Module, loss: Callable[[], Tensor]) -> Fault | None:
    """Runs `loss` and its backward, and names the first module whose output is not finite, if there is one; else the
    parameters whose gradients are not.

    Args:
        model: whose modules `loss` calls.
        loss: computes the loss.

    Returns:
        None where all is finite.
    """
    found: list[str] = []
    names = {module: name or "the model" for name, module in model.named_modules()}

    def look(module: nn.Module, _: Any, output: Any) -> None:
        if not found and any(t.is_floating_point() and not t.isfinite().all() for t in _tensors(output)):
            found.append(f"the output of {names[module]}")

    # Modules inside a module end before it does.
    handles = [module.register_forward_hook(look) for module in names]
    try:
        value = loss()
    finally:
        for handle in handles:
            handle.remove()
    weights = [name for name, parameter in model.named_parameters() if not _local(parameter).isfinite().all()]
    if weights:
        found.insert(0, f"the weights {weights[0]}")
    if not found and not value.isfinite():
        found.append("the loss")
    value.backward()
    if found:
        return Fault(False, found[0])
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not _local(p.grad).isfinite().all()]
    return Fault(True, f"the gradient of {bad[-1]}") if bad else None  # the last layer's is computed first


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    tensor = tensor.detach()
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else torch.as_tensor(local())

"""A patched model beside itself unpatched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.patching._forward import ours
from fastllm.patching._own_loss import Logits


@dataclass
class Comparison:
    """The largest differences, each beside the largest absolute value: (difference, largest).

    Attributes:
        loss, logits: None where the model gave none.
        gradients: by parameter name.
        layers: outputs of modules by path, in the order that they ran in.
        random: whether the model drew random numbers, as dropout does. Fused and unfused ops draw others.
    """

    loss: tuple[float, float] | None = None
    logits: tuple[float, float] | None = None
    gradients: dict[str, tuple[float, float]] = field(default_factory=dict)
    layers: dict[str, tuple[float, float]] = field(default_factory=dict)
    random: bool = False

    def __str__(self) -> str:
        title = f"largest difference of largest value; the worst, as a part of it: {self.worst:.1e}"
        if self.random:
            title += "\nThe model drew random numbers, which differ: compare in evaluation mode, or without dropout."
        rows = [("loss", self.loss), ("logits", self.logits)]
        rows += [(f"layer {path}", value) for path, value in self.layers.items()]
        rows += [(f"gradient {name}", value) for name, value in self.gradients.items()]
        return "\n".join([title, *(f"{name:<60} {v[0]:.2e} of {v[1]:.2e}" for name, v in rows if v is not None)])

    @property
    def worst(self) -> float:
        """The largest of all differences, each relative to the largest value of its tensor; of gradients, to at least a
        thousandth of the largest of all: some, as that of a key's bias, are nothing but roundings."""
        least = 1e-3 * max((largest for _, largest in self.gradients.values()), default=0.0)
        pairs = [pair for pair in (self.loss, self.logits, *self.layers.values()) if pair is not None]
        pairs += [(difference, max(largest, least)) for difference, largest in self.gradients.values()]
        relative = [difference / (largest or 1.0) for difference, largest in pairs]
        return math.nan if any(map(math.isnan, relative)) else max(relative, default=0.0)


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The largest difference (infinite for another shape), and the largest absolute value of `a`."""
    if a.shape != b.shape:
        return math.inf, float(a.detach().abs().max()) if a.numel() else 0.0
    if not a.numel():
        return 0.0, 0.0
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.detach().to(dtype), b.detach().to(dtype)
    return float((a - b).abs().max()), float(a.abs().max())


def _random_states() -> list[Tensor]:
    """Of the generators that torch draws from: the CPU's, and the GPU's where one is in use."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


class _Run:
    """One forward and backward, with the outputs of the model's layers."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], paths: set[str], seed: int):
        self.layers: dict[str, Tensor] = {}
        handles = [m.register_forward_hook(self._take(p)) for p, m in model.named_modules() if p in paths]
        torch.manual_seed(seed)
        states = _random_states()
        try:
            self.output = model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        self.random = any(not torch.equal(a, b) for a, b in zip(states, _random_states(), strict=True))
        if isinstance(self.output, Mapping):
            self.loss, self.logits = self.output.get("loss"), self.output.get("logits")
        else:  # a loss is a single number, whatever it is called
            given = self.output if isinstance(self.output, (tuple, list)) else [self.output]
            tensors = [x for x in given if isinstance(x, Tensor)]
            self.loss = next((x for x in tensors if x.numel() == 1), None)
            self.logits = next((x for x in tensors if x.numel() != 1), None)
        self.grads: dict[str, Tensor] = {}
        if isinstance(self.loss, Tensor) and self.loss.requires_grad:
            named = {n: p for n, p in model.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(self.loss, list(named.values()), allow_unused=True)
            self.grads = {n: g for n, g in zip(named, grads, strict=True) if g is not None}

    def _take(self, path: str):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and not isinstance(first, Logits) and not first.is_meta:  # promised logits
                self.layers[path] = first.detach()

        return hook


def compare(model: nn.Module, batch: Mapping[str, Any], *, seed: int = 0, **patch: Any) -> Comparison:
    """Runs the model unpatched and patched on one batch and says where they differ.

    Args:
        model: not patched.
        batch: its keyword arguments, with labels for the loss and the gradients.
        seed: of both runs' dropout; the masks of fused and unfused ops differ, so compare in eval mode or without it. A
            comparison of a model that drew random numbers says so.
        **patch: as `patch` takes them.

    Returns:
        A `Comparison`; `print` shows it layer by layer.

    Raises:
        TypeError: for a model that is no module, or a batch that is no mapping. ValueError: for a patched model.
    """
    from fastllm.patching import patched

    if not isinstance(model, nn.Module):
        raise TypeError(f"compare: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"compare: batch must be a mapping of the model's arguments by name, got {type(batch).__name__}"
        )
    for path, module in model.named_modules():
        if ours(module.__dict__.get("forward")):
            raise ValueError(f"compare: {path or 'the model'} is patched already; revert() that report first")

    # Blocks of layers and what they consist of: the leaves run other code.
    paths = {path for path, m in model.named_modules() if path and any(True for _ in m.children())}
    before = _Run(model, batch, paths, seed)
    with patched(model, **patch):
        after = _Run(model, batch, paths, seed)
    result = Comparison(random=before.random)
    if isinstance(before.loss, Tensor) and isinstance(after.loss, Tensor):
        result.loss = difference(before.loss, after.loss)
    if isinstance(before.logits, Tensor) and isinstance(after.logits, Tensor):
        result.logits = difference(before.logits, after.logits)
    for path, x in before.layers.items():
        if path in after.layers:
            result.layers[path] = difference(x, after.layers[path])
    for name in before.grads | after.grads:
        given = [run.grads.get(name) for run in (before, after)]
        like = next(grad for grad in given if grad is not None)
        result.gradients[name] = difference(*(torch.zeros_like(like) if grad is None else grad for grad in given))
    return result

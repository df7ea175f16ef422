"""Modules that compute LayerNorm or RMSNorm of the last dimension, whatever they call themselves."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastllm import ops
from fastllm.patching import _probe
from fastllm.patching._forward import Forward, bind
from fastllm.patching._probe import Differs


class Norm(NamedTuple):
    """What a module computes."""

    centered: bool  # LayerNorm
    offset: float  # added to the weight
    eps: float
    widened: bool  # the result has the dtype that input and weight promote to, not the input's


def norm(kind: Norm, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if kind.offset:
        weight = weight + kind.offset
    if kind.centered:
        y = ops.layer_norm(x, weight.shape, weight, bias, kind.eps)
    else:
        y = ops.rms_norm(x, weight.shape, weight, kind.eps)
    return y.to(torch.promote_types(x.dtype, weight.dtype)) if kind.widened else y


def forward(module: nn.Module, kind: Norm, names: tuple[str, ...], *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a patched module; its parameters are looked up, for others may exchange them."""
    if len(args) + len(kwargs) != 1:  # a gate, say, which was not tried
        return type(module).forward(module, *args, **kwargs)
    (x,) = (*args, *kwargs.values())
    parameters = [getattr(module, name) for name in names]
    tried = x.dtype == parameters[0].dtype or (parameters[0].dtype == torch.float32 and x.dtype in _probe.SHORT)
    if x.is_nested or not tried:  # some give the dtype of their weight
        return type(module).forward(module, x)
    return norm(kind, x, *parameters)


def matches(module: nn.Module) -> bool:
    """No submodules, one parameter of one dimension, or two of one shape; a number that could be eps."""
    parameters = list(module.parameters(recurse=False))
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return bool(parameters)
    plain = not any(True for _ in module.children()) and len(parameters) in (1, 2)
    return plain and all(p.dim() == 1 and p.shape == parameters[0].shape for p in parameters) and bool(_eps(module))


OPS = ("layer_norm", "rms_norm")


def _eps(module: nn.Module) -> list[float]:
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return [] if module.eps is None else [module.eps]
    written = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    values = [*vars(module).values(), *(() if written is None else written.co_consts)]
    return [value for value in values if isinstance(value, float) and 0 < value < 1e-1]


def find(module: nn.Module, only: tuple | None = None) -> tuple[Norm, tuple[str, ...]]:
    """What the module computes, and the names of its weight and, if it has one, its bias; `only` is the one answer that
    is asked for.

    Raises:
        Differs: if that is no norm.
    """
    named = dict(module.named_parameters(recurse=False))
    names = tuple(sorted(named, key=lambda name: "bias" in name))
    biased = len(names) > 1
    if biased and "bias" not in names[1]:
        raise Differs(f"its parameters are called {', '.join(names)}")
    weight = named[names[0]]
    if weight.dim() != 1:
        raise Differs(f"it normalizes {weight.dim()} dimensions")
    if weight.numel() == 1:
        raise Differs("it has a single weight, for any number of channels")
    _probe.refuse_buffers(module)
    epsilons = _eps(module) or [torch.finfo(torch.float32).eps]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, weight.numel(), generator=generator)
    x[0] *= max(epsilons) ** 0.5  # where eps counts
    x[1] += 1  # where the mean does
    x = x.to(weight.device, weight.dtype)
    kinds = [
        Norm(centered, offset, eps, False)
        for eps in epsilons
        for offset in (0.0, 1.0)
        for centered in ((True,) if biased else (False, True))
    ]
    if only is not None:
        kinds = [only[0]._replace(widened=False)]

    def attempt(kind: Norm) -> None:
        computed = functools.partial(norm, kind)
        _probe.check(module, lambda x: computed(x, *(named[n] for n in names)), computed, x)

    (kind,) = _probe.first_match([(kind,) for kind in kinds], attempt)
    if weight.dtype != torch.float32:
        return kind, names
    # Fed 16 bits, as autocast does: modules differ in whether a float32 weight widens the result.
    with torch.no_grad():
        out = type(module).forward(module, x.to(torch.bfloat16))
    return kind._replace(widened=out.dtype == torch.float32), names


def replacement(module: nn.Module, found: tuple[Norm, tuple[str, ...]]) -> Forward:
    return bind(module, forward, *found)


def op(found: tuple[Norm, tuple[str, ...]]) -> str:
    return "layer_norm" if found[0].centered else "rms_norm"

"""Modules that compute norm(dropout(projection(x)) + residual), as the blocks of BERT end; the projection may be
missing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastllm import backends, ops
from fastllm.patching import _norms, _probe
from fastllm.patching._forward import Forward, bind
from fastllm.patching._probe import Differs

OPS = ("dropout_add_layer_norm", "dropout_add_rms_norm")


class Residual(NamedTuple):
    """What a module computes, by the names of its children."""

    projection: str | None
    dropout: str
    norm: str
    kind: _norms.Norm
    parameters: tuple[str, ...]  # of the norm
    first: bool  # the residual is the first argument of its forward


def dropout_add_norm(
    kind: _norms.Norm,
    branch: Tensor,
    residual: Tensor,
    p: float,
    training: bool,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """norm(dropout(branch) + residual)."""
    if kind.offset:
        weight = weight + kind.offset
    given, how = (branch, residual, weight.shape, weight), {"p": p, "training": training}
    if kind.centered:
        y, _ = ops.dropout_add_layer_norm(*given, bias, kind.eps, **how)  # type: ignore[arg-type]
    else:
        y, _ = ops.dropout_add_rms_norm(*given, kind.eps, **how)  # type: ignore[arg-type]
    return y.to(torch.promote_types(y.dtype, weight.dtype)) if kind.widened else y


def forward(module: nn.Module, found: Residual, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs or len(args) != 2:
        return type(module).forward(module, *args, **kwargs)
    dropout, norm = getattr(module, found.dropout), getattr(module, found.norm)
    branch, residual = reversed(args) if found.first else args
    if found.projection is not None:
        branch = getattr(module, found.projection)(branch)
    if branch.shape != residual.shape or branch.is_nested:  # a sum broadcasts
        return norm(dropout(branch) + residual)
    parameters = (getattr(norm, name) for name in found.parameters)
    return dropout_add_norm(found.kind, branch, residual, dropout.p, dropout.training, *parameters)


def _parts(module: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """Names of projections, dropouts, norms among its children; all empty if there are others."""
    projections, dropouts, norms = [], [], []
    for name, child in module.named_children():
        if type(child) is nn.Dropout:
            dropouts.append(name)
        elif _probe.sizes(child):
            projections.append(name)
        elif _norms.matches(child):
            norms.append(name)
        else:
            return [], [], []
    return projections, dropouts, norms


def matches(module: nn.Module) -> bool:
    """A dropout, a norm, at most one projection, no parameters of its own, and a forward of two arguments."""
    projections, dropouts, norms = _parts(module)
    if len(dropouts) != 1 or len(norms) != 1 or len(projections) > 1 or list(module.parameters(recurse=False)):
        return False
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())
    except (TypeError, ValueError):
        return False
    return len(parameters) == 3 and all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters)


def find(module: nn.Module, only: Residual | None = None) -> Residual:
    """What the module computes; `only` is the one answer that is asked for.

    What it drops out shows at p = 0 and p = 1, where nothing is random.

    Raises:
        Differs: if it is no norm of a sum with dropout.
    """
    projections, (dropout,), (norm,) = _parts(module)
    projection = projections[0] if projections else None
    kind, names = _norms.find(getattr(module, norm), None if only is None else (only.kind, only.parameters))
    weight = getattr(getattr(module, norm), names[0])
    size = _probe.sizes(getattr(module, projection)) if projection else None
    inner = size[0] if size else weight.numel()
    outer = size[1] if size else inner
    if outer != weight.numel():
        raise Differs(f"its projection gives {outer} channels, its norm takes {weight.numel()}")
    _probe.refuse_buffers(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, inner + outer, generator=generator).to(weight.device, weight.dtype)
    own = [name for name, _ in module.named_parameters()]

    def attempt(first: bool) -> None:
        found = Residual(projection, dropout, norm, kind, names, first)
        sizes = (outer, inner) if first else (inner, outer)

        def call(function: Callable) -> Callable:
            return lambda x: function(module, *x.split(sizes, -1))

        def truth(x: Tensor, *parameters: Tensor) -> Tensor:
            state = dict(zip(own, parameters, strict=True))
            branch, residual = reversed(x.split(sizes, -1)) if first else x.split(sizes, -1)
            if projection is not None:
                branch = _probe.call_child(module, projection, state, branch)
            training, p = getattr(module, dropout).training, getattr(module, dropout).p
            branch = torch.dropout(branch, p, training)
            return _norms.norm(kind, branch + residual, *(state[f"{norm}.{name}"] for name in names))

        def ours(module: nn.Module, a: Tensor, b: Tensor) -> Tensor:
            return forward(module, found, a, b)

        with _probe.dropping(module, 0.0):
            _probe.check(module, call(ours), truth, x, call(type(module).forward))
        module.train()
        with _probe.dropping(module, 1.0), torch.no_grad(), backends.use_backend("reference"):
            theirs, zeros = call(type(module).forward)(x), truth(x.double(), *(p.double() for p in module.parameters()))
            rounding = torch.finfo(theirs.dtype).eps * float(zeros.abs().max())
            _probe.judge("output without its branch", theirs, theirs, zeros, rounding, cancelling=0.0)

    (first,) = _probe.first_match([(False,), (True,)] if only is None else [(only.first,)], attempt)
    return Residual(projection, dropout, norm, kind, names, first)


def replacement(module: nn.Module, found: Residual) -> Forward:
    return bind(module, forward, found, uncalled=(found.dropout, found.norm))


def op(found: Residual) -> str:
    return "dropout_add_layer_norm" if found.kind.centered else "dropout_add_rms_norm"

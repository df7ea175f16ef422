"""Gated feed-forward modules: down(act(gate(x)) * up(x)), gate and up two projections or one. And slow GELUs."""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm import ops
from fastllm.patching import _probe
from fastllm.patching._forward import Forward, bind
from fastllm.patching._probe import Differs


class Gated(NamedTuple):
    """What a module computes, by the names of its projections."""

    gate: str
    up: str | None  # None: gate gives both, gate's half first
    down: str
    activation: str  # "silu", "gelu_tanh" or "gelu"


def gated(activation: str, gate: Tensor, up: Tensor | None) -> Tensor:
    if activation == "silu":
        return ops.swiglu(gate, up)
    return ops.geglu(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none")


def forward(module: nn.Module, kind: Gated, *args: Any, **kwargs: Any) -> Tensor:
    if len(args) + len(kwargs) != 1:
        return type(module).forward(module, *args, **kwargs)
    (x,) = (*args, *kwargs.values())
    if x.is_nested:
        return type(module).forward(module, x)
    up = None if kind.up is None else getattr(module, kind.up)(x)
    return getattr(module, kind.down)(gated(kind.activation, getattr(module, kind.gate)(x), up))


def _layouts(module: nn.Module) -> list[tuple[str, str | None, str]]:
    """(gate, up, down) in every way that the sizes of the projections allow."""
    sizes = {name: size for name, child in module.named_children() if (size := _probe.sizes(child))}
    found: list[tuple[str, str | None, str]] = []
    for down, (inner, outer) in sizes.items():
        into = [name for name, size in sizes.items() if name != down and size == (outer, inner)]
        found += [(gate, up, down) for gate, up in itertools.permutations(into, 2)]
        found += [(name, None, down) for name, size in sizes.items() if name != down and size == (outer, 2 * inner)]
    count = len(sizes)
    return [layout for layout in found if count == (2 if layout[1] is None else 3)]


def _activates(module: nn.Module, projections: set[str]) -> bool:
    """Whether it holds or calls an activation: three projections alone may be anything, attention for one."""
    for name, child in module.named_children():
        if name not in projections and not isinstance(child, (nn.Dropout, nn.Identity)):
            return True
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    called = () if code is None else code.co_names
    functions = any(callable(value) for name, value in vars(module).items() if not name.startswith("_"))
    return functions or any(word in name for name in called for word in ("silu", "gelu", "swish", "act"))


OPS = ("swiglu", "geglu")


def matches(module: nn.Module) -> bool:
    layouts = _layouts(module)
    return bool(layouts) and _activates(module, {name for layout in layouts for name in layout if name is not None})


def find(module: nn.Module, only: Gated | None = None) -> Gated:
    """What the module computes; `only` is the one answer that is asked for.

    Raises:
        Differs: if it is no gated feed-forward.
    """
    for child in module.modules():
        if isinstance(child, nn.Dropout) and child.p > 0:
            raise Differs(f"it drops out, with p = {child.p}")
    if list(module.parameters(recurse=False)):
        raise Differs("it has parameters beside its projections")
    _probe.refuse_buffers(module)
    layouts = _layouts(module)
    gate = getattr(module, layouts[0][0])
    parameter = next(gate.parameters(), None)
    if parameter is None or not parameter.dtype.is_floating_point:
        raise Differs("its projections have no floating parameters")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, _probe.sizes(gate)[0], generator=generator)  # type: ignore[index]
    x = x.to(parameter.device, parameter.dtype)
    with torch.no_grad():  # where activations differ: between -3 and 3
        x /= gate(x).float().abs().max().clamp(min=1e-3).to(x.dtype) / 3
    names = [name for name, _ in module.named_parameters()]

    def attempt(layout: tuple[str, str | None, str], activation: str) -> None:
        kind = Gated(*layout, activation)

        def truth(x: Tensor, *parameters: Tensor) -> Tensor:
            state = dict(zip(names, parameters, strict=True))
            gate = _probe.call_child(module, kind.gate, state, x)
            up = None if kind.up is None else _probe.call_child(module, kind.up, state, x)
            return _probe.call_child(module, kind.down, state, gated(activation, gate, up))

        for scale in (1, 10):  # and where somebody might clamp
            _probe.check(module, functools.partial(forward, module, kind), truth, x * scale)

    candidates = list(itertools.product(layouts, ("silu", "gelu_tanh", "gelu")))
    if only is not None:
        candidates = [((only.gate, only.up, only.down), only.activation)]
    (gate_name, up, down), activation = _probe.first_match(candidates, attempt)
    return Gated(gate_name, up, down, activation)


def replacement(module: nn.Module, found: Gated) -> Forward:
    names = [*(name for name, _ in module.named_children()), *(name for name in vars(module) if name[0] != "_")]
    return bind(module, forward, found, uncalled=[name for name in names if name not in found[:3]])


def op(found: Gated) -> str:
    return "swiglu" if found.activation == "silu" else "geglu"


def gelu_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs or len(args) != 1:
        return type(module).forward(module, *args, **kwargs)
    return F.gelu(args[0], approximate="tanh")


def may_be_gelu(module: nn.Module) -> bool:
    """A module without a state or submodules that is no activation of torch's, nor calls torch's gelu."""
    if type(module).__module__.startswith("torch.") or list(module.children()) or module.state_dict():
        return False
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "gelu" not in code.co_names


def check_gelu(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Raises Differs unless the module is GELU in its tanh form."""
    for x in (torch.linspace(-6, 6, 257), torch.tensor([-1e4, -100, -30, -10, 10, 30, 100, 1e4])):
        gelu = functools.partial(F.gelu, approximate="tanh")
        _probe.check(module, gelu, gelu, x.to(device, dtype))

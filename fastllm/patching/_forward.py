"""The forward that a replaced module is given, and when it goes back to the module's own: where the modules that it
computes without calling them are others than those that were proven, or somebody wants them called."""

from __future__ import annotations

import copy
import inspect
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as _modules

from fastllm.backends import FallbackWarning


class Proven(NamedTuple):
    """What a replaced module was when it was proven."""

    original: Callable | None  # its class's forward, where that is known
    uncalled: tuple[tuple[nn.Module | None, str, nn.Module, type], ...]  # in it (None) or deeper: name, module, class
    functions: tuple[tuple[str, Any], ...]  # in its attributes, that it no longer calls


GLOBAL_HOOKS = (
    _modules._global_forward_hooks,
    _modules._global_forward_pre_hooks,
    _modules._global_backward_hooks,
    _modules._global_backward_pre_hooks,
)
"""Those of all modules."""


class Forward:
    """The forward of one replaced module: run(module, *found, ...), or the module's own.

    As a method's, its `__func__` takes the module as well: accelerate wraps that, and binds it to the module again, or
    to a copy of it."""

    __slots__ = ("found", "module", "proven", "run")
    __name__ = "forward"  # by which a method is pickled

    def __init__(self, module: nn.Module | None, run: Callable, found: tuple, proven: Proven):
        self.module, self.run, self.found, self.proven = module, run, found, proven

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if module is None:
            module, args = args[0], args[1:]
        if not _as_proven(module, self.proven):
            return type(module).forward(module, *args, **kwargs)
        return self.run(module, *self.found, *args, **kwargs)

    def __getstate__(self) -> tuple:
        """Without the class's forward, which pickle may not find: it is the one that the class has then."""
        return self.module, self.run, self.found, self.proven.uncalled, self.proven.functions

    def __setstate__(self, state: tuple) -> None:
        self.module, self.run, self.found, uncalled, functions = state
        self.proven = Proven(None if self.module is None else type(self.module).forward, uncalled, functions)

    def __deepcopy__(self, memo: dict) -> Forward:
        made = memo[id(self)] = Forward.__new__(Forward)
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        made.proven = made.proven._replace(original=self.proven.original)
        return made

    @property
    def __func__(self) -> Forward:
        return Forward(None, self.run, self.found, self.proven)

    @property
    def __code__(self) -> types.CodeType:
        """torch.export asks every forward where it stands."""
        return type(self).__call__.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(self.proven.original or nn.Module.forward)
        skipped = 0 if self.module is None else 1
        return own.replace(parameters=list(own.parameters.values())[skipped:])


def bind(module: nn.Module, run: Callable, *found: Any, uncalled: Iterable[str] = ()) -> Forward:
    """run(module, *found, ...) as the forward of this one module.

    Args:
        uncalled: names of its children, and of functions in its attributes, that `run` does not call but computes.
    """
    named = [(name, getattr(module, name)) for name in uncalled]
    modules: list[tuple[nn.Module | None, str, nn.Module, type]] = []
    modules += [(None, name, value, type(value)) for name, value in named if isinstance(value, nn.Module)]
    for _, _, outer, _ in modules:  # grows meanwhile
        modules += [(outer, name, inner, type(inner)) for name, inner in outer.named_children()]
    functions = tuple((name, value) for name, value in named if callable(value) and not isinstance(value, nn.Module))
    return Forward(module, run, found, Proven(type(module).forward, tuple(modules), functions))


def ours(forward: Any, proven: Proven | None = None) -> bool:
    """Whether `patch` has set this forward; the one with this proof, where it is given."""
    forward = forward.__func__ if isinstance(forward, types.MethodType) else forward
    return isinstance(forward, Forward) and (proven is None or forward.proven is proven)


def _as_proven(module: nn.Module, proven: Proven) -> bool:
    if proven.original is not None and type(module).forward is not proven.original:
        _warn(module, "has the forward of another class than when it was patched")
        return False
    for parent, name, child, was in proven.uncalled:
        inside = module if parent is None else parent  # a Sequential may be empty
        if inside._modules.get(name) is not child or type(child) is not was:
            _warn(module, f"has another {name} than when it was patched")
            return False
        if not untouched(child):  # whoever looks at it, or brings its parameters, wants it called
            return False
    if torch.compiler.is_compiling():  # Dynamo does not compare functions
        return True
    for name, function in proven.functions:
        if module.__dict__.get(name) is not function:
            _warn(module, f"has another {name} than when it was patched")
            return False
    return True


def _warn(module: nn.Module, what: str) -> None:
    if torch.compiler.is_compiling():  # which a warning would end
        return
    message = f"fastllm.patch: {type(module).__name__} {what}: it runs as it was before the patch"
    warnings.warn(message, FallbackWarning, stacklevel=4)


def untouched(module: nn.Module) -> bool:
    """Whether nobody has hooked the module, or given it a forward of his own."""
    forward = module.__dict__.get("forward")
    return not hooked(module) and (forward is None or ours(forward))


def hooked(module: nn.Module) -> bool:
    """Whether somebody wants to know when this module runs, or when any module does."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or watched()


def watched() -> bool:
    """Whether somebody wants to know when any module at all runs."""
    return any(GLOBAL_HOOKS)

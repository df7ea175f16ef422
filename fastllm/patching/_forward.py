"""The forward that a replaced module is given, and when it goes back to the module's own: where the modules that it
computes without calling them are others than those that were proven, or somebody wants them called."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import module as _modules

from fastllm.backends import FallbackWarning


class Proven(NamedTuple):
    """What a replaced module was when it was proven."""

    original: Callable  # its class's forward
    children: tuple[tuple[str, nn.Module, type], ...]  # that it no longer calls: name, module, class
    functions: tuple[tuple[str, Any], ...]  # in its attributes, that it no longer calls


GLOBAL_HOOKS = (
    _modules._global_forward_hooks,
    _modules._global_forward_pre_hooks,
    _modules._global_backward_hooks,
    _modules._global_backward_pre_hooks,
)
"""Those of all modules."""

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)


def bind(module: nn.Module, run: Callable, *found: Any, uncalled: Iterable[str] = ()) -> functools.partial:
    """run(module, *found, ...) as the forward of this one module.

    Args:
        uncalled: names of its children, and of functions in its attributes, that `run` does not call but computes.
    """
    named = [(name, getattr(module, name)) for name in uncalled]
    children = tuple((name, value, type(value)) for name, value in named if isinstance(value, nn.Module))
    functions = tuple((name, value) for name, value in named if isinstance(value, _FUNCTIONS))
    proven = Proven(type(module).forward, children, functions)
    forward: Any = functools.partial(call, module, run, found, proven)
    # As a method has it: accelerate wraps the function, and binds it to the module, or to a copy of that.
    forward.__func__ = functools.partial(call_as_method, run, found, proven)
    forward.__func__.__name__ = "forward"  # by which a method is pickled
    signature = inspect.signature(type(module).forward)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]  # annotations may not be pickled
    forward.__func__.__signature__ = inspect.Signature(bare)
    forward.__signature__ = inspect.Signature(bare[1:])
    return forward


def ours(forward: Any) -> bool:
    """Whether `patch` has set this forward."""
    forward = forward.__func__ if isinstance(forward, types.MethodType) else forward
    return isinstance(forward, functools.partial) and forward.func in (call, call_as_method)


def call(module: nn.Module, run: Callable, found: tuple, proven: Proven, *args: Any, **kwargs: Any) -> Any:
    """The forward of a replaced module."""
    if not _as_proven(module, proven):
        return type(module).forward(module, *args, **kwargs)
    return run(module, *found, *args, **kwargs)


def call_as_method(run: Callable, found: tuple, proven: Proven, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward as a function of the module."""
    return call(module, run, found, proven, *args, **kwargs)


def _as_proven(module: nn.Module, proven: Proven) -> bool:
    if type(module).forward is not proven.original:
        _warn(module, "has the forward of another class than when it was patched")
        return False
    for name, child, was in proven.children:
        if module._modules.get(name) is not child or type(child) is not was:
            _warn(module, f"has another {name} than when it was patched")
            return False
        if not untouched(child):  # whoever looks at it, or brings its parameters, wants it called
            return False
    for name, function in proven.functions:
        if module.__dict__.get(name) is not function:
            _warn(module, f"has another {name} than when it was patched")
            return False
    return True


def _warn(module: nn.Module, what: str) -> None:
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

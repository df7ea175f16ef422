"""Modules whose forward calls scaled_dot_product_attention."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastllm.patching import _probe
from fastllm.patching._attention import dot_product
from fastllm.patching._forward import Forward, bind
from fastllm.patching._probe import Differs

OPS = ("attention",)


def matches(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and not type(module).__module__.startswith("torch.") and _calls(code)


def _calls(code: CodeType) -> bool:
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return "scaled_dot_product_attention" in code.co_names or any(map(_calls, inner))


class _Instead(TorchFunctionMode):
    """`function` for scaled_dot_product_attention, with the same arguments, in this thread and block."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.function if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A compiled graph keeps torch's attention: Dynamo breaks it where such a mode meets some of Tensor's methods."""
    if torch.compiler.is_compiling():
        return type(module).forward(module, *args, **kwargs)
    with _Instead(dot_product):
        return type(module).forward(module, *args, **kwargs)


def _undropped(function: Callable) -> Callable:
    def call(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *a, **k
    ) -> Tensor:
        return function(query, key, value, attn_mask, 0.0, *a, **k)

    return call


def find(module: nn.Module, only: bool | None = None) -> bool:
    """Raises Differs unless the module computes the same with either, on (2, 6, channels of its first projection)."""
    channels = next((size[0] for child in module.modules() if (size := _probe.sizes(child))), None)
    parameter = next((p for p in module.parameters() if p.dtype.is_floating_point), None)
    if channels is None or parameter is None:
        raise Differs("it has no projection that says what it takes")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, channels, generator=generator).to(parameter.device, parameter.dtype)

    def run(function: Callable, call: Callable) -> Callable:
        def result(x: Tensor) -> Tensor:
            with _Instead(_undropped(function)):
                out = call(x)
            return out[0] if isinstance(out, tuple) else out

        return result

    original = functools.partial(type(module).forward, module)

    def truth(x: Tensor, *parameters: Tensor) -> Tensor:
        return run(F.scaled_dot_product_attention, _probe.functional(module, parameters))(x)

    with _probe.dropping(module, 0.0):
        stock = run(F.scaled_dot_product_attention, original)
        _probe.check(module, run(dot_product, original), truth, x, stock)
    return True


def replacement(module: nn.Module, found: bool) -> Forward:
    return bind(module, forward)


def op(found: bool) -> str:
    return OPS[0]

"""The configurations of a patched model of transformers: copies whose attention implementation is ours, and that are
in all else what they were, also to the checks which transformers makes by that name."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

NAME = "fastllm"
"""Of the attention implementation, as `set_attn_implementation` takes it."""

CHOICE = "_attn_implementation_internal"
"""Where a configuration keeps it."""


@contextlib.contextmanager
def _as_before(config: Any) -> Iterator[None]:
    """The configuration names the attention that it named before the patch."""
    values = vars(config)
    ours = values.get(CHOICE) == NAME
    if ours:
        values[CHOICE] = type(config).attention_before
    try:
        yield
    finally:
        if ours and values.get(CHOICE) == type(config).attention_before:
            values[CHOICE] = NAME


@functools.cache
def _class(base: type, before: str | None) -> type:
    """`base` for the copy of a configuration that named the attention `before`: what transformers allows or refuses by
    that name (output_attentions with "eager" alone) stays as it was, and unpickling makes ours known."""

    def validate(self: Any) -> None:
        with _as_before(self):
            base.validate(self)  # type: ignore[attr-defined]

    def set_output_attentions(self: Any, value: bool) -> None:
        with _as_before(self):
            wanted.fset(self, value)

    def reduce(self: Any, protocol: Any) -> tuple:
        return restored, (base, before), vars(self)

    members: dict[str, Any] = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {"attention_before": before, "__reduce_ex__": reduce}
    if hasattr(base, "validate"):
        members["validate"] = validate
    wanted = inspect.getattr_static(base, "output_attentions", None)
    if isinstance(wanted, property):
        members["output_attentions"] = property(wanted.fget, set_output_attentions)
    return type(base)(base.__name__, (base,), members)


def restored(base: type, before: str | None) -> Any:
    """An empty configuration of a patched model, as pickle asks for it."""
    from fastllm.patching._attention import register

    register()
    return object.__new__(_class(base, before))


def own(model: nn.Module) -> Callable[[], None]:
    """Gives the model configurations of its own, for models may share them; returns what gives it the others back,
    with what was set in these meanwhile."""
    from transformers import PreTrainedConfig

    holders = [
        (m, name, value)
        for m in model.modules()
        for name, value in vars(m).items()
        if isinstance(value, PreTrainedConfig)
    ]
    memo: dict[int, Any] = {}  # by id, the copy of each; under its own id, all originals
    for module, name, config in holders:
        module.__dict__[name] = copy.deepcopy(config, memo)
    pairs = [(config, memo[id(config)]) for config in {id(c): c for c in memo.get(id(memo), [])}.values()]
    copies = [(c, made, dict(vars(made))) for c, made in pairs if isinstance(c, PreTrainedConfig)]
    for _, made, values in copies:
        object.__setattr__(made, "__class__", _class(type(made), values.get(CHOICE)))  # type: ignore[arg-type]

    def undo() -> None:
        for original, made, before in copies:
            for name, value in vars(made).items():
                changed = name not in before or value is not before[name]
                if isinstance(value, (dict, list)):  # perhaps in place
                    changed = value != original.__dict__.get(name)
                if changed and (name != CHOICE or value != NAME):
                    original.__dict__[name] = value
        for module, name, config in holders:
            module.__dict__[name] = config

    return undo


def keep(part: nn.Module, whole: nn.Module) -> bool:
    """Gives a part of a patched model its own attention back. False if its configurations are those of others, too."""
    inside = set(map(id, part.modules()))
    others = {id(value) for m in whole.modules() if id(m) not in inside for value in vars(m).values()}
    configs = _patched(part)
    if any(id(config) in others for config in configs):
        return False
    _give_back(configs)
    return True


def _patched(model: nn.Module) -> list[Any]:
    """The configurations in it that name our attention."""
    found = {id(c): c for m in model.modules() for c in vars(m).values() if hasattr(type(c), "attention_before")}
    return [config for config in found.values() if vars(config).get(CHOICE) == NAME]


def _give_back(configs: list[Any]) -> None:
    """These name the attention that they named before the patch."""
    for config in configs:
        vars(config)[CHOICE] = type(config).attention_before


def init_continuous_batching(model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' engine of `generate_batch` knows by name which attentions it can page: the model has its own until
    the engine stops."""
    patched = _patched(model)
    _give_back(patched)
    try:
        manager = type(model).init_continuous_batching(model, *args, **kwargs)
    except BaseException:
        for config in patched:
            vars(config)[CHOICE] = NAME
        raise
    manager._original_attn_impl = NAME  # which it sets when it stops
    return manager

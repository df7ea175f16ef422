"""Heads of models whose forward calls cross_entropy itself: what the head gives in training is a promise of logits,
with their shape and no memory, which becomes linear_cross_entropy when the loss is taken of it, and logits when
anything else is."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from fastllm import ops
from fastllm.backends import FallbackWarning, autocasts
from fastllm.patching._forward import bind
from fastllm.patching._head import Head, can_defer, wants_no_logits
from fastllm.patching._inputs import decoded_shape
from fastllm.patching._probe import Differs, told

_SHAPES = {"view", "reshape", "flatten", "contiguous", "float", "bfloat16", "half", "to", "size", "dim", "numel"}
"""Methods that leave the numbers as they are."""

_KNOWN = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "ndim")}
"""Attributes that a promise has."""


def _drops_the_last(logits: Tensor, key: Any) -> bool:
    """Whether logits[key] is all (B, S, V) of them but those of the last position."""
    keys = key if isinstance(key, tuple) else (key,)
    if logits.dim() != 3 or any(k is not Ellipsis and k not in (slice(None), slice(None, -1)) for k in keys):
        return False
    batch, length, classes = logits.shape
    return logits[key].shape == (batch, length - 1, classes)


class Logits(Tensor):
    """What a head would have given for `hidden`. Views, and adding a bias, promise again, and cross_entropy needs no
    more; whatever else is done makes the logits after all."""

    head: Head
    module: Any
    hidden: Tensor
    bias: Tensor | None  # (V,), added to them since
    sliced: bool  # without the last position
    made: Tensor | None  # once somebody needed them

    @staticmethod
    def promise(
        like: Tensor, head: Head, module: Any, hidden: Tensor, bias: Tensor | None = None, sliced: bool = False
    ) -> Logits:
        """Of the shape and dtype of `like`, a tensor on the meta device."""
        logits: Logits = Tensor._make_subclass(Logits, like)  # type: ignore[assignment]
        logits.head, logits.module, logits.hidden, logits.bias = head, module, hidden, bias
        logits.sliced, logits.made = sliced, None
        return logits

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self = next((x for x in (*args, *kwargs.values()) if isinstance(x, cls)), None)
        if self is not None and self.made is None and args and args[0] is self:
            found = self._promised(func, args, kwargs)
            if found is not NotImplemented:
                return found
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # of a property
            name = getattr(func.__self__, "__name__", name)
        args, kwargs = tree_map_only(cls, lambda promise: promise._keep(name), (args, kwargs))
        return func(*args, **kwargs)

    def _promised(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """func(self, ...), where that needs no numbers."""
        if func is F.cross_entropy:
            return self._loss(*args[1:], **kwargs)
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.hidden.device
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("add", "__add__", "__radd__") and len(args) == 2 and not kwargs:
                added, classes = args[1], self.shape[-1]
                if self.bias is None and isinstance(added, Tensor) and added.numel() == added.shape[-1] == classes:
                    return self._again(self.to(torch.promote_types(self.dtype, added.dtype)), added.flatten())
            elif func in _KNOWN:
                return func(self)
            elif name in _SHAPES or (name == "__getitem__" and _drops_the_last(self, args[1])):
                try:
                    out = func(*args, **kwargs)
                except Exception:  # as `to` raises for another device
                    return NotImplemented
                if not isinstance(out, Tensor):
                    return out
                if out.is_meta and out.dtype.is_floating_point:
                    return self._again(out, self.bias, self.sliced or name == "__getitem__")
        return NotImplemented

    def _again(self, like: Tensor, bias: Tensor | None, sliced: bool | None = None) -> Logits:
        sliced = self.sliced if sliced is None else sliced
        return self.promise(like, self.head, self.module, self.hidden, bias, sliced)

    def _keep(self, name: str) -> Tensor:
        """The logits themselves, for a function of this name."""
        if self.made is None:
            self.head.asked.append(name)
            message = f"fastllm.patch: {type(self.module).__name__} makes its logits for {name}: the loss is not fused"
            warnings.warn(message, FallbackWarning, stacklevel=3)
            with torch._C.DisableTorchFunctionSubclass():
                shape, dtype = self.shape, self.dtype
            logits = type(self.module).forward(self.module, self.hidden)
            logits = logits if self.bias is None else logits + self.bias
            self.made = (logits[..., :-1, :] if self.sliced else logits).reshape(shape).to(dtype)
        return self.made

    def _loss(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        hidden = self.hidden[..., :-1, :] if self.sliced else self.hidden
        hidden = hidden.flatten(0, -2)
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype = tuple(self.shape), self.dtype
        weights = self.module.weight
        odd = size_average is not None or reduce is not None or target.dtype.is_floating_point
        odd = odd or (weight is not None and label_smoothing > 0)
        if odd or shape != (hidden.shape[0], weights.shape[0]):
            return NotImplemented
        if autocasts(hidden.device.type):  # where torch's is computed in float32
            dtype = torch.promote_types(dtype, torch.float32)
        biases = [x for x in (getattr(self.module, "bias", None), self.bias) if x is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        return ops.linear_cross_entropy(
            hidden, weights, target, linear_bias=bias, weight=weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, dtype=dtype,
        )  # fmt: skip


def head_forward(module: Any, head: Head, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs or len(args) != 1 or not can_defer(module, head):
        return type(module).forward(module, *args, **kwargs)
    (hidden,) = args
    dtype, device = hidden.dtype, hidden.device.type
    if autocasts(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    like = torch.empty((*hidden.shape[:-1], module.weight.shape[0]), dtype=dtype, device="meta")
    return Logits.promise(like, head, module, hidden)


def model_forward(model: Any, head: Head, *args: Any, output_logits: bool = False, **kwargs: Any) -> Any:
    """The model's forward. In training, with labels, its logits are None, unless `output_logits=True` asks for them.

    A compiled graph has them: a promise of logits cannot be traced."""
    if torch.compiler.is_compiling() or not wants_no_logits(model, output_logits, kwargs):
        return type(model).forward(model, *args, **kwargs)
    head.deferred = True
    try:
        output = type(model).forward(model, *args, **kwargs)
    finally:
        head.deferred = False
    return type(output)(**{key: value for key, value in output.items() if not isinstance(value, Logits)})


def install(report: Any, model: Any, head: Head) -> None:
    """Sets the two forwards on this model."""
    module = model.get_output_embeddings()
    report.set_forward(module, bind(module, head_forward, head))
    report.set_forward(model, bind(model, model_forward, head))


class _Watch(TorchFunctionMode):
    """Takes what cross_entropy is given, of so many classes."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.cross_entropy and args and args[0].shape[-1] == self.classes:
            self.seen.append(args[0])
            return args[0].sum() * 0
        return func(*args, **(kwargs or {}))


def find(model: Any, module: Any, inputs: dict[str, Tensor]) -> Head:
    """How the model's own loss uses its head.

    Raises:
        Differs: if it does not take one loss of its head's logits.
    """
    weight = module.weight
    classes, shape = weight.shape[0], decoded_shape(inputs)
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(*shape, classes, generator=generator).to(weight.device, weight.dtype)
    labels = torch.randint(classes, shape, generator=generator).to(weight.device)
    watch = _Watch(classes)
    module.__dict__["forward"] = lambda hidden: known
    try:
        with torch.no_grad(), watch:
            model(**inputs, labels=labels)
    except Exception as error:
        raise Differs(f"it cannot be run on random inputs: {told(error)}") from error
    finally:
        del module.__dict__["forward"]
    if len(watch.seen) != 1:
        raise Differs(f"its loss calls cross_entropy {len(watch.seen)} times")
    seen = watch.seen[0].to(known.dtype)
    expected = (known if seen.numel() == known.numel() else known[:, :-1]).flatten(0, 1)
    if seen.shape != expected.shape or not torch.equal(seen, expected):
        raise Differs("its loss is not that of its head's own logits")
    return Head()

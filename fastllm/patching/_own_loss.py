"""Heads of models whose forward calls cross_entropy itself: what the head gives in training is a promise of logits,
with their shape and no memory, which becomes linear_cross_entropy when the loss is taken of it."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastllm import ops
from fastllm.patching._head import Head, can_defer, keep_signature, wants_no_logits
from fastllm.patching._inputs import decoded_shape
from fastllm.patching._probe import Differs, told

_SHAPES = {"view", "reshape", "flatten", "contiguous", "float", "bfloat16", "half", "to", "size", "dim", "numel"}
_SHAPES.add("__get__")  # of shape, dtype and the like
"""What leaves the numbers as they are."""


def _drops_the_last(logits: Tensor, key: Any) -> bool:
    """Whether logits[key] is all (B, S, V) of them but those of the last position."""
    keys = key if isinstance(key, tuple) else (key,)
    if logits.dim() != 3 or any(k is not Ellipsis and k not in (slice(None), slice(None, -1)) for k in keys):
        return False
    batch, length, classes = logits.shape
    return logits[key].shape == (batch, length - 1, classes)


class Logits(Tensor):
    """What a head would have given for `hidden`; what may be done to it until the loss is views, and adding a bias."""

    hidden: Tensor
    module: Any
    bias: Tensor | None  # (V,), added to them since
    sliced: bool  # without the last position

    @staticmethod
    def promise(like: Tensor, hidden: Tensor, module: Any, bias: Tensor | None = None, sliced: bool = False) -> Logits:
        """Of the shape and dtype of `like`, a tensor on the meta device."""
        logits: Logits = Tensor._make_subclass(Logits, like)  # type: ignore[assignment]
        logits.hidden, logits.module, logits.bias, logits.sliced = hidden, module, bias, sliced
        return logits

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy and isinstance(args[0], cls):
            return args[0]._loss(*args[1:], **kwargs)
        self = next(x for x in (*args, *kwargs.values()) if isinstance(x, cls))
        name = getattr(func, "__name__", str(func))
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.hidden.device
        added = next((x for x in args if x is not self), None) if name in ("add", "__add__", "__radd__") else None
        with torch._C.DisableTorchFunctionSubclass():
            if isinstance(added, Tensor) and len(args) == 2 and not kwargs:
                if self.bias is None and added.numel() == added.shape[-1] == self.shape[-1]:
                    return cls.promise(self, self.hidden, self.module, added.flatten(), self.sliced)
            elif name in _SHAPES or (name == "__getitem__" and _drops_the_last(self, args[1])):
                out = func(*args, **kwargs)
                sliced = self.sliced or name == "__getitem__"
                return cls.promise(out, self.hidden, self.module, self.bias, sliced) if isinstance(out, Tensor) else out
        raise NotImplementedError(
            f"fastllm.patch: in training {type(self.module).__name__} gives no logits that could be used in {name}; "
            "call the model with output_logits=True"
        )

    def _loss(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        size_average: Any = None,
        reduce: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        hidden = self.hidden[..., :-1, :] if self.sliced else self.hidden
        hidden = hidden.flatten(0, -2)
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype = tuple(self.shape), self.dtype
        weights = self.module.weight
        if size_average is not None or reduce is not None or shape != (hidden.shape[0], weights.shape[0]):
            raise NotImplementedError(
                f"fastllm.patch: in training {type(self.module).__name__} gives no logits of shape {shape} for "
                "cross_entropy; call the model with output_logits=True"
            )
        biases = [x for x in (getattr(self.module, "bias", None), self.bias) if x is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        return ops.linear_cross_entropy(  # type: ignore[return-value]
            hidden, weights, target, linear_bias=bias, weight=weight, dtype=dtype, **kwargs
        )


def head_forward(module: Any, head: Head, hidden: Tensor) -> Tensor:
    if not can_defer(module, head):
        return type(module).forward(module, hidden)
    classes = module.weight.shape[0]
    shape = torch.empty((*hidden.shape[:-1], classes), dtype=hidden.dtype, device="meta")
    return Logits.promise(shape, hidden, module)


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
    report.set_forward(module, functools.partial(head_forward, module, head))
    report.set_forward(model, keep_signature(model, functools.partial(model_forward, model, head)))


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

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
from fastllm.patching._compare import difference
from fastllm.patching._head import Head, can_defer, keep_signature
from fastllm.patching._inputs import decoded_length
from fastllm.patching._probe import Differs, told


class Logits(Tensor):
    """What a head would have given for `hidden`. Its shape and dtype go along with whatever is done to it."""

    hidden: Tensor
    module: Any
    shift: bool

    @staticmethod
    def promise(like: Tensor, hidden: Tensor, module: Any, shift: bool) -> Logits:
        """Of the shape and dtype of `like`, a tensor on the meta device."""
        logits: Logits = Tensor._make_subclass(Logits, like)  # type: ignore[assignment]
        logits.hidden, logits.module, logits.shift = hidden, module, shift
        return logits

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy and isinstance(args[0], cls):
            return args[0]._loss(*args[1:], **kwargs)
        self = next(x for x in (*args, *kwargs.values()) if isinstance(x, cls))
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.hidden.device

        def on_meta(x: Any) -> Any:
            return x.to("meta") if isinstance(x, Tensor) else x

        with torch._C.DisableTorchFunctionSubclass():
            try:
                out = func(*map(on_meta, args), **{name: on_meta(value) for name, value in kwargs.items()})
            except Exception as error:
                raise NotImplementedError(
                    f"fastllm.patch: in training {type(self.module).__name__} gives no logits that could be used in "
                    f"{getattr(func, '__name__', func)}; call the model with output_logits=True"
                ) from error
            return cls.promise(out, self.hidden, self.module, self.shift) if isinstance(out, Tensor) else out

    def _loss(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        size_average: Any = None,
        reduce: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        hidden = self.hidden[..., :-1, :] if self.shift else self.hidden
        hidden = hidden.flatten(0, -2)
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype = tuple(self.shape), self.dtype
        weights = self.module.weight
        if size_average is not None or reduce is not None or shape != (hidden.shape[0], weights.shape[0]):
            raise NotImplementedError(
                f"fastllm.patch: in training {type(self.module).__name__} gives no logits of shape {shape} for "
                "cross_entropy; call the model with output_logits=True"
            )
        bias = getattr(self.module, "bias", None)
        return ops.linear_cross_entropy(  # type: ignore[return-value]
            hidden, weights, target, linear_bias=bias, weight=weight, dtype=dtype, **kwargs
        )


def head_forward(module: Any, head: Head, hidden: Tensor) -> Tensor:
    if not can_defer(module, head):
        return type(module).forward(module, hidden)
    classes = module.weight.shape[0]
    shape = torch.empty((*hidden.shape[:-1], classes), dtype=hidden.dtype, device="meta")
    return Logits.promise(shape, hidden, module, head.shift)


def model_forward(model: Any, head: Head, *args: Any, output_logits: bool = False, **kwargs: Any) -> Any:
    """The model's forward. In training, with labels, its logits are None, unless `output_logits=True` asks for them.

    A compiled graph has them: a promise of logits cannot be traced."""
    plain = not model.training or output_logits or kwargs.get("labels") is None or torch.compiler.is_compiling()
    if plain or kwargs.get("return_dict") is False or not getattr(model.config, "return_dict", True):
        return type(model).forward(model, *args, **kwargs)
    return _deferred(model, head, *args, **kwargs)


def _deferred(model: Any, head: Head, *args: Any, **kwargs: Any) -> Any:
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
        Differs: if its logits are not those of its head, or the loss, or a gradient, is another one.
    """
    weight = module.weight
    classes, length = weight.shape[0], decoded_length(inputs)
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(1, length, classes, generator=generator).to(weight.device, weight.dtype)
    labels = torch.randint(classes, (1, length), generator=generator).to(weight.device)
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
    shift = seen.numel() != known.numel()
    expected = (known[:, :-1] if shift else known).flatten(0, 1)
    if seen.shape != expected.shape or not torch.equal(seen, expected):
        raise Differs("its loss is not that of its head's own logits")
    head = Head(shift=shift)
    module.__dict__["forward"] = functools.partial(head_forward, module, head)
    model.__dict__["forward"] = functools.partial(_deferred, model, head)
    try:
        mine = _loss_and_gradient(lambda: model(**inputs, labels=labels), model)
    except Exception as error:
        raise Differs(f"its loss cannot be run: {told(error)}") from error
    finally:
        del module.__dict__["forward"], model.__dict__["forward"]
    theirs = _loss_and_gradient(lambda: model(**inputs, labels=labels), model)
    eps = torch.finfo(weight.dtype).eps ** (1.0 if weight.dtype == torch.float32 else 1.5)
    for what, a, b in zip(("loss", "gradient"), theirs, mine, strict=True):
        worst, largest = difference(a, b)
        if not worst <= 1000 * eps * largest:
            raise Differs(f"its {what} differs by {worst:.1e} where the largest is {largest:.1e}")
    return head


def _loss_and_gradient(run: Any, model: Any) -> list[Tensor]:
    with torch.enable_grad():
        loss = run().loss
        leaves = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else []
    return [loss, *(grad for grad in grads if grad is not None)][:2]

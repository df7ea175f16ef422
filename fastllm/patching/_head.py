"""The language-model head and its loss as one: the logits of a training step are never held whole."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm import backends, ops
from fastllm.backends import FallbackWarning
from fastllm.patching._forward import bind, hooked, ours, watched
from fastllm.patching._inputs import decoded_shape
from fastllm.patching._probe import Differs, judge, sharded, told
from fastllm.patching._report import PatchError

HUGE = 6e4  # a logit that saturates every softcap, and that float16 has


class Head:
    """What head, loss and model share while a loss is computed."""

    def __init__(self, scale: float = 1.0, softcap: float = 0.0, shift: bool = True):
        self.scale, self.softcap = scale, softcap
        self.shift = shift  # a position's target is the next label, not its own
        self.deferred = False
        self.hidden: Tensor | None = None
        self.asked: list[str] = []  # for what logits had to be made after all

    def logits(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """What the loss is given where nothing is deferred."""
        logits = type(module).forward(module, hidden) * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def can_defer(module: nn.Module, head: Head) -> bool:
    """Whether this call is one in which the head's product is left to the loss."""
    if not head.deferred or hooked(module):  # whoever looks at the logits, or changes them, gets them
        return False
    reason = None
    if not ours(module.__dict__.get("forward")):  # which may bring its weight, and take it away again
        reason = "has been given a forward by somebody else"
    elif sharded(module):
        reason = "is sharded by itself, and its weight not whole when the loss is computed"
    elif not is_linear(module):
        reason = "has other parameters than when it was patched"
    if reason is not None:
        message = f"fastllm.patch: {type(module).__name__} {reason}: its loss is not fused"
        warnings.warn(message, FallbackWarning, stacklevel=2)
    return reason is None


def is_linear(module: nn.Module) -> bool:
    """Whether weight and bias are all that it has."""
    return {name for name, _ in module.named_parameters()} <= {"weight", "bias"}


def in_place(model: Any) -> bool:
    """Whether the model's head is still the one that was patched. (Its embeddings may have been resized, say.)"""
    forward = getattr(model.get_output_embeddings(), "__dict__", {}).get("forward")
    if ours(forward):
        return True
    message = f"fastllm.patch: {type(model).__name__} has another head than when it was patched: its loss is not fused"
    warnings.warn(message, FallbackWarning, stacklevel=2)
    return False


def wants_no_logits(model: Any, output_logits: bool, kwargs: dict[str, Any]) -> bool:
    """Whether this call of the model's forward is one in training, with labels, that can do without."""
    if not model.training or output_logits or kwargs.get("labels") is None or kwargs.get("return_dict") is False:
        return False
    if watched():  # whoever looks at all modules sees what they were
        return False
    return getattr(model.config, "return_dict", True) and in_place(model)


def head_forward(module: nn.Module, head: Head, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs or len(args) != 1 or not can_defer(module, head):
        return type(module).forward(module, *args, **kwargs)
    (hidden,) = args
    head.hidden = hidden
    # What follows until the loss (a scale, a softcap) is in `Head`; whatever it makes of this is not looked at.
    return hidden


def fused_loss(
    head: Head,
    hidden: Tensor,
    module: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """transformers' ForCausalLMLoss of head(hidden), or ForMaskedLMLoss."""
    if shift_labels is None and not head.shift:
        shift_labels = labels
    elif shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    weight, bias = module.weight, getattr(module, "bias", None)
    if head.scale != 1.0:
        hidden = hidden * head.scale
        bias = None if bias is None else bias * head.scale
    loss: Any = ops.linear_cross_entropy(
        hidden.flatten(0, -2), weight, shift_labels.flatten().to(hidden.device), linear_bias=bias,
        reduction="mean" if num_items_in_batch is None else "sum", ignore_index=ignore_index, softcap=head.softcap,
        dtype=torch.float32,
    )  # fmt: skip
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def loss_function(
    model: Any, head: Head, original: Callable, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any
) -> Tensor:
    if head.hidden is None:
        return original(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
    hidden, head.hidden = head.hidden, None
    known = ("num_items_in_batch", "ignore_index", "shift_labels")
    module = model.get_output_embeddings()
    asked = {name for name, value in kwargs.items() if value is not None} - set(known)
    if asked and not getattr(original, "__module__", "").startswith("transformers."):  # whose losses ignore the rest
        return original(logits=head.logits(module, hidden), labels=labels, vocab_size=vocab_size, **kwargs)
    return fused_loss(head, hidden, module, labels, **{k: v for k, v in kwargs.items() if k in known})


def model_forward(model: Any, head: Head, *args: Any, output_logits: bool = False, **kwargs: Any) -> Any:
    """The model's forward. In training, with labels, its logits are None, unless `output_logits=True` asks for them."""
    ours = getattr(model.__dict__.get("_loss_function"), "func", None) is loss_function  # and not set since by others
    if not ours or not wants_no_logits(model, output_logits, kwargs):
        return type(model).forward(model, *args, **kwargs)
    head.deferred = True
    try:
        output = type(model).forward(model, *args, **kwargs)
    finally:
        head.deferred, head.hidden = False, None
    return type(output)(**{key: value for key, value in output.items() if key != "logits"})


def _set_loss(model: Any, function: Callable) -> Callable[[], None]:
    """Gives the model another loss_function; returns what takes it back."""
    before = model.__dict__.get("_loss_function")
    model.loss_function = function

    def undo() -> None:
        if model.__dict__.get("_loss_function") is not function:
            raise PatchError(
                f"revert: the loss_function of a {type(model).__name__} was set by somebody else meanwhile"
            )
        if before is None:
            model.__dict__.pop("_loss_function", None)
        else:
            model._loss_function = before

    return undo


def install(report: Any, model: Any, head: Head) -> None:
    """Sets the three forwards on this model."""
    module = model.get_output_embeddings()
    report.set_forward(module, bind(module, head_forward, head))
    report.on_revert(_set_loss(model, functools.partial(loss_function, model, head, model.loss_function)))
    report.set_forward(model, bind(model, model_forward, head))


def find(model: Any, module: Any, inputs: dict[str, Tensor]) -> Head | None:
    """What lies between the head's logits and the loss: a scale and a softcap, read off what the loss is given when the
    head gives numbers that are known. None if the loss is not computed by the model's loss_function.

    Raises:
        Differs: if the model has no such head and loss, or computes something else.
    """
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        raise Differs("it has no linear output embeddings")
    if "forward" in module.__dict__:
        raise Differs("the forward of its head was replaced already")
    if not is_linear(module):
        raise Differs("it has more parameters than a weight and a bias")
    if not weight.dtype.is_floating_point:
        raise Differs(f"its weight is {weight.dtype}")
    if getattr(model, "loss_function", None) is None:
        return None
    classes = weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(*decoded_shape(inputs), classes, generator=generator) * 20
    known[0, 0] = 1e-3 * known[0, 0].sign()
    known[0, 1] = HUGE
    known = known.to(weight.device, weight.dtype)
    seen = _logits_of_the_loss(model, module, inputs, known)
    if seen is None:
        return None
    if seen.numel() != known.numel():
        raise Differs(f"its loss is given logits of shape {tuple(seen.shape)}")
    seen, eps = seen.detach().double().view(known.shape), torch.finfo(weight.dtype).eps
    # Of many, so that the roundings of 16 bits average out.
    scale = float(seen[0, 0].abs().sum() / known[0, 0].double().abs().sum())
    top = float(seen[0, 1].max())
    softcap = top if top < 0.5 * scale * HUGE else 0.0
    scaled = scale * known.double()
    computed = softcap * torch.tanh(scaled / softcap) if softcap else scaled
    error = float((computed - seen)[0, 2:].abs().max())
    if not scale > 0 or not math.isfinite(scale) or not error <= max(1e-3, 4 * eps) * float(seen[0, 2:].abs().max()):
        raise Differs("what happens to its logits before the loss is more than a scale and a softcap")
    reason = None
    for shift in (True, False):
        head = Head(_plain(scale, eps), _plain(softcap, eps), shift)
        try:
            # In 16 bits the loss of a position looks much like that of another.
            for tried in (module,) if weight.dtype == torch.float32 else (copy.deepcopy(module).float(), module):
                _check_loss(model, tried, head)
        except Differs as differs:
            reason = reason or differs
        else:
            return head
    assert reason is not None
    raise reason


def _plain(number: float, eps: float) -> float:
    """As it was written, of which float32 leaves six digits and the mean of 16 bits three or four."""
    short = float(f"{number:.3g}")
    return short if abs(number / (short or 1.0) - 1) < eps / 4 else float(f"{number:.6g}")


def _logits_of_the_loss(model: Any, module: nn.Module, inputs: dict[str, Tensor], known: Tensor) -> Tensor | None:
    """What the loss_function gets when the head gives `known`."""
    seen: list[Tensor] = []

    def take(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(logits)
        return logits.sum() * 0

    undo = _set_loss(model, take)
    module.__dict__["forward"] = lambda hidden: known
    labels = torch.zeros(known.shape[:2], dtype=torch.int64, device=known.device)
    try:
        with torch.no_grad():
            model(**inputs, labels=labels)
    except Exception as error:
        raise Differs(f"it cannot be run on random inputs: {told(error)}") from error
    finally:
        del module.__dict__["forward"]
        undo()
    return seen[0] if seen else None


def _check_loss(model: Any, module: Any, head: Head) -> None:
    """The loss and its gradients beside the model's own, on random hidden states."""
    weight = module.weight
    classes = weight.shape[0]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 6, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    labels = torch.randint(classes, (2, 6), generator=generator).to(weight.device)
    labels[0, 3] = -100

    def stock(hidden: Tensor) -> Tensor:
        return model.loss_function(logits=head.logits(module, hidden), labels=labels, vocab_size=classes)

    def ours(hidden: Tensor) -> Tensor:
        return fused_loss(head, hidden, module, labels)

    with torch.enable_grad():
        results = []
        for fn in (ours, stock):
            x = hidden.detach().requires_grad_()
            try:
                loss = fn(x)
            except Exception as error:
                raise Differs(f"its loss cannot be run: {told(error)}") from error
            results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
        bias = getattr(module, "bias", None)
        wide: Any = nn.Module()
        wide.weight, wide.bias = weight.detach().double(), None if bias is None else bias.detach().double()
        x = hidden.detach().double().requires_grad_()
        with backends.use_backend("reference"):
            loss = fused_loss(head, x, wide, labels)
        truth = loss.detach(), torch.autograd.grad(loss, x)[0]
    for what, mine, theirs, true in zip(("loss", "gradient"), *results, truth, strict=True):
        rounding = torch.finfo(weight.dtype).eps * max(float(true.abs().max()), 1.0)
        judge(f"its {what}", mine, theirs, true.double(), rounding, cancelling=1.0)

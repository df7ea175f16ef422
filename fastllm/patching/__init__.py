"""Fused ops in models that exist already: found by structure, proven on the model's own modules, and reversible."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.backends import explain
from fastllm.patching import (
    _attention,
    _calls,
    _encoder,
    _head,
    _mlps,
    _multihead,
    _norms,
    _own_loss,
    _probe,
    _residual,
)
from fastllm.patching._compare import Comparison, compare, difference
from fastllm.patching._inputs import decoded_shape, random_inputs
from fastllm.patching._probe import Differs
from fastllm.patching._report import Entry, PatchError, PatchReport
from fastllm.testing import sample

__all__ = ["Comparison", "Entry", "PatchError", "PatchReport", "compare", "patch", "patched"]

KINDS = (
    *("layer_norm", "rms_norm", "dropout_add_layer_norm", "dropout_add_rms_norm"),
    *("swiglu", "geglu", "gelu", "attention", "linear_cross_entropy"),
)
"""What `only` and `exclude` may name."""


class _Choice:
    """What `only` and `exclude` leave."""

    def __init__(self, only: Iterable[str] | str | None, exclude: Iterable[str] | str | None):
        self.only = None if only is None else [only] if isinstance(only, str) else list(only)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude or ())
        for name in [*(self.only or ()), *self.exclude]:
            if not isinstance(name, str):
                raise TypeError(f"patch: only and exclude take names of ops and patterns of paths, got {name!r}")

    def check(self, model: nn.Module) -> None:
        """Raises ValueError for a name that is no op, and matches no module."""
        paths = [path for path, _ in model.named_modules()]
        for name in [*(self.only or ()), *self.exclude]:
            if name not in KINDS and not fnmatch.filter(paths, name):
                raise ValueError(f"patch: {name!r} is no op ({', '.join(KINDS)}) and matches no module of the model")

    def __call__(self, path: str, kind: str) -> bool:
        def named(patterns: list[str]) -> bool:
            return any(p == kind if p in KINDS else fnmatch.fnmatchcase(path, p) for p in patterns)

        return (self.only is None or named(self.only)) and not named(self.exclude)


def patch(
    model: nn.Module,
    *,
    only: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str | None = None,
    verify: bool = True,
    strict: bool = False,
) -> PatchReport:
    """Runs fastllm's ops in this model, wherever they compute what its modules compute.

    Nothing is known of architectures. Modules that look like a norm, a gated feed-forward or a GELU are run beside the
    op on random inputs, forward and backward, in their own dtype, and replaced if they are the same function to within
    rounding; so are norms behind dropout and a sum, torch's encoder layers and attention modules. In models of
    transformers attention goes through the AttentionInterface, and the head with its loss becomes
    linear_cross_entropy, which needs no logits. Only this instance changes: each replaced module gets a forward of its
    own; classes, parameters, state_dict and hooks stay as they are. Dropout draws other masks.

    In training and with labels the model's output has no logits (None), unless it is called with output_logits=True.

    Args:
        model: any module; heads with their losses are found in models of transformers.
        only, exclude: names of ops ("rms_norm", "layer_norm", "dropout_add_rms_norm", "dropout_add_layer_norm",
            "swiglu", "geglu", "gelu", "attention", "linear_cross_entropy"), or patterns of module paths
            ("model.layers.0.*").
        verify: run the whole model on a few random tokens with and without the new attention. Single modules are
            always proven.
        strict: raise if anything that matched was not replaced; the model is then as before.

    Returns:
        A `PatchReport`; `print` shows it, `revert()` takes everything back.

    Raises:
        PatchError: with strict=True. TypeError: for what is no module or no name. ValueError: for a name that is no op
            and matches no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = _Choice(only, exclude)
    wanted.check(model)
    report = PatchReport(model)
    try:
        with _probe.quiet(model):
            _patch_modules(report, model, wanted)
            if hasattr(model, "config") and hasattr(model, "set_attn_implementation"):
                _patch_attention(report, model, wanted, verify)
                _patch_head(report, model, wanted)
    except BaseException:
        report.revert()
        raise
    if strict and report.left:
        message = f"patch: not everything that matched was replaced:\n{report}"
        report.revert()
        raise PatchError(message)
    return report


@contextlib.contextmanager
def patched(model: nn.Module, **kwargs: Any) -> Iterator[PatchReport]:
    """`patch` inside, `revert` at the end."""
    report = patch(model, **kwargs)
    try:
        yield report
    finally:
        report.revert()


def _device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    for parameter in model.parameters():
        if parameter.is_meta:  # it will be where torch computes
            return torch.device("cuda" if torch.cuda.is_available() else "cpu"), parameter.dtype
        if parameter.dtype.is_floating_point:
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def _backend(op: str, device: torch.device, dtype: torch.dtype) -> str:
    args, kwargs = sample(op, device, dtype)
    return explain(op, *args, **kwargs).backend


def _patch_modules(report: PatchReport, model: nn.Module, wanted: _Choice) -> None:
    device, dtype = _device_and_dtype(model)
    known: dict[tuple, Any] = {}  # what modules of a signature were found to be, or why not
    backends: dict[str, str] = {}
    kinds: tuple[ModuleType, ...] = (_encoder, _residual, _norms, _mlps, _multihead, _calls)
    whole: list[str] = []  # prefixes of paths below which nobody calls norms and activations any more
    for path, module in model.named_modules():
        inside = path.startswith(tuple(whole))
        for kind in kinds:
            if not kind.matches(module) or not any(wanted(path, op) for op in kind.OPS) or (inside and kind is _norms):
                continue
            key = kind, _probe.signature(module)
            if key not in known:
                known[key] = _found(kind, module)
            found, was = known[key], type(module).__name__
            if isinstance(found, Differs):
                report.append(Entry(path, was, reason=str(found)))
                continue
            op = kind.op(found)
            if not wanted(path, op):
                continue
            if "forward" in module.__dict__:
                report.append(Entry(path, was, reason="its forward was replaced already"))
            else:
                backends[op] = backends.get(op) or _backend(op, device, dtype)
                report.set_forward(module, kind.replacement(module, found))
                report.append(Entry(path, was, op, backends[op]))
                whole += [f"{path}." if path else ""] if kind in (_residual, _mlps) else []
        if not inside and _mlps.may_be_gelu(module) and "forward" not in module.__dict__ and wanted(path, "gelu"):
            _patch_gelu(report, path, module, known, dtype, device)


def _found(kind: ModuleType, module: nn.Module) -> Any:
    try:
        made = _probe.trial(module)
        short = any(p.dtype in (torch.bfloat16, torch.float16) for p in made.parameters())
        # What it is shows in float32 only: to 16 bits, one activation looks much like another.
        known = kind.find(copy.deepcopy(made).float()) if short else None
        return kind.find(made, known)
    except Differs as differs:
        return differs
    except Exception as error:  # a module may be run in its model only
        return Differs(f"it cannot be run by itself: {_probe.told(error)}")


def _patch_gelu(
    report: PatchReport, path: str, module: nn.Module, known: dict, dtype: torch.dtype, device: torch.device
) -> None:
    key = None, _probe.signature(module)
    if key not in known:
        try:
            for checked in {torch.float32, dtype}:
                _mlps.check_gelu(module, checked, device)
            known[key] = True
        except Exception:  # another activation, or no activation at all: it did not match
            known[key] = False
    if known[key]:
        report.set_forward(module, functools.partial(_mlps.gelu_forward, module))
        report.append(Entry(path, type(module).__name__, "gelu", "torch"))


def _patch_attention(report: PatchReport, model: Any, wanted: _Choice, verify: bool) -> None:
    was = f"attention: {model.config._attn_implementation}"
    if not wanted("", "attention"):
        return
    device, dtype = _device_and_dtype(model)
    try:
        report.on_revert(_switched(model, device, dtype, verify))
    except Differs as differs:
        report.append(Entry("", was, reason=str(differs)))
    else:
        report.append(Entry("", was, "attention", _backend("attention", device, dtype)))


def _switched(model: Any, device: torch.device, dtype: torch.dtype, verify: bool) -> Callable[[], None]:
    """Sets the model's attention to ours; returns what sets it back.

    Raises:
        Differs: if that cannot be, or the model then computes something else; its attention is as before.
    """
    reason = _attention.reason_against(model)
    if reason is not None:
        raise Differs(reason)
    inputs, before = None, {}
    if verify:
        try:
            inputs = random_inputs(model, device, lambda tried: before.update(_outputs(model, tried)))
        except Exception as error:
            raise Differs(f"it cannot be run on random inputs: {_probe.told(error)}") from error
    undo = _attention.switch(model)
    reason = None if model.config._attn_implementation == _attention.NAME else "it keeps its own attention"
    if verify and reason is None:
        try:
            reason = _difference(before, _outputs(model, inputs), dtype)
        except Exception as error:
            reason = f"it does not run: {_probe.told(error)}"
    if reason is not None:
        undo()
        raise Differs(reason)
    return undo


def _outputs(model: Any, inputs: Any) -> dict[str, Tensor | None]:
    """Logits or hidden states, and the gradient of a parameter behind the whole model."""
    model.eval()
    torch.manual_seed(0)  # some models draw random numbers in evaluation, too
    with torch.enable_grad(), _probe.grads_kept(model), _probe.attributes_kept(model):
        output = model(**inputs)
        out = output["logits"] if "logits" in output else next(v for v in output.values() if isinstance(v, Tensor))
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device, out.dtype)
        if _probe.sharded(model):  # which wants its iteration ended
            out.backward(cotangent)
            grads = [p.grad for p in model.parameters()]
        else:
            leaf = next((p for p in model.parameters() if p.requires_grad), None)
            grads = [] if leaf is None else list(torch.autograd.grad(out, leaf, cotangent, allow_unused=True))
    return {"output": out.detach(), "gradient": next((grad for grad in grads if grad is not None), None)}


SMALL = 2**14
"""Elements of parameters whose gradients are compared; of the others one is, and the head's."""


def _trained(model: Any, head: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The loss of the model in training and its gradients, with the same dropout each time."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    chosen = {
        name: p for i, (name, p) in enumerate(weights.items()) if i == 0 or p.numel() <= SMALL or p is head.weight
    }
    rows, length = decoded_shape(inputs)
    labels = torch.arange(rows * length).view(rows, length).to(head.weight.device) % head.weight.shape[0]
    buffers = [(b, b.clone()) for b in model.buffers()]
    model.train()
    try:
        torch.manual_seed(0)
        with torch.enable_grad(), _probe.attributes_kept(model):
            loss = model(**inputs, labels=labels).loss
            grads = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True) if chosen else ()
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return {"loss": loss.detach(), **dict(zip(chosen, grads, strict=True))}


def _difference(before: dict[str, Tensor | None], after: dict[str, Tensor | None], dtype: torch.dtype) -> str | None:
    """What differs by more than roundings, of a whole model; gradients by those of the largest of them."""
    largest = max((difference(x, x)[1] for name, x in before.items() if name != "loss" and x is not None), default=0.0)
    for name, a in before.items():
        b = after[name]
        if a is None or b is None:
            if (a is None) != (b is None):
                return f"the gradient of {name} is {'missing' if b is None else 'new'}"
            continue
        worst, own = difference(a, b)
        eps = torch.finfo(dtype).eps ** (1.0 if dtype == torch.float32 else 1.5)
        if not worst <= 1000 * eps * max(own, 0.1 * largest):
            what = name if name in ("loss", "output", "gradient") else f"gradient of {name}"
            return f"the {what} of the whole model differs by {worst:.1e} where the largest is {own:.1e}"
    return None


def _patch_head(report: PatchReport, model: Any, wanted: _Choice) -> None:
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        return
    path = next((path for path, m in model.named_modules() if m is module), "")
    was = f"{type(module).__name__} and loss"
    if not wanted(path, "linear_cross_entropy"):
        return
    device, dtype = _device_and_dtype(model)
    try:
        if "forward" in model.__dict__:
            raise Differs("the model's forward was replaced already")
        model.eval()
        inputs = random_inputs(model, device)
        head, install = _head.find(model, module, inputs), _head.install
        if head is None:
            head, install = _own_loss.find(model, module, inputs), _own_loss.install
        before = _trained(model, module, inputs)
        made = PatchReport(model)
        install(made, model, head)
        try:
            reason = _difference(before, _trained(model, module, inputs), dtype)
        except Exception as error:
            reason = f"its loss cannot be run: {_probe.told(error)}"
        if reason is not None:
            made.revert()
            raise Differs(reason)
        report.on_revert(made.revert)
    except Exception as error:
        said = str(error) if isinstance(error, Differs) else f"it cannot be run on random inputs: {_probe.told(error)}"
        report.append(Entry(path, was, reason=said))
        return
    report.append(Entry(path, was, "linear_cross_entropy", _backend("linear_cross_entropy", device, dtype)))

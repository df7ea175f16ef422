"""Fused ops in models that exist already: found by structure, proven on the model's own modules, and reversible."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastllm.patching import _calls, _encoder, _mlps, _multihead, _norms, _probe, _residual, _whole_model
from fastllm.patching._compare import Comparison, compare
from fastllm.patching._forward import bind
from fastllm.patching._probe import Differs
from fastllm.patching._report import Entry, PatchError, PatchReport

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
            for path, found in _whole_model.of_transformers(model):
                _whole_model.patch(report, path, found, wanted, verify)
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


def _patch_modules(report: PatchReport, model: nn.Module, wanted: _Choice) -> None:
    device, dtype = _whole_model.device_and_dtype(model)
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
                backends[op] = backends.get(op) or _whole_model.backend(op, device, dtype)
                report.set_forward(module, kind.replacement(module, found))
                report.append(Entry(path, was, op, backends[op]))
                whole += [f"{path}." if path else ""] if kind in (_residual, _mlps) else []
        if not inside and _mlps.may_be_gelu(module) and "forward" not in module.__dict__ and wanted(path, "gelu"):
            _patch_gelu(report, path, module, known, dtype, device)


def _found(kind: ModuleType, module: nn.Module) -> Any:
    try:
        made = _probe.trial(module)
        short = any(p.dtype in _probe.SHORT for p in made.parameters())
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
        report.set_forward(module, bind(module, _mlps.gelu_forward))
        report.append(Entry(path, type(module).__name__, "gelu", "torch"))

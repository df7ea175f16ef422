"""The twins of the fuzz: what they are given, what is seen of them, and when that is the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from patch_models import VOCABULARY, assert_same
from torch import Tensor, nn

from fastllm.patching import PatchReport

ROUNDINGS = 2 * torch.finfo(torch.bfloat16).eps
"""Of its norm, by which what is computed in bfloat16 may miss more than twice what the unpatched twin misses."""
KINKED = 0.2
"""The same where there is a ReLU: one unit that a rounding switches off is a tenth of a gradient of so few."""


@dataclass
class Batch:
    """What both twins are given."""

    rows: int = 2
    length: int = 9
    padded: bool = False
    more: dict[str, Any] = field(default_factory=dict)  # what the loss is told

    def inputs(self, core: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(10, VOCABULARY, (self.rows, self.length), generator=generator)
        labels = ids.roll(-1, 1)
        labels[:, -1] = -100
        inputs = {"input_ids": ids, "labels": labels, **self.more}
        if self.padded:
            mask = torch.ones_like(ids)
            mask[0, self.length // 2 :] = 0
            labels[mask == 0] = -100
            inputs["attention_mask"] = mask
        if getattr(getattr(core, "config", None), "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = torch.randint(10, VOCABULARY, tuple(ids.shape), generator=generator)
        return inputs


@dataclass
class Side:
    """One of the twins."""

    root: Any  # what is called
    core: Any  # the model inside all that it was wrapped into
    patching: bool  # the other one keeps the books alone
    reports: list[PatchReport | None] = field(default_factory=list)  # of the patches that were not taken back
    foreign: int = 0  # of those, how many are older than the last time that somebody else replaced forwards
    stuck: bool = False  # what was patched is beyond every report
    marks: set[str] = field(default_factory=set)  # what happened to it that other events must know
    batch: Batch = field(default_factory=Batch)
    seen: list[Any] = field(default_factory=list)  # by the global hook

    @property
    def pristine(self) -> bool:
        """Whether it must be the unpatched twin to the last bit."""
        return not self.reports and not self.stuck

    def keep(self, logits: Tensor) -> Tensor:
        """Those of the tokens that are no padding: what hidden tokens attend to is nobody's business."""
        mask = self.batch.inputs(self.core).get("attention_mask")
        return logits.detach() if mask is None or mask.shape != logits.shape[:2] else logits[mask.bool()].detach()

    @property
    def low_precision(self) -> bool:
        short = any(p.dtype == torch.bfloat16 for p in self.root.parameters())
        return short or bool(self.marks & {"autocast", "prepared"})

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Every forward."""
        handle = None
        if "watched" in self.marks:
            handle = nn.modules.module.register_module_forward_hook(self._watch)
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in self.marks):
                yield
        finally:
            if handle is not None:
                handle.remove()

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen.append((type(module).__name__, _shape(output)))

    def call(self, **changes: Any) -> Any:
        torch.default_generator.manual_seed(3)  # torch.manual_seed looks for GPUs, which takes longer than the model
        with self.around():
            return self.root(**{k: v for k, v in (self.batch.inputs(self.core) | changes).items() if v is not None})


def _shape(output: Any) -> Any:
    """Of the first tensor of what a module gives, which is neither logits nor weights of attention."""
    if isinstance(output, dict):
        output = tuple(value for key, value in output.items() if key not in ("logits", "loss"))
    if isinstance(output, tuple):
        output = next((x for x in output if isinstance(x, Tensor)), None)
    return (tuple(output.shape), output.dtype) if isinstance(output, Tensor) else None


class Recorder:
    """A hook of a module, or one before it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, module: nn.Module, args: Any, output: Any = ()) -> None:
        self.seen.append(_shape(output) if output != () else _shape(args))


def recorders(root: nn.Module) -> dict[str, tuple[dict, Any]]:
    """Where they are: the hooks of a module, and the key of one of them."""
    found: dict[str, tuple[dict, Any]] = {}
    for path, module in root.named_modules():
        for when, hooks in (("before", module._forward_pre_hooks), ("behind", module._forward_hooks)):
            keys = [key for key, hook in hooks.items() if isinstance(hook, Recorder)]
            found |= {f"hook {i} {when} {path}": (hooks, key) for i, key in enumerate(keys)}
    return found


Result = dict[str, Any]
"""Tensors, which are the twin's to within rounding; all else is equal."""


def observe(side: Side) -> dict[str, Result]:
    """Evaluation and training, with all gradients."""
    found = {}
    for train in (False, True):
        side.root.train(train)
        side.seen.clear()
        for hooks, key in recorders(side.root).values():
            hooks[key].seen.clear()
        output = side.call()
        result: Result = {"loss": output["loss"].detach(), "keys": sorted(k for k in output if k != "logits")}
        logits = output.get("logits")
        if isinstance(logits, Tensor):
            result["logits"] = side.keep(logits)
        result |= {name: list(hooks[key].seen) for name, (hooks, key) in recorders(side.root).items()}
        result["global hook"] = list(side.seen)
        weights = {name: p for name, p in side.root.named_parameters() if p.requires_grad}
        if output["loss"].requires_grad and weights:
            grads = torch.autograd.grad(output["loss"], list(weights.values()), allow_unused=True)
            result |= {f"gradient of {n}": g for n, g in zip(weights, grads, strict=True) if g is not None}
        found["training" if train else "evaluation"] = result
    return found


class Difference(AssertionError):
    """The patched twin is not the other one."""


def compare(what: str, got: Result, wanted: Result, side: Side, truth: Callable[[], Result]) -> None:
    """Raises Difference."""
    lacking = wanted.keys() - got.keys()
    if what == "training" and not side.pristine:
        lacking -= {"logits"}
    if lacking or got.keys() - wanted.keys():
        raise Difference(f"{what}: missing {sorted(lacking)}, new {sorted(got.keys() - wanted.keys())}")
    tensors = {name: x for name, x in wanted.items() if isinstance(x, Tensor)}
    for name, x in wanted.items():
        y = got.get(name, x)
        if not isinstance(x, Tensor):
            if y != x:
                raise Difference(f"{what}: {name} is {_first_difference(y, x)}")
        elif (y.dtype, y.shape) != (x.dtype, x.shape):
            raise Difference(f"{what}: {name} is {y.dtype} {tuple(y.shape)}, not {x.dtype} {tuple(x.shape)}")
        elif side.pristine and not torch.equal(y, x):
            raise Difference(f"{what}: {name} differs by {float((y - x).abs().max()):.1e}, and nothing is patched")
    if side.pristine:
        return
    if side.low_precision:
        kinked = any(isinstance(m, nn.ReLU) for m in side.root.modules())
        _compare_errors(what, got, tensors, truth, KINKED if kinked else ROUNDINGS)
        return
    try:
        assert_same({n: got[n] for n in tensors if n in got}, tensors, truth)
    except AssertionError as error:
        raise Difference(f"{what}: {error}") from None


def _compare_errors(what: str, got: Result, wanted: Result, truth: Callable[[], Result], roundings: float) -> None:
    """Of bfloat16: the patched twin's distance from float64 is that of the other one, or a few roundings."""
    exact = truth()
    if any(not x.isfinite().all() for x in exact.values() if isinstance(x, Tensor)):
        exact, roundings = wanted, 6 * roundings  # rows that see nothing are NaN in float64
    sizes = [float(x.double().norm()) for name, x in wanted.items() if name not in ("loss", "logits")]
    for name, x in wanted.items():
        if name not in got or not x.numel():
            continue
        true = exact[name].double()
        errors = [float((y.double() - true).norm()) for y in (got[name], x)]
        size = float(true.norm()) if name in ("loss", "logits") else max(float(true.norm()), 0.1 * max(sizes))
        if not errors[0] <= 2 * errors[1] + roundings * size:
            raise Difference(f"{what}: {name}: errors {errors[0]:.1e}, unpatched {errors[1]:.1e}, of {size:.1e}")


def _first_difference(got: Any, wanted: Any) -> str:
    if isinstance(got, list) and isinstance(wanted, list):
        for i, (a, b) in enumerate(zip(got, wanted, strict=False)):
            if a != b:
                return f"at {i} {a}, not {b}"
        return f"of {len(got)} entries, not {len(wanted)}: {(got + wanted)[min(len(got), len(wanted)) :][:2]}"
    return f"{got}, not {wanted}"

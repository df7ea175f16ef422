"""Attention and head of models of transformers: proven with the whole model, in float32 whatever its dtype."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastllm.backends import explain
from fastllm.patching import _attention, _config, _head, _own_loss, _probe
from fastllm.patching._compare import difference
from fastllm.patching._inputs import decoded_shape, random_inputs, unreached
from fastllm.patching._probe import Differs
from fastllm.patching._report import Entry, PatchReport
from fastllm.testing import sample

SMALL = 2**14
"""Elements of parameters whose gradients are compared; of the others one is, and the head's."""


def of_transformers(model: nn.Module) -> list[tuple[str, Any]]:
    """The outermost models of transformers in a module, which may be one itself, with their paths."""
    found: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer, _ in found)
        if not inside and hasattr(type(module), "set_attn_implementation") and hasattr(module, "config"):
            found.append((path, module))
    return found


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    for parameter in model.parameters():
        if parameter.is_meta:  # it will be where torch computes
            return torch.device("cuda" if torch.cuda.is_available() else "cpu"), parameter.dtype
        if parameter.dtype.is_floating_point:
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def backend(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Which backend runs an op there."""
    args, kwargs = sample(op, device, dtype)
    return explain(op, *args, **kwargs).backend


class Proof:
    """A model and what its trials are made with, which two of them share.

    In 16 bits, and of random weights, one attention looks much like another: what is proven is a copy in float32."""

    def __init__(self, model: Any):
        self.model = model
        self.device, self.dtype = device_and_dtype(model)
        self.inference = any(p.is_inference() for p in model.parameters())
        self._wide: Any = None

    def wide(self) -> Any:
        """The model itself, if it is of float32 or wider; else a copy that is.

        Raises:
            Differs: if it cannot be copied.
        """
        parameters = list(self.model.parameters())
        if any(p.is_meta for p in parameters):
            return self.model
        if not self.inference and not any(p.dtype in _probe.SHORT for p in parameters):
            return self.model
        if self._wide is None:
            if any(_probe.sharded(m) for m in self.model.modules()):
                raise Differs("it is sharded already and cannot be proven in float32: patch it before fully_shard")
            self._wide = self._copy()
        return self._wide

    def _copy(self) -> Any:
        try:
            return _widened(self.model)
        except torch.OutOfMemoryError:
            pass  # and out of the handler, whose traceback holds what was allocated
        except Exception as error:
            raise Differs(f"it cannot be copied to be proven in float32: {_probe.told(error)}") from error
        try:
            return _widened(self.model, torch.device("cpu"))
        except Exception as error:
            raise Differs(f"it cannot be copied to be proven in float32: {_probe.told(error)}") from error

    def end(self) -> None:
        """Gives the copy's memory back now: modules and their forwards refer to each other."""
        if self._wide is not None:
            self._wide = None
            gc.collect()


def _widened(model: Any, device: torch.device | None = None) -> Any:
    """A copy with parameters and buffers of at least float32, there or where they are."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in memo and type(tensor) in (Tensor, nn.Parameter):
            floating = tensor.is_floating_point()
            dtype = torch.promote_types(tensor.dtype, torch.float32) if floating else tensor.dtype
            made = tensor.detach().to(device or tensor.device, dtype, copy=True)
            trained = tensor.requires_grad and (floating or tensor.is_complex())
            memo[id(tensor)] = nn.Parameter(made, trained) if isinstance(tensor, nn.Parameter) else made
    return copy.deepcopy(model, memo)


def patch(report: PatchReport, path: str, model: Any, wanted: Callable[[str, str], bool], verify: bool) -> None:
    """Replaces attention and head of a model of transformers, or reports why not."""
    proof = Proof(model)
    try:
        with _probe.attributes_kept(model):
            _patch_attention(report, path, proof, wanted, verify)
            _patch_head(report, path, proof, wanted)
    finally:
        proof.end()


def _patch_attention(
    report: PatchReport, path: str, proof: Proof, wanted: Callable[[str, str], bool], verify: bool
) -> None:
    was = f"attention: {proof.model.config._attn_implementation}"
    if not wanted(path, "attention"):
        return
    try:
        reason = _attention.reason_against(proof.model)
        if reason is not None:
            raise Differs(reason)
        undo, kept = _switched(proof, verify)
    except Differs as differs:
        if str(differs) != _attention.NOT_INTERFACED or _attends(proof.model):  # some have no attention at all
            report.append(Entry(path, was, reason=str(differs)))
        return
    report.on_revert(undo)
    report.append(Entry(path, was, "attention", backend("attention", proof.device, proof.dtype)))
    for part, reason in kept.items():
        report.append(Entry(f"{path}.{part}" if path else part, was, reason=reason))


def _switched(proof: Proof, verify: bool) -> tuple[Callable[[], None], dict[str, str]]:
    """Sets the model's attention to ours.

    Returns:
        What sets it back; and, by path, the parts that keep their own, with the reason.

    Raises:
        Differs: if that cannot be, or the model then computes something else; its attention is as before.
    """
    kept: dict[str, str] = {}
    if verify and proof.wide() is not proof.model:
        undo, kept = _try_attention(proof.wide(), verify)
        undo()
        verify = not proof.inference  # it gives no gradients
    undo, kept_too = _try_attention(proof.model, verify)
    for part in kept:
        _config.keep(proof.model.get_submodule(part), proof.model)
    return undo, kept_too | kept


class _Part(NamedTuple):
    """A model, or one inside of it that its inputs do not reach, with what it gave before the switch."""

    model: Any
    trials: list[tuple[dict[str, Tensor], dict[str, Tensor | None]]]  # inputs, without padding and with it, and outputs


def _part(model: Any) -> _Part:
    device, _ = device_and_dtype(model)

    def run(inputs: dict[str, Tensor]) -> None:
        before.clear()
        before.update(_outputs(model, inputs))

    before: dict[str, Tensor | None] = {}
    try:
        trials = [(random_inputs(model, device, run), dict(before))]
    except Exception as error:
        raise Differs(f"it cannot be run on random inputs: {_probe.told(error)}") from error
    with contextlib.suppress(Exception):  # some take a mask and cannot do with it
        trials.append((random_inputs(model, device, run, padded=True), dict(before)))
    return _Part(model, trials)


def _attends(model: nn.Module) -> bool:
    return any("Attention" in type(module).__name__ for module in model.modules())


def _try_attention(model: Any, verify: bool) -> tuple[Callable[[], None], dict[str, str]]:
    """As `_switched`, of one model in its own dtype."""
    parts: dict[str, _Part] = {}
    kept: dict[str, str] = {}
    if verify:
        parts[""] = _part(model)
        paths = {id(module): path for path, module in model.named_modules()}
        # A forward without its backward would spoil the next one of a sharded model.
        for inner in [] if _probe.sharded(model) else unreached(model, parts[""].trials[0][0]):
            path = paths[id(inner)]
            try:
                parts[path] = _part(inner)
            except Differs as differs:
                if _attends(inner):  # a vocoder does not, say
                    kept[path] = str(differs)
    undo = _attention.switch(model)
    try:
        if model.config._attn_implementation != _config.NAME:
            raise Differs("it keeps its own attention")
        for path, part in parts.items():
            reason = _reason(part)
            if reason is not None and not path:
                raise Differs(reason)
            if reason is not None and (reason != _attention.NOT_INTERFACED or _attends(part.model)):
                kept[path] = reason
        for path, reason in kept.items():
            if not _config.keep(model.get_submodule(path), model):
                raise Differs(f"{path}: {reason}")
    except BaseException:
        undo()
        raise
    return undo, kept


def _reason(part: _Part) -> str | None:
    """Why its attention cannot be ours, which it is now; None if it can."""
    _, dtype = device_and_dtype(part.model)
    for inputs, before in part.trials:
        try:
            with _attention.callers() as calls:
                after = _outputs(part.model, inputs)
        except Exception as error:
            return f"it does not run: {_probe.told(error)}"
        reason = _difference(before, after, dtype) or (None if calls else _attention.NOT_INTERFACED)
        if reason is not None:
            return reason
    return None


def _outputs(model: Any, inputs: Any) -> dict[str, Tensor | None]:
    """All that the model gives, of the tokens that are not hidden, and the gradient of a parameter behind it."""
    model.eval()
    _probe.seed()  # some models draw random numbers in evaluation, too
    shown = inputs.get("attention_mask")
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), _probe.grads_kept(model), _probe.attributes_kept(model):
        given = {
            name: value
            for name, value in model(**inputs).items()
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
        }
        if shown is not None and "decoder_input_ids" not in inputs:
            given = {
                name: value * shown.to(value.device, value.dtype)[..., None]
                if value.shape[:-1] == shown.shape
                else value
                for name, value in given.items()
            }
        trained = [value for value in given.values() if value.requires_grad]
        cotangents = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in trained]
        if _probe.sharded(model):  # which wants its iteration ended
            torch.autograd.backward(trained, cotangents)
            grads = [p.grad for p in model.parameters()]
        else:
            leaf = next((p for p in model.parameters() if p.requires_grad), None)
            grads = [] if leaf is None else list(torch.autograd.grad(trained, leaf, cotangents, allow_unused=True))
    found: dict[str, Tensor | None] = {f"output {name}": value.detach() for name, value in given.items()}
    return found | {"gradient": next((grad for grad in grads if grad is not None), None)}


def _trained(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The loss of the model in training and its gradients, with the same dropout each time; of what trainers pass, a
    mask that hides tokens, and how many there are in all."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = model.get_output_embeddings()
    chosen = {
        name: p for i, (name, p) in enumerate(weights.items()) if i == 0 or p.numel() <= SMALL or p is head.weight
    }
    rows, length = decoded_shape(inputs)
    labels = torch.arange(rows * length).view(rows, length).to(head.weight.device) % head.weight.shape[0]
    shown = inputs.get("attention_mask")
    if shown is not None and shown.shape == labels.shape and "decoder_input_ids" not in inputs:
        labels = labels.masked_fill(shown.to(labels.device) == 0, -100)
    given: dict[str, Any] = {**inputs, "labels": labels}
    taken = inspect.signature(model.forward).parameters
    if any(p.kind == p.VAR_KEYWORD for p in taken.values()) or "num_items_in_batch" in taken:
        given["num_items_in_batch"] = torch.tensor(7, device=labels.device)
    buffers = [(b, b.clone()) for b in model.buffers()]
    model.train()
    try:
        _probe.seed()
        with torch.enable_grad(), _probe.attributes_kept(model):
            loss = model(**given).loss
            grads = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True) if chosen else ()
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return {"loss": loss.detach(), **dict(zip(chosen, grads, strict=True))}


def _difference(before: dict[str, Tensor | None], after: dict[str, Tensor | None], dtype: torch.dtype) -> str | None:
    """What differs by more than roundings, of a whole model; gradients by those of the largest of them."""
    pairs = [(name, a, after[name]) for name, a in before.items() if a is not None]
    found = {name: difference(a, a if b is None else b) for name, a, b in pairs}
    largest = max((own for name, (_, own) in found.items() if name != "loss"), default=0.0)
    for name, a in before.items():
        b = after[name]
        if a is None or b is None:
            if (a is None) != (b is None):
                return f"the gradient of {name} is {'missing' if b is None else 'new'}"
            continue
        worst, own = found[name]
        eps = torch.finfo(dtype).eps ** (1.0 if dtype == torch.float32 else 1.5)
        if not worst <= 1000 * eps * max(own, 0.1 * largest):
            what = name if name in ("loss", "gradient") or name.startswith("output ") else f"gradient of {name}"
            return f"the {what} of the whole model differs by {worst:.1e} where the largest is {own:.1e}"
    return None


def _patch_head(report: PatchReport, path: str, proof: Proof, wanted: Callable[[str, str], bool]) -> None:
    model = proof.model
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        return
    path = next((name for name, m in report.model.named_modules() if m is module), path)
    was = f"{type(module).__name__} and loss"
    if not wanted(path, "linear_cross_entropy"):
        return
    try:
        if "forward" in model.__dict__:
            raise Differs("the model's forward was replaced already")
        if proof.inference:
            raise Differs("its parameters were made in inference mode: it cannot be trained")
        if _probe.sharded(model):  # a forward without its backward would spoil the next one
            raise Differs("the model is sharded already, and its head cannot be tried: patch it before fully_shard")
        if proof.wide() is not model:
            _try_head(proof.wide()).revert()
        report.on_revert(_try_head(model).revert)
    except Exception as error:
        said = str(error) if isinstance(error, Differs) else f"it cannot be run on random inputs: {_probe.told(error)}"
        report.append(Entry(path, was, reason=said))
        return
    report.append(Entry(path, was, "linear_cross_entropy", backend("linear_cross_entropy", proof.device, proof.dtype)))


def _try_head(model: Any) -> PatchReport:
    """Replaces the head of one model in its own dtype; the report takes it back.

    Raises:
        Exception: if it cannot be, or the loss is then another; the head is as before.
    """
    device, dtype = device_and_dtype(model)
    model.eval()
    inputs = random_inputs(model, device, padded=True)
    module = model.get_output_embeddings()
    head, install = _head.find(model, module, inputs), _head.install
    if head is None:
        head, install = _own_loss.find(model, module, inputs), _own_loss.install
    before = _trained(model, inputs)
    made = PatchReport(model)
    install(made, model, head)
    try:
        reason = _difference(before, _trained(model, inputs), dtype)
    except Exception as error:
        reason = f"its loss cannot be run: {_probe.told(error)}"
    if head.asked:
        reason = f"its loss uses its logits in {', '.join(dict.fromkeys(head.asked))}"
        head.asked.clear()
    if reason is not None:
        made.revert()
        raise Differs(reason)
    return made

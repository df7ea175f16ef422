"""Whether a replacement computes what the module does: both run on random inputs, forward and backward.

With `truth` the replacement in float64, the module must be its rounding, max|module - truth| <= 32 eps max|truth|, and
the replacement no worse than twice that error and a floor of roundings, for the output and every gradient.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastllm import backends
from fastllm.ops._sharding import dtensor
from fastllm.testing import rounding_floor

SAME = 32
"""Roundings of its dtype by which a module may miss the function that it is taken for."""


class Differs(Exception):
    """The replacement is not what the module computes, or that cannot be found out; the message says why.

    Attributes:
        by: the difference, relative to the largest value."""

    def __init__(self, reason: str, by: float = math.inf):
        super().__init__(reason)
        self.by = by


def told(error: Exception) -> str:
    """An error in few words, for a report."""
    return f"{type(error).__name__}: {str(error)[:100]}"


def signature(module: nn.Module) -> tuple:
    """Modules of one signature compute the same but for the values of parameters and buffers: one is tried for all."""
    found: list[Any] = []
    for path, m in module.named_modules():
        found += [path, type(m)]
        for name, tensor in (*m._parameters.items(), *m._buffers.items()):
            described = tensor is not None and (tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)
            found.append((name, described))
        for name, value in vars(m).items():
            if name != "training" and name not in _INTERNAL:
                found.append((name, _described(value)))
    return tuple(found)


def _described(value: Any) -> Any:
    """Equal for equal plain values; other objects are equal to themselves."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_described, value))
    return repr(value) if isinstance(value, _PLAIN) else id(value)


_INTERNAL = vars(nn.Module()).keys() | {"forward"}
_PLAIN = (int, float, str, type(None), torch.dtype, torch.device, torch.Size)


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a projection."""
    found = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return found if isinstance(found[0], int) and isinstance(found[1], int) else None  # type: ignore[return-value]


def sharded(module: nn.Module) -> bool:
    """Whether fully_shard was applied to this module itself."""
    return hasattr(module, "unshard")


@contextlib.contextmanager
def grads_kept(module: nn.Module) -> Iterator[None]:
    """Whatever backward() gives the parameters inside is taken off again, and what they had is back at the end."""
    before = [(p, p.grad) for p in module.parameters()]
    for p, _ in before:
        p.grad = None
    try:
        yield
    finally:
        for p in module.parameters():
            p.grad = None
        for p, grad in before:
            p.grad = grad


def trial(module: nn.Module) -> nn.Module:
    """A copy to be tried: with all of each DTensor, which every rank makes; on the CPU if it is on the meta device; and
    with parameters off the zeros and ones of an initialization, which hide what is done with them."""
    made = copy.deepcopy(module)
    if any(tensor.is_meta for tensor in (*made.parameters(), *made.buffers())):
        made = made.to_empty(device="cpu")
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.detach().zero_()
    generator = torch.Generator().manual_seed(0)
    for m in made.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            if isinstance(p, dtensor()):
                m.register_parameter(name, nn.Parameter(p.full_tensor().detach()))  # type: ignore[attr-defined]
    for p in made.parameters():
        if p.dtype.is_floating_point:
            p.detach().add_(torch.randn(p.shape, generator=generator).to(p.device, p.dtype) / 8)
            p.requires_grad_()
    return made


def hooked(module: nn.Module) -> bool:
    """Whether somebody wants to know when this module runs."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@contextlib.contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Leaves no trace of probes, neither in the random state nor in the modules' modes, and compiles nothing for them,
    where the module or what it calls is compiled."""
    modes = [(m, m.training) for m in module.modules()]
    devices = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    with (
        torch.random.fork_rng(devices=devices),
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        try:
            yield
        finally:
            for m, mode in modes:
                m.training = mode


@contextlib.contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Tensors that a run leaves in attributes for the next one, positions for one, are taken off again."""
    before = [(m, dict(vars(m))) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes in before:
            for name in [name for name, value in vars(m).items() if isinstance(value, Tensor)]:
                if name not in attributes:
                    del m.__dict__[name]
                else:
                    m.__dict__[name] = attributes[name]


def functional(module: nn.Module, parameters: Sequence[Tensor]) -> Callable:
    """The module's call with other parameters, in the order of its own."""
    names = (name for name, _ in module.named_parameters())
    state = dict(zip(names, parameters, strict=True))
    return lambda *args, **kwargs: torch.func.functional_call(module, state, args, kwargs)


def call_child(module: nn.Module, name: str, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """module.<name>(x) with parameters from `state`, which has those of the whole module."""
    prefix = f"{name}."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return torch.func.functional_call(getattr(module, name), own, x)


@contextlib.contextmanager
def dropping(module: nn.Module, p: float) -> Iterator[None]:
    """Every dropout in it has this probability: at 0 and 1 nothing is random."""
    before: list[tuple[nn.Module, str, float]] = []
    for m in module.modules():
        name = {nn.Dropout: "p", nn.MultiheadAttention: "dropout"}.get(type(m))
        if name is not None:
            before.append((m, name, getattr(m, name)))
            setattr(m, name, p)
    try:
        yield
    finally:
        for m, name, value in before:
            setattr(m, name, value)


def _run(fn: Callable, x: Tensor, parameters: Sequence[Tensor], cotangent: Tensor | None) -> list[Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = fn(x)
        if not isinstance(out, Tensor):
            raise Differs(f"it returns {type(out).__name__}, not a tensor")
        if cotangent is None:
            cotangent = torch.randn(out.shape, device=out.device, dtype=torch.float32)
        leaves = [x, *(p for p in parameters if p.requires_grad)]
        grads = torch.autograd.grad(out, leaves, cotangent.to(out.dtype), allow_unused=True)
    if any(grad is None for grad in grads):
        raise Differs("it does not use all of its input and parameters")
    return [out.detach(), *grads, cotangent]  # type: ignore[list-item]


def check(
    module: nn.Module, replacement: Callable, truth: Callable, x: Tensor, original: Callable | None = None
) -> None:
    """Compares forward and backward in training and in evaluation mode.

    Args:
        replacement: takes x; computes with the module's own parameters.
        truth: takes x and copies of the parameters, all in float64.
        original: takes x; what is replaced. Default: the module's forward.

    Raises:
        Differs: with the largest difference.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    doubles = [p.detach().double().requires_grad_() for p in module.parameters()]
    wide = [d for d, p in zip(doubles, module.parameters(), strict=True) if p.requires_grad]
    stock_forward = original or functools.partial(type(module).forward, module)
    for mode in (True, False):
        module.train(mode)
        *theirs, cotangent = _run(stock_forward, x, parameters, None)
        *ours, _ = _run(replacement, x, parameters, cotangent)
        with backends.use_backend("reference"):
            *exact, _ = _run(lambda x: truth(x, *doubles), x.double(), wide, cotangent)
        for i, (mine, stock, true) in enumerate(zip(ours, theirs, exact, strict=True)):
            what = "output" if i == 0 else f"gradient {i}"
            if mine.dtype != stock.dtype or mine.shape != stock.shape:
                raise Differs(f"{what}: {stock.dtype} {tuple(stock.shape)}, not {mine.dtype} {tuple(mine.shape)}")
            largest = float(true.abs().max())
            judge(what, mine, stock, true, torch.finfo(stock.dtype).eps * largest, cancelling=largest)


def judge(what: str, mine: Tensor, stock: Tensor, true: Tensor, rounding: float, cancelling: float) -> None:
    """Raises Differs unless `stock` is `true` to within SAME roundings, and `mine` within the error budget.

    Args:
        rounding: one rounding of what was computed.
        cancelling: as `fastllm.testing.rounding_floor`.
    """
    missed, stocks = (float((x.double() - true).abs().max()) for x in (mine, stock))
    if not stocks <= SAME * rounding:
        largest = float(true.abs().max())
        raise Differs(f"{what} differs by {stocks:.1e} where the largest is {largest:.1e}", stocks / (largest or 1.0))
    if not missed <= 2 * stocks + rounding_floor(true, stock.dtype, cancelling=cancelling):
        raise Differs(f"{what}: error {missed:.1e}, the module's own {stocks:.1e}", 0.0)


def first_match(candidates: Sequence[tuple], attempt: Callable) -> tuple:
    """The first candidate that `attempt` does not refuse.

    Raises:
        Differs: if all are refused, with the refusal that was nearest to none.
    """
    reasons = []
    for candidate in candidates:
        try:
            attempt(*candidate)
        except Differs as differs:
            reasons.append(differs)
        except Exception as error:  # a module may be run in its model only, or with other shapes
            reasons.append(Differs(f"it cannot be run by itself: {told(error)}"))
        else:
            return candidate
    raise min(
        reasons, key=lambda differs: differs.by, default=Differs("nothing that fastllm computes has its structure")
    )

"""Whether a replacement computes what the module does: both run on random inputs, forward and backward.

Either both give the same bits; or, with `truth` the replacement in float64, the module must be its rounding,
max|module - truth| <= 32 eps max|truth| (more where its products have more than 64 summands, as their roundings grow),
and the replacement no worse than twice that error and a floor of roundings, for the output and every gradient. In 16
bits, in which what is proven in float32 is run once more, either of the two is enough: a rounding may switch a ReLU.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from fastllm import backends
from fastllm.ops._sharding import dtensor
from fastllm.patching._forward import GLOBAL_HOOKS
from fastllm.testing import rounding_floor

SAME = 32
"""Roundings of its dtype by which a module may miss the function that it is taken for."""

SUMMANDS = 64
"""Of products; with more of them, roundings grow as their square root."""

SHORT = (torch.bfloat16, torch.float16)
"""In which one function looks much like another: what a module computes is proven in float32."""

SAMPLED = 2**18
"""Elements of a gradient that are compared."""


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


def refuse_buffers(module: nn.Module) -> None:
    """Raises Differs if it has any of its own: a trial sees what they are, not what they become."""
    if list(module.buffers(recurse=False)):
        raise Differs("it has buffers, which may change")


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


def _summands(weight: Tensor) -> int:
    """Of a product with this weight."""
    return max(1, weight[:1].numel()) if weight.dim() > 1 else 1


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
    """A copy to be tried: with all of each DTensor, which every rank makes; on the CPU if it is on the meta device; its
    vectors off the zeros and ones of an initialization, which hide what is done with them; its matrices so that what
    goes through keeps its size, for large activations would saturate a softmax. All are drawn anew: what is found
    depends neither on the width nor on the values that the module happens to have."""
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
    for name, p in made.named_parameters():
        if p.dtype.is_floating_point:
            noise = torch.randn(p.shape, generator=generator)
            around = 0.0 if p.dim() > 1 or name.endswith("bias") else 1.0
            p.detach().copy_(around + noise * (_summands(p) ** -0.5 if p.dim() > 1 else 0.125))
            p.requires_grad_()
    return made


@contextlib.contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Leaves no trace of probes, neither in the random state nor in the modules' modes, and compiles nothing for them,
    where the module or what it calls is compiled."""
    modes = [(m, m.training) for m in module.modules()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        torch.random.fork_rng(devices=devices),
        _random_states_kept(),
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(),
        _alone(),
    ):
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        try:
            yield
        finally:
            for m, mode in modes:
                m.training = mode


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Nothing that the caller has put around his code acts inside: autocast, inference mode, a default device or dtype,
    modes that watch or change torch's calls, hooks of all modules."""
    default = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        for hooks in GLOBAL_HOOKS:
            stack.callback(hooks.update, dict(hooks))
            hooks.clear()
        for device in ("cpu", "cuda"):
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_disable_current_modes())
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(torch.float32)
        yield


@contextlib.contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Tensors and plain values that a run leaves in attributes for the next one, positions for one, are taken off
    again."""
    before = [(m, dict(vars(m))) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes in before:
            for name, value in list(vars(m).items()):
                left = isinstance(value, Tensor) or (
                    isinstance(value, _PLAIN) and name[0] != "_" and name != "training"
                )
                if left and name not in attributes:
                    del m.__dict__[name]
                elif left:
                    m.__dict__[name] = attributes[name]


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Those of Python and NumPy, from which some models draw masks in training."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])


def seed() -> None:
    """The same random numbers from here on, wherever a model draws them."""
    torch.default_generator.manual_seed(0)  # not torch.manual_seed, which seeds GPUs that nobody has used yet
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


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
            cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.device)
        leaves = [x, *(p for p in parameters if p.requires_grad)]
        grads = torch.autograd.grad(out, leaves, cotangent.to(out.dtype), allow_unused=True)
    if any(grad is None for grad in grads):
        raise Differs("it does not use all of its input and parameters")
    return [out.detach(), *map(_some, grads), cotangent]  # type: ignore[arg-type]


def _some(gradient: Tensor) -> Tensor:
    """At most so many of its elements, from everywhere: a gradient that is wrong is wrong all over."""
    step = gradient.numel() // SAMPLED
    return gradient.flatten()[:: step | 1] if step else gradient


def _with_last(function: Callable, last: Sequence[Tensor], x: Tensor) -> Tensor:
    return function(x, *last)


def check(
    module: nn.Module, replacement: Callable, truth: Callable, x: Tensor, original: Callable | None = None
) -> None:
    """Compares forward and backward in training and in evaluation mode.

    Args:
        replacement: takes x; computes with the module's own parameters.
        truth: takes x and copies of the parameters, all in float64, or in float32 where the module has 16 bits.
        original: takes x; what is replaced. Default: the module's forward.

    Raises:
        Differs: with the largest difference.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    summands = max((_summands(p) for p in module.parameters()), default=1)
    growth = max(1.0, (summands / SUMMANDS) ** 0.5)
    stock_forward = original or functools.partial(type(module).forward, module)
    wide: list[Tensor] | None = None
    widest = torch.float64
    for mode in (True, False):
        module.train(mode)
        *theirs, cotangent = _run(stock_forward, x, parameters, None)
        *ours, _ = _run(replacement, x, parameters, cotangent)
        names = ["output", *(f"gradient {i}" for i in range(1, len(ours)))]
        for what, mine, stock in zip(names, ours, theirs, strict=True):
            if mine.dtype != stock.dtype or mine.shape != stock.shape:
                raise Differs(f"{what}: {stock.dtype} {tuple(stock.shape)}, not {mine.dtype} {tuple(mine.shape)}")
        if all(map(torch.equal, ours, theirs)):
            continue
        if wide is None:  # once for both modes
            widest = torch.float32 if theirs[0].dtype in SHORT else torch.float64
            wide = [p.detach().to(widest).requires_grad_() for p in module.parameters()]
        trained = [w for w, p in zip(wide, module.parameters(), strict=True) if p.requires_grad]
        with backends.use_backend("reference"):
            *exact, _ = _run(functools.partial(_with_last, truth, wide), x.to(widest), trained, cotangent)
        # The gradient of a key's bias is 0 but for the roundings of what cancels, which are as large as others' are.
        among = max((float(true.abs().max()) for true in exact[2:]), default=0.0)
        for i, (what, mine, stock, true) in enumerate(zip(names, ours, theirs, exact, strict=True)):
            largest = max(float(true.abs().max()), among if i > 1 else 0.0)
            judge(what, mine, stock, true, torch.finfo(stock.dtype).eps * largest * growth, cancelling=largest)


def judge(what: str, mine: Tensor, stock: Tensor, true: Tensor, rounding: float, cancelling: float) -> None:
    """Raises Differs unless `stock` is `true` to within SAME roundings, and `mine` within the error budget.

    Args:
        rounding: one rounding of what was computed.
        cancelling: as `fastllm.testing.rounding_floor`.
    """
    missed, stocks = (float((x.double() - true).abs().max()) for x in (mine, stock))
    short = stock.dtype in SHORT
    if not stocks <= SAME * rounding and not (short and math.isfinite(stocks)):
        largest = float(true.abs().max())
        raise Differs(f"{what} differs by {stocks:.1e} where the largest is {largest:.1e}", stocks / (largest or 1.0))
    floor = rounding_floor(true, stock.dtype, cancelling=cancelling)
    if not missed <= max(2 * stocks + floor, SAME * rounding if short else 0.0):
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

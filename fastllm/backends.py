"""Which implementation of an op runs, and why.

An op has a schema and implementations ("backends") in order of preference, the reference last. C++ kernels sit in
torch's dispatcher under their device's key, so that a call reaches them with no Python in between; every other choice
is made by `Op._select` on real tensors. `explain` and that choice read the same list, so they cannot disagree.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function

from fastllm import _ext

NAMES = ("cuda", "triton", "cpu", "torch", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels compute; the reference computes every floating dtype."""
LIBRARY = torch.library.Library("fastllm", "DEF")
OPS: dict[str, Op] = {}
"""Every registered op by its name in `torch.ops.fastllm`."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run these arguments."""


class FallbackWarning(UserWarning):
    """An op runs on its reference (or on another lesser backend) because its kernel cannot. Shown once a reason."""


def _not_built(*args):
    raise AssertionError("this backend supports nothing here, so nothing can be asked of it")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: one of `NAMES`.
        supports: takes the op's arguments; returns None, or the reason why they cannot be computed. Plain Python over
            tensor metadata only, because Dynamo traces it, and `run`, when a backend is forced. Strides are read in
            lists, not in generators: where Dynamo does not know a gradient's it traces anew, and that of torch 2.15
            then meets a generator that is still open ("generator already executing").
        run: takes the op's arguments. For a C++ kernel, `Op` puts the call through the dispatcher here.
        key: the dispatch key of a C++ kernel ("CPU", "CUDA"), else None.
        kernel: where the backend has several, takes the op's arguments and returns what `explain` says of its choice.
    """

    name: str
    supports: Callable[..., str | None]
    run: Callable = _not_built
    key: str | None = None
    kernel: Callable[..., str] | None = None


@dataclass(frozen=True)
class Candidate:
    """One line of an `Explanation`: `reason` says why the backend was rejected, None if it could run; `kernel` which of
    the backend's kernels runs, where it has several."""

    op: str
    backend: str
    reason: str | None
    chosen: bool
    kernel: str = ""

    @property
    def verdict(self) -> str:
        if self.chosen:
            return f"runs: {self.kernel}" if self.kernel else "runs"
        return f"rejected: {self.reason}" if self.reason else "could run"

    def __str__(self) -> str:
        return f"{self.op}  {self.backend}  {self.verdict}"


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows as lines, every column as wide as its longest entry."""
    widths = [max(len(entry) for entry in column) for column in zip(*rows, strict=True)]
    return ["  ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class Explanation(list):
    """What `explain` returns: a list of `Candidate`, in order of preference. Prints as a table."""

    def __str__(self) -> str:
        return "\n".join(aligned([(line.op, line.backend, line.verdict) for line in self]))

    @property
    def backend(self) -> str:
        """The backend that would run; if the call makes several ops, the last one's."""
        chosen = [candidate.backend for candidate in self if candidate.chosen]
        if not chosen:
            raise BackendUnavailable(f"no backend can run this call:\n{self}")
        return chosen[-1]


_forced: str | None = None
_explanation: Explanation | None = None
_explaining: int | None = None  # the thread that `explain` runs in: the others compute
_explain_lock = threading.Lock()
_slow_path = False  # a backend is forced, or `explain` listens: one test in the hot path instead of two


def steered() -> bool:
    """Whether a backend is forced, or `explain` listens: then every call must go through its `Op`."""
    return _slow_path


def _check_name(name: str | None, source: str) -> str | None:
    if name is not None and name not in NAMES:
        raise ValueError(f"{source}: unknown backend {name!r}; known are {', '.join(NAMES)}")
    return name


def _tensors(args: Iterable) -> Iterator[Tensor]:
    """The tensors among an op's arguments, those in lists too."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from (item for item in arg if isinstance(item, Tensor))


layout: Callable[..., tuple[bytes, bytes]] | None = (
    _ext.C.layout if _ext.C is not None and hasattr(Tensor, "__dlpack_c_exchange_api__") else None
)
"""Of lists of tensors: where and how all lie but for the addresses of the second list's, and these."""


def compiled(key: str, supports: Callable[..., str | None]) -> Backend:
    """A C++ kernel for dispatch key "CPU" or "CUDA". `supports` need not look at the device."""

    def on_device(*args) -> str | None:
        device = next(_tensors(args)).device.type
        return supports(*args) if device == key.lower() else f"runs on {key.lower()}, the input is on {device}"

    return Backend(key.lower(), on_device, key=key)


def _no_kernel(key: str) -> Callable[..., str]:
    def reason(*args) -> str:
        return _ext.STATUS[key]

    return reason


def _always(*args) -> None:
    return None


def autocasts(device: str) -> bool:
    """Whether an op casts its arguments as torch's would: autocast is on, for a device that has our kernels."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def _autocast_is_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """A context in which autocast is off."""
    return torch.autocast(device, enabled=False) if _autocast_is_on(device) else contextlib.nullcontext()


def _by_itself(run: Callable) -> Callable:
    """`run` without autocast, whose casts are made outside of an op, if they are, and without gradients, which are the
    autograd function's."""

    def alone(*args):
        device = next(_tensors(args)).device.type
        if not torch.is_grad_enabled() and not _autocast_is_on(device):
            return run(*args)
        with torch.no_grad(), without_autocast(device):
            return run(*args)

    return alone


class Op:
    """A registered op: `torch.ops.fastllm.<name>`, and `<name>_fallback`, which never reaches a C++ kernel.

    C++ kernels hand over to `<name>_fallback` what they do not compute, so that they are total: whatever the schema
    admits has a result.

    Args:
        schema: as `torch.library.define` takes it, without namespace.
        reference: the specification, in plain PyTorch, on any device and floating dtype.
        fake: returns empty outputs with the kernels' shapes, dtypes and strides.
        backends: the other implementations, best first.
    """

    def __init__(self, schema: str, *, reference: Callable, fake: Callable, backends: tuple[Backend, ...] = ()):
        self.name, _, signature = schema.partition("(")
        self.fake = fake
        for name in (self.name, f"{self.name}_fallback"):
            LIBRARY.define(f"{name}({signature}")
            LIBRARY.impl(name, self._select, "CompositeExplicitAutograd")
            torch.library.register_fake(f"fastllm::{name}", fake, lib=LIBRARY)
        self.call = getattr(torch.ops.fastllm, self.name).default
        self.built = frozenset(
            backend.key
            for backend in backends
            if backend.key and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastllm::{self.name}", backend.key)
        )
        self.backends = tuple(
            replace(backend, supports=_no_kernel(backend.key))
            if backend.key and backend.key not in self.built
            # The kernel may still hand over to the fallback what `supports` admits only by mistake; a test looks for
            # that, and nothing is computed wrongly meanwhile.
            else replace(backend, run=self.call)
            if backend.key
            else replace(backend, run=_by_itself(backend.run))
            for backend in (*backends, Backend("reference", _always, reference))
        )
        self._warned: set[str] = set()
        OPS[self.name] = self

    def __call__(self, *args):
        if _slow_path:
            if _explanation is not None and _explaining == threading.get_ident():
                return self._explain(*args)
            if _forced is not None:
                return self._run_forced(*args)
        return self.call(*args)

    def below_autograd(self, *args):
        """The call from inside of an autograd function, which is not to meet the op's own."""
        if torch.compiler.is_dynamo_compiling():
            return self(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self(*args)

    def differentiate(self, function: Any) -> Any:
        """Registers the autograd function that takes the op's arguments: what gives gradients to a call of the op
        itself, as it stands in an exported or captured graph. A decorator."""
        # torch.func's transformations have been sorted out when the dispatcher calls: what is left is one level.
        methods = {name: staticmethod(getattr(function, name)) for name in ("forward", "setup_context", "backward")}
        level: Any = type(function.__name__, (torch.autograd.function._SingleLevelFunction,), methods)

        def run(*args):
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(args)):
                with enable_single_level_autograd_function():
                    outputs = level.apply(*args)
                return outputs if self.call._schema.returns else None
            return self.below_autograd(*args)

        self.function, function.op_name = function, self.name.removesuffix("_fwd")
        LIBRARY.impl(self.name, run, "Autograd")
        return function

    def candidates(self, *args) -> Iterator[tuple[Backend, str | None]]:
        """Every backend with the reason why it cannot run these arguments (None if it can), best first."""
        for backend in self.backends:
            yield backend, backend.supports(*args)

    def _run_forced(self, *args):
        for backend in self.backends:
            if backend.name == _forced:
                if (reason := backend.supports(*args)) is not None:
                    raise BackendUnavailable(f"fastllm.{self.name}: backend {_forced!r} cannot run: {reason}")
                return backend.run(*args)
        names = ", ".join(backend.name for backend in self.backends)
        raise BackendUnavailable(f"fastllm.{self.name} has no backend {_forced!r}; it has {names}")

    def _explain(self, *args):
        assert _explanation is not None
        found = False
        for backend, reason in self.candidates(*args):
            chosen = not found and reason is None and _forced in (None, backend.name)
            found = found or chosen
            if reason is None and _forced not in (None, backend.name):
                reason = f"{_forced!r} is forced"
            kernel = backend.kernel(*args) if chosen and backend.kernel is not None else ""
            _explanation.append(Candidate(self.name, backend.name, reason, chosen, kernel))
        return self.fake(*args)

    def _select(self, *args):
        # C++ kernels have had their turn: the dispatcher calls this only where there is none for the device, or
        # because it handed the arguments over.
        rejected: list[tuple[Backend, str]] = []
        for backend, reason in self.candidates(*args):
            if backend.key is None and reason is None:
                if backend.name == "reference" or (rejected and any(t.device.type != "cpu" for t in _tensors(args))):
                    self._warn(backend.name, rejected, args)
                return backend.run(*args)
            rejected.append((backend, reason or "handed these arguments over"))
        raise AssertionError(f"{self.name}: the reference refuses nothing")

    def _warn(self, chosen: str, rejected: list[tuple[Backend, str]], args: tuple) -> None:
        device = next(_tensors(args)).device.type
        # "cuda cannot run a CPU tensor" is no news; why this device's own kernel did not run is.
        reasons = [f"{b.name}: {reason}" for b, reason in rejected if b.key is None or b.key.lower() == device]
        message = f"fastllm.{self.name} runs on {chosen} for {device} tensors; " + (
            "; ".join(reasons) or f"no kernel for {device}"
        )
        self._warn_once(message)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, FallbackWarning, stacklevel=_users_level())

    def check_second_derivative(self, device: torch.device) -> None:
        """For the gradient of this op, a backward, which plain PyTorch computes: warns once, or raises where a kernel
        is forced."""
        if _forced not in (None, "reference"):
            raise BackendUnavailable(
                f"fastllm.{self.name}: backend {_forced!r} has no gradient of a gradient; the reference has"
            )
        self._warn_once(
            f"fastllm.{self.name}: the gradient of a gradient runs on reference for {device.type} tensors; no kernel "
            "has it"
        )


def warn_again() -> None:
    """Forgets which fallbacks were warned of: each warns once more."""
    for op in OPS.values():
        op._warned.clear()


def _users_level() -> int:
    """The `stacklevel` with which a warning of the caller points at the user's line, outside of fastllm and torch."""
    level, frame = 1, sys._getframe(1)
    # What Inductor writes is in modules below torch._inductor, what Dynamo writes in none.
    while frame.f_back and frame.f_globals.get("__name__", "torch").partition(".")[0] in ("fastllm", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def _set_state(forced: str | None, explanation: Explanation | None) -> None:
    global _forced, _explanation, _explaining, _slow_path
    _explaining = None if explanation is None else threading.get_ident()
    _forced, _explanation, _slow_path = forced, explanation, forced is not None or explanation is not None


class use_backend:
    """Runs every fastllm op on backend `name`, in all threads; None lifts an outer choice.

        with use_backend("reference"): ...      # inside
        use_backend("reference")                # from here on, until the next choice
        @use_backend("reference")               # in every call of a function

    A forced backend never falls back: an op that lacks it, or cannot run its arguments on it, raises
    `BackendUnavailable` with the reasons. The environment variable FASTLLM_BACKEND does the same for a whole process.

    Args:
        name: "cuda", "triton", "cpu", "torch" or "reference".

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(self, name: str | None):
        self.name, self._before = _check_name(name, "use_backend"), _forced
        _set_state(name, _explanation)

    def __enter__(self) -> None:
        _set_state(self.name, _explanation)

    def __exit__(self, *exception: object) -> None:
        _set_state(self._before, _explanation)

    def __call__(self, function: Callable) -> Callable:
        _set_state(self._before, _explanation)  # a decorator chooses in the calls only

        @functools.wraps(function)
        def run(*args, **kwargs):
            with use_backend(self.name):
                return function(*args, **kwargs)

        return run


def explain(op: str | Callable, *args, **kwargs) -> Explanation:
    """Lists every backend that could run this call, chosen or rejected, with the reason. Computes nothing.

    Args:
        op: a function of `fastllm.ops`, or its name.
        *args, **kwargs: what it would be called with.

    Returns:
        An `Explanation`: a list of `Candidate`; `print` shows it as a table and `.backend` is the one that would run.

    Raises:
        ValueError: for an unknown op, and whatever the op itself raises for bad arguments.
    """
    from fastllm import ops

    if isinstance(op, str) and op not in ops.__all__:
        raise ValueError(f"explain: unknown op {op!r}; known are {', '.join(ops.__all__)}")
    function = getattr(ops, op) if isinstance(op, str) else op
    explanation = Explanation()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with _explain_lock, torch.random.fork_rng(devices=devices):  # ops with dropout draw a seed
        _set_state(_forced, explanation)
        try:
            function(*args, **kwargs)  # with gradients, if they are on: backends differ in those they give
        finally:
            _set_state(_forced, None)
    if not explanation:
        raise ValueError(f"explain: {getattr(function, '__name__', function)!r} calls no op of fastllm")
    return explanation


try:
    _set_state(_check_name(os.environ.get("FASTLLM_BACKEND") or None, "FASTLLM_BACKEND"), None)
except ValueError as error:
    # The command line says it in one line. It has no say yet: its own module is imported after this one.
    started = " ".join(sys.orig_argv).partition(" -m ")[2] if sys.argv[:1] == ["-m"] else "".join(sys.argv[:1])
    if os.path.basename(started.partition(" ")[0]).partition(".")[0] != "fastllm":
        raise
    sys.exit(f"fastllm: error: {error}")

"""How an op is tested: an error budget against a float64 truth, and inputs that are hard on kernels.

    args = (make((4, 127), torch.bfloat16, layout="transposed"), (127,), make((127,), torch.float32, seed=1))
    check_op(ops.rms_norm, torch.nn.functional.rms_norm, args)

The rule is one for every op, dtype and shape, so that no test has a tolerance of its own:

    max|kernel - truth| <= 2 max|eager - truth| + floor

where truth is the op's reference in float64, eager the stock PyTorch function in the dtype of the call, and floor the
rounding that no implementation can avoid (`rounding_floor`). It holds for each output and each gradient.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm import backends
from fastllm.ops._dropout import dropout_seed
from fastllm.reference._dropout import dropped

ODD_SIZES = (1, 3, 127, 129, 1000)
"""Sizes beside those that vectors, warps and blocks like."""

LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded", "scalar", "misaligned")
"""What `make` lays out:

transposed: the order of the dimensions in memory is reversed.
sliced: dense rows with a gap between them.
strided: every second element of a row.
expanded: stride 0 in the first dimension.
scalar: stride 0 in every dimension, as the gradient that `.sum()` sends back.
misaligned: contiguous, but starts one element past where the allocation does.
"""

# Arithmetic inside a kernel that the eager function may happen to round otherwise.
FLOOR_ROUNDINGS = 8


def make(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    layout: str = "contiguous",
) -> Tensor:
    """Draws a tensor from the standard normal distribution, laid out in memory as one of `LAYOUTS`.

    Raises:
        ValueError: for an unknown layout.
    """
    shape = tuple(shape)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        # Every dtype rounds the same values.
        drawn = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(size, generator=generator, device=device, dtype=drawn).to(dtype)

    if layout == "contiguous" or not shape:
        return draw(*shape)
    if layout == "transposed":
        return draw(*reversed(shape)).permute(*reversed(range(len(shape))))
    if layout == "sliced":
        return draw(*shape[:-1], shape[-1] + 3)[..., : shape[-1]]
    if layout == "strided":
        return draw(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "expanded":
        return draw(1, *shape[1:]).expand(shape)
    if layout == "scalar":
        return draw().expand(shape)
    if layout == "misaligned":
        return draw(1 + torch.Size(shape).numel())[1:].view(shape)
    raise ValueError(f"make: unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")


def seeded(op: Callable, seed: int = 0) -> Callable:
    """`op` behind torch.manual_seed(seed), so that its dropout is that of `dropout_factors`."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(seed)
        return op(*args, **kwargs)

    return call


def dropout_factors(x: Tensor, p: float, seed: int = 0) -> Tensor:
    """What a `seeded` norm behind dropout multiplies x (..., N) by: 0 or 1 / (1 - p), in float32."""
    torch.manual_seed(seed)
    ones, key = torch.ones_like(x, dtype=torch.float32), dropout_seed(x, p)
    return ones if key is None else dropped(ones, key, p)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fills every tensor that is allocated inside and not initialized with NaN (integers: the largest value).

    Output elements that a kernel does not write then show, whatever the allocation held before. It reaches
    `torch.empty` and its like from Python, from ATen and from kernels on the stable ABI.
    """
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # its attribute is a property that type checkers do not see
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        deterministic.fill_uninitialized_memory = fill


def _norm_sample(draw: Callable[..., Tensor], *, added: bool, biased: bool) -> tuple[tuple, dict[str, Any]]:
    activations = [draw(3, 8) for _ in range(1 + added)]
    return (*activations, (8,), *(draw(8) for _ in range(1 + biased))), {}


# One small valid call of each op, from a function that draws a tensor of a shape.
_SAMPLES: dict[str, Callable[[Callable[..., Tensor]], tuple[tuple, dict[str, Any]]]] = {
    "layer_norm": functools.partial(_norm_sample, added=False, biased=True),
    "rms_norm": functools.partial(_norm_sample, added=False, biased=False),
    "add_layer_norm": functools.partial(_norm_sample, added=True, biased=True),
    "add_rms_norm": functools.partial(_norm_sample, added=True, biased=False),
    "dropout_add_layer_norm": functools.partial(_norm_sample, added=True, biased=True),
    "dropout_add_rms_norm": functools.partial(_norm_sample, added=True, biased=False),
}


def _attention_sample(draw: Callable[..., Tensor]) -> tuple[tuple, dict[str, Any]]:
    return (draw(1, 2, 5, 16), draw(1, 2, 7, 16), draw(1, 2, 7, 16)), {"window_size": (3, 0)}


def _varlen_sample(draw: Callable[..., Tensor]) -> tuple[tuple, dict[str, Any]]:
    q, k, v = (draw(7, 2, 16) for _ in range(3))
    cu = torch.tensor([0, 3, 7], dtype=torch.int32, device=q.device)
    return (q, k, v, cu, cu, 4, 4), {"is_causal": True}


def _kvcache_sample(draw: Callable[..., Tensor]) -> tuple[tuple, dict[str, Any]]:
    q, k, v = draw(2, 2, 1, 16), draw(2, 2, 9, 16), draw(2, 2, 9, 16)
    return (q, k, v, torch.tensor([4, 9], dtype=torch.int32, device=q.device)), {}


def _adamw_sample(draw: Callable[..., Tensor]) -> tuple[tuple, dict[str, Any]]:
    lists = [[draw(3, 8), draw(5)] for _ in range(5)]
    for second_moments in lists[3:]:
        for v in second_moments:
            v.abs_()
    steps = [torch.ones((), device=p.device) for p in lists[0]]
    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8}
    return (*lists, steps), hyper


def _cross_entropy_sample(draw: Callable[..., Tensor]) -> tuple[tuple, dict[str, Any]]:
    x = draw(5, 9)
    return (x, torch.tensor([3, 0, -100, 8, 8], device=x.device)), {
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 5.0,
    }


def _linear_cross_entropy_sample(draw: Callable[..., Tensor]) -> tuple[tuple, dict[str, Any]]:
    x, weight, bias = draw(5, 8), draw(9, 8), draw(9)
    return (x, weight, torch.tensor([3, 0, -100, 8, 8], device=x.device)), {"linear_bias": bias, "chunk_size": 2}


def _glu_sample(draw: Callable[..., Tensor]) -> tuple[tuple, dict[str, Any]]:
    return (draw(3, 8), draw(3, 8)), {}


def _gelu_sample(draw: Callable[..., Tensor]) -> tuple[tuple, dict[str, Any]]:
    return (draw(3, 8),), {"bias": draw(8)}


def _rotary_sample(draw: Callable[..., Tensor]) -> tuple[tuple, dict[str, Any]]:
    q, k, cos, sin = draw(2, 4, 5, 16), draw(2, 2, 5, 16), draw(9, 6).float(), draw(9, 6).float()
    return (q, k, cos, sin), {"position_ids": torch.arange(4, 9, device=q.device)}


_SAMPLES |= {
    "swiglu": _glu_sample,
    "geglu": _glu_sample,
    "gelu": _gelu_sample,
    "rotary": _rotary_sample,
    "cross_entropy": _cross_entropy_sample,
    "linear_cross_entropy": _linear_cross_entropy_sample,
    "adamw": _adamw_sample,
    "attention": _attention_sample,
    "attention_varlen": _varlen_sample,
    "attention_kvcache": _kvcache_sample,
}


def sample(
    op: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[tuple, dict[str, Any]]:
    """Returns (args, kwargs) of a small valid call of `fastllm.ops.<op>`, with every optional tensor.

    Raises:
        ValueError: for an unknown op.
    """
    if op not in _SAMPLES:
        raise ValueError(f"sample: unknown op {op!r}; known are {', '.join(_SAMPLES)}")
    seeds = iter(range(seed, seed + 1000))
    return _SAMPLES[op](lambda *shape: make(shape, dtype, device, next(seeds)))


def outputs_of(result: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """What an op returned, as a tuple; empty for one that works in place."""
    if result is None:
        return ()
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def gradients(
    fn: Callable, args: Sequence[Any], kwargs: Mapping[str, Any] | None, cotangents: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Calls `fn` on leaves that share the arguments' memory and differentiates it.

    Args:
        fn: returns a tensor or a sequence of tensors.
        args, kwargs: every floating tensor among them is differentiated.
        cotangents: one for each output, rounded to its dtype.

    Returns:
        The outputs, detached, and the gradients of the floating tensors in the order of args and kwargs; None for one
        that no output depends on.
    """
    kwargs = kwargs or {}
    values = [v.detach().requires_grad_() if _differentiable(v) else v for v in (*args, *kwargs.values())]
    leaves = [value for value in values if _differentiable(value)]
    outputs = outputs_of(fn(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True))))
    cotangents = [cotangent.to(output.dtype) for cotangent, output in zip(cotangents, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True) if leaves else ()
    return tuple(output.detach() for output in outputs), grads


def rounding_floor(
    truth: Tensor, dtype: torch.dtype, roundings: int = FLOOR_ROUNDINGS, cancelling: float = 0.0
) -> float:
    """The error that an implementation may have where eager has none, for a result of this dtype.

    One rounding of the largest element to `dtype`, and `roundings` of the dtype that sums are accumulated in (float32,
    or float64 for float64); near zero, that many of the smallest subnormal. `cancelling` is the size of terms that the
    formula subtracts from each other, where it is larger than the result.
    """
    finite = truth[truth.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    result, sums = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    subnormal = result.smallest_normal * result.eps
    rounded = largest * result.eps + max(largest, cancelling) * roundings * sums.eps
    return rounded / 2 + roundings * subnormal


def _kind(x: Tensor) -> Tensor:
    """0 finite, 1 infinity, 2 minus infinity, 3 NaN."""
    return x.isposinf() + 2 * x.isneginf() + 3 * x.isnan()


def assert_within_budget(
    kernel: Tensor, truth: Tensor, eager: Tensor, *, floor: float | None = None, name: str = "output"
) -> None:
    """Asserts max|kernel - truth| <= 2 max|eager - truth| + floor, and that infinities and NaN are where they belong.

    They belong where truth, rounded to the kernel's dtype, has them, or where eager has them (whose intermediate
    results may overflow). Only elements that are finite in both are compared.

    Args:
        kernel: what is tested.
        truth: the same in float64.
        eager: the same by stock PyTorch; rounded to the kernel's dtype if it has another.
        floor: default `rounding_floor(truth, kernel.dtype)`.
        name: what the message calls it.

    Raises:
        AssertionError: with the worst element's index and values, and the budget.
    """
    dtype = kernel.dtype
    what = f"{name} {str(dtype).removeprefix('torch.')} {tuple(kernel.shape)}"
    for label, other in (("truth", truth), ("eager", eager)):
        if other.shape != kernel.shape:
            raise AssertionError(f"{what}: {label} has shape {tuple(other.shape)}")
    eager = eager.to(dtype).double()
    kinds = _kind(truth.to(dtype)), _kind(eager)
    truth, result = truth.double(), kernel.double()

    def values(index: int) -> str:
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), kernel.shape))
        k, t, e = (float(x.flatten()[index]) for x in (result, truth, eager))
        return f"at {place}: kernel {k:.9g}, truth {t:.9g}, eager {e:.9g}"

    misplaced = (_kind(result) != kinds[0]) & (_kind(result) != kinds[1])
    if misplaced.any():
        index = int(misplaced.flatten().int().argmax())
        count = int(misplaced.sum())
        raise AssertionError(f"{what}: {count} infinities or NaN too many or too few, the first {values(index)}")
    error = torch.where(result.isfinite() & truth.isfinite(), result - truth, 0).abs()
    if not error.numel():
        return
    rival = float(torch.where(eager.isfinite() & truth.isfinite(), eager - truth, 0).abs().max())
    if floor is None:
        floor = rounding_floor(truth, dtype)
    budget = 2 * rival + floor
    index = int(error.argmax())
    if not float(error.max()) <= budget:
        raise AssertionError(
            f"{what}: error {float(error.max()):.3g} over the budget {budget:.3g} = 2 x {rival:.3g} (eager's error) + "
            f"{floor:.3g} (floor) {values(index)}"
        )


def _same_dtype(fn: Callable) -> Callable:
    """Stock functions refuse most mixes of dtypes: on a mix, runs `fn` in the dtype that its tensors promote to."""

    def promoted(*args: Any, **kwargs: Any) -> Any:
        dtypes = {value.dtype for value in (*args, *kwargs.values()) if _differentiable(value)}
        if len(dtypes) < 2:
            return fn(*args, **kwargs)
        dtype = functools.reduce(torch.promote_types, dtypes)
        args = tuple(arg.to(dtype) if _differentiable(arg) else arg for arg in args)
        return fn(*args, **{key: value.to(dtype) if _differentiable(value) else value for key, value in kwargs.items()})

    return promoted


def check_outputs(op: Callable, eager: Callable, args: Sequence[Any]) -> None:
    """`check_op` for an op without a gradient: its outputs only."""
    with torch.no_grad():
        kernel, stock = outputs_of(op(*args)), outputs_of(eager(*args))
        with backends.use_backend("reference"):
            truth = outputs_of(op(*(arg.double() if _differentiable(arg) else arg for arg in args)))
    for k, t, e in zip(kernel, truth, stock, strict=True):
        assert_within_budget(k, t, e)


def check_op(
    op: Callable,
    eager: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    grad_layout: str = "contiguous",
    seed: int = 1000,
    roundings: int = FLOOR_ROUNDINGS,
    cancelling: float = 0.0,
    in_exponent: float = 0.0,
) -> None:
    """Asserts that an op's outputs and the gradients of all its floating tensor arguments are within budget.

    Args:
        op: a function of `fastllm.ops`. The truth is what it computes on its reference from the arguments in float64.
        eager: the stock PyTorch function with the same arguments and outputs. Where dtypes are mixed it runs in the one
            that they promote to.
        args, kwargs: of the call.
        grad_layout: the layout of the gradients that come in, one of `LAYOUTS`.
        seed: of the gradients that come in.
        roundings, cancelling: of the floor, where the op's formula implies more than usual; see `rounding_floor`.
        in_exponent: for gradients that are exponentials, the size of what is subtracted there: its roundings are
            relative errors of theirs. `cancelling` is then of the outputs alone.

    Raises:
        AssertionError: with the op, the tensor, the worst element and the budget.
    """
    kwargs = dict(kwargs or {})
    with torch.no_grad():
        outputs = outputs_of(op(*args, **kwargs))
    device = outputs[0].device
    cotangents = [make(out.shape, out.dtype, device, seed + i, grad_layout) for i, out in enumerate(outputs)]
    kernel = gradients(op, args, kwargs, cotangents)
    stock = gradients(_same_dtype(eager), args, kwargs, cotangents)
    with backends.use_backend("reference"):
        double = [arg.double() if _differentiable(arg) else arg for arg in args]
        double_kwargs = {key: value.double() if _differentiable(value) else value for key, value in kwargs.items()}
        truth = gradients(op, double, double_kwargs, [cotangent.double() for cotangent in cotangents])

    name = getattr(op, "__name__", "op")
    bound = inspect.signature(op).bind(*args, **kwargs).arguments
    labels = [f"output {i}" for i in range(len(outputs))]
    labels += [f"gradient of {key}" for key, value in bound.items() if _differentiable(value)]
    for label, k, t, e in zip(labels, *([*outs, *grads] for outs, grads in (kernel, truth, stock)), strict=True):
        if k is None or t is None or e is None:
            assert k is t is e, f"{name}: {label}: only some of kernel, truth and eager depend on it"
            continue
        terms = cancelling
        if in_exponent and label.startswith("gradient"):
            largest = float(torch.where(t.isfinite(), t, 0).abs().max()) if t.numel() else 0.0
            # The probability of the target is subtracted from 1, times what comes in.
            terms = in_exponent * largest + max(float(c.abs().max()) for c in cotangents if c.numel())
        assert_within_budget(k, t, e, floor=rounding_floor(t, k.dtype, roundings, terms), name=f"{name}: {label}")

"""What the norms have in common, alone or behind an addition: validation, shapes, autocast, backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.backends import KERNEL_DTYPES, Backend, compiled
from fastllm.ops import _sharding, _triton
from fastllm.ops._arguments import check_dtype, number
from fastllm.reference.layer_norm import layer_norm_fwd
from fastllm.reference.rms_norm import rms_norm_fwd

LONGEST_WITH_DROPOUT = 8192
"""Elements of a row, which kernels/_dropout_norm.py holds in registers."""


def _supports(x: int, *parameters: int) -> Callable[..., str | None]:
    """For an op whose schema has the activation at position `x`, weight (and bias) at `parameters`."""

    def supports(*args) -> str | None:
        for position in (x, *parameters):
            tensor = args[position]
            if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
                what = "input" if position == x else "weight and bias"
                return f"{what} must be float32, bfloat16 or float16, got {str(tensor.dtype).removeprefix('torch.')}"
        return None

    return supports


def kernels(x: int, *parameters: int) -> tuple[Backend, ...]:
    """The C++ backends of an op; positions as `_supports` takes them."""
    supports = _supports(x, *parameters)
    return compiled("CUDA", supports), compiled("CPU", supports)


def dropout_kernels(fake: Callable, launch: Callable, x: int, *parameters: int) -> tuple[Backend, ...]:
    """The backends of an op with dropout: Triton's, from its launcher launch(outputs, *args), and the CPU's."""
    supports = _supports(x, *parameters)

    def short_enough(*args) -> str | None:
        n = args[x].shape[-1]
        if n > LONGEST_WITH_DROPOUT:
            return f"computes rows of up to {LONGEST_WITH_DROPOUT:,} elements, got {n:,}"
        return supports(*args)

    def run(*args):
        outputs = fake(*args)
        if args[x].numel():
            launch(outputs, *args)
        else:  # the gradients of weight and bias are sums over no rows
            for output in outputs:
                output.zero_()
        return outputs

    return Backend("triton", _triton.supports(short_enough), run), compiled("CPU", supports)


def validate(
    name: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None = None,
) -> int:
    """Checks a norm's arguments and returns the number of normalized dimensions.

    Raises:
        TypeError: for what is not a tensor, a sequence of ints, or of a floating dtype.
        ValueError: for shapes or devices that do not fit.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a tensor, got {type(input).__name__}")
    if type(input) is not Tensor:
        _sharding.ready(input)
    if not isinstance(normalized_shape, (tuple, list)):
        raise TypeError(f"{name}: normalized_shape must be a tuple of ints, got {normalized_shape!r}")
    shape, ndim = tuple(normalized_shape), len(normalized_shape)
    check_dtype(name, "input", input.dtype)
    if ndim == 0:
        raise ValueError(f"{name}: normalized_shape must have at least one dimension, got ()")
    if tuple(input.shape[-ndim:]) != shape:
        raise ValueError(f"{name}: input must have shape (*, {str(shape)[1:]}, got {tuple(input.shape)}")
    for label, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name}: {label} must be a tensor or None, got {type(parameter).__name__}")
        check_dtype(name, label, parameter.dtype)
        if tuple(parameter.shape) != shape:
            raise ValueError(f"{name}: {label} must have shape {shape}, got {tuple(parameter.shape)}")
        if parameter.device != input.device:
            raise ValueError(f"{name}: input is on {input.device}, {label} on {parameter.device}")
    return ndim


def validate_residual(name: str, input: Tensor, residual: Tensor) -> None:
    """Checks the second argument of the add-norms, once the first is known to be good.

    Raises:
        TypeError, ValueError: as `validate`.
    """
    if not isinstance(residual, Tensor):
        raise TypeError(f"{name}: residual must be a tensor, got {type(residual).__name__}")
    check_dtype(name, "residual", residual.dtype)
    if residual.shape != input.shape:
        raise ValueError(f"{name}: residual must have shape {tuple(input.shape)}, got {tuple(residual.shape)}")
    if residual.device != input.device:
        raise ValueError(f"{name}: input is on {input.device}, residual on {residual.device}")


def runs_in_float32(x: Tensor) -> bool:
    """Whether autocast makes torch's norms take this input in float32: it does on CUDA, it does not on the CPU."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled("cuda")


def flatten(x: Tensor | None, ndim: int) -> Tensor | None:
    """Folds the last `ndim` dimensions, the normalized ones, into one."""
    return x if x is None or ndim == 1 else x.flatten(-ndim)


def statistics(x: Tensor, eps: float, *, centered: bool) -> Any:
    """(mean, rstd) of the rows of x, or (rstd,), in plain PyTorch, so that gradients flow through them."""
    return layer_norm_fwd(x, None, None, eps)[1:] if centered else rms_norm_fwd(x, None, eps)[1:]


def promote(input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of their sum."""
    if input.dtype == residual.dtype:
        return input, residual
    dtype = torch.promote_types(input.dtype, residual.dtype)
    return input.to(dtype), residual.to(dtype)


def empty_parameter_grad(x: Tensor, parameter: Tensor | None, wanted: bool) -> Tensor:
    """The fake of a parameter's gradient: (N,) in its dtype, or empty where it is not asked for."""
    size = x.shape[-1] if wanted and parameter is not None else 0
    return x.new_empty(size, dtype=x.dtype if parameter is None else parameter.dtype)


def empty_statistic(x: Tensor) -> Tensor:
    """The fake of mean or rstd."""
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def rms_eps(name: str, x: Tensor, eps: float | None) -> float:
    """torch's default: the machine epsilon of the dtype that the norm is computed in."""
    if eps is None:
        return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    return number(name, "eps", eps)

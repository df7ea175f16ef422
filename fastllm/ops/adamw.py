"""AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101) over a list of parameters at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastllm.backends import KERNEL_DTYPES, LIBRARY, Op, compiled
from fastllm.ops._arguments import DTYPES, check_dtype
from fastllm.reference import adamw as reference


def _norm_supports(grads: Sequence[Tensor]) -> str | None:
    for grad in grads:
        if grad.dtype not in KERNEL_DTYPES:
            return f"computes float32, bfloat16 and float16 gradients, not {grad.dtype}"
    return None


def _supports(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], *_) -> str | None:
    for param, grad, exp_avg in zip(params, grads, exp_avgs, strict=True):
        if param.dtype not in KERNEL_DTYPES:
            return f"computes float32, bfloat16 and float16 parameters, not {param.dtype}"
        if grad.dtype not in KERNEL_DTYPES:
            return f"computes float32, bfloat16 and float16 gradients, not {grad.dtype}"
        if exp_avg.dtype not in (*KERNEL_DTYPES, torch.uint8):
            return f"computes moments of float32, bfloat16, float16 and 8 bits, not {exp_avg.dtype}"
    return None


_CUDA_MIXES = (
    # parameter, gradient, moments; these are compiled in csrc/cuda/adamw.cu
    *((dtype, dtype, dtype) for dtype in KERNEL_DTYPES),
    *((dtype, dtype, torch.uint8) for dtype in KERNEL_DTYPES),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
)


def _cuda_supports(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], *_) -> str | None:
    for param, grad, exp_avg in zip(params, grads, exp_avgs, strict=True):
        mix = param.dtype, grad.dtype, exp_avg.dtype
        if mix not in _CUDA_MIXES:
            return "not compiled for parameter {}, gradient {} and moments {}".format(*mix)
    return None


step_op = Op(
    "adamw_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    "Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] steps, Tensor(g!)[] masters, Tensor(h!)[] exp_avg_scales, "
    "Tensor(i!)[] exp_avg_sq_scales, Tensor? grad_norm, Tensor? grad_scale, Tensor? found_inf, Tensor? lr_tensor, "
    "int[] indices, float lr, float beta1, float beta2, float weight_decay, float eps, float max_norm, bool maximize, "
    "bool stochastic, int seed) -> ()",
    reference=reference.adamw_step,
    fake=lambda *args: None,
    backends=(compiled("CUDA", _cuda_supports), compiled("CPU", _supports)),
)
_norm = Op(
    "adamw_norm(Tensor[] grads) -> Tensor",
    reference=reference.adamw_norm,
    fake=lambda grads: grads[0].new_empty(
        (), dtype=torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    ),
    backends=(compiled("CUDA", _norm_supports), compiled("CPU", _norm_supports)),
)


# For the optimizer, C++ only: the addresses of all tensors of a step as a table, an int64 tensor on the CPU that is
# empty where the kernels cannot read them as they lie, and the step for a table that was made before and is still true.
# `like` is any of the parameters. A table names tensors by address, so the schemas cannot say what is written: whoever
# traces calls `step_op`.
LIBRARY.define(
    "adamw_table(Tensor[] params, Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] max_exp_avg_sqs, "
    "Tensor[] steps, Tensor[] masters, Tensor[] exp_avg_scales, Tensor[] exp_avg_sq_scales, int[] indices, bool first) "
    "-> Tensor"
)
LIBRARY.define(
    "adamw_table_step(Tensor(a!) like, Tensor table, Tensor? grad_norm, Tensor? grad_scale, Tensor? found_inf, "
    "Tensor? lr_tensor, bool steps_apart, float lr, float beta1, float beta2, float weight_decay, float eps, "
    "float max_norm, bool maximize, bool stochastic, int seed) -> ()"
)
torch.library.register_fake(
    "fastllm::adamw_table", lambda params, *rest: torch.empty(0, 0, dtype=torch.int64), lib=LIBRARY
)
torch.library.register_fake("fastllm::adamw_table_step", lambda *args: None, lib=LIBRARY)
make_table, table_step = torch.ops.fastllm.adamw_table.default, torch.ops.fastllm.adamw_table_step.default
TABLE_GRAD = 1  # the column of the gradients' addresses


def has_tables(device: torch.device) -> bool:
    """Whether the kernels of this device are there."""
    return device.type.upper() in step_op.built


BLOCK, SPARSE = reference.BLOCK, reference.SPARSE
join, split = reference.join, reference.split


def quantize(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes like `moment`, scales) of a float32 moment, as 8-bit moments are kept."""
    codes, scales = reference.encode(_in_memory_order(moment.float()), signed)
    code = torch.empty_like(moment, dtype=torch.uint8)
    _in_memory_order(code).copy_(codes)
    return code, scales


def dequantize(code: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The float32 moment that 8-bit codes and their scales stand for."""
    moment = torch.empty_like(code, dtype=torch.float32)
    _in_memory_order(moment).copy_(reference.decode(_in_memory_order(code), scales, signed))
    return moment


def _in_memory_order(x: Tensor) -> Tensor:
    """The elements of a dense tensor as a vector that shares its memory."""
    return x.as_strided((x.numel(),), (1,))


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, sqrt(sum of squares), in one read of them and with no device sync.

    Args:
        grads: at least one floating tensor, all on one device, of any shapes, strides and dtypes.

    Returns:
        0-d float32 (float64 if a gradient is), on their device. The same bits at every run and number of threads.
    """
    return _norm(list(grads))


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_norm: Tensor | None = None,
    max_norm: float = 0.0,
    masters: Sequence[Tensor] = (),
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
    stochastic_rounding: bool = False,
    seed: int = 0,
    indices: Sequence[int] = (),
) -> None:
    """One step of AdamW for every parameter of a list, in place and in one pass, as `torch.optim.adamw.adamw`.

        t <- t + 1                                p <- p (1 - lr weight_decay)
        m <- m + (1 - beta1) (g - m)              v <- beta2 v + (1 - beta2) g^2
        p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    in float32 (float64 for float64 parameters); what is stored is rounded to its dtype. `fastllm.optim.AdamW` keeps the
    state and calls this. Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.

    Args:
        params, grads: floating tensors of the same shapes; dtypes and strides may differ, and from one parameter to the
            next too. All lists are on one device.
        exp_avgs, exp_avg_sqs: m and v like their parameters, floating, or uint8 codes.
        max_exp_avg_sqs: the largest v so far, of v's dtype, for amsgrad; empty without.
        state_steps: t before the step, float32 of one element each, on the CPU or the parameters' device.
        lr: learning rate; a float32 tensor of one element is read on its device, with no sync.
        beta1, beta2, weight_decay, eps: as in the formula.
        maximize: go up instead of down.
        grad_scale: divide the gradients by this first, and store them so. float32, one element.
        found_inf: do nothing at all if this is not zero. float32, one element. On a GPU, state_steps must be there
            too.
        grad_norm: clip: multiply the gradients by min(1, max_norm / (grad_norm + 1e-6)) on the way, without storing
            them. float32, one element: the norm of what the gradients are after `grad_scale` divided them.
        max_norm: see `grad_norm`.
        masters: for 16-bit parameters, like them: float32, the value that the parameter is rounded from; or, for
            bfloat16, int16, the 16 bits that this lost (join and split in csrc/math/adamw.h). Empty without.
        exp_avg_scales, exp_avg_sq_scales: for moments of uint8, a float32 for each 256 elements.
        stochastic_rounding: round 16-bit parameters up or down at random, right on average.
        seed, indices: of those random numbers: they depend on (seed, t, index of the parameter, element in the order
            of memory) alone. Default of indices: 0, 1, ...

    Raises:
        ValueError: for lists of different lengths, a tensor that does not fit its parameter in shape or device, and a
            number out of range: lr, weight_decay and eps are not negative, beta1 and beta2 in [0, 1).
        TypeError: for one that does not fit in dtype, and for what is no list of tensors.
    """
    lists: dict[str, Sequence[Tensor]] = {
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "max_exp_avg_sqs": max_exp_avg_sqs,
        "state_steps": state_steps,
        "masters": masters,
        "exp_avg_scales": exp_avg_scales,
        "exp_avg_sq_scales": exp_avg_sq_scales,
    }
    required = ("grads", "exp_avgs", "exp_avg_sqs", "state_steps")
    given: dict[str, Sequence[Tensor]] = {"params": params, **lists}
    for name, values in given.items():
        if isinstance(values, Tensor):
            raise TypeError(f"adamw: {name} must be a list of tensors, got one tensor")
        for i, entry in enumerate(values):
            if not isinstance(entry, Tensor):
                raise TypeError(f"adamw: {name}[{i}] must be a tensor, got {type(entry).__name__}")
    lengths = {**{name: len(values) for name, values in lists.items()}, "indices": len(indices)}
    for name, length in lengths.items():
        if length != len(params) and (name in required or length):
            raise ValueError(f"adamw: {name} has {length} entries for {len(params)} parameters")
    for i, param in enumerate(params):
        if param.device != params[0].device:
            raise ValueError(f"adamw: params[{i}] is on {param.device}, params[0] on {params[0].device}")
        _check(i, param, {name: values[i] for name, values in lists.items() if values})
    for name, value in {"grad_scale": grad_scale, "found_inf": found_inf, "grad_norm": grad_norm}.items():
        if value is not None and value.numel() != 1:
            raise ValueError(f"adamw: {name} must have one element, got shape {tuple(value.shape)}")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"adamw: lr must be a number or have one element, got shape {tuple(lr.shape)}")
    on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
    for name, number in {"lr": 0.0 if on_device else float(lr), "weight_decay": weight_decay, "eps": eps}.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"adamw: {name} must be finite and not negative, got {number}")
    for name, number in {"beta1": beta1, "beta2": beta2}.items():
        if not 0 <= number < 1:
            raise ValueError(f"adamw: {name} must be in [0, 1), got {number}")
    if not isinstance(seed, int):
        raise TypeError(f"adamw: seed must be an int, got {type(seed).__name__}")
    if (grad_norm is None) != (max_norm == 0) or max_norm < 0:
        raise ValueError(f"adamw: grad_norm and a positive max_norm go together, got max_norm={max_norm}")
    if not params:
        return
    with torch.no_grad():
        step_op(
            *(list(values) for values in (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)),
            *(list(values) for values in (masters, exp_avg_scales, exp_avg_sq_scales)),
            *(None if value is None else value.float() for value in (grad_norm, grad_scale, found_inf)),
            lr.float() if on_device and isinstance(lr, Tensor) else None,
            list(indices),
            0.0 if on_device else float(lr),
            beta1,
            beta2,
            weight_decay,
            eps,
            max_norm,
            maximize,
            stochastic_rounding,
            seed,
        )


def _check(index: int, param: Tensor, parts: dict[str, Tensor]) -> None:
    """The tensors that belong to one parameter."""
    check_dtype("adamw", f"params[{index}]", param.dtype)
    quantized = parts["exp_avgs"].dtype == torch.uint8
    if quantized and (not {"exp_avg_scales", "exp_avg_sq_scales"} <= set(parts) or "max_exp_avg_sqs" in parts):
        raise ValueError("adamw: moments of 8 bits need exp_avg_scales and exp_avg_sq_scales, and know no amsgrad")
    if any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
        raise ValueError(f"adamw: params[{index}] is expanded: its elements share memory, strides {param.stride()}")
    for name, tensor in parts.items():
        shape: Sequence[int] = param.shape
        if name in ("exp_avg_scales", "exp_avg_sq_scales"):
            shape = (-(-param.numel() // reference.BLOCK),)
        if name == "state_steps":
            if tensor.numel() != 1 or tensor.dtype != torch.float32:
                found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise ValueError(f"adamw: state_steps[{index}] must be one float32, got {found}")
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"adamw: {name}[{index}] must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != param.device:
            raise ValueError(f"adamw: {name}[{index}] must be on {param.device}, got {tensor.device}")
        allowed = {
            "exp_avgs": tensor.dtype in DTYPES or quantized,
            "exp_avg_sqs": tensor.dtype == parts["exp_avgs"].dtype,
            "max_exp_avg_sqs": tensor.dtype == parts["exp_avgs"].dtype,
            "masters": tensor.dtype == torch.float32 or (tensor.dtype == torch.int16 and param.dtype == torch.bfloat16),
            "exp_avg_scales": tensor.dtype == torch.float32,
            "exp_avg_sq_scales": tensor.dtype == torch.float32,
        }.get(name, tensor.dtype in DTYPES)
        if not allowed:
            beside = "" if name in ("grads", "masters") else f" with exp_avgs of {parts['exp_avgs'].dtype}"
            raise TypeError(f"adamw: {name}[{index}] cannot be {tensor.dtype} for a parameter of {param.dtype}{beside}")

"""What cross_entropy and linear_cross_entropy have in common: ops over rows of logits, checks, the loss of a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllm.backends import KERNEL_DTYPES, Backend, Op, autocasts, compiled
from fastllm.ops import _triton
from fastllm.ops._arguments import check_dtype, check_inside, integer, number
from fastllm.reference import cross_entropy as reference


def _supports(logits: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    if logits.dtype not in KERNEL_DTYPES:
        return f"computes float32, bfloat16 and float16 logits, not {logits.dtype}"
    if target.is_floating_point():
        return "computes class indices, not probabilities"
    if weight is not None:
        return "computes no label smoothing with class weights"
    return None


def _fwd_supports(logits, target, weight, *rest):
    return _supports(logits, target, weight)


def _bwd_supports(dlse, dpicked, dmean, logits, target, weight, *rest):
    return _supports(logits, target, weight)


def writable(logits: Tensor) -> bool:
    """Whether the rows are dense and apart from each other, so that a kernel may write where it reads."""
    return logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]


def _bwd_in_place_supports(dlse, dpicked, dmean, logits, target, *rest):
    if not writable(logits):
        return f"writes into dense rows that lie apart, not into strides {tuple(logits.stride())}"
    return _supports(logits, target, None)


def _fwd_triton(logits, target, weight, softcap, mean):
    if not logits.numel():
        return reference.cross_entropy_fwd(logits, target, weight, softcap, mean)
    outputs = empty_stats(logits, mean)
    launch_fwd(outputs, logits, target, softcap)
    return outputs


def launch_fwd(outputs, logits, target, softcap):
    """Writes the stats of all rows into `outputs`, by a Triton kernel."""
    from fastllm.kernels import cross_entropy as kernels

    top, lse, picked, mean = _wanted(outputs)
    kernels.cross_entropy_fwd(top, lse, picked, mean, _dense(logits), target, softcap)


def launch_loss(outputs, logits, target, scale, label_smoothing, z_loss, softcap):
    """The same, and the gradient of the loss over the logits, whose rows are dense."""
    from fastllm.kernels import cross_entropy as kernels

    top, lse, picked, mean = _wanted(outputs)
    kernels.cross_entropy_loss(
        top, lse, picked, mean, logits, target, scale, label_smoothing, z_loss, softcap
    )  # fmt: skip


def _wanted(outputs):
    return tuple([output if output.numel() else None for output in outputs])


def _bwd_triton(dlse, dpicked, dmean, logits, target, weight, top, lse, softcap):
    dlogits = logits.new_empty(logits.shape)
    _launch_bwd(dlogits, dlse, dpicked, dmean, logits, target, top, lse, softcap)
    return dlogits


def _bwd_in_place_triton(dlse, dpicked, dmean, logits, target, top, lse, softcap):
    _launch_bwd(logits, dlse, dpicked, dmean, logits, target, top, lse, softcap)


def _dense(logits: Tensor) -> Tensor:
    """With dense rows, as the kernels walk along them."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _launch_bwd(dlogits, dlse, dpicked, dmean, logits, target, top, lse, softcap):
    if logits.numel():
        from fastllm.kernels import cross_entropy as kernels

        out = _dense(dlogits)
        kernels.cross_entropy_bwd(out, dlse, dpicked, dmean, _dense(logits), target, top, lse, softcap)
        if out is not dlogits:
            dlogits.copy_(out)


def _bwd_in_place_reference(dlse, dpicked, dmean, logits, target, top, lse, softcap):
    logits.copy_(reference.cross_entropy_bwd(dlse, dpicked, dmean, logits, target, None, top, lse, softcap))


def empty_stats(x: Tensor, mean: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """top, lse, picked and mean (empty if it is not asked for) of the rows of `x`, not yet written."""
    acc, rows = torch.promote_types(x.dtype, torch.float32), x.shape[0]
    top, lse, picked = (x.new_empty(rows, dtype=acc) for _ in range(3))
    return top, lse, picked, x.new_empty(rows if mean else 0, dtype=acc)


def without_idle_rows(rows: Tensor, dlse: Tensor, lse: Tensor) -> Tensor:
    """Zeros for rows that have no gradient and may hold anything, so that nothing of it comes back as 0 * NaN."""
    return rows.masked_fill(((dlse == 0) & ~lse.isfinite())[:, None], 0.0)


def upstream(lse: Tensor, dlse: Tensor | None, dpicked: Tensor | None, dmean: Tensor | None):
    """What autograd hands a backward, as the kernels take it: dense, zeros for what nobody used."""
    grads = [torch.zeros_like(lse) if grad is None else grad.contiguous() for grad in (dlse, dpicked)]
    return *grads, None if dmean is None else dmean.contiguous()


stats_fwd = Op(
    "cross_entropy_fwd(Tensor logits, Tensor target, Tensor? weight, float softcap, bool mean) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.cross_entropy_fwd,
    fake=lambda logits, target, weight, softcap, mean: empty_stats(logits, mean),
    backends=(Backend("triton", _triton.supports(_fwd_supports), _fwd_triton), compiled("CPU", _fwd_supports)),
)
stats_bwd = Op(
    "cross_entropy_bwd(Tensor dlse, Tensor dpicked, Tensor? dmean, Tensor logits, Tensor target, Tensor? weight, "
    "Tensor top, Tensor lse, float softcap) -> Tensor",
    reference=reference.cross_entropy_bwd,
    fake=lambda dlse, dpicked, dmean, logits, *rest: logits.new_empty(logits.shape),
    backends=(Backend("triton", _triton.supports(_bwd_supports), _bwd_triton), compiled("CPU", _bwd_supports)),
)
stats_bwd_in_place = Op(
    "cross_entropy_bwd_(Tensor dlse, Tensor dpicked, Tensor? dmean, Tensor(a!) logits, Tensor target, Tensor top, "
    "Tensor lse, float softcap) -> ()",
    reference=_bwd_in_place_reference,
    fake=lambda *args: None,
    backends=(
        Backend("triton", _triton.supports(_bwd_in_place_supports), _bwd_in_place_triton),
        compiled("CPU", _bwd_in_place_supports),
    ),
)


def check_target(name: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises for a class index that is none: at once on the CPU, by a device-side assertion on a GPU, as torch."""
    check_inside(name, "target", target, classes, f"out of bounds for {classes} classes", ignore_index)


def check_options(
    name: str,
    reduction: str,
    label_smoothing: float,
    z_loss: float | None,
    softcap: float | None,
    dtype: torch.dtype | None = None,
) -> tuple[float, float, float]:
    """Returns label_smoothing, z_loss and softcap as numbers."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if dtype is not None:
        check_dtype(name, "dtype", dtype)
    label_smoothing = number(name, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    return label_smoothing, _not_negative(name, "z_loss", z_loss), _not_negative(name, "softcap", softcap)


def _not_negative(name: str, label: str, value: float | None) -> float:
    value = 0.0 if value is None else number(name, label, value)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name}: {label} must be finite and not negative, got {value}")
    return value


def check_linear_options(
    name: str, weight: Tensor | None, label_smoothing: float, z_loss: float, chunk_size: int | None
) -> int | None:
    """What linear_cross_entropy asks beyond `check_options`; returns chunk_size."""
    if weight is not None and (label_smoothing or z_loss):
        raise ValueError(
            f"{name}: class weights do not go with label_smoothing and z_loss, got {label_smoothing} and {z_loss}"
        )
    if chunk_size is not None:
        chunk_size = integer(name, "chunk_size", chunk_size)
        if chunk_size < 1:
            raise ValueError(f"{name}: chunk_size must be at least 1, got {chunk_size}")
    return chunk_size


def check_num_valid(name: str, num_valid: float | Tensor | None, reduction: str) -> None:
    if num_valid is None:
        return
    if reduction != "mean":
        raise ValueError(f"{name}: num_valid is for reduction='mean', got {reduction!r}")
    if isinstance(num_valid, Tensor):
        if num_valid.numel() != 1 or num_valid.requires_grad:
            raise ValueError(
                f"{name}: num_valid must have one element and get no gradient, got shape {tuple(num_valid.shape)}, "
                f"requires_grad={num_valid.requires_grad}"
            )
    elif not number(name, "num_valid", num_valid) > 0:
        raise ValueError(f"{name}: num_valid must be positive, got {num_valid}")


def check_weight(name: str, weight: Tensor | None, classes: int, input: Tensor) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: weight must be a tensor or None, got {type(weight).__name__}")
    check_dtype(name, "weight", weight.dtype)
    if weight.shape != (classes,) or weight.device != input.device:
        raise ValueError(
            f"{name}: weight must have shape ({classes},) on {input.device}, got {tuple(weight.shape)} on "
            f"{weight.device}"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: weight gets no gradient; detach it")


def row_losses(
    stats: tuple[Tensor, Tensor, Tensor, Tensor],
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor | float]:
    """The loss of each row, and what their sum is divided by for the mean."""
    top, lse, picked, mean = stats
    weight = None if weight is None else weight.to(lse.dtype)
    valid = None
    count: Tensor | float
    if target.is_floating_point():
        share = target.to(lse.dtype) if weight is None else target.to(lse.dtype) * weight
        rows, count = share.sum(-1) * lse - picked, float(lse.shape[0])
    else:
        valid = target != ignore_index
        rows, count = lse - picked, valid.sum()
        if weight is not None:
            chosen = torch.where(valid, weight[torch.where(valid, target, 0)], 0.0)
            rows, count = chosen * rows, chosen.sum()
    if label_smoothing:
        uniform = lse - mean if weight is None else weight.mean() * lse - mean
        rows = (1 - label_smoothing) * rows + label_smoothing * uniform
    if z_loss:
        whole = top + lse
        if valid is not None:
            whole = torch.where(valid, whole, 0.0)  # a row that is ignored may hold anything
        rows = rows + z_loss * whole.square()
    return (rows if valid is None else torch.where(valid, rows, 0.0)), count


def reduced(rows: Tensor, count: Tensor | float, reduction: str, num_valid: float | Tensor | None) -> Tensor:
    if reduction == "none":
        return rows
    return rows.sum() / (count if num_valid is None else num_valid) if reduction == "mean" else rows.sum()


def loss_dtype(input: Tensor) -> torch.dtype:
    """torch's: the input's, but float32 under autocast."""
    short = input.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if short and autocasts(input.device.type) else input.dtype

"""Cross-entropy of logits, fused: softmax, loss and gradient without a copy of the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllm.ops import _cross_entropy
from fastllm.ops._arguments import check_dtype, integer
from fastllm.ops._autograd import Function, again, gradients, run
from fastllm.reference import cross_entropy as reference
from fastllm.tracing import batched, transformed


@_cross_entropy.stats_fwd.differentiate
class _Stats(Function):
    """(top, lse, picked, mean) of rows of logits, for which see reference/cross_entropy.py."""

    @staticmethod
    def forward(logits, target, weight, softcap, mean):
        return _cross_entropy.stats_fwd.below_autograd(logits, target, weight, softcap, mean)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        logits, target, weight, ctx.softcap, ctx.mean = inputs
        top, lse, _, _ = outputs
        ctx.save_for_backward(logits, target, weight, top, lse)
        ctx.mark_non_differentiable(top)
        ctx.set_materialize_grads(False)
        ctx.inplace = False

    @staticmethod
    def backward(ctx, _, dlse, dpicked, dmean):
        logits, target, weight, top, lse = ctx.saved_tensors
        dlse, dpicked, dmean = _cross_entropy.upstream(lse, dlse, dpicked, dmean if ctx.mean else None)
        dlogits = dtarget = None
        if ctx.needs_input_grad[1]:  # before the logits are overwritten
            acc = lse.dtype
            dtarget = dpicked[:, None] * (reference.cap(logits.to(acc), ctx.softcap) - top[:, None])
            dtarget = (dtarget if weight is None else dtarget * weight.to(acc)).to(target.dtype)
        # A compiled graph knows no versions: nobody would be told that the logits are gone.
        inplace = ctx.inplace and ctx.needs_input_grad[0] and not torch.compiler.is_compiling()
        plain = weight is None and not target.is_floating_point() and not again() and not batched(dlse)
        if inplace and plain and _cross_entropy.writable(logits):
            _cross_entropy.stats_bwd_in_place(dlse, dpicked, dmean, logits, target, top, lse, ctx.softcap)
            torch.autograd.graph.increment_version(logits)  # whoever saved them for another backward gets an error
            dlogits = logits.detach()
        elif ctx.needs_input_grad[0]:
            args = (dlse, dpicked, dmean, logits, target, weight, top, lse, ctx.softcap)
            dlogits = gradients(_cross_entropy.stats_bwd, _formula, *args)
        return dlogits, dtarget, None, None, None


class _StatsInPlace(_Stats):
    """The gradient of the logits overwrites them."""

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _Stats.setup_context(ctx, inputs, outputs)
        ctx.inplace = True


def _formula(dlse, dpicked, dmean, logits, target, weight, top, lse, softcap):
    logits = _cross_entropy.without_idle_rows(logits, dlse, lse)
    lse = reference.cross_entropy_fwd(logits, target, weight, softcap, False)[1]
    return reference.cross_entropy_bwd(dlse, dpicked, dmean, logits, target, weight, top, lse, softcap)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float | None = 0.0,
    softcap: float | None = 0.0,
    num_valid: float | Tensor | None = None,
    dtype: torch.dtype | None = None,
    inplace: bool = False,
) -> Tensor:
    """Cross-entropy between logits and targets, as `torch.nn.functional.cross_entropy`.

        t = x, or c tanh(x / c) with a softcap c        lse = log(sum_j exp(t_j))
        loss = w_y ((1 - e) (lse - t_y)) + e / V sum_j w_j (lse - t_j) + z lse^2,   e label smoothing, z z_loss

    One read of the logits in the forward, one read and one write in the backward; sums in float32 (float64 for
    float64), counted from each row's highest logit, so that logits of any size lose no digits.
    Sources: z-loss: Chowdhery et al., "PaLM", 2022; softcap: Gemma 2, 2024; label smoothing: Szegedy et al., 2016.

    Args:
        input: (N, V), (V,) or (N, V, d1, ...) logits; float32, bfloat16, float16; float64 runs on the reference.
            Classes that are not dense in memory are copied.
        target: class indices, (N,), () or (N, d1, ...), int64, int32 or uint8; or probabilities of input's shape, which
            run on the reference.
        weight: (V,), of the classes; with label smoothing it runs on the reference. Not differentiable.
        ignore_index: a target that takes no part.
        reduction: "mean" (over targets that take part, by their weights; NaN if there are none), "sum" or "none".
        label_smoothing: e above, in [0, 1].
        z_loss: z above: keeps lse near zero; 0 or None is none.
        softcap: c above; 0 or None is none.
        num_valid: divide the sum by this instead of by the number of targets that take part: that of a whole
            accumulation window, a number or a 0-d tensor. Only for "mean".
        dtype: of the result, floating. Default: input's, as torch, and float32 under autocast. (Sums are in float32
            before.)
        inplace: let the gradient overwrite the logits in the backward, which saves their memory once more. Whoever
            else saved them for a backward gets autograd's error about it; read them before. It has no effect in a
            compiled graph, inside torch.func's transformations, and on logits whose rows are not dense or share memory.

    Returns:
        The loss, 0-d, or for "none" of target's shape. Differentiable;
        a second derivative runs on the reference.

    Raises:
        IndexError: for a target that is no class, on the CPU (RuntimeError in a compiled or captured graph); on a GPU a
            device-side assertion fails, as torch's.
        TypeError: for dtypes that do not fit, and what is no number; ValueError: for shapes, devices and numbers that
            do not.
    """
    name = "cross_entropy"
    for label, tensor in (("input", input), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {label} must be a tensor, got {type(tensor).__name__}")
    check_dtype(name, "input", input.dtype)
    if input.dim() == 0:
        raise ValueError(f"{name}: input must have shape (V,), (N, V) or (N, V, ...), got ()")
    class_dim = 0 if input.dim() == 1 else 1
    classes = input.shape[class_dim]
    probabilities = target.is_floating_point()
    shape = (*input.shape[:class_dim], *input.shape[class_dim + 1 :])
    expected = tuple(input.shape) if probabilities else shape
    if tuple(target.shape) != expected:
        raise ValueError(
            f"{name}: target must have shape {expected} for input {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if probabilities:
        check_dtype(name, "target", target.dtype)
    elif target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(f"{name}: target must be int64, int32, uint8 or floating probabilities, got {target.dtype}")
    ignore_index = integer(name, "ignore_index", ignore_index)
    if probabilities and ignore_index >= 0:
        raise ValueError(f"{name}: ignore_index is for class indices, got {ignore_index} with probabilities")
    if target.device != input.device:
        raise ValueError(f"{name}: input is on {input.device}, target on {target.device}")
    label_smoothing, z_loss, softcap = _cross_entropy.check_options(
        name, reduction, label_smoothing, z_loss, softcap, dtype
    )
    _cross_entropy.check_weight(name, weight, classes, input)
    _cross_entropy.check_num_valid(name, num_valid, reduction)
    inplace = inplace and not transformed()
    base = input if input._base is None else input._base
    if inplace and base.is_leaf and base.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: inplace=True would overwrite a leaf, which somebody owns; give it computed logits")

    logits = input.movedim(class_dim, -1).reshape(math.prod(shape), classes)
    if probabilities:
        target = target.movedim(class_dim, -1).reshape(math.prod(shape), classes)
    else:
        target = target.reshape(-1).long().contiguous()
        _cross_entropy.check_target(name, target, classes, ignore_index)
    inner = weight if probabilities or label_smoothing else None
    args = (logits, target, inner, float(softcap), label_smoothing > 0)
    stats = run(_cross_entropy.stats_fwd, *args, function=_StatsInPlace if inplace else None)
    rows, count = _cross_entropy.row_losses(stats, target, weight, ignore_index, label_smoothing, z_loss)
    return _cross_entropy.reduced(rows.reshape(shape), count, reduction, num_valid).to(
        _cross_entropy.loss_dtype(input) if dtype is None else dtype
    )

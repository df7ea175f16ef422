"""Dropout, residual addition and RMSNorm in one pass: what stands between the blocks while a model trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllm.backends import Op
from fastllm.ops import _norm
from fastllm.ops._arguments import apart
from fastllm.ops._dropout import check_rate, dropout_seed
from fastllm.ops.add_rms_norm import add_rms_norm
from fastllm.reference import dropout_add_rms_norm as reference


def _fwd_fake(x, residual, weight, seed, p, eps):
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        _norm.empty_statistic(x),
    )


def _bwd_fake(dy, dsum, sum, rstd, weight, seed, p, weight_grad):
    return (
        sum.new_empty(sum.shape),
        sum.new_empty(sum.shape),
        _norm.empty_parameter_grad(sum, weight, weight_grad),
    )


def _launch_fwd(outputs, *args):
    from fastllm.kernels import dropout_add_rms_norm as kernels

    kernels.dropout_add_rms_norm_fwd(outputs, *args)


def _launch_bwd(outputs, dy, dsum, sum, rstd, weight, seed, p, *wanted):
    from fastllm.kernels import dropout_add_rms_norm as kernels

    kernels.dropout_add_rms_norm_bwd(outputs, dy, dsum, sum, rstd, weight, seed, p)


_fwd = Op(
    "dropout_add_rms_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor seed, float p, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.dropout_add_rms_norm_fwd,
    fake=_fwd_fake,
    backends=_norm.dropout_kernels(_fwd_fake, _launch_fwd, 0, 2),
)
_bwd = Op(
    "dropout_add_rms_norm_bwd(Tensor dy, Tensor? dsum, Tensor sum, Tensor rstd, Tensor? weight, "
    "Tensor seed, float p, bool weight_grad) -> (Tensor, Tensor, Tensor)",
    reference=reference.dropout_add_rms_norm_bwd,
    fake=_bwd_fake,
    backends=_norm.dropout_kernels(_bwd_fake, _launch_bwd, 2, 4),
)


class _DropoutAddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, seed, p, eps):
        y, total, rstd = _fwd(x, residual, weight, seed, p, eps)
        ctx.save_for_backward(total, rstd, weight, seed)
        ctx.p = p
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dtotal):
        total, *rest, seed = ctx.saved_tensors
        if dy is None and dtotal is None:
            return None, None, None, None, None, None
        if dy is None:  # only the sum was used, which is rare enough to leave it to plain PyTorch
            return reference.dropped(dtotal, seed, ctx.p).to(dtotal.dtype), dtotal, None, None, None, None
        weight_grad = ctx.needs_input_grad[2]
        dx, dresidual, dweight = _bwd(dy, dtotal, total, *rest, seed, ctx.p, weight_grad)
        return dx, dresidual, dweight if weight_grad else None, None, None, None


def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    p: float = 0.5,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """`s = dropout(input, p, training) + residual; return rms_norm(s, ...), s` in one pass.

    The mask is not stored: the backward draws it again, by Philox keyed on one seed from torch's generator, so that
    torch.manual_seed reproduces it. It is another mask than that of torch's dropout, and of a compiled graph, which
    draws its seeds in its own way. The sum is rounded to its dtype once. Without dropout (p = 0, or not training) this
    is `add_rms_norm`.

    Args:
        input: (*, *normalized_shape), any strides; float32, bfloat16, float16. float64 runs on the
            reference, and on a GPU rows of more than 8,192 elements.
        residual: of input's shape. Another dtype is promoted as `+` does.
        normalized_shape, weight, eps: as `rms_norm`.
        p: the probability of an element of input to be dropped, 0 to 1; what is kept is multiplied by 1 / (1 - p).
        training: whether anything is dropped at all.

    Returns:
        (normed, sum), both contiguous, of input's shape. Differentiable once.

    Raises:
        TypeError: for another dtype, an eps that is no number, a normalized_shape that is no sequence.
        ValueError: for shapes or devices that do not fit, and a p that is no probability; residual is not broadcast.
    """
    ndim = _norm.validate("dropout_add_rms_norm", input, normalized_shape, weight)
    _norm.validate_residual("dropout_add_rms_norm", input, residual)
    p = check_rate("dropout_add_rms_norm", "p", p)
    input, residual = _norm.promote(input, residual)
    eps = _norm.rms_eps("dropout_add_rms_norm", input, eps)
    if p == 0 or not training:
        return add_rms_norm(input, residual, normalized_shape, weight, eps)
    if _norm.runs_in_float32(input):  # as autocast has the norm; the sum comes in 16 bits
        normed, total = dropout_add_rms_norm(input.float(), residual.float(), normalized_shape, weight, eps, p=p)
        return normed, total.to(input.dtype)
    seed = dropout_seed(input, p)
    if ndim == 1:
        return _DropoutAddRMSNorm.apply(*apart(input, residual, weight), seed, p, eps)
    x, r, weight = (_norm.flatten(t, ndim) for t in (input, residual, weight))
    y, total = _DropoutAddRMSNorm.apply(x, r, weight, seed, p, eps)
    return y.view(input.shape), total.view(input.shape)

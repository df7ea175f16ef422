"""Residual addition and RMSNorm in one pass: the pair between the blocks of a Llama-style transformer."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from fastllm.backends import Op
from fastllm.ops import _norm
from fastllm.ops._arguments import apart
from fastllm.ops._autograd import Function, gradients, run
from fastllm.ops.rms_norm import rms_norm
from fastllm.reference import add_rms_norm as reference

_fwd = Op(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference.add_rms_norm_fwd,
    fake=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape), _norm.empty_statistic(x)),
    backends=_norm.kernels(0, 2),
)
_bwd = Op(
    "add_rms_norm_bwd(Tensor dy, Tensor? dsum, Tensor sum, Tensor rstd, Tensor? weight, bool weight_grad) "
    "-> (Tensor, Tensor)",
    reference=reference.add_rms_norm_bwd,
    fake=lambda dy, dsum, sum, rstd, weight, weight_grad: (
        sum.new_empty(sum.shape),
        _norm.empty_parameter_grad(sum, weight, weight_grad),
    ),
    backends=_norm.kernels(2, 4),
)


@_fwd.differentiate
class _AddRMSNorm(Function):
    @staticmethod
    def forward(x, residual, weight, eps):
        return _fwd.below_autograd(x, residual, weight, eps)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *_, weight, ctx.eps = inputs
        _, total, rstd = outputs
        ctx.save_for_backward(total, rstd, weight)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, dtotal, _):
        if dy is None:  # only the sum was used
            return dtotal, dtotal, None, None
        weight_grad = ctx.needs_input_grad[2]
        formula = functools.partial(_formula, eps=ctx.eps)
        dx, dweight = gradients(_bwd, formula, dy, dtotal, *ctx.saved_tensors, weight_grad)
        return dx, dx, dweight if weight_grad else None, None


def _formula(dy, dtotal, total, rstd, *rest, eps):
    return reference.add_rms_norm_bwd(dy, dtotal, total, *_norm.statistics(total, eps, centered=False), *rest)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`s = input + residual; return rms_norm(s, ...), s` in one pass, with gradients through both outputs.

    The sum is rounded to its dtype before it is normalized, so the result is that of the two steps.

    Args:
        input: (*, *normalized_shape), any strides; float32, bfloat16, float16; float64 runs on the reference.
        residual: of input's shape. Another dtype is promoted as `+` does.
        normalized_shape, weight, eps: as `rms_norm`.

    Returns:
        (normed, input + residual), both contiguous, of input's shape. Differentiable;
        a second derivative runs on the reference.

    Raises:
        TypeError: for another dtype, an eps that is no number, a normalized_shape that is no sequence.
        ValueError: for shapes or devices that do not fit; residual is not broadcast.
    """
    ndim = _norm.validate("add_rms_norm", input, normalized_shape, weight)
    _norm.validate_residual("add_rms_norm", input, residual)
    input, residual = _norm.promote(input, residual)
    eps = _norm.rms_eps("add_rms_norm", input, eps)
    if _norm.runs_in_float32(input):  # autocast rounds the sum to 16 bits and normalizes it in float32
        total = input + residual
        return rms_norm(total, normalized_shape, weight, eps), total
    if ndim == 1:
        return run(_fwd, *apart(input, residual, weight), eps)[:2]
    x, r, weight = (_norm.flatten(t, ndim) for t in (input, residual, weight))
    y, total, *_ = run(_fwd, x, r, weight, eps)
    return y.view(input.shape), total.view(input.shape)

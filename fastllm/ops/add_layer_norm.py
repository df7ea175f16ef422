"""Residual addition and LayerNorm in one pass: the pair between the blocks of a pre-norm transformer."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from fastllm.backends import Op
from fastllm.ops import _norm
from fastllm.ops._arguments import apart, number
from fastllm.ops._autograd import Function, gradients, run
from fastllm.ops.layer_norm import layer_norm
from fastllm.reference import add_layer_norm as reference

_fwd = Op(
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.add_layer_norm_fwd,
    fake=lambda x, residual, weight, bias, eps: (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        _norm.empty_statistic(x),
        _norm.empty_statistic(x),
    ),
    backends=_norm.kernels(0, 2, 3),
)


def _bwd_fake(dy, dsum, sum, mean, rstd, weight, bias, weight_grad, bias_grad):
    return (
        sum.new_empty(sum.shape),
        _norm.empty_parameter_grad(sum, weight, weight_grad),
        _norm.empty_parameter_grad(sum, bias, bias_grad),
    )


_bwd = Op(
    "add_layer_norm_bwd(Tensor dy, Tensor? dsum, Tensor sum, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)",
    reference=reference.add_layer_norm_bwd,
    fake=_bwd_fake,
    backends=_norm.kernels(2, 5, 6),
)


@_fwd.differentiate
class _AddLayerNorm(Function):
    @staticmethod
    def forward(x, residual, weight, bias, eps):
        return _fwd.below_autograd(x, residual, weight, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *_, weight, bias, ctx.eps = inputs
        _, total, mean, rstd = outputs
        ctx.save_for_backward(total, mean, rstd, weight, bias)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, dtotal, *_):
        if dy is None:  # only the sum was used
            return dtotal, dtotal, None, None, None
        _, _, weight_grad, bias_grad, _ = ctx.needs_input_grad
        formula = functools.partial(_formula, eps=ctx.eps)
        dx, dweight, dbias = gradients(_bwd, formula, dy, dtotal, *ctx.saved_tensors, weight_grad, bias_grad)
        return dx, dx, dweight if weight_grad else None, dbias if bias_grad else None, None


def _formula(dy, dtotal, total, mean, rstd, *rest, eps):
    return reference.add_layer_norm_bwd(dy, dtotal, total, *_norm.statistics(total, eps, centered=True), *rest)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`s = input + residual; return layer_norm(s, ...), s` in one pass, with gradients through both outputs.

    The sum is rounded to its dtype before it is normalized, so the result is that of the two steps.

    Args:
        input: (*, *normalized_shape), any strides; float32, bfloat16, float16; float64 runs on the reference.
        residual: of input's shape. Another dtype is promoted as `+` does.
        normalized_shape, weight, bias, eps: as `layer_norm`.

    Returns:
        (normed, input + residual), both contiguous, of input's shape. Differentiable;
        a second derivative runs on the reference.

    Raises:
        TypeError: for another dtype, an eps that is no number, a normalized_shape that is no sequence.
        ValueError: for shapes or devices that do not fit; residual is not broadcast.
    """
    ndim = _norm.validate("add_layer_norm", input, normalized_shape, weight, bias)
    _norm.validate_residual("add_layer_norm", input, residual)
    eps = number("add_layer_norm", "eps", eps)
    input, residual = _norm.promote(input, residual)
    if _norm.runs_in_float32(input):  # autocast rounds the sum to 16 bits and normalizes it in float32
        total = input + residual
        return layer_norm(total, normalized_shape, weight, bias, eps), total
    if ndim == 1:
        return run(_fwd, *apart(input, residual, weight, bias), eps)[:2]
    x, r, weight, bias = (_norm.flatten(t, ndim) for t in (input, residual, weight, bias))
    y, total, *_ = run(_fwd, x, r, weight, bias, eps)
    return y.view(input.shape), total.view(input.shape)

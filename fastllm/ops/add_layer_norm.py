"""Residual addition and LayerNorm in one pass: the pair between the blocks of a pre-norm transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllm.backends import Op
from fastllm.ops import _norm
from fastllm.ops._arguments import apart, number
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


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        y, total, mean, rstd = _fwd(x, residual, weight, bias, eps)
        ctx.save_for_backward(total, mean, rstd, weight, bias)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dtotal):
        if dy is None:  # only the sum was used
            return dtotal, dtotal, None, None, None
        _, _, weight_grad, bias_grad, _ = ctx.needs_input_grad
        dx, dweight, dbias = _bwd(dy, dtotal, *ctx.saved_tensors, weight_grad, bias_grad)
        return dx, dx, dweight if weight_grad else None, dbias if bias_grad else None, None


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
        (normed, input + residual), both contiguous, of input's shape. Differentiable once.

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
        return _AddLayerNorm.apply(*apart(input, residual, weight, bias), eps)
    x, r, weight, bias = (_norm.flatten(t, ndim) for t in (input, residual, weight, bias))
    y, total = _AddLayerNorm.apply(x, r, weight, bias, eps)
    return y.view(input.shape), total.view(input.shape)

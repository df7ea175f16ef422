"""Dropout, residual addition and LayerNorm in one pass: what stands between the blocks while a model trains."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from fastllm.backends import Op
from fastllm.ops import _norm
from fastllm.ops._arguments import apart, number
from fastllm.ops._autograd import Function, gradients, run
from fastllm.ops._dropout import check_rate, dropout_seed
from fastllm.ops.add_layer_norm import add_layer_norm
from fastllm.reference import dropout_add_layer_norm as reference


def _fwd_fake(x, residual, weight, bias, seed, p, eps):
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        _norm.empty_statistic(x),
        _norm.empty_statistic(x),
    )


def _bwd_fake(dy, dsum, sum, mean, rstd, weight, bias, seed, p, weight_grad, bias_grad):
    return (
        sum.new_empty(sum.shape),
        sum.new_empty(sum.shape),
        _norm.empty_parameter_grad(sum, weight, weight_grad),
        _norm.empty_parameter_grad(sum, bias, bias_grad),
    )


def _launch_fwd(outputs, *args):
    from fastllm.kernels import dropout_add_layer_norm as kernels

    kernels.dropout_add_layer_norm_fwd(outputs, *args)


def _launch_bwd(outputs, dy, dsum, sum, mean, rstd, weight, bias, seed, p, *wanted):
    from fastllm.kernels import dropout_add_layer_norm as kernels

    kernels.dropout_add_layer_norm_bwd(outputs, dy, dsum, sum, mean, rstd, weight, seed, p)


_fwd = Op(
    "dropout_add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor seed, float p, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.dropout_add_layer_norm_fwd,
    fake=_fwd_fake,
    backends=_norm.dropout_kernels(_fwd_fake, _launch_fwd, 0, 2, 3),
)
_bwd = Op(
    "dropout_add_layer_norm_bwd(Tensor dy, Tensor? dsum, Tensor sum, Tensor mean, Tensor rstd, Tensor? weight, "
    "Tensor? bias, Tensor seed, float p, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.dropout_add_layer_norm_bwd,
    fake=_bwd_fake,
    backends=_norm.dropout_kernels(_bwd_fake, _launch_bwd, 2, 5, 6),
)


@_fwd.differentiate
class _DropoutAddLayerNorm(Function):
    @staticmethod
    def forward(x, residual, weight, bias, seed, p, eps):
        return _fwd.below_autograd(x, residual, weight, bias, seed, p, eps)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *_, weight, bias, seed, ctx.p, ctx.eps = inputs
        _, total, mean, rstd = outputs
        ctx.save_for_backward(total, mean, rstd, weight, bias, seed)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, dtotal, *_):
        if dy is None and dtotal is None:
            return None, None, None, None, None, None, None
        if dy is None:  # only the sum was used, which is rare enough to leave it to plain PyTorch
            seed = ctx.saved_tensors[-1]
            return reference.dropped(dtotal, seed, ctx.p).to(dtotal.dtype), dtotal, None, None, None, None, None
        wanted = weight_grad, bias_grad = ctx.needs_input_grad[2:4]
        formula = functools.partial(_formula, eps=ctx.eps)
        dx, dresidual, dweight, dbias = gradients(_bwd, formula, dy, dtotal, *ctx.saved_tensors, ctx.p, *wanted)
        return dx, dresidual, dweight if weight_grad else None, dbias if bias_grad else None, None, None, None


def _formula(dy, dtotal, total, mean, rstd, *rest, eps):
    statistics = _norm.statistics(total, eps, centered=True)
    return reference.dropout_add_layer_norm_bwd(dy, dtotal, total, *statistics, *rest)


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    p: float = 0.5,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """`s = dropout(input, p, training) + residual; return layer_norm(s, ...), s` in one pass.

    The mask is not stored: the backward draws it again, by Philox keyed on one seed from torch's generator, so that
    torch.manual_seed reproduces it. It is another mask than that of torch's dropout, and of a compiled graph, which
    draws its seeds in its own way. The sum is rounded to its dtype once. Without dropout (p = 0, or not training) this
    is `add_layer_norm`.

    Args:
        input: (*, *normalized_shape), any strides; float32, bfloat16, float16. float64 runs on the
            reference, and on a GPU rows of more than 8,192 elements.
        residual: of input's shape. Another dtype is promoted as `+` does.
        normalized_shape, weight, bias, eps: as `layer_norm`.
        p: the probability of an element of input to be dropped, 0 to 1; what is kept is multiplied by 1 / (1 - p).
        training: whether anything is dropped at all.

    Returns:
        (normed, sum), both contiguous, of input's shape. Differentiable;
        a second derivative runs on the reference.

    Raises:
        TypeError: for another dtype, an eps that is no number, a normalized_shape that is no sequence.
        ValueError: for shapes or devices that do not fit, and a p that is no probability; residual is not broadcast.
    """
    ndim = _norm.validate("dropout_add_layer_norm", input, normalized_shape, weight, bias)
    _norm.validate_residual("dropout_add_layer_norm", input, residual)
    p = check_rate("dropout_add_layer_norm", "p", p)
    eps = number("dropout_add_layer_norm", "eps", eps)
    if p == 0 or not training:
        return add_layer_norm(input, residual, normalized_shape, weight, bias, eps)
    input, residual = _norm.promote(input, residual)
    if _norm.runs_in_float32(input):  # as autocast has the norm; the sum comes in 16 bits
        normed, total = dropout_add_layer_norm(
            input.float(), residual.float(), normalized_shape, weight, bias, eps, p=p
        )
        return normed, total.to(input.dtype)
    seed = dropout_seed(input, p)
    if ndim == 1:
        return run(_fwd, *apart(input, residual, weight, bias), seed, p, eps)[:2]
    x, r, weight, bias = (_norm.flatten(t, ndim) for t in (input, residual, weight, bias))
    y, total, *_ = run(_fwd, x, r, weight, bias, seed, p, eps)
    return y.view(input.shape), total.view(input.shape)

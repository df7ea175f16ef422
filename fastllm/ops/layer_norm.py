"""LayerNorm (Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from fastllm.backends import Op
from fastllm.ops import _norm
from fastllm.ops._arguments import apart, number
from fastllm.ops._autograd import Function, gradients, run
from fastllm.reference import layer_norm as reference

_fwd = Op(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_fwd,
    fake=lambda x, weight, bias, eps: (x.new_empty(x.shape), _norm.empty_statistic(x), _norm.empty_statistic(x)),
    backends=_norm.kernels(0, 1, 2),
)


def _bwd_fake(dy, x, mean, rstd, weight, bias, weight_grad, bias_grad):
    return (
        x.new_empty(x.shape),
        _norm.empty_parameter_grad(x, weight, weight_grad),
        _norm.empty_parameter_grad(x, bias, bias_grad),
    )


_bwd = Op(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_bwd,
    fake=_bwd_fake,
    backends=_norm.kernels(1, 4, 5),
)


@_fwd.differentiate
class _LayerNorm(Function):
    @staticmethod
    def forward(x, weight, bias, eps):
        return _fwd.below_autograd(x, weight, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, weight, bias, ctx.eps = inputs
        _, mean, rstd = outputs
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.mark_non_differentiable(mean, rstd)

    @staticmethod
    def backward(ctx, dy, *_):
        _, weight_grad, bias_grad, _ = ctx.needs_input_grad
        formula = functools.partial(_formula, eps=ctx.eps)
        dx, dweight, dbias = gradients(_bwd, formula, dy, *ctx.saved_tensors, weight_grad, bias_grad)
        return dx, dweight if weight_grad else None, dbias if bias_grad else None, None


def _formula(dy, x, mean, rstd, *rest, eps):
    return reference.layer_norm_bwd(dy, x, *_norm.statistics(x, eps, centered=True), *rest)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalization over the last dimensions, as `torch.nn.functional.layer_norm`.

        y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

    mean and var (the biased variance) are taken over `normalized_shape` in float32 (float64 for float64 input), by two
    passes. Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.

    Args:
        input: (*, *normalized_shape), any strides; float32, bfloat16, float16; float64 runs on the reference.
        normalized_shape: the sizes of the last dimensions, normalized together.
        weight: normalized_shape, or None for ones. Any of these dtypes, also another than the input's.
        bias: normalized_shape, or None for zeros. As weight.
        eps: added to the variance.

    Returns:
        Contiguous, of input's shape and dtype (float32 under CUDA autocast, as torch). Differentiable;
        a second derivative runs on the reference.

    Raises:
        TypeError: for another dtype, an eps that is no number, a normalized_shape that is no sequence.
        ValueError: for shapes or devices that do not fit.
    """
    ndim = _norm.validate("layer_norm", input, normalized_shape, weight, bias)
    eps = number("layer_norm", "eps", eps)
    if _norm.runs_in_float32(input):
        input = input.float()
    if ndim == 1:
        return run(_fwd, *apart(input, weight, bias), eps)[0]
    x, weight, bias = (_norm.flatten(t, ndim) for t in (input, weight, bias))
    return run(_fwd, x, weight, bias, eps)[0].view(input.shape)

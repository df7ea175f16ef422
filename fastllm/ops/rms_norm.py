"""RMSNorm (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from fastllm.backends import Op
from fastllm.ops import _norm
from fastllm.ops._arguments import apart
from fastllm.ops._autograd import Function, gradients, run
from fastllm.reference import rms_norm as reference

_fwd = Op(
    "rms_norm_fwd(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    reference=reference.rms_norm_fwd,
    fake=lambda x, weight, eps: (x.new_empty(x.shape), _norm.empty_statistic(x)),
    backends=_norm.kernels(0, 1),
)
_bwd = Op(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor rstd, Tensor? weight, bool weight_grad) -> (Tensor, Tensor)",
    reference=reference.rms_norm_bwd,
    fake=lambda dy, x, rstd, weight, weight_grad: (
        x.new_empty(x.shape),
        _norm.empty_parameter_grad(x, weight, weight_grad),
    ),
    backends=_norm.kernels(1, 3),
)


@_fwd.differentiate
class _RMSNorm(Function):
    @staticmethod
    def forward(x, weight, eps):
        return _fwd.below_autograd(x, weight, eps)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, weight, ctx.eps = inputs
        rstd = outputs[1]
        ctx.save_for_backward(x, rstd, weight)
        ctx.mark_non_differentiable(rstd)

    @staticmethod
    def backward(ctx, dy, _):
        weight_grad = ctx.needs_input_grad[1]
        formula = functools.partial(_formula, eps=ctx.eps)
        dx, dweight = gradients(_bwd, formula, dy, *ctx.saved_tensors, weight_grad)
        return dx, dweight if weight_grad else None, None


def _formula(dy, x, rstd, *rest, eps):
    return reference.rms_norm_bwd(dy, x, *_norm.statistics(x, eps, centered=False), *rest)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Root mean square normalization over the last dimensions, as `torch.nn.functional.rms_norm`.

        y = x / sqrt(mean(x^2) + eps) * weight

    The mean is taken over `normalized_shape` in float32 (float64 for float64 input). Source: Zhang and Sennrich,
    "Root Mean Square Layer Normalization", 2019.

    Args:
        input: (*, *normalized_shape), any strides; float32, bfloat16, float16; float64 runs on the reference.
        normalized_shape: the sizes of the last dimensions, normalized together.
        weight: normalized_shape, or None for ones. Any of these dtypes, also another than the input's.
        eps: added to the mean square; None means torch.finfo(torch.float32).eps (float64's for float64 input), as in
            torch.

    Returns:
        Contiguous, of input's shape and dtype (float32 under CUDA autocast, as torch). Differentiable;
        a second derivative runs on the reference.

    Raises:
        TypeError: for another dtype, an eps that is no number, a normalized_shape that is no sequence.
        ValueError: for shapes or devices that do not fit.
    """
    ndim = _norm.validate("rms_norm", input, normalized_shape, weight)
    if _norm.runs_in_float32(input):
        input = input.float()
    eps = _norm.rms_eps("rms_norm", input, eps)
    if ndim == 1:
        return run(_fwd, *apart(input, weight), eps)[0]
    x, weight = (_norm.flatten(t, ndim) for t in (input, weight))
    return run(_fwd, x, weight, eps)[0].view(input.shape)

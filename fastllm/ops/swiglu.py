"""SwiGLU (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.backends import Op
from fastllm.ops import _glu
from fastllm.ops._autograd import Function, gradients, run
from fastllm.reference import swiglu as reference


def _launch_fwd(*args):
    from fastllm.kernels import swiglu as kernels

    kernels.swiglu_fwd(*args)


def _launch_bwd(*args):
    from fastllm.kernels import swiglu as kernels

    kernels.swiglu_bwd(*args)


_fwd_backends, _bwd_backends = _glu.backends(_launch_fwd, _launch_bwd)
_fwd = Op(
    "swiglu_fwd(Tensor gate, Tensor up) -> Tensor",
    reference=reference.swiglu_fwd,
    fake=_glu.fwd_fake,
    backends=_fwd_backends,
)
_bwd = Op(
    "swiglu_bwd(Tensor dy, Tensor gate, Tensor up) -> Tensor",
    reference=reference.swiglu_bwd,
    fake=_glu.bwd_fake,
    backends=_bwd_backends,
)


@_fwd.differentiate
class _SwiGLU(Function):
    @staticmethod
    def forward(gate, up):
        return _fwd.below_autograd(gate, up)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, dy):
        d = gradients(_bwd, reference.swiglu_bwd, dy, *ctx.saved_tensors)
        return d.chunk(2, -1)


class _SwiGLUPacked(Function):
    """Of gate and up side by side in one tensor, whose gradient then comes in one, too."""

    op_name = "swiglu"

    @staticmethod
    def forward(both):
        return _fwd.below_autograd(*both.chunk(2, -1))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, dy):
        (both,) = ctx.saved_tensors
        return gradients(_bwd, reference.swiglu_bwd, dy, *both.chunk(2, -1))


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, the activation of Llama's feed-forward, in one pass.

        y = g / (1 + e^-g) u

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.

    The backward computes the activation once more instead of keeping it.

    Args:
        gate: (..., N), any strides; or, without `up`, (..., 2 N): gate, then up, as one projection gives them.
            float32, bfloat16, float16; float64 runs on the reference.
        up: (..., N). Another dtype is promoted as `*` does.

    Returns:
        (..., N), contiguous, in the dtype that gate and up promote to. Differentiable;
        a second derivative runs on the reference.

    Raises:
        TypeError: for another dtype; ValueError: for shapes and devices that do not fit.
    """
    gate, up = _glu.checked("swiglu", gate, up)
    if up is None and torch.is_grad_enabled() and not torch.compiler.is_exporting():
        return run(_fwd, gate, function=_SwiGLUPacked)
    return run(_fwd, *_glu.halves(gate, up))

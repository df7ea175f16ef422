"""GEGLU (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.backends import Op
from fastllm.ops import _glu
from fastllm.ops._autograd import Function, gradients, run
from fastllm.reference import geglu as reference


def _launch_fwd(*args):
    from fastllm.kernels import geglu as kernels

    kernels.geglu_fwd(*args)


def _launch_bwd(*args):
    from fastllm.kernels import geglu as kernels

    kernels.geglu_bwd(*args)


_fwd_backends, _bwd_backends = _glu.backends(_launch_fwd, _launch_bwd)
_fwd = Op(
    "geglu_fwd(Tensor gate, Tensor up, bool tanh) -> Tensor",
    reference=reference.geglu_fwd,
    fake=_glu.fwd_fake,
    backends=_fwd_backends,
)
_bwd = Op(
    "geglu_bwd(Tensor dy, Tensor gate, Tensor up, bool tanh) -> Tensor",
    reference=reference.geglu_bwd,
    fake=_glu.bwd_fake,
    backends=_bwd_backends,
)


@_fwd.differentiate
class _GEGLU(Function):
    @staticmethod
    def forward(gate, up, tanh):
        return _fwd.below_autograd(gate, up, tanh)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.save_for_backward(*inputs[:2])
        ctx.tanh = inputs[-1]

    @staticmethod
    def backward(ctx, dy):
        d = gradients(_bwd, reference.geglu_bwd, dy, *ctx.saved_tensors, ctx.tanh)
        return *d.chunk(2, -1), None


class _GEGLUPacked(Function):
    """Of gate and up side by side in one tensor, whose gradient then comes in one, too."""

    op_name = "geglu"

    @staticmethod
    def forward(both, tanh):
        return _fwd.below_autograd(*both.chunk(2, -1), tanh)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.save_for_backward(inputs[0])
        ctx.tanh = inputs[-1]

    @staticmethod
    def backward(ctx, dy):
        (both,) = ctx.saved_tensors
        d = gradients(_bwd, reference.geglu_bwd, dy, *both.chunk(2, -1), ctx.tanh)
        return d, None


def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up, the activation of Gemma's feed-forward, in one pass.

        y = g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2 u,  or  g (1 + erf(g / sqrt 2)) / 2 u

    Sources: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, 2016.

    The backward computes the activation once more instead of keeping it.

    Args:
        gate: (..., N), any strides; or, without `up`, (..., 2 N): gate, then up, as one projection gives them.
            float32, bfloat16, float16; float64 runs on the reference.
        up: (..., N). Another dtype is promoted as `*` does.
        approximate: "tanh", Gemma's; or "none", with the error function, as in `torch.nn.functional.gelu`.

    Returns:
        (..., N), contiguous, in the dtype that gate and up promote to. Differentiable;
        a second derivative runs on the reference.

    Raises:
        TypeError: for another dtype; ValueError: for shapes and devices that do not fit, and for
            another `approximate`.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"geglu: approximate must be 'tanh' or 'none', got {approximate!r}")
    gate, up = _glu.checked("geglu", gate, up)
    if up is None and torch.is_grad_enabled() and not torch.compiler.is_exporting():
        return run(_fwd, gate, approximate == "tanh", function=_GEGLUPacked)
    return run(_fwd, *_glu.halves(gate, up), approximate == "tanh")

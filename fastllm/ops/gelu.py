"""GELU (Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415) of input + bias."""

from __future__ import annotations

from torch import Tensor

from fastllm.backends import KERNEL_DTYPES, Backend, Op, compiled
from fastllm.ops import _norm, _triton
from fastllm.ops._arguments import apart, check_dtype
from fastllm.ops._autograd import Function, gradients, run
from fastllm.reference import gelu as reference


def _fwd_fake(x, bias, tanh):
    return x.new_empty(x.shape)


def _bwd_fake(dy, x, bias, tanh, bias_grad):
    return x.new_empty(x.shape), _norm.empty_parameter_grad(x, bias, bias_grad)


def _supports(x: Tensor, bias: Tensor | None) -> str | None:
    for label, tensor in (("input", x), ("bias", bias)):
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return f"{label} must be float32, bfloat16 or float16, got {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _fwd_supports(x, bias, tanh):
    return _supports(x, bias)


def _bwd_supports(dy, x, bias, tanh, bias_grad):
    return _supports(x, bias)


def _triton_fwd(x, bias, tanh):
    from fastllm.kernels import gelu as kernels

    y = _fwd_fake(x, bias, tanh)
    if y.numel():
        kernels.gelu_fwd(y, x, bias, tanh)
    return y


def _triton_bwd(dy, x, bias, tanh, bias_grad):
    from fastllm.kernels import gelu as kernels

    dx, dbias = _bwd_fake(dy, x, bias, tanh, bias_grad)
    if dx.numel():
        kernels.gelu_bwd(dx, dbias, dy, x, bias, tanh)
    else:  # a sum over no rows
        dbias.zero_()
    return dx, dbias


_fwd = Op(
    "gelu_fwd(Tensor x, Tensor? bias, bool tanh) -> Tensor",
    reference=reference.gelu_fwd,
    fake=_fwd_fake,
    backends=(Backend("triton", _triton.supports(_fwd_supports), _triton_fwd), compiled("CPU", _fwd_supports)),
)
_bwd = Op(
    "gelu_bwd(Tensor dy, Tensor x, Tensor? bias, bool tanh, bool bias_grad) -> (Tensor, Tensor)",
    reference=reference.gelu_bwd,
    fake=_bwd_fake,
    backends=(Backend("triton", _triton.supports(_bwd_supports), _triton_bwd), compiled("CPU", _bwd_supports)),
)


@_fwd.differentiate
class _GELU(Function):
    @staticmethod
    def forward(x, bias, tanh):
        return _fwd.below_autograd(x, bias, tanh)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, bias, ctx.tanh = inputs
        ctx.save_for_backward(x, bias)

    @staticmethod
    def backward(ctx, dy):
        bias_grad = ctx.needs_input_grad[1]
        dx, dbias = gradients(_bwd, reference.gelu_bwd, dy, *ctx.saved_tensors, ctx.tanh, bias_grad)
        return dx, dbias if bias_grad else None, None


def _check(input: Tensor, approximate: str, bias: Tensor | None) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"gelu: input must be a tensor, got {type(input).__name__}")
    check_dtype("gelu", "input", input.dtype)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"gelu: bias must be a tensor or None, got {type(bias).__name__}")
    check_dtype("gelu", "bias", bias.dtype)
    if bias.shape != input.shape[-1:] or input.dim() == 0:
        wanted = f"must have the shape of input's last dimension, {tuple(input.shape[-1:])}"
        raise ValueError(f"gelu: bias {wanted}, got {tuple(bias.shape)}")
    if bias.device != input.device:
        raise ValueError(f"gelu: input is on {input.device}, bias on {bias.device}")


def gelu(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """GELU, as `torch.nn.functional.gelu`, of input + bias: a feed-forward's activation with the bias of the projection
    before it, in one pass each way.

        g = x + bias
        y = g (1 + erf(g / sqrt 2)) / 2,  or  g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units (GELUs)", 2016.

    The sum is not rounded to input's dtype. The backward computes it once more instead of keeping it, and sums the
    bias's gradient in float32 while it writes the input's.

    Args:
        input: (..., N), any strides; float32, bfloat16, float16; float64 runs on the reference.
        approximate: "none", with the error function; or "tanh".
        bias: (N,), or None for zeros. Any of these dtypes, also another than the input's.

    Returns:
        Contiguous, of input's shape and dtype. Differentiable; a second derivative runs on the reference.

    Raises:
        TypeError: for another dtype. ValueError: for shapes and devices that do not fit, and for another `approximate`.
    """
    _check(input, approximate, bias)
    if input.dim() == 0:
        return gelu(input[None], approximate)[0]
    return run(_fwd, *apart(input, bias), approximate == "tanh")

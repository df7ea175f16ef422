"""Rotary positions (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.backends import KERNEL_DTYPES, Backend, Op, compiled
from fastllm.ops import _attention, _triton
from fastllm.ops._arguments import apart, check_dtype, check_inside
from fastllm.ops._autograd import Function, again, apply, run
from fastllm.reference import rotary as reference
from fastllm.tracing import transformed


def _supports(q, k, cos, sin, *rest) -> str | None:
    if q.dtype not in KERNEL_DTYPES:
        return f"computes float32, bfloat16 and float16, not {q.dtype}"
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        return f"takes float32 cos and sin, not {cos.dtype} and {sin.dtype}"
    return None


def _in_place_supports(q, k, *rest) -> str | None:
    if q.stride(3) != 1 or k.stride(3) != 1:
        return f"writes into dense heads, not into strides {tuple(q.stride())} and {tuple(k.stride())}"
    return _supports(q, k, *rest)


def _fake(q, k, *rest):
    return _attention.empty_out(q, q.shape[3]), _attention.empty_out(k, k.shape[3])


def _fwd_reference(*args):
    return _attention.into(_fake(*args), reference.rotary_fwd(*args))


def _in_place_reference(q, k, *rest):
    for x, turned in zip((q, k), reference.rotary_fwd(q, k, *rest), strict=True):
        x.copy_(turned)


def _fwd_triton(q, k, *rest):
    outputs = _fake(q, k)
    _launch(q, k, *outputs, *rest)
    return outputs


def _in_place_triton(q, k, *rest):
    _launch(q, k, q, k, *rest)


def _launch(*args):
    if args[0].numel() or args[1].numel():
        from fastllm.kernels import rotary as kernels

        kernels.rotary(*args)


_SIGNATURE = "Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse"
_fwd = Op(
    f"rotary_fwd(Tensor q, Tensor k, {_SIGNATURE}) -> (Tensor, Tensor)",
    reference=_fwd_reference,
    fake=_fake,
    backends=(Backend("triton", _triton.supports(_supports), _fwd_triton), compiled("CPU", _supports)),
)
_in_place = Op(
    f"rotary_(Tensor(a!) q, Tensor(b!) k, {_SIGNATURE}) -> ()",
    reference=_in_place_reference,
    fake=lambda *args: None,
    backends=(
        Backend("triton", _triton.supports(_in_place_supports), _in_place_triton),
        compiled("CPU", _in_place_supports),
    ),
)


@_fwd.differentiate
class _Rotary(Function):
    @staticmethod
    def forward(q, k, cos, sin, positions, interleaved, inverse):
        return _fwd.below_autograd(q, k, cos, sin, positions, interleaved, inverse)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, _, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
        ctx.save_for_backward(cos, sin, positions)

    @staticmethod
    def backward(ctx, dq, dk):
        args = (dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
        # Linear, and so its gradient's gradient is one more call.
        return *(apply(_Rotary, *args) if again() else _fwd(*args)), *(None,) * 5


@_in_place.differentiate
class _RotaryInPlace(Function):
    @staticmethod
    def forward(q, k, cos, sin, positions, interleaved, inverse):
        _in_place.below_autograd(q, k, cos, sin, positions, interleaved, inverse)
        return q, k

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _Rotary.setup_context(ctx, inputs, outputs)
        ctx.mark_dirty(*outputs)

    backward = _Rotary.backward


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Turns each pair of every head of queries and keys by the angle of its position, both in one pass.

        (a, b) -> (a cos - b sin, b cos + a sin)

    Pair i of R / 2 is elements (i, i + R / 2) of a head, as in GPT-NeoX and Llama on Hugging Face, or interleaved
    (2 i, 2 i + 1), as in GPT-J and in Llama's own code. Elements from R on stay as they are. Computed in float32
    (float64 for float64). Source: Su et al., "RoFormer", 2021.

    Args:
        q: (B, H, S, D), any strides, so that views of (B, S, H, D) cost nothing; or packed, (total, H, D). float32,
            bfloat16, float16; float64 runs on the reference.
        k: (B, HK, S, D) or (total, HK, D), in q's dtype.
        cos, sin: (P, R / 2), a row for each position, of which the first S are taken; or (B, S, R / 2). Half as wide as
            transformers' tables, which hold everything twice. Not differentiable.
        interleaved: the pairs, see above.
        position_ids: (S,) or (B, S) integers, or (total,) with packed q: the rows of cos and sin.
        inplace: overwrite q and k, and return them. With gradients, they must be no views (and so not packed).

    Returns:
        q and k turned, of their shapes, in memory ordered as they are. Differentiable as often as one likes.

    Raises:
        TypeError: for dtypes that do not fit; ValueError: for shapes and devices that do not; IndexError: for positions
            outside cos, on the CPU; on a GPU a device-side assertion fails.
    """
    name = "rotary"
    packed = isinstance(q, Tensor) and q.dim() == 3
    _attention.check_tensors(name, "SHD" if packed else "BHSD", q=q, k=k)
    if inplace:
        _check_in_place(q, k, packed)
    if packed:
        q, k = (x.transpose(0, 1)[None] for x in (q, k))
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"{name}: q and k must have the same shape but for the heads, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    cos, sin = _tables(q, cos, sin, interleaved)
    positions = _positions(q, cos, position_ids)
    args = (*apart(q, k, cos, sin), positions, interleaved, False)
    if not inplace:
        q, k = run(_fwd, *args)
    elif torch.compiler.is_exporting() or transformed():
        q, k = (x.copy_(turned) for x, turned in zip((q, k), run(_fwd, *args), strict=True))
    elif torch.is_grad_enabled():
        q, k = run(_in_place, *args)
    else:
        _in_place(*args)
    return (q[0].transpose(0, 1), k[0].transpose(0, 1)) if packed else (q, k)


def _check_in_place(q: Tensor, k: Tensor, packed: bool) -> None:
    for label, x in (("q", q), ("k", k)):
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            raise ValueError(f"rotary: inplace needs elements of their own, {label} has strides {tuple(x.stride())}")
        compiling = torch.compiler.is_compiling()  # a compiled graph writes into a copy where it must
        if x.requires_grad and torch.is_grad_enabled() and (packed or (not compiling and x._is_view())):
            raise ValueError(
                f"rotary: inplace with gradients needs tensors that are no views, and not packed; {label} is"
            )
    if q is k:
        raise ValueError("rotary: inplace would turn one tensor twice: q is k")


def _tables(q: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    batch, _, length, size = q.shape
    for label, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, Tensor):
            raise TypeError(f"rotary: {label} must be a tensor, got {type(table).__name__}")
        check_dtype("rotary", label, table.dtype)
        if table.device != q.device:
            raise ValueError(f"rotary: q is on {q.device}, {label} on {table.device}")
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"rotary: {label} gets no gradient; detach it")
    if cos.shape != sin.shape:
        raise ValueError(f"rotary: cos and sin must have one shape, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if cos.dim() == 3 and cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    if cos.dim() not in (2, 3) or (cos.dim() == 3 and cos.shape[:2] != (batch, length)):
        raise ValueError(
            f"rotary: cos must have shape (P, R / 2) or ({batch}, {length}, R / 2), got {tuple(cos.shape)}"
        )
    width = cos.shape[-1]
    if 2 * width > size:
        message = f"rotary: cos turns {2 * width} elements of a head, which has {size}"
        if width <= size and width % 2 == 0:
            message += "; cos and sin are half as wide as transformers'"
            message += "" if interleaved else f": pass cos[..., : {width // 2}] and sin[..., : {width // 2}]"
        raise ValueError(message)
    acc = torch.promote_types(q.dtype, torch.float32)
    return cos.to(acc), sin.to(acc)


def _positions(q: Tensor, cos: Tensor, position_ids: Tensor | None) -> Tensor | None:
    batch, _, length, _ = q.shape
    rows = cos.shape[-2]
    if position_ids is None:
        if rows < length:
            raise ValueError(f"rotary: cos has {rows} positions, q {length}")
        return None
    if not isinstance(position_ids, Tensor) or position_ids.dtype not in (torch.int32, torch.int64):
        found = getattr(position_ids, "dtype", position_ids)
        raise TypeError(f"rotary: position_ids must be an int32 or int64 tensor, got {found!r}")
    if cos.dim() == 3:
        raise ValueError(f"rotary: position_ids need cos of shape (P, R / 2), got {tuple(cos.shape)}")
    if position_ids.shape not in ((length,), (batch, length), (1, length)):
        raise ValueError(
            f"rotary: position_ids must have shape ({length},) or ({batch}, {length}), got {tuple(position_ids.shape)}"
        )
    if position_ids.device != q.device:
        raise ValueError(f"rotary: q is on {q.device}, position_ids on {position_ids.device}")
    check_inside("rotary", "position", position_ids, rows, f"outside the {rows} of cos")
    return position_ids.long().expand(batch, length)

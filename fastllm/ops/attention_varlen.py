"""Attention over packed sequences of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.backends import Backend, Op
from fastllm.ops import _attention, _sdpa
from fastllm.ops._arguments import apart
from fastllm.ops._autograd import Function, gradients, run
from fastllm.ops._dropout import dropout_seed
from fastllm.reference import attention_varlen as reference


def _fwd_fake(query, key, value, *rest):
    out = query.new_empty((*query.shape[:2], value.shape[2]))
    return out, _attention.empty_lse(query, (query.shape[1], query.shape[0]))


def _bwd_fake(dout, dlse, query, key, value, out, lse, cu_seq_q, cu_seq_k, sinks, *rest):
    dsinks = query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return *(x.new_empty(x.shape) for x in (query, key, value)), dsinks


def _triton_fwd_supports(query, key, value, cu_q, cu_k, sinks, slopes, seed, max_q, max_k, dropout_p, scale, *rest):
    return _attention.triton_supports(query, key, value, False, scale)


def _triton_bwd_supports(dout, dlse, query, key, value, out, lse, *rest):
    return _triton_fwd_supports(query, key, value, *rest)


def _sdpa_fwd_supports(
    query, key, value, cu_q, cu_k, sinks, slopes, seed, max_q, max_k, dropout_p, scale, left, right, softcap, corner
):
    return _attention.sdpa_supports(query, sinks, slopes, False, dropout_p, scale, softcap)


def _sdpa_bwd_supports(dout, dlse, query, key, value, out, lse, *rest):
    if dlse is not None:
        return "scaled_dot_product_attention gives lse no gradient"
    return _sdpa_fwd_supports(query, key, value, *rest)


def _triton_fwd(query, key, value, cu_q, cu_k, sinks, slopes, seed, max_q, max_k, *scores):
    args = (query, key, value, cu_q, cu_k, sinks, slopes, seed)
    if not query.numel() or not key.numel():
        return reference.attention_varlen_fwd(*args, max_q, max_k, *scores)
    from fastllm.kernels import attention_varlen as kernels

    out, lse = _fwd_fake(*args)
    kernels.attention_varlen_fwd(out, lse, *args, kernels.Scores(*scores))
    return out, lse


def _triton_bwd(dout, dlse, query, key, value, out, lse, cu_q, cu_k, sinks, slopes, seed, max_q, max_k, *scores):
    args = (dout, dlse, query, key, value, out, lse, cu_q, cu_k, sinks, slopes, seed)
    if not query.numel() or not key.numel():
        return reference.attention_varlen_bwd(*args, max_q, max_k, *scores)
    from fastllm.kernels import attention_varlen as kernels

    dq, dk, dv, dsinks = outputs = _bwd_fake(*args)
    kernels.attention_varlen_bwd(dq, dk, dv, None if sinks is None else dsinks, *args, kernels.Scores(*scores))
    return outputs


def _triton_kernel(query, key, value, cu_q, cu_k, sinks, slopes, seed, max_q, max_k, *scores):
    from fastllm.kernels import attention_varlen as kernels

    return kernels.describe(query, key, value, slopes, seed, kernels.Scores(*scores))


def _sequences(cu_q: Tensor, cu_k: Tensor):
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for n in range(len(bounds_q) - 1):
        yield slice(*bounds_q[n : n + 2]), slice(*bounds_k[n : n + 2])


def _dense(x: Tensor, rows: slice) -> Tensor:
    """Rows of (total, H, D) as (1, H, rows, D)."""
    return x[rows].transpose(0, 1)[None]


def _sdpa_fwd(
    query, key, value, cu_q, cu_k, sinks, slopes, seed, max_q, max_k, dropout_p, scale, left, right, cap, corner
):
    if dropout_p > 0:  # scaled_dot_product_attention draws other masks
        scores = dropout_p, scale, left, right, cap, corner
        args = (query, key, value, cu_q, cu_k, sinks, slopes, seed, max_q, max_k, *scores)
        return reference.attention_varlen_fwd(*args, draw=_attention.drawn)
    out, lse = _fwd_fake(query, key, value)
    end = 0
    for rows, keys in _sequences(cu_q, cu_k):
        end = rows.stop
        if rows.start < rows.stop:
            dense = _dense(query, rows), _dense(key, keys), _dense(value, keys)
            part = _sdpa.forward(lse[None, :, rows], *dense, None, scale, left, right, corner)
            out[rows] = part[0].transpose(0, 1)
    out[end:] = 0
    lse[:, end:] = -torch.inf
    return out, lse


def _sdpa_bwd(
    dout, dlse, query, key, value, out, lse, cu_q, cu_k, sinks, slopes, seed, max_q, max_k, dropout_p, scale, left,
    right, cap, corner,
):  # fmt: skip
    if dropout_p > 0:
        scores = dropout_p, scale, left, right, cap, corner
        args = (dout, dlse, query, key, value, out, lse, cu_q, cu_k, sinks, slopes, seed, max_q, max_k, *scores)
        return reference.attention_varlen_bwd(*args, draw=_attention.drawn)
    outputs = dq, dk, dv, _ = _bwd_fake(dout, dlse, query, key, value, out, lse, cu_q, cu_k, None)
    end_q = end_k = 0
    for rows, keys in _sequences(cu_q, cu_k):
        end_q, end_k = rows.stop, keys.stop
        if rows.start == rows.stop:
            dk[keys] = 0
            dv[keys] = 0
            continue
        dense = _dense(query, rows), _dense(key, keys), _dense(value, keys), _dense(out, rows), lse[None, :, rows]
        parts = _sdpa.backward(_dense(dout, rows), *dense, None, scale, left, right, corner)
        for grad, at, part in zip((dq, dk, dv), (rows, keys, keys), parts, strict=True):
            grad[at] = part[0].transpose(0, 1)
    dq[end_q:] = 0
    dk[end_k:] = 0
    dv[end_k:] = 0
    return outputs


_fwd = Op(
    "attention_varlen_fwd(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k, Tensor? sinks, "
    f"Tensor? alibi_slopes, Tensor? seed, SymInt max_q, SymInt max_k, {_attention.SCORES}) -> (Tensor, Tensor)",
    reference=reference.attention_varlen_fwd,
    fake=_fwd_fake,
    backends=(
        Backend("triton", _triton_fwd_supports, _triton_fwd, kernel=_triton_kernel),
        Backend("torch", _sdpa_fwd_supports, _sdpa_fwd),
    ),
)
_bwd = Op(
    "attention_varlen_bwd(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor cu_seq_q, Tensor cu_seq_k, Tensor? sinks, Tensor? alibi_slopes, Tensor? seed, SymInt max_q, SymInt max_k, "
    f"{_attention.SCORES}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.attention_varlen_bwd,
    fake=_bwd_fake,
    backends=(
        Backend("triton", _triton_bwd_supports, _triton_bwd),
        Backend("torch", _sdpa_bwd_supports, _sdpa_bwd),
    ),
)


def _save(ctx, inputs, outputs):
    query, key, value, cu_seq_q, cu_seq_k, sinks, slopes, seed, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, *outputs, cu_seq_q, cu_seq_k, sinks, slopes, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    saved = ctx.saved_tensors  # once: checkpoints compute what they unpack
    if dout is None:
        dout = torch.zeros_like(saved[3])
    dq, dk, dv, dsinks = gradients(_bwd, _formula, dout, dlse, *saved, *ctx.rest)
    return dq, dk, dv, None, None, dsinks if ctx.needs_input_grad[5] else None, *(None,) * 10


@_fwd.differentiate
class _AttentionVarlen(Function):
    @staticmethod
    def forward(
        q, k, v, cu_q, cu_k, sinks, slopes, seed, max_q, max_k, dropout_p, scale, left, right, softcap, bottom_right
    ):  # fmt: skip
        return _fwd.below_autograd(
            q, k, v, cu_q, cu_k, sinks, slopes, seed, max_q, max_k, dropout_p, scale, left, right, softcap, bottom_right
        )  # fmt: skip

    setup_context = staticmethod(_save)  # type: ignore[assignment]
    backward = staticmethod(_backward)


class _AttentionVarlenAlone(_AttentionVarlen):
    """Without lse: nobody has it, but the backward of a compiled graph gets zeros for it, which some kernels refuse."""

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _save(ctx, inputs, outputs)
        ctx.mark_non_differentiable(outputs[1])

    @staticmethod
    def backward(ctx, dout, dlse):
        return _backward(ctx, dout, None)


def _formula(dout, dlse, query, key, value, out, lse, *rest):
    outputs = reference.attention_varlen_fwd(query, key, value, *rest)
    return reference.attention_varlen_bwd(dout, dlse, query, key, value, *outputs, *rest)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    softcap: float | None = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention inside each of the sequences that are packed one behind the other, without padding.

    Argument names are those of `torch.nn.attention.varlen.varlen_attn`, and so is the diagonal: the last query of a
    sequence stands at its last key. Sequences may have length zero; queries without a key, and rows behind the last
    sequence, give 0.

    Args:
        query: (total_q, H, D), any strides; float32, bfloat16, float16; float64 on the CPU.
        key, value: (total_k, HK, D) and (total_k, HK, DV).
        cu_seq_q, cu_seq_k: (N + 1,) int32 or int64, on query's device: sequence n is rows cu_seq_q[n] to
            cu_seq_q[n + 1]. They start at 0 and do not decrease; that is not checked: the host would have to wait.
        max_q, max_k: upper limits of the lengths. Kept for the signature's sake: no kernel here needs them.
        is_causal: query i sees keys up to the diagonal.
        scale, window_size, enable_gqa, dropout_p, softcap, sinks, deterministic: as `attention`.
        alibi_slopes: (H,) or (N, H).
        return_lse: also return lse.

    Returns:
        out (total_q, H, DV), contiguous; with return_lse also lse (H, total_q). A second derivative runs on the
        reference.

    Raises:
        TypeError: for other dtypes or several, and what is no number; ValueError: for shapes, devices or numbers
            that do not fit.
    """
    name = "attention_varlen"
    query, key, value = _attention.autocast(query, key, value)
    _attention.check_tensors(name, "SHD", query=query, key=key, value=value)
    _attention.check_heads(name, query, key, value, 1, enable_gqa)
    for label, cu in (("cu_seq_q", cu_seq_q), ("cu_seq_k", cu_seq_k)):
        if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: {label} must be an int32 or int64 tensor, got {getattr(cu, 'dtype', cu)!r}")
        if cu.dim() != 1 or cu.shape[0] < 1 or cu.shape != cu_seq_q.shape:
            raise ValueError(f"{name}: {label} must have shape (N + 1,), got {tuple(cu.shape)}")
        if cu.device != query.device:
            raise ValueError(f"{name}: query is on {query.device}, {label} on {cu.device}")
    left, right = _attention.check_window(name, window_size, is_causal)
    dropout_p, scale, softcap, alibi_slopes = _attention.check_extras(
        name, query, query.shape[1], cu_seq_q.shape[0] - 1, dropout_p, scale, softcap, sinks, alibi_slopes
    )
    query, key, value = apart(query, key, value)
    cu_seq_q, cu_seq_k = apart(cu_seq_q, cu_seq_k)
    out, lse = run(
        _fwd, query, key, value, cu_seq_q, cu_seq_k, sinks, alibi_slopes, dropout_seed(query, dropout_p), max_q, max_k,
        dropout_p, scale, left, right, softcap, True,
        function=_AttentionVarlen if return_lse else _AttentionVarlenAlone,
    )  # fmt: skip
    return (out, lse) if return_lse else out

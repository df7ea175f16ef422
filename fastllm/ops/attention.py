"""Scaled dot-product attention (Vaswani et al., 2017), fused as in FlashAttention-2 (Dao, 2023)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm.backends import Backend, Op
from fastllm.ops import _attention, _sdpa
from fastllm.ops._arguments import DTYPES, apart
from fastllm.ops._autograd import Function, gradients, run
from fastllm.ops._dropout import dropout_seed
from fastllm.reference import attention as reference

_PART_BYTES = 4 << 20  # of one float32 tensor of scores


def _fwd_fake(query, key, value, attn_mask, sinks, slopes, seed, mask_grad, *scores):
    return _attention.empty_out(query, value.shape[3]), _attention.empty_lse(query, query.shape[:3])


def _bwd_fake(dout, dlse, query, key, value, out, lse, attn_mask, sinks, slopes, seed, mask_grad, *scores):
    return (
        *(_attention.empty_grad(x) for x in (query, key, value)),
        query.new_empty(attn_mask.shape, dtype=attn_mask.dtype) if mask_grad else query.new_empty(0),
        query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    )


def _fwd_reference(*args):
    return _attention.into(_fwd_fake(*args), reference.attention_fwd(*args))


def _bwd_reference(*args):
    return _attention.into(_bwd_fake(*args), reference.attention_bwd(*args))


def _triton_fwd_supports(query, key, value, attn_mask, sinks, slopes, seed, mask_grad, dropout_p, scale, *rest):
    return _attention.triton_supports(query, key, value, mask_grad, scale)


def _triton_bwd_supports(dout, dlse, query, key, value, out, lse, *rest):
    return _triton_fwd_supports(query, key, value, *rest)


def _sdpa_fwd_supports(
    query, key, value, attn_mask, sinks, slopes, seed, mask_grad, dropout_p, scale, left, right, softcap, bottom_right
):
    return _attention.sdpa_supports(query, sinks, slopes, mask_grad, dropout_p, scale, softcap)


def _sdpa_bwd_supports(dout, dlse, query, key, value, out, lse, *rest):
    if dlse is not None:
        return "scaled_dot_product_attention gives lse no gradient"
    return _sdpa_fwd_supports(query, key, value, *rest)


def _triton_fwd(query, key, value, attn_mask, sinks, slopes, seed, mask_grad, *scores):
    args = (query, key, value, attn_mask, sinks, slopes, seed, mask_grad, *scores)
    if not query.numel() or not key.numel():
        return _fwd_reference(*args)
    from fastllm.kernels import attention as kernels

    out, lse = _fwd_fake(*args)
    kernels.attention_fwd(out, lse, query, key, value, attn_mask, sinks, slopes, seed, kernels.Scores(*scores))
    return out, lse


def _triton_kernel(query, key, value, attn_mask, sinks, slopes, seed, mask_grad, *scores):
    from fastllm.kernels import attention as kernels

    return kernels.describe(query, key, value, attn_mask, slopes, seed, kernels.Scores(*scores))


def _triton_bwd(dout, dlse, query, key, value, out, lse, attn_mask, sinks, slopes, seed, mask_grad, *scores):
    args = (dout, dlse, query, key, value, out, lse, attn_mask, sinks, slopes, seed)
    if not query.numel() or not key.numel():
        return _bwd_reference(*args, mask_grad, *scores)
    from fastllm.kernels import attention as kernels

    outputs = *grads, _, dsinks = _bwd_fake(*args, mask_grad, *scores)
    dq, dk, dv = grads
    options = None if sinks is None else dsinks, *args
    kernels.attention_bwd(dq, dk, dv, *options, kernels.Scores(*scores))  # type: ignore[arg-type]
    return outputs


def _parts(query: Tensor, key: Tensor) -> list[slice]:
    """Of the batch, such that what is computed of a part stays in the processor's caches, and in memory that the
    process has already: of a whole batch each temporary tensor would be new pages, which take longer than the
    arithmetic."""
    size = max(1, _PART_BYTES // max(1, query[0].numel() // query.shape[-1] * key.shape[2] * 4))
    return [slice(start, start + size) for start in range(0, query.shape[0], size)]


def _cut(part: slice, *tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x[part] for x in tensors]


def _fill(part: slice, outputs: Iterable[Tensor], results: Iterable[Tensor]) -> None:
    for output, result in zip(outputs, results, strict=False):
        output[part].copy_(result)


def _sdpa_fwd(query, key, value, attn_mask, sinks, slopes, seed, mask_grad, dropout_p, scale, left, right, cap, corner):
    if dropout_p > 0:  # scaled_dot_product_attention draws other masks
        scores = dropout_p, scale, left, right, cap, corner
        outputs = _fwd_fake(query, key, value, attn_mask, sinks, slopes, seed, mask_grad, *scores)
        for part in _parts(query, key):
            q, k, v, mask, slope = _cut(part, query, key, value, attn_mask, slopes)
            args = q, k, v, mask, sinks, slope, seed, mask_grad, *scores, part.start
            _fill(part, outputs, reference.attention_fwd(*args, draw=_attention.drawn))
        return outputs
    lse = _attention.empty_lse(query, query.shape[:3])
    out = _sdpa.forward(lse, query, key, value, attn_mask, scale, left, right, corner)
    return *_attention.into((_attention.empty_out(query, value.shape[3]),), (out,)), lse


def _sdpa_bwd(
    dout, dlse, query, key, value, out, lse, attn_mask, sinks, slopes, seed, mask_grad, dropout_p, scale, left, right,
    cap, corner,
):  # fmt: skip
    if dropout_p > 0:
        scores = dropout_p, scale, left, right, cap, corner
        whole = dout, dlse, query, key, value, out, lse, attn_mask, sinks, slopes, seed, mask_grad, *scores
        outputs = _bwd_fake(*whole)
        of_sinks = []
        for part in _parts(query, key):
            *cut, mask, slope = _cut(part, *whole[:7], attn_mask, slopes)
            args = *cut, mask, sinks, slope, seed, mask_grad, *scores, part.start
            found = reference.attention_bwd(*args, draw=_attention.drawn)
            _fill(part, outputs[: 4 if mask_grad else 3], found)
            of_sinks.append(found[4].float())
        if sinks is not None:
            outputs[4].copy_(sum(of_sinks))
        return outputs
    grads = _sdpa.backward(dout, query, key, value, out, lse, attn_mask, scale, left, right, corner)
    outputs = tuple(_attention.empty_grad(x) for x in (query, key, value))
    return *_attention.into(outputs, grads), query.new_empty(0), query.new_empty(0)


_fwd = Op(
    "attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? sinks, Tensor? alibi_slopes, "
    f"Tensor? seed, bool mask_grad, {_attention.SCORES}) -> (Tensor, Tensor)",
    reference=_fwd_reference,
    fake=_fwd_fake,
    backends=(
        Backend("triton", _triton_fwd_supports, _triton_fwd, kernel=_triton_kernel),
        Backend("torch", _sdpa_fwd_supports, _sdpa_fwd),
    ),
)
_bwd = Op(
    "attention_bwd(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor? attn_mask, Tensor? sinks, Tensor? alibi_slopes, Tensor? seed, bool mask_grad, "
    f"{_attention.SCORES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_bwd_reference,
    fake=_bwd_fake,
    backends=(
        Backend("triton", _triton_bwd_supports, _triton_bwd),
        Backend("torch", _sdpa_bwd_supports, _sdpa_bwd),
    ),
)


def _save(ctx, inputs, outputs):
    query, key, value, attn_mask, sinks, slopes, seed, _, *ctx.scores = inputs
    ctx.save_for_backward(query, key, value, *outputs, attn_mask, sinks, slopes, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    saved = ctx.saved_tensors  # once: checkpoints compute what they unpack
    if dout is None:
        dout = torch.zeros_like(saved[3])
    mask_grad = ctx.needs_input_grad[3]  # of a captured graph, another than its forward was told of
    dq, dk, dv, dmask, dsinks = gradients(_bwd, _formula, dout, dlse, *saved, mask_grad, *ctx.scores)
    dmask = dmask if mask_grad else None
    dsinks = dsinks if ctx.needs_input_grad[4] else None
    return dq, dk, dv, dmask, dsinks, *(None,) * 9


@_fwd.differentiate
class _Attention(Function):
    @staticmethod
    def forward(q, k, v, mask, sinks, slopes, seed, mask_grad, dropout_p, scale, left, right, softcap, bottom_right):
        return _fwd.below_autograd(
            q, k, v, mask, sinks, slopes, seed, mask_grad, dropout_p, scale, left, right, softcap, bottom_right
        )  # fmt: skip

    setup_context = staticmethod(_save)  # type: ignore[assignment]
    backward = staticmethod(_backward)


class _AttentionAlone(_Attention):
    """Without lse: nobody has it, but the backward of a compiled graph gets zeros for it, which some kernels refuse."""

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _save(ctx, inputs, outputs)
        ctx.mark_non_differentiable(outputs[1])

    @staticmethod
    def backward(ctx, dout, dlse):
        return _backward(ctx, dout, None)


def _formula(dout, dlse, query, key, value, out, lse, *rest):
    outputs = reference.attention_fwd(query, key, value, *rest)
    return reference.attention_bwd(dout, dlse, query, key, value, *outputs, *rest)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    causal_align: str = "top_left",
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention, as `torch.nn.functional.scaled_dot_product_attention`, and what models have added to it.

        p_i = i, or i + Sk - Sq with causal_align="bottom_right": the key position that query i stands at
        t_ij = scale q_i.k_j;  with a softcap c: c tanh(t_ij / c)
        t_ij = t_ij - slope |p_i - j| + mask_ij, where key j is visible to query i; else -inf
        lse_i = log(sum_j exp(t_ij) + exp(sink));  out_i = sum_j exp(t_ij - lse_i) v_j

    A query that sees no key gets 0 (and lse -inf, if there are no sinks), and no gradient. Sources: Vaswani et al.,
    "Attention Is All You Need", 2017; Dao, "FlashAttention-2", 2023; softcap: Gemma 2, 2024; sinks: gpt-oss, 2025;
    ALiBi: Press et al., 2022.

    Args:
        query: (B, H, Sq, D), any strides, so that views of (B, S, H, D) cost nothing. float32, bfloat16, float16;
            float64 runs on torch's kernel or the reference. D up to 512 in kernels; what is wider, and float32 of more
            than 256 on GPUs with little shared memory, runs on the reference.
        key: (B, HK, Sk, D).
        value: (B, HK, Sk, DV); DV may differ from D.
        attn_mask: bool (True: visible) or additive, broadcastable to (B, H, Sq, Sk). Unlike in torch it may be given
            together with is_causal. One that requires grad runs on the reference, which gives its gradient.
        dropout_p: the share of probabilities dropped, whoever calls: pass 0.0 in evaluation. The mask is drawn from
            torch's generator by way of Philox, so torch.manual_seed reproduces it.
        is_causal: query i sees keys up to p_i.
        scale: None means D ** -0.5.
        enable_gqa: lets HK be a divisor of H; query head h reads key head h // (H / HK).
        window_size: (left, right): query i sees keys from p_i - left to p_i + right; -1 is no limit.
        softcap: c above; 0 or None is none.
        sinks: (H,) logits, one a head, that take part in the softmax and have no value. Differentiable.
        alibi_slopes: (H,) or (B, H), not differentiable.
        causal_align: "top_left" as torch, or "bottom_right" as flash-attn; the same where Sq == Sk.
        deterministic: there is no faster variant that is not, so both values do the same.
        return_lse: also return lse.

    Returns:
        out (B, H, Sq, DV) in query's dtype (autocast's, where it is on), in memory ordered as query. With return_lse
        also lse (B, H, Sq), float32 (float64 for float64), differentiable, in which sinks are counted. A second
        derivative runs on the reference; torch's own attention, which a plain call on a CPU is, refuses it.

    Raises:
        TypeError: for other dtypes or several, and what is no number; ValueError: for shapes, devices or numbers
            that do not fit.
    """
    name = "attention"
    query, key, value = _attention.autocast(query, key, value)
    _attention.check_tensors(name, "BHSD", query=query, key=key, value=value)
    _attention.check_heads(name, query, key, value, 1, enable_gqa)
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"{name}: query has batch size {query.shape[0]}, key and value {key.shape[0]}")
    if causal_align not in ("top_left", "bottom_right"):
        raise ValueError(f'{name}: causal_align must be "top_left" or "bottom_right", got {causal_align!r}')
    left, right = _attention.check_window(name, window_size, is_causal)
    batch, heads, seq_q, _ = query.shape
    dropout_p, scale, softcap, alibi_slopes = _attention.check_extras(
        name, query, heads, batch, dropout_p, scale, softcap, sinks, alibi_slopes
    )
    if attn_mask is not None:
        attn_mask = _mask(attn_mask, query, (batch, heads, seq_q, key.shape[2]))
    plain = attn_mask is sinks is alibi_slopes is None and dropout_p == softcap == 0 and not return_lse
    simple = left == -1 and (right == -1 or (right == 0 and (causal_align == "top_left" or seq_q == key.shape[2])))
    if plain and simple and _attention.stock_cpu(query, key, value, scale):
        # What the torch backend would do, without the price of the op around it.
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=right == 0, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value = apart(query, key, value)
    mask_grad = attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
    out, lse = run(
        _fwd, query, key, value, attn_mask, sinks, alibi_slopes, dropout_seed(query, dropout_p), mask_grad, dropout_p,
        scale, left, right, softcap, causal_align == "bottom_right",
        function=_Attention if return_lse else _AttentionAlone,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _mask(attn_mask: Tensor, query: Tensor, shape: tuple) -> Tensor:
    """The mask expanded to (B, H, Sq, Sk), which copies nothing."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attention: attn_mask must be a tensor or None, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in DTYPES:
        raise TypeError(f"attention: attn_mask must be bool or floating of 16 bits or more, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"attention: query is on {query.device}, attn_mask on {attn_mask.device}")
    given = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if attn_mask.dim() > 4 or any(size not in (1, whole) for size, whole in zip(given, shape, strict=True)):
        raise ValueError(f"attention: attn_mask must broadcast to {tuple(shape)}, got {tuple(attn_mask.shape)}")
    return attn_mask.expand(shape)

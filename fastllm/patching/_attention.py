"""Attention of transformers' models, by way of its AttentionInterface and AttentionMaskInterface."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm import ops
from fastllm.patching._config import NAME, init_continuous_batching, own
from fastllm.patching._probe import Differs, told
from fastllm.tracing import lasting

_callers: list[str] | None = None

UNPADDED_ON_CPU = 768
"""Shorter rows are attended to with their padding there: taking it out costs as much as it saves."""


def register() -> bool:
    """Makes NAME known to transformers: attention and mask together, for without its mask function a model would hand
    over no mask, and lose causality and padding. Returns whether transformers is there."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError:
        return False
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return True


def _weights_wanted(kwargs: dict[str, Any]) -> bool:
    """Some models hand the wish on, others only look whether the attention returned weights."""
    if kwargs.get("output_attentions"):
        return True
    if torch.compiler.is_compiling():
        return False
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return False
    return "attentions" in (_active_collector.get() or ())


class Sequences(NamedTuple):
    """Of what a boolean mask lets queries see, if that is no more than the keys of their own sequence and, if causal,
    its past."""

    rows: Tensor | None  # of the keys that are seen among all B S, int64; None if there is no padding
    cu_seq: Tensor  # (N + 1,) int32
    longest: int
    causal: bool  # then queries and keys are the same tokens, and hidden together
    window: tuple[int, int]
    version: int  # of the mask: whoever writes to it makes it another


def mask(**kwargs: Any) -> Tensor | None:
    """What transformers calls as a mask function: boolean, or None where is_causal says it all.

    One that hides only padding says so in an attribute, which is lost by whatever is made of it."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    made, tokens, function = sdpa_mask(**kwargs), kwargs.get("attention_mask"), kwargs.get("mask_function")
    traced = torch.compiler.is_compiling() or not lasting()
    if made is None or tokens is None or tokens.dim() != 2 or traced or made.is_inference():
        return made
    causal = function is causal_mask_function and kwargs["q_length"] == kwargs["kv_length"]
    if kwargs["kv_length"] == tokens.shape[1] and (causal or function is bidirectional_mask_function):
        lengths = tokens.bool().sum(1, dtype=torch.int32)
        made.sequences = Sequences(  # type: ignore[attr-defined]
            tokens.flatten().nonzero().squeeze(1),
            F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            int(lengths.max()),
            causal,
            (-1, -1),
            made._version,
        )
    return made


def _sequences(mask: Tensor | None, cu_seq: Tensor | None, window: int | None) -> Sequences | None:
    """What is known of a mask. Of packed documents it is found out, once for each mask: it must be no other than that
    of `cu_seq`."""
    traced = torch.compiler.is_compiling() or not lasting()
    if mask is None or traced or mask.is_inference():  # which have no versions
        return None
    if not hasattr(mask, "sequences"):
        found = None
        if cu_seq is not None and mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[:2] == (1, 1):
            found = _documents(mask, cu_seq, window)
        mask.sequences = found  # type: ignore[attr-defined]
    known: Sequences | None = mask.sequences  # type: ignore[attr-defined]
    return known if known is not None and known.version == mask._version else None


def _documents(mask: Tensor, cu_seq: Tensor, window: int | None) -> Sequences | None:
    place = torch.arange(mask.shape[2], device=mask.device)
    if mask.shape[3] != len(place) or int(cu_seq[-1]) != len(place):
        return None
    document = torch.bucketize(place, cu_seq[1:], right=True)
    same, back = document[:, None] == document, place[:, None] - place
    found = Sequences(None, cu_seq.int(), int(cu_seq.diff().max()), True, (-1, -1), mask._version)
    if torch.equal(mask[0, 0], same & (back >= 0)):
        return found
    if window is not None and torch.equal(mask[0, 0], same & (back >= 0) & (back < window)):
        return found._replace(window=(window - 1, 0))
    return found._replace(causal=False) if torch.equal(mask[0, 0], same) else None


def attention(
    module: nn.Module,
    query: Tensor,  # (B, H, Sq, D)
    key: Tensor,  # (B, HK, Sk, D)
    value: Tensor,  # (B, HK, Sk, DV)
    attention_mask: Tensor | None,  # (B or 1, H or 1, Sq, Sk), boolean or added
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls as an attention function.

    Returns (B, Sq, H, DV), and the weights where they are asked for."""
    if _callers is not None and not torch.compiler.is_compiling():
        _callers.append(type(module).__name__)
    if _weights_wanted(kwargs):
        return _with_weights(
            module, query, key, value, attention_mask, dropout, scaling, position_bias, softcap, s_aux, **kwargs
        )
    scores: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    sequences = None
    if position_bias is None and not (dropout and query.device.type == "cpu"):  # only the reference has that, packed
        sequences = _sequences(attention_mask, kwargs.get("cu_seq_lens_q"), kwargs.get("sliding_window"))
    short = query.device.type == "cpu" and key.shape[2] < UNPADDED_ON_CPU
    if sequences is not None and not (short and sequences.rows is not None) and _fits(attention_mask, query, key):
        return _packed(query, key, value, sequences, dropout_p=dropout, **scores), None
    rows = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # A single query with a cache sees all of it. Without a mask the queries are the first positions, as torch aligns
    # them, also where a static cache is longer.
    causal = rows > 1 and attention_mask is None and bool(is_causal)
    if causal and key.shape[2] > rows:
        key, value = key[:, :, :rows], value[:, :, :rows]
        position_bias = None if position_bias is None else position_bias[..., :rows]
    mask = attention_mask
    if mask is not None:
        mask = mask[..., : key.shape[2]]
    if position_bias is not None:
        mask, causal = _biased(position_bias, mask, causal, query, key), False
    if key.shape[0] != query.shape[0]:  # queries that are learned, say, and the same for all
        batch = max(key.shape[0], query.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    out = dot_product(query, key, value, mask, dropout, causal, enable_gqa=query.shape[1] != key.shape[1], **scores)
    return out.transpose(1, 2).contiguous(), None


def _fits(mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    """Whether queries and keys are those that the mask was made for."""
    batch, _, rows, columns = mask.shape  # type: ignore[union-attr]
    return query.shape[0] == key.shape[0] == batch and (query.shape[2], key.shape[2]) == (rows, columns)


def _packed(query: Tensor, key: Tensor, value: Tensor, known: Sequences, **scores: Any) -> Tensor:
    """(B, Sq, H, DV) of sequences without their hidden keys; without the queries either where these are the same
    tokens, and then 0 for them."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    batch, _, rows, _ = query.shape
    cu_seq_q, longest = known.cu_seq, known.longest
    if known.rows is not None:
        k, v = k[known.rows], v[known.rows]
        if known.causal:
            q = q[known.rows]
        else:
            cu_seq_q, longest = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * rows, rows
    out: Any = ops.attention_varlen(
        q, k, v, cu_seq_q, known.cu_seq, longest, known.longest,
        is_causal=known.causal, window_size=known.window, enable_gqa=q.shape[1] != k.shape[1], **scores,
    )  # fmt: skip
    if known.rows is not None and known.causal:
        out = out.new_zeros(batch * rows, *out.shape[1:]).index_copy(0, known.rows, out)
    return out.unflatten(0, (batch, rows))


def dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """ops.attention, but for what only its reference does, and torch's own attention faster: dropout on a CPU, and the
    gradient of a mask; and for shapes that only torch's takes: other ranks than 4, and what must be broadcast."""
    dropped = dropout_p and query.device.type == "cpu"
    learned = attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
    ranks = {query.dim(), key.dim(), value.dim()} != {4} or query.is_nested
    odd = ranks or not query.shape[0] == key.shape[0] == value.shape[0] or key.shape[1] != value.shape[1]
    odd = odd or (query.shape[1] != key.shape[1] and not enable_gqa)
    odd = odd or (attn_mask is not None and type(attn_mask) not in (Tensor, nn.Parameter))  # as a CausalBias is
    if (dropped or learned or odd) and not softcap and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return ops.attention(  # type: ignore[return-value]
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, softcap=softcap, sinks=sinks
    )


def _biased(bias: Tensor, mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor:
    """One mask to add, of a learned bias, the mask and causality."""
    if mask is not None and mask.dtype != torch.bool:
        return bias + mask
    if causal:
        rows, columns = query.shape[2], key.shape[2]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
    return bias.to(query.dtype) if mask is None else torch.where(mask, bias, torch.finfo(bias.dtype).min)


def _with_weights(module, query, key, value, mask, dropout, scaling, position_bias, softcap, sinks, **kwargs):
    """The model's own attention in plain PyTorch: no fused one has the weights."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(f"{type(module).__name__} has no attention that gives its weights")
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    elif mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        mask = torch.full((query.shape[2], key.shape[2]), torch.finfo(query.dtype).min, device=query.device)
        mask = mask.to(query.dtype).triu(1)  # the queries are the first positions, as above
    optional = {"position_bias": position_bias, "softcap": softcap, "s_aux": sinks}
    kwargs |= {name: value for name, value in optional.items() if value is not None}
    return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


NOT_INTERFACED = "its attention does not go through transformers' AttentionInterface"


@contextlib.contextmanager
def callers() -> Iterator[list[str]]:
    """Takes down which modules call the attention inside."""
    global _callers
    before, _callers = _callers, []
    try:
        yield _callers
    finally:
        _callers = before


_OTHERS = re.compile(r"torch\.|transformers\.(?!models\.)")
"""Modules whose classes know attentions by name and compute none."""


@functools.cache
def _asks_for(kind: type, name: str) -> bool:
    """Whether a method of this class compares the attention's name with this one, and so sees ours for another."""
    own = (base for base in kind.__mro__ if _OTHERS.match(base.__module__) is None)
    methods = (f for base in own for f in vars(base).values())
    codes = [getattr(inspect.unwrap(f), "__code__", None) for f in methods if inspect.isfunction(f)]
    return any(
        code is not None and "_attn_implementation" in code.co_names and name in _strings(code) for code in codes
    )


def _strings(code: CodeType) -> set[str]:
    constants = [x for c in code.co_consts for x in (c if isinstance(c, (tuple, frozenset)) else [c])]
    return {c for c in constants if isinstance(c, str)}


def reason_against(model: Any) -> str | None:
    """Why a transformers model cannot take this attention, or None, and NAME is known to transformers."""
    can = getattr(model, "_can_set_attn_implementation", None)
    if can is None or not can():
        return NOT_INTERFACED
    if model.config._attn_implementation == NAME:
        return "replaced already"
    for module in model.modules():
        before = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if before is not None and _asks_for(type(module), before):  # type: ignore[arg-type]
            return f"{type(module).__name__} does something else where its attention is called {before}"
    return None if register() else "transformers is not installed"


def switch(model: Any) -> Callable[[], None]:
    """Sets the model's attention to NAME; returns what sets it back."""
    try:
        undo_configs = own(model)
    except Exception as error:
        raise Differs(f"its configuration cannot be copied: {told(error)}") from error

    def undo() -> None:
        model.__dict__.pop("init_continuous_batching", None)
        undo_configs()

    try:
        model.set_attn_implementation(NAME)
        for part in model.modules():  # transformers 5.17 leaves out those that have a copy of the model's configuration
            config: Any = getattr(part, "config", None) if hasattr(type(part), "set_attn_implementation") else None
            if type(config) is type(model.config) and config._attn_implementation != NAME:
                part.set_attn_implementation(NAME)
    except Exception as error:
        undo()
        raise Differs(f"its attention cannot be set: {told(error)}") from error
    if hasattr(type(model), "init_continuous_batching"):
        model.__dict__["init_continuous_batching"] = functools.partial(init_continuous_batching, model)
    return undo

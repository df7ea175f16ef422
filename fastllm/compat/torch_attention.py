"""fastllm's attention behind torch's own switch, for models that call scaled_dot_product_attention:

    fastllm.compat.torch_attention.register()
    torch.nn.attention.activate_flash_attention_impl("fastllm")

From then on the flash backend of scaled_dot_product_attention, and `torch.nn.attention.varlen.varlen_attn`, run it on
CUDA tensors, until `torch.nn.attention.restore_flash_attention_impl()`. Which backend a call takes stays torch's
choice: some GPUs get cuDNN's, unless the call is inside of `sdpa_kernel(SDPBackend.FLASH_ATTENTION)`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import attention as switch

from fastllm.backends import OPS
from fastllm.ops import _attention
from fastllm.ops._dropout import dropout_seed

_WHO = "fastllm in place of torch's flash attention"


class _Handle:
    """Puts the kernels into torch's dispatcher; `remove` is what torch takes them back with."""

    def __init__(self, key: str = "CUDA"):
        self.library = torch.library.Library("aten", "IMPL", key)
        for name, kernel in KERNELS.items():
            self.library.impl(name, kernel)

    def remove(self) -> None:
        self.library._destroy()


def register() -> None:
    """Lists "fastllm" among torch's implementations of flash attention; activates nothing.

    Raises:
        RuntimeError: where torch has no such switch.
    """
    if not hasattr(switch, "register_flash_attention_impl"):
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.nn.attention.register_flash_attention_impl, as 2.11 has; "
            "call fastllm.ops.attention, or patch the model with fastllm.patch"
        )
    switch.register_flash_attention_impl("fastllm", register_fn=_Handle)


def _check(query: Tensor, key: Tensor, value: Tensor, packing: tuple) -> None:
    _attention.check_tensors(_WHO, "SHD" if packing else "BHSD", query=query, key=key, value=value)
    _attention.check_heads(_WHO, query, key, value, 1, True)
    if value.shape[-1] != query.shape[-1] or (not packing and key.shape[0] != query.shape[0]):
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ValueError(f"{_WHO}: query, key and value must have one batch size and one head size, got {shapes}")
    for cu in packing[:2]:
        if not isinstance(cu, Tensor) or cu.dtype != torch.int32 or cu.shape != packing[0].shape:
            raise TypeError(f"{_WHO}: cum_seq_q and cum_seq_k must be int32 tensors of one shape")


def _run(kind: str, tensors: tuple, query: Tensor, packing: tuple, rng_state, dropout_p, scale, causal, left, right):
    seed = rng_state.view(torch.int64)[:1] if dropout_p > 0 else None
    left, right = -1 if left is None else left, 0 if causal else -1 if right is None else right
    # The diagonal is flash attention's: the last query stands at the last key.
    scores = dropout_p, query.shape[-1] ** -0.5 if scale is None else scale, left, right, 0.0, True
    if packing:
        return OPS[f"attention_varlen_{kind}"](*tensors, *packing[:2], None, None, seed, *packing[2:], *scores)
    return OPS[f"attention_{kind}"](*tensors, None, None, None, seed, False, *scores)


def _forward(query: Tensor, key: Tensor, value: Tensor, packing: tuple, debug: bool, dropout_p: float, *options):
    """(B, H, S, D), or packed (total, H, D), to out, lse, and the random state as torch hands it to the backward."""
    if debug:
        raise NotImplementedError(f"{_WHO}: return_debug_mask is not supported")
    _check(query, key, value, packing)
    rng_state = query.new_empty(2, dtype=torch.int64)  # the first is read, and with dropout alone
    seed = dropout_seed(query, dropout_p)
    if seed is not None:
        rng_state[:1] = seed
    rng_state = rng_state.view(torch.uint64)
    out, lse = _run("fwd", (query, key, value), query, packing, rng_state, dropout_p, *options)
    (out,) = _attention.into((torch.empty_like(query),), (out,))  # the strides that torch.compile counts on
    return out, lse, rng_state, query.new_empty((), dtype=torch.uint64), query.new_empty(0)


def _backward(dout: Tensor, saved: tuple, packing: tuple, *options):
    grads = _run("bwd", (dout, None, *saved), saved[0], packing, *options)
    return _attention.into(tuple(torch.empty_like(x) for x in saved[:3]), grads[:3])


def _sdpa(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    out, lse, *rest = _forward(query, key, value, (), return_debug_mask, dropout_p, scale, is_causal, None, None)
    return out, lse, None, None, query.shape[2], key.shape[2], *rest


def _sdpa_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,
    philox_offset, *, scale=None,
):  # fmt: skip
    saved = query, key, value, out, logsumexp
    return _backward(grad_out, saved, (), philox_seed, dropout_p, scale, is_causal, None, None)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Dense tensors, which come as (B, S, H, D), or back; packed ones as they are."""
    return [x.transpose(1, 2) if x.dim() == 4 else x for x in tensors]


def _flash(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, num_splits=None, **others,
):  # fmt: skip
    others["num_splits"] = None if num_splits == 1 else num_splits  # keys are never split: 1 is what happens
    for name, given in others.items():
        if given is not None:
            raise NotImplementedError(f"{_WHO}: {name} is not supported")
    packing = () if cum_seq_q is None else (cum_seq_q, cum_seq_k, max_q, max_k)
    options = dropout_p, scale, is_causal, window_size_left, window_size_right
    query, key, value = _heads_first(query, key, value)
    out, *rest = _forward(query, key, value, packing, return_debug_mask, *options)
    return *_heads_first(out), *rest


def _flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    grad_out, *saved = _heads_first(grad_out, query, key, value, out)
    packing = () if cum_seq_q is None else (cum_seq_q, cum_seq_k, max_q, max_k)
    options = rng_state, dropout_p, scale, is_causal, window_size_left, window_size_right
    return tuple(_heads_first(*_backward(grad_out, (*saved, logsumexp), packing, *options)))


KERNELS = {
    "_scaled_dot_product_flash_attention": _sdpa,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
    "_flash_attention_forward": _flash,
    "_flash_attention_backward": _flash_backward,
}
"""By the names of torch's ops, whose arguments and results they have; nothing in them asks for a GPU."""

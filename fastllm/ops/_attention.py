"""What the attention ops have in common: validation, allocation, and which arguments each backend takes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm import backends
from fastllm.ops import _triton
from fastllm.ops._arguments import check_dtype, integer, number
from fastllm.ops._dropout import check_rate
from fastllm.reference import _attention as reference
from fastllm.tracing import transformed

SCORES = "float dropout_p, float scale, SymInt window_left, SymInt window_right, float softcap, bool bottom_right"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Backends

FLOAT32_WIDE = 131_072
"""Bytes of shared memory that the backward takes of float32 heads of more than 256: four of its smallest tiles."""


def triton_supports(query: Tensor, key: Tensor, value: Tensor, mask_grad: bool, scale: float) -> str | None:
    """Why the Triton kernels cannot run this, or None."""
    reason = _triton.device_reason(query)
    if reason is not None:
        return reason
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 matrices wrongly"
    if query.dtype not in backends.KERNEL_DTYPES:
        return f"query must be float32, bfloat16 or float16, got {short(query.dtype)}"
    if query.shape[-1] > 512 or value.shape[-1] > 512:
        return f"head sizes go to 512, got {query.shape[-1]} and {value.shape[-1]}"
    if query.dtype == torch.float32 and max(query.shape[-1], value.shape[-1]) > 256 and query.device.type == "cuda":
        properties = torch.cuda.get_device_properties(query.device)
        shared = getattr(properties, "shared_memory_per_block_optin", 65536)  # AMD's have no other number
        if shared < FLOAT32_WIDE:
            return f"float32 heads of more than 256 take {FLOAT32_WIDE} bytes of shared memory, the device has {shared}"
    if mask_grad:
        return "attn_mask requires grad, which the kernels do not compute"
    if not scale > 0:
        return f"scale must be positive, got {scale}"
    return None


def sdpa_supports(
    query: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    mask_grad: bool,
    dropout_p: float,
    scale: float,
    softcap: float,
) -> str | None:
    """Why torch's fused CPU attention cannot compute this, or None. With dropout, torch's products around masks of our
    own do, which can all."""
    if query.device.type != "cpu":
        return f"runs on the CPU, the input is on {query.device.type}"
    if dropout_p > 0:
        return None
    if softcap > 0:
        return "scaled_dot_product_attention has no softcap"
    if sinks is not None:
        return "scaled_dot_product_attention has no sinks"
    if slopes is not None:
        return "scaled_dot_product_attention has no ALiBi"
    if mask_grad:
        return "torch's fused CPU attention gives attn_mask no gradient"
    if not scale > 0:
        return f"torch's fused CPU attention multiplies -inf by the scale, which must be positive, got {scale}"
    return None


_drawn = backends.Op(
    "attention_dropout(Tensor seed, float dropout_p, SymInt batch, SymInt heads, SymInt seq_q, SymInt seq_k, "
    "SymInt first_batch) -> Tensor",
    reference=lambda *args: reference.dropout(*args).float(),
    fake=lambda seed, p, batch, heads, seq_q, seq_k, first: seed.new_empty(
        (batch, heads, seq_q, seq_k), dtype=torch.float32
    ),
    backends=(backends.compiled("CPU", lambda *args: None),),
)


def drawn(seed: Tensor, dropout_p: float, batch: int, heads: int, seq_q: int, seq_k: int, first_batch: int) -> Tensor:
    """Z of the reference's formula, (batch, heads, seq_q, seq_k): the same bits, sooner. It is part of what the "torch"
    backend of attention does, and no choice of its own."""
    return _drawn.call(seed, dropout_p, batch, heads, seq_q, seq_k, first_batch)


def stock_cpu(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> bool:
    """Whether scaled_dot_product_attention, which the op would choose on a CPU, may be called in its place. A compiled
    graph is compiled anew where a backend is forced later; one that is exported keeps the choice, and so the op."""
    return (
        query.device.type == "cpu"
        and not _triton.INTERPRETED
        and not backends.steered()
        and not torch.compiler.is_exporting()
        and (torch.compiler.is_compiling() or not transformed())
        and query.shape[-1] == value.shape[-1]
        and (scale is None or scale > 0)
        and bool(query.numel() and key.numel())
    )


# Allocation: what the kernels write into, and what the fakes return


def empty_out(query: Tensor, size: int) -> Tensor:
    """(B, H, Sq, size), in memory as `query`: (B, H, S, D), or (B, S, H, D) if its heads lie inside its positions."""
    batch, heads, rows, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty((batch, rows, heads, size)).transpose(1, 2)
    return query.new_empty((batch, heads, rows, size))


def empty_grad(x: Tensor) -> Tensor:
    """(B, H, S, D), in memory (B, S, H, D) as torch's own gradients."""
    batch, heads, rows, size = x.shape
    return x.new_empty((batch, rows, heads, size)).transpose(1, 2)


def empty_lse(query: Tensor, shape: tuple) -> Tensor:
    return query.new_empty(shape, dtype=torch.promote_types(query.dtype, torch.float32))


def into(outputs: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`results` with the strides of `outputs`; copied only where they differ."""
    return tuple(
        [  # a list: `Backend.supports` says why
            result if result.stride() == output.stride() else output.copy_(result)
            for output, result in zip(outputs, results, strict=True)
        ]
    )


# Arguments


def check_tensors(name: str, rank: str, **tensors: Tensor) -> None:
    """Floating tensors of one dtype and device, with as many dimensions as `rank` has letters."""
    (first_label, first), *_ = tensors.items()
    for label, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {label} must be a tensor, got {type(tensor).__name__}")
        check_dtype(name, label, tensor.dtype)
        if tensor.dim() != len(rank):
            raise ValueError(f"{name}: {label} must have shape ({', '.join(rank)}), got {tuple(tensor.shape)}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name}: {label} must have {first_label}'s dtype {first.dtype}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: {first_label} is on {first.device}, {label} on {tensor.device}")


def check_heads(name: str, query: Tensor, key: Tensor, value: Tensor, dim: int, enable_gqa: bool) -> None:
    """Head counts and sizes of query, key and value, whose heads are dimension `dim`."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        raise ValueError(f"{name}: query and key must have the same head size, got {shapes}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"{name}: key and value must have the same shape but for the head size, got {shapes}")
    heads, kv_heads = query.shape[dim], key.shape[dim]
    if heads != kv_heads and not enable_gqa:
        raise ValueError(f"{name}: query and key must have as many heads, unless enable_gqa=True, got {shapes}")
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"{name}: query's heads must be a multiple of key's, got {shapes}")


def check_window(name: str, window_size, is_causal: bool) -> tuple[int, int]:
    """(left, right) with causality taken in; -1 is no limit."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"{name}: window_size must be (left, right), got {window_size!r}")
    left, right = (integer(name, "window_size", size) for size in window_size)
    if left < -1 or right < -1:
        raise ValueError(f"{name}: window_size must be at least 0, or -1 for no limit, got {tuple(window_size)}")
    return left, 0 if is_causal else right


def check_extras(
    name: str,
    query: Tensor,
    heads: int,
    sequences: int,
    dropout_p: float,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> tuple[float, float, float, Tensor | None]:
    """Returns dropout_p, the scale, the softcap and the slopes, expanded to (sequences, heads)."""
    dropout_p = check_rate(name, "dropout_p", dropout_p)
    scale = query.shape[-1] ** -0.5 if scale is None else number(name, "scale", scale)
    softcap = 0.0 if softcap is None else number(name, "softcap", softcap)
    if not softcap >= 0:
        raise ValueError(f"{name}: softcap must be at least 0 (0 for none), got {softcap}")
    for label, tensor in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {label} must be a tensor or None, got {type(tensor).__name__}")
        check_dtype(name, label, tensor.dtype)
        if tensor.device != query.device:
            raise ValueError(f"{name}: query is on {query.device}, {label} on {tensor.device}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"{name}: sinks must have shape ({heads},), got {tuple(sinks.shape)}")
    if alibi_slopes is not None:
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: alibi_slopes get no gradient; detach them")
        if alibi_slopes.shape not in ((heads,), (sequences, heads)):
            raise ValueError(
                f"{name}: alibi_slopes must have shape ({heads},) or ({sequences}, {heads}), "
                f"got {tuple(alibi_slopes.shape)}"
            )
        alibi_slopes = alibi_slopes.expand(sequences, heads)
    return float(dropout_p), float(scale), float(softcap), alibi_slopes


def autocast(query: Tensor, *others: Tensor) -> list[Tensor]:
    """As torch does for scaled_dot_product_attention: floating tensors in autocast's dtype, where it is on."""
    tensors = [query, *others]
    device = query.device.type if isinstance(query, Tensor) else ""
    if not backends.autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if isinstance(t, Tensor) and t.dtype.is_floating_point and t.dtype != torch.float64 else t
        for t in tensors
    ]

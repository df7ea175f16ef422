"""What the attention benchmarks share: rivals, counts and shapes.

Operations are counted as usual: 4 S^2 D a head for the forward (half of it if causal), and 2.5 times that for the
backward. What a window or other sequences hide is not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fastllm.benchmarks.harness import AUTOTUNE, Direction
from fastllm.testing import make

BACKENDS = {  # left to choose, SDPA takes flash on Hopper, where cuDNN is faster
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLEX, FLEX_AUTOTUNED = "FlexAttention", "FlexAttention max-autotune"


def visible(seq_q: int, seq_k: int, left: int, causal: bool, device) -> Tensor | None:
    if left < 0 and not causal:
        return None
    ahead = torch.arange(seq_k, device=device) - torch.arange(seq_q, device=device)[:, None]
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    return seen & (ahead >= -left) if left >= 0 else seen


_window_mask = functools.lru_cache(maxsize=1)(visible)  # is not made in the time of what needs it


def eager(q: Tensor, k: Tensor, v: Tensor, *, left: int = -1, causal: bool = False) -> Tensor:
    """The formula, operation by operation."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    t = q @ k.mT * q.shape[-1] ** -0.5
    seen = visible(q.shape[2], k.shape[2], left, causal, q.device)
    if seen is not None:
        t = t.masked_fill(~seen, -torch.inf)
    return torch.softmax(t, -1) @ v


def stock(q: Tensor, k: Tensor, v: Tensor, *, left: int = -1, causal: bool = False, backend=None) -> Tensor:
    """scaled_dot_product_attention. A window is given as a materialised mask, the only way it has."""
    mask = _window_mask(q.shape[2], k.shape[2], left, causal, q.device) if left >= 0 else None
    call = functools.partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    if backend is None:
        return call(q, k, v, is_causal=causal and mask is None)
    with sdpa_kernel(backend):
        return call(q, k, v, is_causal=causal and mask is None)


@functools.cache
def _flex(mode: str | None) -> Callable:
    return torch.compile(flex_attention, dynamic=False, mode=mode)


def flex(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask | None = None, mode: str | None = None) -> Tensor:
    """FlexAttention, compiled but on a CPU, where it has no compiled backward."""
    attend = _flex(mode) if q.is_cuda else flex_attention
    return attend(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _block_mask(seq_q: int, seq_k: int, left: int, causal: bool, device: str) -> BlockMask:
    def seen(b, h, i, j):
        inside = i >= j if causal else i == i
        return inside & (i - j <= left) if left >= 0 else inside

    return create_block_mask(seen, None, None, seq_q, seq_k, device=device)


def _flex_window(q: Tensor, k: Tensor, v: Tensor, *, left: int, causal: bool, mode: str | None = None) -> Tensor:
    mask = _block_mask(q.shape[2], k.shape[2], left, causal, str(q.device)) if causal or left >= 0 else None
    return flex(q, k, v, block_mask=mask, mode=mode)


def rivals(device: str, left: int, causal: bool) -> dict[str, Callable | str]:
    if device == "cuda":
        return gpu_rivals(left, causal)
    return {
        "eager": functools.partial(eager, left=left, causal=causal),
        "SDPA": functools.partial(stock, left=left, causal=causal),
    }


def gpu_rivals(left: int, causal: bool) -> dict[str, Callable | str]:
    found: dict[str, Callable | str] = {"eager": functools.partial(eager, left=left, causal=causal)}
    for name, backend in BACKENDS.items():
        found[name] = functools.partial(stock, left=left, causal=causal, backend=backend)
    for name, mode in ((FLEX, None), (FLEX_AUTOTUNED, AUTOTUNE)):
        found[name] = functools.partial(_flex_window, left=left, causal=causal, mode=mode)
    return found


def flops(pairs: int, heads: int, size: int, direction: Direction) -> int:
    """The operations of attention in which `pairs` of a query and a key see each other in each head."""
    forward = 4 * pairs * heads * size
    return {"forward": forward, "backward": forward * 5 // 2, "forward+backward": forward * 7 // 2}[direction]


def dense(batch: int, heads: int, kv_heads: int, rows: int, size: int, dtype: torch.dtype, device: str) -> tuple:
    """q, k and v, which are views of tensors laid out as (B, S, H, D)."""
    return tuple(
        make((batch, rows, h, size), dtype, device, seed=seed).transpose(1, 2)
        for seed, h in enumerate((heads, kv_heads, kv_heads))
    )

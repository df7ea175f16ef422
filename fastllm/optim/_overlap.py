"""Parameters that share memory: fine as long as no two share an element."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def _span(x: Tensor) -> tuple[int, int]:
    """The first element of its storage that a view touches, and the one after the last."""
    offset = x.storage_offset()
    return offset, offset + 1 + sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))


def check_overlap(params: Sequence[Tensor]) -> None:
    """Raises ValueError if an element of memory belongs to two parameters, or twice to one."""
    by_storage: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for i, param in enumerate(params):
        if param.numel():
            by_storage[param.untyped_storage().data_ptr()].append((i, param))
    for shared in by_storage.values():
        if len(shared) == 1 and 0 not in (stride for _, p in shared for stride in p.stride()):
            continue
        spans = sorted((*_span(param), i) for i, param in shared)
        nested = any(end > start for (_, end, _), (start, _, _) in zip(spans, spans[1:], strict=False))
        if nested or len(shared) == 1 or len({param.dtype for _, param in shared}) > 1:
            _count(shared)


def _count(shared: list[tuple[int, Tensor]]) -> None:
    # Views may interleave without sharing an element, so every byte is counted.
    storage = shared[0][1].untyped_storage()
    owner = torch.full((storage.nbytes(),), -1, dtype=torch.int32)
    for i, param in shared:
        width = param.element_size()
        size, stride = (*param.shape, width), (*(s * width for s in param.stride()), 1)
        index = torch.arange(len(owner)).as_strided(size, stride, param.storage_offset() * width).flatten()
        taken = owner[index]
        if bool((taken >= 0).any()):
            other = int(taken[taken >= 0][0])
            raise ValueError(f"AdamW: parameters {other} and {i} overlap in memory")
        owner[index] = i
        if int((owner == i).sum()) < len(index):
            raise ValueError(f"AdamW: parameter {i} of shape {tuple(param.shape)} overlaps itself in memory")

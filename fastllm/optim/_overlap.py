"""Parameters that share memory: fine as long as no two share an element."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def _address(x: Tensor) -> int:
    """Where the storage of a tensor with elements lies; 0 for one without memory (freed, fake, on the meta device)."""
    if not x.numel() or x.device.type == "meta" or type(x) not in (Tensor, torch.nn.Parameter):
        return 0
    storage = x.untyped_storage()
    return storage.data_ptr() if storage.nbytes() else 0


def _span(x: Tensor) -> tuple[int, int]:
    """The first element of its storage that a view touches, and the one after the last."""
    offset = int(x.storage_offset())
    return offset, offset + 1 + sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))


def check_overlap(params: Sequence[Tensor]) -> None:
    """Raises ValueError if an element of memory belongs to two parameters, or twice to one."""
    by_storage: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for i, param in enumerate(params):
        address = _address(param)
        if address:
            by_storage[address].append((i, param))
    for shared in by_storage.values():
        if len(shared) == 1 and 0 not in (stride for _, p in shared for stride in p.stride()):
            continue
        furthest, nested = 0, False
        for start, end in sorted(_span(param) for _, param in shared):
            nested = nested or start < furthest
            furthest = max(furthest, end)
        if nested or len(shared) == 1 or len({param.dtype for _, param in shared}) > 1:
            _count(shared)


def _count(shared: list[tuple[int, Tensor]]) -> None:
    # Views may interleave without sharing an element, so every element (every byte, if their sizes differ) is counted.
    storage = shared[0][1].untyped_storage()
    widths = {param.element_size() for _, param in shared}
    unit = widths.pop() if len(widths) == 1 else 1
    places = torch.arange(storage.nbytes() // unit)
    taken = torch.zeros(len(places), dtype=torch.bool)
    for number, (i, param) in enumerate(shared):
        width = param.element_size() // unit
        size, stride = (*param.shape, width), (*(s * width for s in param.stride()), 1)
        index = places.as_strided(size, stride, param.storage_offset() * width).flatten()
        if bool(taken[index].any()):
            others = ", ".join(str(other) for other, _ in shared[:number])
            raise ValueError(f"AdamW: parameter {i} of shape {tuple(param.shape)} overlaps one of {others} in memory")
        before = int(taken.sum())
        taken[index] = True
        if int(taken.sum()) - before < len(index):
            raise ValueError(f"AdamW: parameter {i} of shape {tuple(param.shape)} overlaps itself in memory")

"""The table of the programs of packed sequences, made on the device by one small kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels import _utils
from fastllm.kernels._utils import Config


@triton.jit
def _lengths(cu, i, sequences):
    """Of the sequences i; 0 beyond the last."""
    there = i < sequences
    start = tl.load(cu + i, mask=there, other=0)
    return (tl.load(cu + i + 1, mask=there, other=0) - start).to(tl.int32)


@triton.jit(do_not_specialize=["sequences", "total_q", "total_k", "size"])  # each step has others
def _packed_tiles_kernel(
    cu_q, cu_k, tiles, sequences, total_q, total_k, size, OF_KEYS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A program writes the blocks of one sequence, the last first, behind those of all that are longer; the program
    after the last sequence writes what lies behind it, and the rest of the table."""
    i = tl.program_id(0)
    own = cu_q
    other = cu_k
    if OF_KEYS:
        own = cu_k
        other = cu_q
    s = tl.arange(0, BLOCK_S)
    longer = _lengths(other, i, sequences)
    first = 0
    used = 0
    for start in range(0, sequences, BLOCK_S):
        j = start + s
        blocks = (_lengths(own, j, sequences) + BLOCK - 1) // BLOCK
        length = _lengths(other, j, sequences)
        before = (length > longer) | ((length == longer) & (j < i))
        first += tl.sum(tl.where(before, blocks, 0), 0)
        used += tl.sum(blocks, 0)
    q_start = tl.load(cu_q + i).to(tl.int32)
    k_start = tl.load(cu_k + i).to(tl.int32)
    q_rows = _lengths(cu_q, i, sequences)
    k_rows = _lengths(cu_k, i, sequences)
    if i == sequences:
        first = used
        if OF_KEYS:
            k_rows = total_k - k_start
        else:
            q_rows = total_q - q_start
    mine = q_rows
    if OF_KEYS:
        mine = k_rows
    mine = (mine + BLOCK - 1) // BLOCK
    for start in range(0, mine, BLOCK_S):
        t = start + s
        row = tiles + 6 * (first + t)
        inside = (t < mine) & (first + t < size)
        tl.store(row, i, mask=inside)
        tl.store(row + 1, mine - 1 - t, mask=inside)
        tl.store(row + 2, q_start, mask=inside)
        tl.store(row + 3, k_start, mask=inside)
        tl.store(row + 4, q_rows, mask=inside)
        tl.store(row + 5, k_rows, mask=inside)
    if i == sequences:
        for start in range(6 * (first + mine), 6 * size, BLOCK_S):
            tl.store(tiles + start + s, 0, mask=start + s < 6 * size)


def packed_tiles(
    cu_q: Tensor,  # (N + 1,)
    cu_k: Tensor,  # (N + 1,)
    total_q: int,
    total_k: int,
    block: int,
    of_keys: bool,
) -> Tensor:
    """(n, 6) int32 for programs that own blocks of queries, or of keys: sequence, block, where the sequence's queries
    and keys begin, and how many they are; the longest work first.

    What lies behind the last sequence belongs to one more, which has nothing to attend to: its rows come out as zeros.
    Rows of the table that are left over have a sequence without rows.
    """
    sequences = cu_q.shape[0] - 1
    size = (total_k if of_keys else total_q) // block + sequences + 1
    tiles = cu_q.new_empty((size, 6), dtype=torch.int32)
    config = Config({"BLOCK": block, "BLOCK_S": 128}, 1 if _utils.interpreted() else 4, 1)
    _utils.launch(
        _packed_tiles_kernel, (sequences + 1,), config, cu_q=cu_q.contiguous(), cu_k=cu_k.contiguous(), tiles=tiles,
        sequences=sequences, total_q=total_q, total_k=total_k, size=size, OF_KEYS=of_keys,
    )  # fmt: skip
    return tiles

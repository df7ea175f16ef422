"""Philox-4x32-7, the counter-based random numbers of every op that draws some.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
LOW = 0xFFFFFFFF


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * x for 0 <= x < 2^32, in int64 that holds no 64 bits of product."""
    low, high = constant * (x & 0xFFFF), constant * (x >> 16)
    middle = (low >> 16) + (high & LOW)
    return (high >> 32 << 16) + (middle >> 16), (middle << 16 | low & 0xFFFF) & LOW


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words, in int64, for counter (c0, c1, c2, c3) and a 64-bit seed."""
    c0, c1, c2, c3 = (c.long() & LOW for c in torch.broadcast_tensors(c0, c1, c2, c3))
    k0, k1 = seed & LOW, seed >> 32 & LOW
    for _ in range(PHILOX_ROUNDS):
        high_a, low_a = _multiply(0xD2511F53, c0)
        high_b, low_b = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def kept(word: Tensor, rate: float) -> Tensor:
    """What dropout keeps: where 24 random bits reach rate * 2^24."""
    return word >> 8 >= round(rate * 2**24)


def keep_scale(rate: float) -> float:
    """What dropout multiplies by that which it keeps."""
    return 1 / (1 - rate) if rate < 1 else 0.0

"""The tiles of the attention kernels: BLOCK_M x BLOCK_N, warps, stages, by chip, head size and features."""

from __future__ import annotations

from typing import Any

import torch

from fastllm.kernels._utils import Config


def _c(block_m: int, block_n: int, warps: int, stages: int, specialised: bool = False) -> Config:
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages, specialised)


# FEATURED: where a mask, ALiBi, a softcap or dropout is on, or the head size is no power of two, logits or the masks of
# loads need registers that larger tiles would take.
HOPPER = {
    "fwd": {64: _c(128, 128, 8, 3), 128: _c(128, 128, 8, 2), 256: _c(128, 32, 8, 2), 512: _c(32, 32, 8, 1)},
    "dkdv": {64: _c(64, 128, 8, 3), 128: _c(64, 128, 8, 2), 256: _c(32, 64, 8, 2), 512: _c(16, 16, 8, 1)},
    "dq": {64: _c(128, 64, 8, 3), 128: _c(128, 64, 8, 2), 256: _c(64, 32, 8, 2), 512: _c(16, 16, 8, 1)},
}
HOPPER_FEATURED = {
    "fwd": {64: _c(64, 64, 4, 3), 128: _c(128, 64, 8, 3), 256: _c(128, 32, 8, 2), 512: _c(32, 16, 8, 1)},
    "dkdv": {64: _c(32, 128, 8, 2), 128: _c(32, 64, 8, 2), 256: _c(16, 64, 8, 2), 512: _c(16, 16, 8, 1)},
    "dq": {64: _c(128, 32, 8, 2), 128: _c(128, 32, 8, 2), 256: _c(128, 16, 8, 2), 512: _c(16, 16, 8, 1)},
}
BLACKWELL = {
    "fwd": HOPPER["fwd"] | {128: _c(128, 64, 8, 3), 256: _c(64, 64, 8, 2)},
    "dkdv": HOPPER["dkdv"] | {128: _c(32, 128, 8, 2)},
    "dq": HOPPER["dq"],
}
AMPERE = {
    "fwd": {64: _c(64, 64, 4, 3), 128: _c(128, 32, 8, 2), 256: _c(64, 32, 8, 1), 512: _c(32, 32, 8, 1)},
    "dkdv": {64: _c(32, 64, 4, 2), 128: _c(32, 64, 8, 1), 256: _c(16, 32, 8, 1), 512: _c(16, 16, 8, 1)},
    "dq": {64: _c(64, 32, 4, 2), 128: _c(64, 32, 8, 1), 256: _c(32, 32, 8, 1), 512: _c(16, 16, 8, 1)},
}
AMPERE_FEATURED = {
    "fwd": {64: _c(64, 32, 4, 2), 128: _c(64, 32, 8, 1), 256: _c(64, 32, 8, 1), 512: _c(32, 16, 8, 1)},
    "dkdv": {64: _c(32, 32, 4, 1), 128: _c(32, 32, 8, 1), 256: _c(16, 32, 8, 1), 512: _c(16, 16, 8, 1)},
    "dq": {64: _c(32, 32, 4, 1), 128: _c(32, 32, 8, 1), 256: _c(16, 32, 8, 1), 512: _c(16, 16, 8, 1)},
}
Chip = tuple[str, Any]  # ("cuda", 90) or ("hip", "gfx942")
TABLE: dict[Chip, tuple[dict, dict]] = {  # plain, featured
    ("cuda", 80): (AMPERE, AMPERE_FEATURED),
    ("cuda", 90): (HOPPER, HOPPER_FEATURED),
    ("cuda", 100): (BLACKWELL, HOPPER_FEATURED),
    ("cuda", 120): (AMPERE, AMPERE_FEATURED),
    ("hip", "gfx942"): (AMPERE, AMPERE_FEATURED),
}
FLOAT32 = {
    "fwd": {64: _c(32, 32, 4, 2), 128: _c(32, 32, 8, 1), 256: _c(16, 32, 8, 1), 512: _c(16, 16, 8, 1)},
    "dkdv": {64: _c(32, 32, 4, 1), 128: _c(32, 32, 8, 1), 256: _c(16, 16, 8, 1), 512: _c(16, 16, 8, 1)},
    "dq": {64: _c(32, 32, 4, 1), 128: _c(32, 16, 8, 1), 256: _c(16, 16, 8, 1), 512: _c(16, 16, 8, 1)},
}
# Of the kernels in `_attention_hopper`: those to choose from, the default first.
SPECIALISED = {
    "fwd": [_c(128, 128, 4, 2, True), _c(128, 64, 4, 3, True)],
    "dkdv": [_c(64, 128, 4, 2, True), _c(32, 128, 4, 2, True)],
    "dq": [_c(128, 64, 4, 3, True), _c(128, 64, 4, 2, True)],
}
INTERPRETER = {"fwd": _c(32, 16, 1, 1), "dkdv": _c(16, 32, 1, 1), "dq": _c(32, 16, 1, 1)}
CANDIDATES = {
    "fwd": [_c(m, n, w, s) for m, n, w in ((64, 64, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)) for s in (2, 3)],
    "dkdv": [_c(m, n, w, s) for m, n, w in ((32, 64, 4), (64, 64, 4), (64, 128, 8), (32, 128, 8)) for s in (1, 2, 3)],
    "dq": [_c(m, n, w, s) for m, n, w in ((64, 32, 4), (64, 64, 4), (128, 64, 8), (128, 32, 8)) for s in (1, 2, 3)],
}


def config(kind: str, block_d: int, dtype: torch.dtype, featured: bool, chip: Chip) -> Config:
    """The table's configuration; an unknown chip takes its nearest older relative's."""
    if chip[0] == "cpu":
        return INTERPRETER[kind]
    if dtype == torch.float32:
        return FLOAT32[kind][max(64, block_d)]
    if chip not in TABLE:
        # A GPU of AMD is told by a name, one of NVIDIA by a number.
        older = [name for kind_of, name in TABLE if kind_of == chip[0] and (kind_of == "hip" or name <= chip[1])]
        chip = (chip[0], max(older)) if older else ("cuda", 80)
    return TABLE[chip][featured][kind][max(64, block_d)]

"""How the norms run on DTensors: on each rank's rows, wherever the normalized dimension is whole."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def dtensor() -> type | tuple[()]:
    """DTensor, if the process has any: whoever makes one has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module.DTensor if module is not None else ()


def ready(x: Tensor) -> None:
    """Makes the norms known to DTensor, if x is one. A dimension that is cut is gathered by DTensor itself."""
    if isinstance(x, dtensor()):
        _register()


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def rule(outputs: str, inputs: str) -> Callable[..., Sequence]:
        """A letter for each tensor: r for rows (activations and their statistics), p for a parameter, its gradient
        where it is an output; - for what is no tensor."""

        def shardings(*args: object) -> Sequence[tuple[list, list]]:
            x = args[inputs.index("r")]
            found = []
            for rows in (Replicate(), *map(Shard, range(x.ndim - 1))):  # type: ignore[attr-defined]
                grad = rows if isinstance(rows, Replicate) else Partial()
                given = {"r": rows, "p": Replicate(), "-": None}
                takes = [None if arg is None else given[kind] for arg, kind in zip(args, inputs, strict=True)]
                found.append(([{"r": rows, "p": grad}[kind] for kind in outputs], takes))
            return found

        return shardings

    ops = torch.ops.fastllm
    rules = {
        ops.rms_norm_fwd: ("rr", "rp-"),
        ops.rms_norm_bwd: ("rp", "rrrp-"),
        ops.layer_norm_fwd: ("rrr", "rpp-"),
        ops.layer_norm_bwd: ("rpp", "rrrrpp--"),
        ops.add_rms_norm_fwd: ("rrr", "rrp-"),
        ops.add_rms_norm_bwd: ("rp", "rrrrp-"),
        ops.add_layer_norm_fwd: ("rrrr", "rrpp-"),
        ops.add_layer_norm_bwd: ("rpp", "rrrrrpp--"),
    }
    for op, (outputs, inputs) in rules.items():
        register_sharding(op.default)(rule(outputs, inputs))

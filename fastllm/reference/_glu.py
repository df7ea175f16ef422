"""Gated activations and their gradients, in the open.

    y = act(g) u          du = dy act(g)          dg = dy u act'(g)

Computed in float32 (float64 for float64). The gradients of gate and up come side by side, as one tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Activation = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Returns act(g) and act'(g)."""


def glu_fwd(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    acc = torch.promote_types(gate.dtype, torch.float32)
    return (activation(gate.to(acc))[0] * up.to(acc)).to(gate.dtype)


def glu_bwd(activation: Activation, dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    acc = torch.promote_types(gate.dtype, torch.float32)
    value, slope = activation(gate.to(acc))
    return torch.cat([dy.to(acc) * up.to(acc) * slope, dy.to(acc) * value], -1).to(gate.dtype)

"""Gated feed-forward modules."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm import ops


class _GatedMLP(torch.nn.Module):
    """down(act(gate(x)) * up(x)), with the names that transformers gives the projections."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.gate_proj = torch.nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.up_proj = torch.nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, bias, device, dtype)

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) to the same."""
        return self.down_proj(self._gated(self.gate_proj(x), self.up_proj(x)))


class SwiGLU(_GatedMLP):
    """Llama's feed-forward over `fastllm.ops.swiglu`; state_dict as transformers' LlamaMLP.

    Args:
        hidden_size, intermediate_size: sizes outside and inside.
        bias: of the three projections.
        device, dtype: of the weights.
    """

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.swiglu(gate, up)


class GEGLU(_GatedMLP):
    """Gemma's feed-forward over `fastllm.ops.geglu`; state_dict as transformers' GemmaMLP.

    Args:
        hidden_size, intermediate_size, bias, device, dtype: as `SwiGLU`.
        approximate: "tanh" or "none", as `fastllm.ops.geglu`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        approximate: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, intermediate_size, bias, device=device, dtype=dtype)
        self.approximate = approximate

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.geglu(gate, up, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"

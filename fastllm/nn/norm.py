"""LayerNorm and RMSNorm modules.

Parameters are read in `forward` alone: around it, and nowhere else, FSDP2 gathers those of a module that it shards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm import ops


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on `fastllm.ops.layer_norm`: same arguments, same state_dict."""

    def forward(self, input: Tensor, residual: Tensor | None = None, dropout: float = 0.0) -> Any:
        """The norm of `input`; with a residual, what `add` returns."""
        parameters = self.normalized_shape, self.weight, self.bias, self.eps
        if residual is None:
            return ops.layer_norm(input, *parameters)
        if not dropout:
            return ops.add_layer_norm(input, residual, *parameters)
        return ops.dropout_add_layer_norm(input, residual, *parameters, p=dropout)

    def add(self, input: Tensor, residual: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Returns (self(sum), sum), sum = input + residual, computed in one pass, with that much dropout of input."""
        return self(input, residual, dropout)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on `fastllm.ops.rms_norm`: same arguments, same state_dict."""

    def forward(self, x: Tensor, residual: Tensor | None = None, dropout: float = 0.0) -> Any:
        """The norm of `x`; with a residual, what `add` returns."""
        parameters = self.normalized_shape, self.weight, self.eps
        if residual is None:
            return ops.rms_norm(x, *parameters)
        if not dropout:
            return ops.add_rms_norm(x, residual, *parameters)
        return ops.dropout_add_rms_norm(x, residual, *parameters, p=dropout)

    def add(self, x: Tensor, residual: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Returns (self(sum), sum), sum = x + residual, computed in one pass, with that much dropout of x."""
        return self(x, residual, dropout)

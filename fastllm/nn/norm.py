"""LayerNorm and RMSNorm modules."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm import ops


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on `fastllm.ops.layer_norm`: same arguments, same state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def add(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (self(input + residual), input + residual), computed in one pass."""
        return ops.add_layer_norm(input, residual, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on `fastllm.ops.rms_norm`: same arguments, same state_dict."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (self(x + residual), x + residual), computed in one pass."""
        return ops.add_rms_norm(x, residual, self.normalized_shape, self.weight, self.eps)

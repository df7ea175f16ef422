"""LayerNorm and RMSNorm modules."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm import ops


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on `fastllm.ops.layer_norm`: same arguments, same state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def add(self, input: Tensor, residual: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Returns (self(sum), sum), sum = input + residual, computed in one pass, with that much dropout of input."""
        parameters = self.normalized_shape, self.weight, self.bias, self.eps
        if not dropout:
            return ops.add_layer_norm(input, residual, *parameters)
        return ops.dropout_add_layer_norm(input, residual, *parameters, p=dropout)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on `fastllm.ops.rms_norm`: same arguments, same state_dict."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Returns (self(sum), sum), sum = x + residual, computed in one pass, with that much dropout of x."""
        parameters = self.normalized_shape, self.weight, self.eps
        if not dropout:
            return ops.add_rms_norm(x, residual, *parameters)
        return ops.dropout_add_rms_norm(x, residual, *parameters, p=dropout)

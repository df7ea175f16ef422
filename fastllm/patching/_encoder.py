"""torch's own TransformerEncoderLayer: its dropouts, sums and norms in one pass each."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from fastllm import ops
from fastllm.patching import _probe
from fastllm.patching._forward import Forward, bind

OPS = ("dropout_add_layer_norm",)


def matches(module: nn.Module) -> bool:
    return type(module) is nn.TransformerEncoderLayer


def forward(
    module: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """torch's in training. In evaluation torch has a fused layer of its own, with conditions of its own."""
    if src.is_nested or not module.training:
        return type(module).forward(module, src, src_mask, src_key_padding_mask, is_causal)

    def attend(x: Tensor) -> Tensor:
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        return module.self_attn(x, x, x, need_weights=False, **masks)[0]

    def feed_forward(x: Tensor) -> Tensor:
        return module.linear2(module.dropout(module.activation(module.linear1(x))))

    def normed_sum(branch: Tensor, residual: Tensor, dropout: nn.Dropout, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        return ops.dropout_add_layer_norm(
            branch, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps,
            p=dropout.p, training=dropout.training,
        )  # fmt: skip

    if module.norm_first:
        normed, src = normed_sum(attend(module.norm1(src)), src, module.dropout1, module.norm2)
        return src + module.dropout2(feed_forward(normed))
    src, _ = normed_sum(attend(src), src, module.dropout1, module.norm1)
    src, _ = normed_sum(feed_forward(src), src, module.dropout2, module.norm2)
    return src


def find(module: nn.TransformerEncoderLayer, only: bool | None = None) -> bool:
    """Raises Differs unless the replacement computes what the layer does; nothing is dropped meanwhile, for the masks
    would be others."""
    weight = module.linear1.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, weight.shape[1], generator=generator).to(weight.device, weight.dtype)

    def truth(x: Tensor, *parameters: Tensor) -> Tensor:
        return _probe.functional(module, parameters)(x)

    with _probe.dropping(module, 0.0):
        _probe.check(module, functools.partial(forward, module), truth, x)
    return True


def replacement(module: nn.TransformerEncoderLayer, found: bool) -> Forward:
    uncalled = ("norm2", "dropout1") if module.norm_first else ("norm1", "norm2", "dropout1", "dropout2")
    return bind(module, forward, uncalled=uncalled)


def op(found: bool) -> str:
    return OPS[0]

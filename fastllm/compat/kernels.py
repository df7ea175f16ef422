"""fastllm's ops as layers for the `kernels` library of Hugging Face, without a download:

    from kernels import Mode, kernelize, use_kernel_mapping

    with use_kernel_mapping(fastllm.compat.kernels.mapping()):
        model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)

Only what an op computes exactly is here. Activations have no op of their own, and a layer in place of "rotary_pos_emb"
could not tell whether both halves of its tables are the same, as `fastllm.ops.rotary` takes for granted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastllm import ops
from fastllm._extras import require


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + variance_epsilon), as transformers' layers of this name."""

    can_torch_compile = True
    has_backward = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.weight.dtype != hidden_states.dtype:  # layers of this name differ in the dtype that they then return
            return type(self).forward(self, hidden_states)
        y = ops.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return y.to(hidden_states.dtype)  # under autocast on a GPU, the op's is float32


class RMSNormZeroCentered(nn.Module):
    """(1 + weight) * x / sqrt(mean(x^2) + eps), in x's dtype, as transformers' layers of this name."""

    can_torch_compile = True
    has_backward = True
    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight.shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)


LAYERS: dict[str, type[nn.Module]] = {"RMSNorm": RMSNorm, "RMSNormZeroCentered": RMSNormZeroCentered}
"""By the names under which models declare their layers. Stateless: only `forward` is taken."""


@dataclass(frozen=True)
class Repository:
    """What the library loads a layer from: this package."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        return self.layer


def mapping(devices: Sequence[str] = ("cpu", "cuda")) -> dict[str, dict[str, Repository]]:
    """For `kernels.use_kernel_mapping` and `kernels.register_kernel_mapping`: every layer for every device and mode."""
    return {name: {device: Repository(layer) for device in devices} for name, layer in LAYERS.items()}


def register() -> None:
    """Registers `mapping()` for the whole process.

    Raises:
        ImportError: where the library is not installed; the message has the command that installs it.
    """
    require("kernels.layer", "kernels").register_kernel_mapping(mapping())

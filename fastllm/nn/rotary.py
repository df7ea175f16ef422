"""Rotary positions, with the ways to stretch them over longer contexts that transformers has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastllm import ops
from fastllm.tracing import host_values, lasting

_KEYS = {
    # What a type needs, and what else it takes.
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}


def _frequencies(base: float, dim: int) -> Tensor:
    """base^(-2 i / R), in float32 step by step as transformers, so that checkpoints see the angles they were made
    with."""
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def _yarn(base: float, dim: int, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Peng et al., "YaRN", 2023: fast pairs as they are, slow ones stretched, a ramp between; and what cos and sin are
    multiplied by."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def turns_at(rotations: float) -> float:
        """The pair that turns this often over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = turns_at(scaling.get("beta_fast") or 32), turns_at(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    kept = 1 - ramp
    wavelengths = base ** (torch.arange(0, dim, 2).float() / dim)
    frequencies = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept

    def magnitude(scale: float, mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = magnitude(factor)
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            attention_factor = magnitude(factor, scaling["mscale"]) / magnitude(factor, scaling["mscale_all_dim"])
    return frequencies, attention_factor


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: waves longer than the original context's share are stretched, short ones kept, a ramp between."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    slow, fast = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = original / (2 * math.pi / frequencies)  # in the original context
    ramp = ((waves - slow) / (fast - slow)).clamp(0, 1)
    between = (1 - ramp) * frequencies / factor + ramp * frequencies
    return torch.where(ramp == 0, frequencies / factor, torch.where(ramp == 1, frequencies, between))


class RotaryEmbedding(torch.nn.Module):
    """`fastllm.ops.rotary` with its tables. Nothing of it is saved in a state_dict, as in transformers.

    Args:
        dim: size of a head.
        max_position_embeddings: positions that the tables hold at first; they grow. For "dynamic", the length from
            which on the base grows.
        base: of the frequencies base^(-2 i / R), `rope_theta` in transformers.
        scaling: None, or a dict as transformers' `rope_parameters` (`rope_scaling`): "rope_type" one of "default",
            "linear" (positions divided by "factor"; Chen et al., 2023), "dynamic" (NTK: a larger base beyond
            max_position_embeddings), "yarn" (Peng et al., 2023) and "llama3", and what this takes. "rope_theta" and
            "partial_rotary_factor" in it stand for the arguments of that meaning.
        partial_rotary_factor: the share of a head that is turned, from its front.
        interleaved: as `fastllm.ops.rotary`.
        device: of the tables.

    Raises:
        ValueError: for an unknown type, missing or unknown keys, and numbers out of range.
    """

    inv_freq: Tensor

    def __init__(
        self,
        dim: int,
        max_position_embeddings: int = 2048,
        base: float = 10000.0,
        *,
        scaling: Mapping[str, Any] | None = None,
        partial_rotary_factor: float = 1.0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        options = dict(scaling or {})
        base = options.pop("rope_theta", base)
        partial_rotary_factor = options.pop("partial_rotary_factor", partial_rotary_factor)
        self.rope_type = options.pop("rope_type", options.pop("type", "default"))
        if self.rope_type not in _KEYS:
            raise ValueError(f"RotaryEmbedding: rope_type must be one of {tuple(_KEYS)}, got {self.rope_type!r}")
        needed, optional = _KEYS[self.rope_type]
        missing, unknown = set(needed) - set(options), set(options) - {*needed, *optional}
        if missing or unknown:
            what = f"needs {sorted(missing)}" if missing else f"does not know {sorted(unknown)}"
            raise ValueError(f"RotaryEmbedding: rope_type {self.rope_type!r} {what}")
        self.rotary_dim = int(dim * partial_rotary_factor)
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= dim:
            raise ValueError(
                f"RotaryEmbedding: dim * partial_rotary_factor must be even and at most dim, got {dim} * "
                f"{partial_rotary_factor}"
            )
        if not base > 0 or max_position_embeddings < 1 or not options.get("factor", 1.0) >= 1.0:
            raise ValueError(
                f"RotaryEmbedding: base must be positive, max_position_embeddings and factor at least 1, got {base}, "
                f"{max_position_embeddings} and {options.get('factor')}"
            )
        self.dim, self.base, self.max_position_embeddings = dim, base, max_position_embeddings
        self.interleaved, self.options = interleaved, options
        frequencies, self.attention_scaling = self._frequencies(max_position_embeddings)
        self.register_buffer("inv_freq", frequencies.to(device), persistent=False)
        self._tables: tuple[Tensor, Tensor] | None = None
        self._length = 0  # that the tables were made for

    def _frequencies(self, length: int) -> tuple[Tensor, float]:
        """For sequences of this length; and what cos and sin are multiplied by."""
        dim, options = self.rotary_dim, self.options
        if self.rope_type == "yarn":
            return _yarn(self.base, dim, options)
        if self.rope_type == "dynamic":
            longest, factor = self.max_position_embeddings, options["factor"]
            stretch = factor * max(length, longest) / longest - (factor - 1)
            return _frequencies(self.base * stretch ** (dim / (dim - 2)), dim), 1.0
        frequencies = _frequencies(self.base, dim)
        if self.rope_type == "linear":
            frequencies = frequencies / options["factor"]
        if self.rope_type == "llama3":
            frequencies = _llama3(frequencies, options)
        return frequencies, 1.0

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each (at least `length`, R / 2) in float32, for a sequence of `length` positions."""
        # The dynamic type's angles depend on the length past max_position_embeddings; a shorter one goes back.
        wanted = max(length, self.max_position_embeddings)
        fits = wanted == self._length if self.rope_type == "dynamic" else wanted <= self._length
        if self._tables is None or not fits or self._tables[0].device != self.inv_freq.device:
            with torch.inference_mode(False):
                # Anew, not from the buffer, which module.to(bfloat16) rounds.
                frequencies = self._frequencies(wanted)[0].to(self.inv_freq.device)
                angles = torch.arange(wanted, device=frequencies.device).float()[:, None] * frequencies
                tables = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
            if not lasting():
                return tables
            if self.rope_type == "dynamic":
                self.inv_freq = frequencies
            self._tables, self._length = tables, wanted
        return self._tables

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Turns queries (B, H, S, D) and keys (B, HK, S, D), or packed (total, H, D), by their positions.

        Args:
            q, k, position_ids: as `fastllm.ops.rotary`; without position_ids, 0, 1, ... For positions past
                max_position_embeddings, position_ids must be on the CPU or `tables(length)` have been called before:
                otherwise the host would have to wait for the GPU to know how long the tables must be.

        Returns:
            q and k turned.
        """
        length = q.shape[-2] if q.dim() == 4 else q.shape[0]
        if position_ids is not None:
            length = self._length
            positions = host_values(position_ids)
            if positions is not None and positions.numel():
                length = int(positions.max()) + 1
                if self.rope_type != "dynamic":
                    length = max(length, self._length)
        cos, sin = self.tables(length)
        return ops.rotary(q, k, cos, sin, interleaved=self.interleaved, position_ids=position_ids)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, rope_type={self.rope_type!r}, rotary_dim={self.rotary_dim}"

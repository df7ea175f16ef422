"""What the configurations of all models have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

Config = TypeVar("Config", bound="ModelConfig")

_CHOICES = {
    "norm": ("layer_norm", "rms_norm"),
    "position": ("learned", "rotary", "sinusoidal", "relative"),
    "mlp": ("gelu", "gelu_erf", "relu", "silu", "swiglu", "geglu"),
    "ops": ("fastllm", "torch"),
}
_POSITIVE = ("vocab_size", "context", "layers", "heads", "width", "num_kv_heads", "head_dim", "mlp_width")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError for a field of these that is no positive int."""
    for field in names:
        value = getattr(config, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}: {field} must be a positive int, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Transformer.

    Attributes:
        vocab_size: number of tokens.
        context: the most positions that the model takes.
        layers, heads, width: number of blocks, of query heads, and of channels.
        kv_heads: number of key and value heads, a divisor of heads (grouped-query attention); None means heads.
        head_size: channels of a head; None means width / heads, which heads must then divide.
        hidden: width inside the MLP; None means 4 * width, and with a gate 8/3 * width rounded up to a multiple of 64,
            which has as many parameters.
        norm: "layer_norm" or "rms_norm".
        norm_first: norms before attention and MLP, and one at the end (Radford et al., 2019), or behind what each adds
            (Vaswani et al., 2017).
        position: "learned", "sinusoidal" (Vaswani et al., 2017), "rotary" (Su et al., 2021), or "relative" (a learned
            bias for each head and distance, as in T5; encoder-decoder models alone).
        mlp: "gelu" (its tanh form), "gelu_erf", "relu", "silu"; or gated, "swiglu" and "geglu" (Shazeer, 2020).
        qk_norm: whether each head's queries and keys are normalized before they meet, as in Qwen3 (Dehghani et al.,
            2023).
        window: how many positions back a position sees, its own included; None is no limit (causal models alone).
        softcap: c of c tanh(score / c), as in Gemma 2; 0 is none.
        sinks: whether each head has a learned logit that takes part in the softmax and has no value, as in gpt-oss.
        bias: whether linear layers and LayerNorm have one.
        dropout: probability, on embeddings, attention and what each block adds.
        label_smoothing: of the loss in training; evaluation has none.
        tie_embeddings: whether the output layer shares the embedding's weight.
        norm_eps, rope_theta: as in the norms, and the base of the rotary frequencies.
        rope_scaling: how rotary positions are stretched, as `fastllm.nn.RotaryEmbedding`'s `scaling`, or None.
        ops: "fastllm" runs fused norms, attention, activations, rotary positions and loss, "torch" stock PyTorch. The
            state_dict is the same.

    Raises:
        ValueError: for a value that does not fit, naming it.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    """Fields by name of a size."""

    vocab_size: int = 50257
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    kv_heads: int | None = None
    head_size: int | None = None
    hidden: int | None = None
    norm: str = "layer_norm"
    norm_first: bool = True
    position: str = "learned"
    mlp: str = "gelu"
    qk_norm: bool = False
    window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    bias: bool = True
    dropout: float = 0.0
    label_smoothing: float = 0.0
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    ops: str = "fastllm"

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_positive(self, *_POSITIVE)
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{name}: {field} must be one of {choices}, got {getattr(self, field)!r}")
        if self.head_size is None and self.width % self.heads:
            raise ValueError(f"{name}: heads must divide width, got heads={self.heads}, width={self.width}")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"{name}: kv_heads must divide heads, got kv_heads={self.kv_heads}, heads={self.heads}")
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(f"{name}: rotary positions need an even width / heads, got {self.head_dim}")
        if self.position == "sinusoidal" and self.width % 2:
            raise ValueError(f"{name}: sinusoidal positions need an even width, got {self.width}")
        if self.window is not None:
            check_positive(self, "window")
        for field in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{name}: {field} must be in [0, 1), got {getattr(self, field)}")
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"{name}: softcap must be finite and not negative, got {self.softcap}")
        for field in ("norm_eps", "rope_theta"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{name}: {field} must be positive, got {getattr(self, field)}")

    def _check_token(self, field: str) -> None:
        token = getattr(self, field)
        if token is not None and not 0 <= token < self.vocab_size:
            raise ValueError(
                f"{type(self).__name__}: {field} must be a token, below vocab_size={self.vocab_size}, got {token}"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads if self.head_size is None else self.head_size

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def gated(self) -> bool:
        return self.mlp in ("swiglu", "geglu")

    @property
    def mlp_width(self) -> int:
        if self.hidden is not None:
            return self.hidden
        return math.ceil(8 * self.width / 3 / 64) * 64 if self.gated else 4 * self.width

    def num_parameters(self) -> int:
        """How many parameters the model has; builds nothing."""
        raise NotImplementedError

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of training on a token, forward and backward, recomputed activations not counted:

            6 N + 12 L H D T                 (Chowdhery et al., 2022, "PaLM", appendix B)

        N are the parameters without embeddings that are only looked up (an untied input embedding, learned positions,
        token types): blocks, norms, and the output layer, tied or not. L, H and D are layers, heads, and the width of a
        head; T is `length`, the positions of a row, or `window` where that is less. Causal attention counts in full,
        and what activations and norms compute does not.
        """
        raise NotImplementedError

    def _linear(self, inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs * self.bias

    def _norm(self, width: int) -> int:
        return width * (2 if self.norm == "layer_norm" and self.bias else 1)

    def _positions(self) -> int:
        return self.context * self.width if self.position == "learned" else 0

    def _blocks(self, layers: int, cross: bool = False) -> int:
        """Parameters of so many `layers.Block`, and of the norm behind them."""
        inner, width = self.heads * self.head_dim, self.width
        attention = self._linear(width, inner + 2 * self.num_kv_heads * self.head_dim) + self._linear(inner, width)
        attention += 2 * self._norm(self.head_dim) * self.qk_norm + self.heads * self.sinks + self._norm(width)
        mlp = self._linear(width, self.mlp_width * (1 + self.gated)) + self._linear(self.mlp_width, width)
        norm = self._norm(width)
        return layers * ((1 + cross) * attention + mlp + norm) + norm * self.norm_first

    def _attention_flops(self, layers: int, length: int) -> int:
        return 12 * layers * self.heads * self.head_dim * length

    @classmethod
    def preset(cls: type[Config], name: str, **changes: Any) -> Config:
        """One of `PRESETS`; `changes` are fields.

        Raises:
            ValueError: for another name.
        """
        if name not in cls.PRESETS:
            raise ValueError(f"{cls.__name__}: there is no preset {name!r}, only {', '.join(cls.PRESETS)}")
        return cls(**{**cls.PRESETS[name], **changes})

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The inverse of `dataclasses.asdict`.

        Raises:
            ValueError: for a name that is no field.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown field {', '.join(unknown)}")
        return cls(**values)

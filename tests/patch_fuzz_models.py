"""The models of the fuzz: hand-written ones, and tiny ones of transformers."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from patch_models import VOCABULARY, tiny_of
from torch import Tensor, nn

try:
    import transformers
except ImportError:
    transformers = None

CHANNELS = 16


class RMS(nn.Module):
    """An RMSNorm of nobody's, whose weight may be what is added to one."""

    def __init__(self, offset: float):
        super().__init__()
        self.weight, self.offset, self.eps = nn.Parameter(torch.full((CHANNELS,), 1 - offset)), offset, 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return ((self.offset + self.weight.float()) * wide).to(x.dtype)


class StepwiseGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(CHANNELS),
    "RMSNorm": lambda: nn.RMSNorm(CHANNELS, eps=1e-6),
    "weight": lambda: RMS(0.0),
    "1 + weight": lambda: RMS(1.0),
}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "SiLU": nn.SiLU, "GELU": nn.GELU, "stepwise GELU": StepwiseGELU, "ReLU": nn.ReLU, "Tanh": nn.Tanh
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self, causal: bool):
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS), causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if mask is not None and self.causal:
            mask = mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, activation: str):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b) for a, b in ((16, 24), (16, 24), (24, 16)))
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class PreNorm(nn.Module):
    """A block of a decoder."""

    def __init__(self, norm: str, activation: str):
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = (
            NORMS[norm](),
            Attention(True),
            NORMS[norm](),
            Gated(activation),
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Output(nn.Module):
    """The end of a block of BERT."""

    def __init__(self, size: int, norm: str):
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(size, CHANNELS), nn.Dropout(0.0), NORMS[norm]()

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dropout(self.dense(x)) + residual)


class PostNorm(nn.Module):
    """A block of BERT."""

    def __init__(self, norm: str, activation: str):
        super().__init__()
        self.attention, self.attended = Attention(False), Output(CHANNELS, norm)
        self.wide, self.act, self.output = nn.Linear(CHANNELS, 24), ACTIVATIONS[activation](), Output(24, norm)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attended(self.attention(x, mask), x)
        return self.output(self.act(self.wide(x)), x)


class Torchs(nn.Module):
    """torch's encoder layer."""

    def __init__(self, norm_first: bool, activation: str):
        super().__init__()
        made = ACTIVATIONS[activation]() if activation != "GELU" else "gelu"
        self.layer = nn.TransformerEncoderLayer(CHANNELS, 2, 24, 0.0, made, batch_first=True, norm_first=norm_first)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.layer(x, src_key_padding_mask=None if mask is None else ~mask[:, 0, 0])


class Multihead(nn.Module):
    def __init__(self, norm: str, weights: bool):
        super().__init__()
        self.norm, self.weights = NORMS[norm](), weights
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm(x)
        padding = None if mask is None else ~mask[:, 0, 0]
        return x + self.attention(y, y, y, key_padding_mask=padding, need_weights=self.weights)[0]


class Language(nn.Module):
    """Embeddings, blocks, a norm and a head; a loss where there are labels."""

    def __init__(self, blocks: list[nn.Module], norm: str):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(VOCABULARY, CHANNELS), nn.ModuleList(blocks)
        self.norm, self.head = NORMS[norm](), nn.Linear(CHANNELS, VOCABULARY, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:  # fmt: skip
        x, mask = self.embed(input_ids), None
        if attention_mask is not None:
            mask = attention_mask.bool()[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        logits = self.head(self.norm(x))
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=label_smoothing)
        return {"loss": loss, "logits": logits}


BLOCKS: dict[str, Callable[[random.Random], nn.Module]] = {
    "pre-norm": lambda rng: PreNorm(rng.choice(list(NORMS)), rng.choice(list(ACTIVATIONS))),
    "post-norm": lambda rng: PostNorm(rng.choice(list(NORMS)), rng.choice(list(ACTIVATIONS))),
    "TransformerEncoderLayer": lambda rng: Torchs(rng.random() < 0.5, rng.choice(list(ACTIVATIONS))),
    "MultiheadAttention": lambda rng: Multihead(rng.choice(list(NORMS)), rng.random() < 0.3),
}
TYPES = (
    "llama", "gpt2", "bert", "t5", "bart", "qwen3", "gemma2", "gpt_neox", "mistral", "phi3", "olmo2", "roberta"
)  # fmt: skip
"""Of transformers."""


@dataclass(frozen=True)
class Recipe:
    """What a pair of twins is made by."""

    kind: str
    seed: int
    dtype: torch.dtype
    layers: int
    eager: bool  # its attention, where it is a model of transformers

    def make(self) -> nn.Module:
        if self.kind in BLOCKS:
            torch.default_generator.manual_seed(self.seed)
            rng = random.Random(self.seed)
            blocks = [BLOCKS[self.kind](rng) for _ in range(self.layers)]
            model: nn.Module = Language(blocks, rng.choice(list(NORMS)))
            with torch.no_grad():  # norms whose weights are all one would hide a swap
                for p in model.parameters():
                    p.add_(torch.randn_like(p) * 0.1)
        else:
            model = copy.deepcopy(_template(self.kind, self.layers))
            if self.eager:
                model.set_attn_implementation("eager")
        return model.to(self.dtype)

    def __str__(self) -> str:
        layers = f"{self.layers} layer{'s' * (self.layers > 1)}"
        words = (self.kind, layers, str(self.dtype).removeprefix("torch."), "eager attention" if self.eager else "")
        return ", ".join(word for word in words if word)


def draw_recipe(rng: random.Random) -> Recipe:
    own = transformers is None or rng.random() < 0.6
    kind = rng.choice(list(BLOCKS) if own else TYPES)
    dtype = torch.bfloat16 if rng.random() < 0.12 else torch.float32
    layers = 1 if rng.random() < 0.7 else 2
    return Recipe(kind, rng.randrange(1000), dtype, layers, not own and rng.random() < 0.25)


@functools.cache
def _template(kind: str, layers: int) -> nn.Module:
    model = tiny_of(kind)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(part.isdigit() for part in path.split(".")):
            del module[layers:]
    return model

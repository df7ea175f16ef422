"""A decoder-only transformer: GPT-2's architecture or Llama's, or what lies between, by configuration.

Letters in names of tensors: B batch, T positions of this call, S positions attended to, C width, H heads, D the width
of a head, V vocabulary, L layers, N documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastllm.nn
from fastllm import ops
from fastllm.models.sampling import sample_token

IGNORE = -100
"""The target that takes no part in the loss, as in torch.nn.functional.cross_entropy."""

_CHOICES = {
    "norm": ("layer_norm", "rms_norm"),
    "position": ("learned", "rotary"),
    "mlp": ("gelu", "swiglu"),
    "ops": ("fastllm", "torch"),
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a `GPT`. The defaults are GPT-2's smallest (124 million parameters).

    Attributes:
        vocab_size: number of tokens.
        context: the most positions that the model takes.
        layers, heads, width: number of blocks, of query heads, and of channels; heads divides width.
        kv_heads: number of key and value heads, a divisor of heads (grouped-query attention); None means heads.
        hidden: width inside the MLP; None means 4 * width for "gelu", and 8/3 * width rounded up to a multiple of 64,
            which has as many parameters, for "swiglu".
        norm: "layer_norm" or "rms_norm".
        position: "learned" or "rotary".
        mlp: "gelu" (its tanh form) or "swiglu".
        bias: whether linear layers and LayerNorm have one.
        dropout: probability, on embeddings, attention and what each block adds.
        tie_embeddings: whether the output layer shares the embedding's weight.
        qk_norm: whether each head's queries and keys are normalized before they meet, as in Qwen3 (Dehghani et al.,
            2023).
        norm_eps, rope_theta: as in the norms, and the base of the rotary frequencies.
        document_token: the token that ends a document, if rows hold several: attention then stays inside a document,
            and positions start anew in each, so that a packed row is worth what its documents are one by one. A
            KVCache, and so `generate`, takes what it holds for one document.
        ops: "fastllm" runs fused norms, attention, gates, rotary positions and loss, "torch" stock PyTorch. The
            state_dict is the same.

    Raises:
        ValueError: for a value that does not fit, naming it.
    """

    vocab_size: int = 50257
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    kv_heads: int | None = None
    hidden: int | None = None
    norm: str = "layer_norm"
    position: str = "learned"
    mlp: str = "gelu"
    qk_norm: bool = False
    bias: bool = True
    dropout: float = 0.0
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    document_token: int | None = None
    ops: str = "fastllm"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width", "num_kv_heads", "mlp_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"GPTConfig: {name} must be a positive int, got {value!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"GPTConfig: {name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.width % self.heads:
            raise ValueError(f"GPTConfig: heads must divide width, got heads={self.heads}, width={self.width}")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"GPTConfig: kv_heads must divide heads, got kv_heads={self.kv_heads}, heads={self.heads}")
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(f"GPTConfig: rotary positions need an even width / heads, got {self.head_dim}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPTConfig: dropout must be in [0, 1), got {self.dropout}")
        if self.document_token is not None and not 0 <= self.document_token < self.vocab_size:
            raise ValueError(
                f"GPTConfig: document_token must be a token, below vocab_size={self.vocab_size}, got "
                f"{self.document_token}"
            )
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"GPTConfig: {name} must be positive, got {getattr(self, name)}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def mlp_width(self) -> int:
        if self.hidden is not None:
            return self.hidden
        return 4 * self.width if self.mlp == "gelu" else math.ceil(8 * self.width / 3 / 64) * 64

    @classmethod
    def gpt2(cls, **changes: Any) -> GPTConfig:
        """GPT-2's architecture at its smallest size; `changes` are fields."""
        return cls(**changes)

    @classmethod
    def llama(cls, **changes: Any) -> GPTConfig:
        """Llama's architecture at the size of the smallest GPT-2; `changes` are fields."""
        llama = {"norm": "rms_norm", "position": "rotary", "mlp": "swiglu", "bias": False, "tie_embeddings": False}
        return cls(**{**llama, **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """The inverse of `dataclasses.asdict`.

        Raises:
            ValueError: for a name that is no field.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"GPTConfig: unknown field {', '.join(unknown)}")
        return cls(**values)


class KVCache:
    """The keys and values of every layer for up to `length` positions, allocated once."""

    def __init__(self, config: GPTConfig, batch: int, length: int, *, device: torch.device, dtype: torch.dtype):
        shape = (config.layers, batch, config.num_kv_heads, length, config.head_dim)
        self.k_LBHSD = torch.empty(shape, device=device, dtype=dtype)
        self.v_LBHSD = torch.empty(shape, device=device, dtype=dtype)
        self.filled = 0
        """Positions stored so far. The model advances it, once all layers have stored theirs."""

    def attend(self, layer: int, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, stock: bool) -> Tensor:
        """Appends this call's keys and values to the layer's; the queries attend to all up to their own position."""
        k_BHSD, v_BHSD = self.k_LBHSD[layer], self.v_LBHSD[layer]
        if not stock:
            return cast("Tensor", ops.attention_kvcache(q_BHTD, k_BHSD, v_BHSD, self.filled, k_BHTD, v_BHTD))
        # Under autocast they come in another dtype than the cache has.
        q_BHTD, k_BHTD, v_BHTD = (x.to(k_BHSD.dtype) for x in (q_BHTD, k_BHTD, v_BHTD))
        t = q_BHTD.shape[2]
        end = self.filled + t
        k_BHSD[:, :, self.filled : end] = k_BHTD
        v_BHSD[:, :, self.filled : end] = v_BHTD
        # is_causal would align the first query with the first key.
        mask_TS = torch.ones(t, end, dtype=torch.bool, device=q_BHTD.device).tril(self.filled) if t > 1 else None
        return F.scaled_dot_product_attention(
            q_BHTD,
            k_BHSD[:, :, :end],
            v_BHSD[:, :, :end],
            attn_mask=mask_TS,
            enable_gqa=q_BHTD.shape[1] != k_BHSD.shape[1],
        )


class Documents(NamedTuple):
    """Where the documents of a batch lie."""

    number_BT: Tensor  # of the document in its row
    positions_BT: Tensor  # in the document
    cu_N: Tensor | None  # (N + 1,) int32, where documents start in the flattened batch; None for stock attention
    longest: int

    @classmethod
    def of(cls, tokens_BT: Tensor, document_token: int, stock: bool) -> Documents:
        start_BT = torch.ones_like(tokens_BT, dtype=torch.bool)  # of a document: behind the token, or of the row
        start_BT[:, 1:] = tokens_BT[:, :-1] == document_token
        place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        positions_BT = place_T - torch.where(start_BT, place_T, 0).cummax(1).values
        cu_N = None
        if not stock:
            cu_N = F.pad(start_BT.flatten().nonzero()[:, 0], (0, 1), value=start_BT.numel()).int()
        return cls(start_BT.cumsum(1), positions_BT, cu_N, tokens_BT.shape[1])

    def mask_B1TT(self) -> Tensor:
        """True where a position sees another: earlier or the same, in its document."""
        t = self.number_BT.shape[1]
        same_BTT = self.number_BT[:, :, None] == self.number_BT[:, None, :]
        return (same_BTT & torch.ones(t, t, dtype=torch.bool, device=same_BTT.device).tril())[:, None]


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    module = fastllm.nn if config.ops == "fastllm" else nn
    if config.norm == "layer_norm":
        return module.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
    return module.RMSNorm(width, eps=config.norm_eps)


def add_norm(norm: nn.Module, x_BTC: Tensor, residual_BTC: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """Returns (norm(sum), sum), sum = dropout(x) + residual: fused where the norm knows how."""
    if isinstance(norm, (fastllm.nn.LayerNorm, fastllm.nn.RMSNorm)):
        return norm.add(x_BTC, residual_BTC, dropout)
    total_BTC = F.dropout(x_BTC, dropout) + residual_BTC if dropout else x_BTC + residual_BTC
    return norm(total_BTC), total_BTC


def rotary_tables(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / D), each (context, D / 2) in float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(torch.arange(config.context, dtype=torch.float64), config.rope_theta**-exponents)
    return angles.cos().float(), angles.sin().float()


def rotate(x_BTHD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021): turns the pair (x_i, x_(i + D/2)) by its angle, the layout of Llama's weights
    on Hugging Face."""
    a, b = x_BTHD.chunk(2, dim=-1)
    return torch.cat((a * cos_T1D - b * sin_T1D, b * cos_T1D + a * sin_T1D), dim=-1).to(x_BTHD.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.dropout, self.stock = layer, config.dropout, config.ops == "torch"
        self.heads, self.kv_heads, self.head_dim = config.heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=config.bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.out_proj = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(
        self,
        x_BTC: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        documents: Documents | None,
    ) -> Tensor:
        heads_BTHD = self.qkv_proj(x_BTC).unflatten(-1, (-1, self.head_dim))
        q_BTHD, k_BTHD, v_BTHD = heads_BTHD.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTHD = self.q_norm(q_BTHD), self.k_norm(k_BTHD)
        if rotary is not None and self.stock:
            q_BTHD, k_BTHD = (rotate(x, *(table.unsqueeze(-2) for table in rotary)) for x in (q_BTHD, k_BTHD))
        elif rotary is not None:
            q_BHTD, k_BHTD = ops.rotary(q_BTHD.transpose(1, 2), k_BTHD.transpose(1, 2), *rotary)
            q_BTHD, k_BTHD = q_BHTD.transpose(1, 2), k_BHTD.transpose(1, 2)
        return self.out_proj(self._attend(q_BTHD, k_BTHD, v_BTHD, cache, documents).flatten(2))

    def _attend(
        self,
        q_BTHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        cache: KVCache | None,
        documents: Documents | None,
    ) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        if documents is not None and documents.cu_N is not None:
            # Rows and documents alike are sequences of one packed batch.
            cu_N, longest = documents.cu_N, documents.longest
            packed = ops.attention_varlen(
                q_BTHD.flatten(0, 1),
                k_BTHD.flatten(0, 1),
                v_BTHD.flatten(0, 1),
                cu_N,
                cu_N,
                longest,
                longest,
                is_causal=True,
                enable_gqa=self.heads != self.kv_heads,
                dropout_p=dropout_p,
            )
            return cast("Tensor", packed).unflatten(0, q_BTHD.shape[:2])
        q_BHTD, k_BHTD, v_BHTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
        if cache is not None:
            y_BHTD = cache.attend(self.layer, q_BHTD, k_BHTD, v_BHTD, self.stock)
        else:
            attention: Any = F.scaled_dot_product_attention if self.stock else ops.attention
            y_BHTD = attention(
                q_BHTD,
                k_BHTD,
                v_BHTD,
                attn_mask=None if documents is None else documents.mask_B1TT(),
                dropout_p=dropout_p,
                is_causal=documents is None,
                enable_gqa=self.heads != self.kv_heads,
            )
        return y_BHTD.transpose(1, 2)


class MLP(nn.Module):
    """down(gelu(up(x))), or down(silu(gate) * up) with gate and up from one projection (Shazeer, 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gated, self.stock = config.mlp == "swiglu", config.ops == "torch"
        self.up_proj = nn.Linear(config.width, config.mlp_width * (2 if self.gated else 1), bias=config.bias)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        hidden = self.up_proj(x_BTC)
        if self.gated and not self.stock:
            return self.down_proj(ops.swiglu(hidden))
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.gelu(hidden, approximate="tanh"))


class Block(nn.Module):
    """A pre-norm block that hands on what it would add, so that dropout and addition fuse with the next norm."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(config, config.width)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(
        self,
        delta_BTC: Tensor | None,
        residual_BTC: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns (what is still to be added, the sum so far); the first block has nothing to add."""
        dropout = self.dropout if self.training else 0.0
        if delta_BTC is None:
            x_BTC = self.attention_norm(residual_BTC)
        else:
            x_BTC, residual_BTC = add_norm(self.attention_norm, delta_BTC, residual_BTC, dropout)
        delta_BTC = self.attention(x_BTC, rotary, cache, documents)
        x_BTC, residual_BTC = add_norm(self.mlp_norm, delta_BTC, residual_BTC, dropout)
        return self.mlp(x_BTC), residual_BTC


class Embedding(nn.Embedding):
    """An embedding whose table serves other purposes, too: a tied head, positions that are added. They are computed in
    its forward, around which alone FSDP2 gathers what it shards."""

    def forward(self, x: Any, use: Callable[[Any, Tensor], Tensor] | None = None) -> Tensor:
        """The rows of `x`, or use(x, table)."""
        return super().forward(x) if use is None else use(x, self.weight)


class Head(nn.Linear):
    """The output layer, which computes in its forward whatever needs its weight: logits, or their loss."""

    def forward(self, x_BTC: Tensor, use: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        return super().forward(x_BTC) if use is None else use(x_BTC, self.weight)


def with_weight(module: Any, x: Any, use: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """use(x, weight), in the module's forward if it is one of the above, and not what somebody put in its place."""
    return module(x, use) if isinstance(module, (Embedding, Head)) else use(x, module.weight)


class GPT(nn.Module):
    """A decoder-only language model.

    Weights start as GPT-2's: normal with standard deviation 0.02, and 0.02 / sqrt(2 * layers) where a block adds to the
    residual; biases at zero.
    """

    cos_SD: Tensor
    sin_SD: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.positions = Embedding(config.context, config.width) if config.position == "learned" else None
        if config.position == "rotary":
            cos_SD, sin_SD = rotary_tables(config)
            self.register_buffer("cos_SD", cos_SD, persistent=False)
            self.register_buffer("sin_SD", sin_SD, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config, config.width)
        # Tied, the head is no parameter of its own: nothing is saved twice.
        self.head = None if config.tie_embeddings else Head(config.width, config.vocab_size, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                scale = math.sqrt(2 * self.config.layers) if name.endswith(("out_proj", "down_proj")) else 1.0
                nn.init.normal_(module.weight, std=0.02 / scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> GPT:
        super()._apply(fn, recurse)
        if self.config.position == "rotary":  # angles stay in float32, whatever the weights are moved to
            device = self.cos_SD.device
            if device.type != "meta":
                self.cos_SD, self.sin_SD = (table.to(device) for table in rotary_tables(self.config))
        return self

    def documents(self, tokens_BT: Tensor) -> Documents | None:
        """Where the documents of these tokens lie; None for a model that does not look."""
        if self.config.document_token is None:
            return None
        return Documents.of(tokens_BT, self.config.document_token, self.config.ops == "torch")

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        reduction: str = "mean",
        cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Logits, or the loss where targets are given.

        Args:
            tokens_BT: (B, T) integers; T plus what the cache holds is at most `config.context`.
            targets_BT: (B, T) int64, the token after each; -100 takes no part in the loss.
            reduction: "mean" over the valid targets (NaN where there is none), or "sum".
            cache: holds the positions before these; these are appended to it.
            documents: `self.documents(tokens_BT)`, which a compiled model cannot find by itself without leaving its
                graph; found here unless given.

        Returns:
            (B, T, V) logits, or the cross-entropy in nats, a float32 scalar.

        Raises:
            ValueError: for tokens that are not (B, T) or longer than the context.
        """
        start = 0 if cache is None else cache.filled
        if tokens_BT.ndim != 2:
            raise ValueError(f"GPT: tokens must have shape (B, T), got {tuple(tokens_BT.shape)}")
        end = start + tokens_BT.shape[1]
        if end > self.config.context:
            raise ValueError(f"GPT: {end} positions do not fit into the context of {self.config.context}")
        at: Tensor | slice = slice(start, end)
        if documents is None and cache is None:
            documents = self.documents(tokens_BT)
        if documents is not None:
            at = documents.positions_BT
        residual_BTC = self.embedding(tokens_BT)
        rotary = None
        if self.positions is not None:
            # Added in there: a slice of the table would be a view of memory that is freed behind the forward.
            residual_BTC = with_weight(self.positions, residual_BTC, lambda x_BTC, table_SC: x_BTC + table_SC[at])
        else:
            rotary = self.cos_SD[at], self.sin_SD[at]
        residual_BTC = self.dropout(residual_BTC)
        delta_BTC = None
        for block in self.blocks:
            delta_BTC, residual_BTC = block(delta_BTC, residual_BTC, rotary, cache, documents)
        assert delta_BTC is not None  # there is a block at least
        x_BTC, _ = add_norm(self.norm, delta_BTC, residual_BTC, self.config.dropout if self.training else 0.0)
        if cache is not None:
            cache.filled = end
        head = self.embedding if self.head is None else self.head
        # An adapter around the head has more to it than a weight.
        plain = isinstance(head, (Embedding, Head)) or type(head) in (nn.Linear, nn.Embedding)
        if targets_BT is not None and self.config.ops == "fastllm" and plain:

            def loss(x_BTC: Tensor, weight_VC: Tensor) -> Tensor:  # the logits are not held whole
                found = ops.linear_cross_entropy(
                    x_BTC, weight_VC, targets_BT, ignore_index=IGNORE, reduction=reduction, dtype=torch.float32
                )
                return cast("Tensor", found)

            return with_weight(head, x_BTC, loss)
        logits_BTV = with_weight(head, x_BTC, F.linear) if self.head is None else self.head(x_BTC)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORE, reduction=reduction
        )

    @torch.no_grad()
    def generate(
        self,
        tokens_BT: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: int | Collection[int] | None = None,
    ) -> Tensor:
        """Continues each row, one token at a time, with a KV cache and without dropout.

        Args:
            tokens_BT: (B, T) prompts of one length, T at least 1.
            max_new_tokens: how many to append at most; with the prompt they must fit into the context.
            temperature, top_k, top_p: as `sample_token`; temperature 0 is greedy.
            seed: of a generator of this call's own, so that the same seed gives the same tokens; None draws from
                torch's global generator.
            stop: a token, or several, that end a row. The row is filled up with the one it stopped at; generation ends
                when all rows have stopped.

        Returns:
            (B, T + n) int64, prompt and continuation, n at most max_new_tokens.

        Raises:
            ValueError: for an empty or too long prompt, tokens outside the vocabulary, or arguments out of range.
        """
        if tokens_BT.ndim != 2 or tokens_BT.numel() == 0:
            raise ValueError(f"generate: the prompt must have shape (B, T), not empty, got {tuple(tokens_BT.shape)}")
        if max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens must not be negative, got {max_new_tokens}")
        batch, prompt = tokens_BT.shape
        if prompt + max_new_tokens > self.config.context:
            raise ValueError(
                f"generate: {prompt} prompt tokens + {max_new_tokens} new ones do not fit into the context of "
                f"{self.config.context}"
            )
        low, high = (int(bound) for bound in tokens_BT.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"generate: token {low if low < 0 else high} is outside the vocabulary of {self.config.vocab_size}"
            )
        device = tokens_BT.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        stops = torch.tensor([stop] if isinstance(stop, int) else sorted(stop or ()), dtype=torch.int64, device=device)
        stopped_B = torch.zeros(batch, dtype=torch.bool, device=device)
        cache = KVCache(self.config, batch, prompt + max_new_tokens, device=device, dtype=self.embedding.weight.dtype)
        output_BT = tokens_BT.long()
        training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                logits_BTV = self(output_BT[:, cache.filled :], cache=cache)
                next_B = sample_token(
                    logits_BTV[:, -1], temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
                )
                next_B = torch.where(stopped_B, output_BT[:, -1], next_B)
                output_BT = torch.cat((output_BT, next_B[:, None]), dim=1)
                if stops.numel():
                    stopped_B |= torch.isin(next_B, stops)
                    if stopped_B.all():
                        break
        finally:
            self.train(training)
        return output_BT

"""A decoder-only transformer: GPT-2's architecture or Llama's, or what lies between, by configuration.

Letters in names of tensors as in `fastllm.models.layers`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastllm.models.config import ModelConfig
from fastllm.models.layers import (
    Block,
    Embedding,
    Linear,
    Model,
    Scope,
    add_positions,
    check_ids,
    check_tokens,
    evaluating,
    init_weights,
    logits_or_loss,
    make_norm,
    make_positions,
    rotary_at,
    run_blocks,
)
from fastllm.models.layout import KVCache, Layout
from fastllm.models.sampling import sample_token

LLAMA = {"norm": "rms_norm", "position": "rotary", "mlp": "swiglu", "bias": False, "tie_embeddings": False}


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelConfig):
    """The shape of a `GPT`. The defaults are GPT-2's smallest (124 million parameters); `PRESETS` has others.

    Attributes, beside those of `ModelConfig`:
        document_token: the token that ends a document, if rows hold several: attention then stays inside a document,
            and positions start anew in each, so that a packed row is worth what its documents are one by one. A
            KVCache, and so `generate`, takes what it holds for one document.

    Raises:
        ValueError: for a value that does not fit, naming it.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-124m": {},
        "gpt2-355m": {"layers": 24, "heads": 16, "width": 1024},
        "gpt2-774m": {"layers": 36, "heads": 20, "width": 1280},
        "gpt2-1558m": {"layers": 48, "heads": 25, "width": 1600},
        "llama-160m": {**LLAMA, "vocab_size": 32000, "context": 2048, "hidden": 3072},
    }
    """By name: GPT-2's four sizes (Radford et al., 2019), and Llama's architecture (Touvron et al.,
    2023) with the layers and width of the smallest of them, and a vocabulary of its own."""

    document_token: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_token("document_token")
        if not self.norm_first or self.position == "relative":
            wrong = "norm_first=False" if not self.norm_first else "position='relative'"
            raise ValueError(f"GPTConfig: {wrong} is for other models")

    def num_parameters(self) -> int:
        tables = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        return tables + self._positions() + self._blocks(self.layers)

    def flops_per_token(self, length: int) -> int:
        seen = length if self.window is None else min(length, self.window)
        weights = self._blocks(self.layers) + self.vocab_size * self.width
        return 6 * weights + self._attention_flops(self.layers, seen)

    @classmethod
    def gpt2(cls, **changes: Any) -> GPTConfig:
        """GPT-2's architecture at its smallest size; `changes` are fields."""
        return cls(**changes)

    @classmethod
    def llama(cls, **changes: Any) -> GPTConfig:
        """Llama's architecture at the size of the smallest GPT-2; `changes` are fields."""
        return cls(**{**LLAMA, **changes})


class GPT(Model):
    """A decoder-only language model.

    Weights start as GPT-2's: normal with standard deviation 0.02, and 0.02 / sqrt(2 * layers) where a block adds to the
    residual; biases at zero.
    """

    config: GPTConfig

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.positions, self.tables = make_positions(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer, causal=True) for layer in range(config.layers))
        self.norm = make_norm(config, config.width)
        # Tied, the head is no parameter of its own: nothing is saved twice.
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, bias=False)
        init_weights(self, config.layers)

    def prepare(self, inputs: Tensor, targets: Any = None, **more: Any) -> dict[str, Any]:
        check_tokens("GPT", inputs, self.config.vocab_size, self.config.context)
        documents = self.documents(inputs)
        return more if documents is None else {"documents": documents, **more}

    def documents(self, tokens_BT: Tensor) -> Layout | None:
        """Where the documents of these tokens lie; None for a model that does not look."""
        if self.config.document_token is None:
            return None
        return Layout.of_documents(tokens_BT, self.config.document_token, packed=self.config.ops == "fastllm")

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        reduction: str = "mean",
        cache: KVCache | None = None,
        documents: Layout | None = None,
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
            ValueError: for tokens that are not (B, T), longer than the context, or (on the CPU) outside the vocabulary.
        """
        start = 0 if cache is None else cache.filled
        check_tokens("GPT", tokens_BT, self.config.vocab_size, self.config.context, start)
        if documents is None and cache is None:
            documents = self.documents(tokens_BT)
        layout = Layout.whole(tokens_BT, start) if documents is None else documents
        at = layout.positions
        x_BTC = self.dropout(add_positions(self.embedding(tokens_BT), at, self.positions, self.tables))
        scope = Scope(layout, rotary_at(at, self.tables), cache=cache)
        dropout = self.config.dropout if self.training else 0.0
        x_BTC = run_blocks(self.blocks, self.norm, x_BTC, scope, dropout)
        if cache is not None:
            cache.filled = start + tokens_BT.shape[1]
        head = self.embedding if self.head is None else self.head
        return logits_or_loss(
            self.config, head, x_BTC, targets_BT, reduction=reduction, label_smoothing=self.label_smoothing
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
        check_ids("generate", tokens_BT, self.config.vocab_size)
        device = tokens_BT.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        stops = torch.tensor([stop] if isinstance(stop, int) else sorted(stop or ()), dtype=torch.int64, device=device)
        stopped_B = torch.zeros(batch, dtype=torch.bool, device=device)
        cache = KVCache(self.config, batch, prompt + max_new_tokens, device=device, dtype=self.embedding.weight.dtype)
        output_BT = tokens_BT.long()
        with evaluating(self):
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
        return output_BT

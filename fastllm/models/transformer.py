"""The encoder-decoder Transformer (Vaswani et al., 2017), and its relatives BART, Marian and T5 by configuration.

Letters in names of tensors as in `fastllm.models.layers`; S are positions of the source, T of the target.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastllm.models.beam import Hypotheses, beam_search
from fastllm.models.config import ModelConfig, check_positive
from fastllm.models.layers import (
    IGNORE,
    Block,
    Embedding,
    Linear,
    Model,
    RelativeBias,
    Scope,
    add_positions,
    check_tokens,
    evaluating,
    logits_or_loss,
    make_norm,
    make_positions,
    rotary_at,
    run_blocks,
)
from fastllm.models.layout import KVCache, Layout
from fastllm.models.sampling import sample_token


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """The shape of a `Transformer`. The defaults are the base model of Vaswani et al.

    Attributes, beside those of `ModelConfig` (of which `layers` counts the decoder's blocks):
        encoder_layers: blocks of the encoder; None means `layers`.
        source_vocab_size: tokens of the source, which then has an embedding of its own; None shares the target's.
        pad_token: fills sources and targets up to one length; never a target of its own.
        start_token: what a target begins with; None means `pad_token`, as Marian and T5 have it.
        end_token: what a target ends with.
        scale_embedding: multiply embeddings by sqrt(width).
        embedding_norm: a norm behind the embeddings, as BART has.
        position_offset: rows of learned positions before the first token's, as BART has.
        logits_bias: a bias of the logits that is not trained, as Marian and BART have.
        scale_logits: multiply the decoder's output by width^-0.5 before a tied output layer, as T5 does.
        relative_buckets, relative_distance: of position="relative", as in T5.

    Raises:
        ValueError: for a value that does not fit, naming it.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "transformer-base": {"layers": 6, "heads": 8, "width": 512},
        "transformer-big": {"layers": 6, "heads": 16, "width": 1024, "dropout": 0.3},
        "transformer-small": {"layers": 4, "heads": 4, "width": 256},
    }
    """By name: the two models of Vaswani et al., 2017, and one for small data."""

    vocab_size: int = 37000
    context: int = 512
    layers: int = 6
    heads: int = 8
    width: int = 512
    norm_first: bool = False
    position: str = "sinusoidal"
    mlp: str = "relu"
    dropout: float = 0.1
    label_smoothing: float = 0.1
    encoder_layers: int | None = None
    source_vocab_size: int | None = None
    pad_token: int = 0
    start_token: int | None = None
    end_token: int = 1
    scale_embedding: bool = True
    embedding_norm: bool = False
    position_offset: int = 0
    logits_bias: bool = False
    scale_logits: bool = False
    relative_buckets: int = 32
    relative_distance: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_encoder_layers", "num_source_tokens", "relative_buckets", "relative_distance")
        for name in ("pad_token", "start_token", "end_token"):
            self._check_token(name)
        if not 0 <= self.pad_token < self.num_source_tokens:
            raise ValueError(
                f"TransformerConfig: pad_token must be a token of the source, too, got {self.pad_token} of "
                f"{self.num_source_tokens}"
            )
        if self.position_offset < 0 or (self.position_offset and self.position != "learned"):
            raise ValueError(
                f"TransformerConfig: position_offset is at least 0, and for learned positions, got "
                f"{self.position_offset} with {self.position!r}"
            )
        if self.relative_buckets < 4 or self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"TransformerConfig: relative_buckets is at least 4, relative_distance more than half of it, got "
                f"{self.relative_buckets} and {self.relative_distance}"
            )

    @property
    def num_encoder_layers(self) -> int:
        return self.layers if self.encoder_layers is None else self.encoder_layers

    @property
    def num_source_tokens(self) -> int:
        return self.vocab_size if self.source_vocab_size is None else self.source_vocab_size

    @property
    def first_token(self) -> int:
        return self.pad_token if self.start_token is None else self.start_token

    def num_parameters(self) -> int:
        tables = self.vocab_size * (1 if self.tie_embeddings else 2)
        tables += self.num_source_tokens if self.source_vocab_size is not None else 0
        side = self._positions() + self._norm(self.width) * self.embedding_norm
        if self.position == "learned":
            side += self.position_offset * self.width
        elif self.position == "relative":
            side += self.relative_buckets * self.heads
        blocks = self._blocks(self.num_encoder_layers) + self._blocks(self.layers, cross=True)
        return tables * self.width + 2 * side + blocks

    def flops_per_token(self, length: int) -> int:
        """As `ModelConfig.flops_per_token`, of a source and a target that have `length` tokens each, for each of these
        2 * length: half of what the encoder, the decoder and the output layer take of a token."""
        weights = self._blocks(self.num_encoder_layers) + self._blocks(self.layers, cross=True)
        seen = length if self.window is None else min(length, self.window)
        attention = self._attention_flops(self.num_encoder_layers + self.layers, length)  # and across
        attention += self._attention_flops(self.layers, seen)
        return (6 * (weights + self.vocab_size * self.width) + attention) // 2


class Layouts(NamedTuple):
    """Where source and target tokens lie among their padding; the target None where it is decoded token by token."""

    source: Layout
    target: Layout | None


class Side(nn.Module):
    """The encoder or the decoder: what is added to embeddings, blocks, and the norm behind them."""

    def __init__(self, config: TransformerConfig, layers: int, decoder: bool):
        super().__init__()
        self.config = config
        self.positions, self.tables = make_positions(config, config.position_offset)
        relative = config.position == "relative"
        self.relative = RelativeBias(config, causal=decoder) if relative else None
        self.embedding_norm = make_norm(config, config.width) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i, causal=decoder, cross=decoder) for i in range(layers))
        self.norm = make_norm(config, config.width) if config.norm_first else None

    def forward(self, x: Tensor, scope: Scope) -> Tensor:
        """Embeddings to hidden states, (B, T, C), or (1, N, C) where the layout leaves padding out."""
        at = scope.layout.at(self.config.position_offset)
        x = add_positions(x, at, self.positions, self.tables)
        x = self.dropout(x if self.embedding_norm is None else self.embedding_norm(x))
        start = 0 if scope.cache is None else scope.cache.filled
        bias = None if self.relative is None else self.relative(x.shape[1], start + x.shape[1])
        scope = scope._replace(rotary=rotary_at(at, self.tables), bias=bias)
        return run_blocks(self.blocks, self.norm, x, scope, self.config.dropout if self.training else 0.0)


class Transformer(Model):
    """A model of one sequence given another. On fastllm's ops, what pads sources and targets is left out: attention
    runs over packed sequences, everything else over tokens alone.

    Weights start as in Vaswani et al.'s own code: Xavier's uniform for matrices, and embeddings normal with standard
    deviation width^-0.5.
    """

    config: TransformerConfig
    logits_bias: Tensor | None

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        # As in Marian and BART, where a start token may be the pad token, what is looked up of this gets no gradient.
        pad = None if config.position == "relative" else config.pad_token
        self.embedding = Embedding(config.vocab_size, config.width, padding_idx=pad)
        own = config.source_vocab_size is not None
        self.source_embedding = Embedding(config.num_source_tokens, config.width, padding_idx=pad) if own else None
        self.encoder = Side(config, config.num_encoder_layers, decoder=False)
        self.decoder = Side(config, config.layers, decoder=True)
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("logits_bias", torch.zeros(config.vocab_size) if config.logits_bias else None)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=config.width**-0.5)

    def prepare(
        self, inputs: Tensor, targets: Any = None, *, source_mask_BS: Tensor | None = None, **more: Any
    ) -> dict[str, Any]:
        return {"layouts": self.layouts(inputs, targets, source_mask_BS), **more}

    def positions_computed(self, inputs: Tensor, options: dict[str, Any]) -> int:
        """Of both sides."""
        return sum(layout.computed for layout in options["layouts"])

    def count(self, targets: Any) -> int:
        return super().count(targets.masked_fill(targets == self.config.pad_token, IGNORE))

    @property
    def _packs(self) -> bool:
        # A bias of the scores is made for rows.
        return self.config.ops == "fastllm" and self.config.position != "relative"

    def shifted(self, targets_BT: Tensor) -> Tensor:
        """What the decoder is given to predict these targets: the start token, and all but the last of them."""
        tokens_BT = torch.full_like(targets_BT, self.config.first_token)
        tokens_BT[:, 1:] = targets_BT[:, :-1].masked_fill(targets_BT[:, :-1] == IGNORE, self.config.pad_token)
        return tokens_BT

    def layouts(
        self, source_BS: Tensor, targets_BT: Tensor | None = None, source_mask_BS: Tensor | None = None
    ) -> Layouts:
        """Where source and target tokens lie: `source_mask_BS` or what is not `pad_token`; of a target, what is not
        behind its last valid token.

        Raises:
            ValueError: as `forward`.
        """
        config = self.config
        check_tokens("Transformer", source_BS, config.num_source_tokens, config.context, what="source")
        mask_BS = source_BS != config.pad_token if source_mask_BS is None else source_mask_BS.bool()
        if mask_BS.shape != source_BS.shape:
            raise ValueError(f"Transformer: source has shape {tuple(source_BS.shape)}, its mask {tuple(mask_BS.shape)}")
        source = Layout.of_padded("Transformer: source", mask_BS, self._packs)
        if targets_BT is None:
            return Layouts(source, None)
        if targets_BT.ndim != 2 or targets_BT.shape[0] != source_BS.shape[0]:
            raise ValueError(
                f"Transformer: source has shape {tuple(source_BS.shape)}, targets {tuple(targets_BT.shape)}"
            )
        valid_BT = (targets_BT != IGNORE) & (targets_BT != config.pad_token)
        mask_BT = valid_BT.flip(1).cumsum(1).flip(1) > 0
        target = Layout.of_padded("Transformer: targets", mask_BT, self._packs)
        if not self._packs:
            return Layouts(source, Layout.whole(targets_BT))  # what is behind the last token, nobody before it sees
        if (source.kept_N is None) != (target.kept_N is None):  # both sides are packed, or neither is
            source = Layout.of_padded("", mask_BS, True, always=True)
            target = Layout.of_padded("", mask_BT, True, always=True)
        return Layouts(source, target)

    def encode(self, source_BS: Tensor, layout: Layout) -> Tensor:
        """The encoder's output (B, S, C), or where `layout` leaves padding out (1, N, C)."""
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        return self.encoder(self._embed(embedding, layout.pack(source_BS)), Scope(layout))

    def _embed(self, embedding: Embedding, tokens: Tensor) -> Tensor:
        x = embedding(tokens)
        return x * math.sqrt(self.config.width) if self.config.scale_embedding else x

    def decode(
        self,
        tokens_BT: Tensor,
        memory: Tensor,
        layouts: Layouts,
        targets_BT: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Logits (B, T, V) behind the tokens, given what `encode` returned; with targets their loss."""
        start = 0 if cache is None else cache.filled
        target = Layout.whole(tokens_BT, start) if layouts.target is None else layouts.target
        scope = Scope(target, cache=cache, memory=memory, memory_layout=layouts.source)
        x = self.decoder(self._embed(self.embedding, target.pack(tokens_BT)), scope)
        if cache is not None:
            cache.filled = start + tokens_BT.shape[1]
        if self.config.scale_logits:
            x = x * self.config.width**-0.5
        found = logits_or_loss(
            self.config,
            self.embedding if self.head is None else self.head,
            x,
            None if targets_BT is None else target.pack(targets_BT),
            bias=self.logits_bias,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return target.unpack(found) if targets_BT is None else found

    def forward(
        self,
        source_BS: Tensor,
        targets_BT: Tensor | None = None,
        *,
        tokens_BT: Tensor | None = None,
        source_mask_BS: Tensor | None = None,
        reduction: str = "mean",
        label_smoothing: float | None = None,
        layouts: Layouts | None = None,
    ) -> Tensor:
        """Logits, or the loss where targets are given.

        Args:
            source_BS: (B, S) integers, S at most `config.context`.
            targets_BT: (B, T) int64, T at most `config.context`, each with its end token; -100 and the pad token take
                no part in the loss.
            tokens_BT: (B, T), what the decoder is given; unless given, the start token and the targets up to the last
                (teacher forcing).
            source_mask_BS: (B, S), true for a token, false for padding; unless given, padding is `config.pad_token`.
            reduction: "mean" over the valid targets or "sum".
            label_smoothing: None is the configuration's in training, and none in evaluation.
            layouts: `self.layouts(source_BS, targets_BT, source_mask_BS)`, which a compiled model cannot find by itself
                without leaving its graph; found here unless given.

        Returns:
            (B, T, V) logits, or the cross-entropy in nats, a float32 scalar.

        Raises:
            ValueError: for shapes that do not fit, tokens outside the vocabulary (on the CPU), too many positions, and
                sources or targets that are all padding.
        """
        if tokens_BT is None:
            if targets_BT is None:
                raise ValueError("Transformer: give targets, or tokens for the decoder")
            if targets_BT.ndim != 2 or targets_BT.numel() == 0:
                shape = tuple(targets_BT.shape)
                raise ValueError(f"Transformer: targets must have shape (B, T), not empty, got {shape}")
            tokens_BT = self.shifted(targets_BT)
        if targets_BT is not None:
            targets_BT = targets_BT.masked_fill(targets_BT == self.config.pad_token, IGNORE)
        if targets_BT is not None and targets_BT.shape != tokens_BT.shape:
            shapes = f"{tuple(targets_BT.shape)}, the decoder's tokens {tuple(tokens_BT.shape)}"
            raise ValueError(f"Transformer: targets have shape {shapes}")
        check_tokens("Transformer", tokens_BT, self.config.vocab_size, self.config.context, what="target tokens")
        if layouts is not None:
            check_tokens("Transformer", source_BS, self.config.num_source_tokens, self.config.context, what="source")
            layouts.source.check("Transformer: source", source_BS)
            if layouts.target is not None:
                layouts.target.check("Transformer: targets", tokens_BT)
        else:
            layouts = self.layouts(source_BS, targets_BT, source_mask_BS)
        if layouts.source.kept_N is not None and layouts.target is None:
            every_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
            layouts = layouts._replace(target=Layout.of_padded("", every_BT, True, always=True))
        if label_smoothing is None:
            label_smoothing = self.label_smoothing
        memory = self.encode(source_BS, layouts.source)
        return self.decode(tokens_BT, memory, layouts, targets_BT, reduction=reduction, label_smoothing=label_smoothing)

    @torch.no_grad()
    def generate(
        self,
        source_BS: Tensor,
        max_new_tokens: int | None = None,
        *,
        source_mask_BS: Tensor | None = None,
        beams: int = 1,
        n_best: int = 1,
        length_penalty: float = 1.0,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        forbidden: Collection[int] | None = None,
        force_end: bool = False,
    ) -> Hypotheses:
        """Targets for these sources, without dropout; keys and values of what was decoded, and of the source, are kept.

        Args:
            source_BS, source_mask_BS: as `forward`.
            max_new_tokens: how many at most, the end token counted in; None is what fits into the context.
            beams: more than 1 searches (`beam_search`); 1 takes one token after another: the most likely, or with a
                temperature one that is drawn.
            n_best, length_penalty, force_end: as `beam_search`.
            temperature, top_k, top_p: as `sample_token`, with one beam.
            seed: as `GPT.generate`.
            forbidden: tokens that are never chosen; None is the pad token.

        Returns:
            Tokens (B, n_best, T), behind the start token, filled up with the pad token behind the end token; and their
            scores.

        Raises:
            ValueError: for arguments out of range, and as `forward`.
        """
        config = self.config
        room = config.context
        max_new_tokens = room if max_new_tokens is None else max_new_tokens
        if not 1 <= max_new_tokens <= room:
            raise ValueError(f"generate: max_new_tokens must be in [1, {room}], got {max_new_tokens}")
        if beams < 1:
            raise ValueError(f"generate: beams must be at least 1, got {beams}")
        if beams > 1 and (temperature or top_k or top_p):
            raise ValueError(f"generate: temperature, top_k and top_p are for one beam, got beams={beams}")
        if beams == 1 and n_best != 1:
            raise ValueError(f"generate: n_best={n_best} needs as many beams, got 1")
        forbidden = (config.pad_token,) if forbidden is None else forbidden
        if outside := [token for token in forbidden if not 0 <= token < config.vocab_size]:
            raise ValueError(f"generate: forbidden token {outside[0]} is outside the vocabulary of {config.vocab_size}")
        if not math.isfinite(length_penalty):
            raise ValueError(f"generate: length_penalty must be finite, got {length_penalty}")
        with evaluating(self):
            source = self.layouts(source_BS, None, source_mask_BS).source
            memory_BSC = source.unpack(self.encode(source_BS, source)).repeat_interleave(beams, 0)
            # From here on decoders go step by step, and have rows of one length to attend to.
            mask_BS = source.tokens(source_BS.device).repeat_interleave(beams, 0)
            layouts = Layouts(Layout.of_padded("", mask_BS, packed=False), None)
            batch, device = source_BS.shape[0], source_BS.device
            cache = KVCache(config, batch * beams, max_new_tokens, device=device, dtype=memory_BSC.dtype)

            def step(tokens: Tensor, parents: Tensor | None) -> Tensor:
                if parents is not None:
                    cache.choose(parents)
                return self.decode(tokens, memory_BSC, layouts, cache=cache)[:, -1]

            start_B = torch.full((batch,), self.config.first_token, device=device)
            if beams > 1:
                return beam_search(
                    step,
                    start_B,
                    beams=beams,
                    max_new_tokens=max_new_tokens,
                    end_token=config.end_token,
                    pad_token=config.pad_token,
                    length_penalty=length_penalty,
                    n_best=n_best,
                    forbidden=forbidden,
                    force_end=force_end,
                )
            return self._generate_one(
                step, start_B, max_new_tokens, length_penalty, forbidden, force_end, seed,
                temperature=temperature, top_k=top_k, top_p=top_p,
            )  # fmt: skip

    def _generate_one(
        self,
        step: Any,
        start_B: Tensor,
        max_new_tokens: int,
        length_penalty: float,
        forbidden: Collection[int],
        force_end: bool,
        seed: int | None,
        **sampling: Any,
    ) -> Hypotheses:
        end, pad = self.config.end_token, self.config.pad_token
        generator = None if seed is None else torch.Generator(start_B.device).manual_seed(seed)
        done_B = torch.zeros_like(start_B, dtype=torch.bool)
        score_B = torch.zeros(start_B.shape, device=start_B.device)
        length_B = torch.zeros_like(start_B)
        tokens, output = start_B[:, None], []
        for length in range(1, max_new_tokens + 1):
            logits_BV = step(tokens, None).float()
            logits_BV[:, sorted(forbidden)] = -torch.inf
            if force_end and length == max_new_tokens:
                logits_BV.fill_(-torch.inf)[:, end] = 0
            next_B = sample_token(logits_BV, generator=generator, **sampling)
            logp_B = logits_BV.log_softmax(-1).gather(1, next_B[:, None])[:, 0]
            score_B = torch.where(done_B, score_B, score_B + logp_B)
            length_B += ~done_B
            output.append(next_B.masked_fill(done_B, pad))
            done_B |= next_B == end
            tokens = next_B[:, None]
            if done_B.all():
                break
        return Hypotheses(torch.stack(output, 1)[:, None], (score_B / length_B**length_penalty)[:, None])

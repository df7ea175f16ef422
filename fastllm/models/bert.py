"""BERT, a bidirectional encoder, its pre-training and its heads (Devlin et al., 2018).

Letters in names of tensors as in `fastllm.models.layers`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm.models.config import ModelConfig, check_positive
from fastllm.models.layers import (
    IGNORE,
    Block,
    Embedding,
    Linear,
    Model,
    Scope,
    add_positions,
    check_reduction,
    check_tokens,
    evaluating,
    gelu_of,
    init_weights,
    logits_or_loss,
    make_norm,
    make_positions,
    ops_of,
    rotary_at,
    run_blocks,
)
from fastllm.models.layout import Layout
from fastllm.tracing import host_values

HEADS = ("mlm", "pretraining", "classification", "tokens", "span")


@dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
    """The shape of a `Bert`. The defaults are the base size's (110 million parameters).

    Attributes, beside those of `ModelConfig`:
        token_types: how many kinds of segments there are; 0 for none.
        pad_token: what fills rows up, where `forward` is given no mask; None where nothing does.
        pooler: whether the first position's output goes through a linear layer and tanh before classification; None
            where the head needs it or there is none ("pretraining", "classification", None).
        head: "mlm" (masked tokens; its output layer is the embedding's weight), "pretraining" (that, and whether the
            second sentence follows the first), "classification" (of the sequence), "tokens" (of each token), "span"
            (start and end of an answer), or None for hidden states alone.
        labels: classes of "classification" and "tokens".
        head_dropout: before the classifier; None means `dropout`.

    Raises:
        ValueError: for a value that does not fit, naming it.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "bert-base": {},
        "bert-large": {"layers": 24, "heads": 16, "width": 1024},
        "bert-small": {"layers": 4, "heads": 8, "width": 512},
        "bert-mini": {"layers": 4, "heads": 4, "width": 256},
        "bert-tiny": {"layers": 2, "heads": 2, "width": 128},
    }
    """By name: BERT's two sizes, and three of the smaller ones of Turc et al., 2019."""

    vocab_size: int = 30522
    context: int = 512
    norm_first: bool = False
    mlp: str = "gelu_erf"
    dropout: float = 0.1
    norm_eps: float = 1e-12
    token_types: int = 2
    pad_token: int | None = 0
    pooler: bool | None = None
    head: str | None = "mlm"
    labels: int = 2
    head_dropout: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "labels")
        if not self.tie_embeddings:
            raise ValueError(
                "BertConfig: tie_embeddings=False is not there: the masked head has the embedding's weight"
            )
        self._check_token("pad_token")
        if self.head is not None and self.head not in HEADS:
            raise ValueError(f"BertConfig: head must be one of {HEADS} or None, got {self.head!r}")
        if self.token_types < 0:
            raise ValueError(f"BertConfig: token_types must not be negative, got {self.token_types}")
        if self.head_dropout is not None and not 0 <= self.head_dropout < 1:
            raise ValueError(f"BertConfig: head_dropout must be in [0, 1), got {self.head_dropout}")
        if self.label_smoothing and self.head == "span":
            wanted = "label_smoothing must be 0 for head='span', where padding has logits of -inf"
            raise ValueError(f"BertConfig: {wanted}, got {self.label_smoothing}")
        if self.position == "relative":
            raise ValueError("BertConfig: position='relative' is for encoder-decoder models")
        if self.head in ("pretraining", "classification") and not self.has_pooler:
            raise ValueError(f"BertConfig: head={self.head!r} needs a pooler, got pooler={self.pooler}")

    @property
    def has_pooler(self) -> bool:
        return self.head in ("pretraining", "classification", None) if self.pooler is None else self.pooler

    @property
    def num_outputs(self) -> int:
        """Of the head's last linear layer; 0 for "mlm" and None."""
        classes = {"classification": self.labels, "tokens": self.labels, "span": 2, "pretraining": 2}
        return classes.get(self.head or "", 0)

    def num_parameters(self) -> int:
        width = self.width
        tables = (self.vocab_size + self.token_types) * width + self._positions() + self._norm(width)
        head = self.num_outputs * (width + 1) + width * (width + 1) * self.has_pooler
        if self.head in ("mlm", "pretraining"):
            head += width * (width + 1) + self._norm(width) + self.vocab_size
        return tables + self._blocks(self.layers) + head

    def flops_per_token(self, length: int) -> int:
        """As `ModelConfig.flops_per_token`; of the heads, the masked one counts for 15% of the tokens, as many as
        `mask_tokens` chooses, and what sees one token of a row, the pooler and classification, not at all."""
        weights = self._blocks(self.layers) + self.num_outputs * self.width * (self.head in ("tokens", "span"))
        if self.head in ("mlm", "pretraining"):
            weights += (self.vocab_size + self.width) * self.width * 15 // 100
        return 6 * weights + self._attention_flops(self.layers, length)


class MaskedHead(nn.Module):
    """Masked tokens' logits from hidden states: a linear layer, GELU, a norm, the embedding's weight and a bias."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.dense = Linear(config.width, config.width)
        self.norm = make_norm(config, config.width)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, embedding: nn.Module, targets: Tensor | None, reduction: str) -> Tensor:
        x = self.norm(gelu_of(self.config, self.dense, x))
        smoothing = self.config.label_smoothing if self.training else 0.0
        return logits_or_loss(
            self.config, embedding, x, targets, bias=self.bias, reduction=reduction, label_smoothing=smoothing
        )


class Pooler(nn.Module):
    """tanh(linear(the first position's output))."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)

    def forward(self, first_BC: Tensor) -> Tensor:
        return torch.tanh(self.dense(first_BC))


class Bert(Model):
    """BERT with one of its heads. On fastllm's ops, what pads the rows is left out: attention runs over packed
    sequences, everything else over tokens alone."""

    config: BertConfig

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.token_types = Embedding(config.token_types, config.width) if config.token_types else None
        self.positions, self.tables = make_positions(config)
        self.embedding_norm = make_norm(config, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer, causal=False) for layer in range(config.layers))
        self.norm = make_norm(config, config.width) if config.norm_first else None
        self.pooler = Pooler(config) if config.has_pooler else None
        head = config.head
        self.masked_head = MaskedHead(config) if head in ("mlm", "pretraining") else None
        self.next_head = nn.Linear(config.width, 2) if head == "pretraining" else None
        outputs = config.num_outputs if self.next_head is None else 0
        self.head = nn.Linear(config.width, outputs) if outputs else None
        self.head_dropout = nn.Dropout(config.dropout if config.head_dropout is None else config.head_dropout)
        init_weights(self, 1 if not config.norm_first else config.layers)

    def prepare(
        self, inputs: Tensor, targets: Any = None, *, mask_BT: Tensor | None = None, **more: Any
    ) -> dict[str, Any]:
        layout = self.layout(inputs, mask_BT)
        options = {"layout": layout, **more}
        if targets is not None:
            self._check_targets(inputs, targets)
            if self.masked_head is not None:
                options["chosen_M"] = self.chosen(targets if self.config.head == "mlm" else targets[0], layout)
        return options

    def positions_computed(self, inputs: Tensor, options: dict[str, Any]) -> int:
        return options["layout"].computed

    def count(self, targets: Any) -> int:
        """As `Model.count`. With "span" a row counts as one, and needs both ends or neither; with "pretraining" the
        masked tokens count. Padding is taken to have no targets (-100)."""
        if self.config.head == "pretraining":
            targets = targets[0]
        valid = super().count(targets)
        return valid // 2 if self.config.head == "span" else valid

    def layout(self, tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Layout:
        """Where the tokens lie among the padding: `mask_BT` (True for a token), or what is not `pad_token`.

        Raises:
            ValueError: for what `forward` says of tokens and masks.
        """
        check_tokens("Bert", tokens_BT, self.config.vocab_size, self.config.context)
        if mask_BT is None:
            if self.config.pad_token is None:
                return Layout.whole(tokens_BT)
            mask_BT = tokens_BT != self.config.pad_token
        if mask_BT.shape != tokens_BT.shape:
            raise ValueError(f"Bert: mask has shape {tuple(mask_BT.shape)}, tokens {tuple(tokens_BT.shape)}")
        first_B = host_values(mask_BT[:, 0])
        if self.config.head in ("pretraining", "classification") and first_B is not None and not first_B.all():
            row = int((first_B == 0).nonzero()[0])
            raise ValueError(
                f"Bert: row {row} begins with padding, but head={self.config.head!r} reads the first position"
            )
        return Layout.of_padded("Bert", mask_BT.bool(), packed=self.config.ops == "fastllm")

    def chosen(self, targets_BT: Tensor, layout: Layout) -> Tensor:
        """The positions that "mlm" and "pretraining" predict, (M,) in the flattened batch that `layout` packs."""
        return _valid(_packed_targets(targets_BT, layout))

    def hidden(self, tokens_BT: Tensor, types_BT: Tensor | None, layout: Layout) -> Tensor:
        """The last hidden states, (B, T, C), or where `layout` leaves padding out (1, N, C)."""
        config = self.config
        if types_BT is not None and types_BT.shape != tokens_BT.shape:
            raise ValueError(f"Bert: types have shape {tuple(types_BT.shape)}, tokens {tuple(tokens_BT.shape)}")
        tokens, at = layout.pack(tokens_BT), layout.positions
        x_BTC = self.embedding(tokens)
        if self.token_types is not None:
            types = torch.zeros_like(tokens) if types_BT is None else layout.pack(types_BT)
            if types_BT is not None and (seen := host_values(types)) is not None:
                for bound in map(int, seen.aminmax()):
                    if not 0 <= bound < config.token_types:
                        raise ValueError(f"Bert: token types must be in [0, {config.token_types}), got {bound}")
            x_BTC = x_BTC + self.token_types(types)
        x_BTC = self.dropout(self.embedding_norm(add_positions(x_BTC, at, self.positions, self.tables)))
        dropout = config.dropout if self.training else 0.0
        return run_blocks(self.blocks, self.norm, x_BTC, Scope(layout, rotary_at(at, self.tables)), dropout)

    def forward(
        self,
        tokens_BT: Tensor,
        targets: Any = None,
        *,
        types_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        reduction: str = "mean",
        layout: Layout | None = None,
        chosen_M: Tensor | None = None,
    ) -> Any:
        """What the head gives, or its loss where targets are given.

        Args:
            tokens_BT: (B, T) integers, T at most `config.context`.
            targets: for "mlm" and "tokens" (B, T), -100 where a position takes no part; for "classification" (B,); for
                "span" (B, 2), the first and the last position of the answer; for "pretraining" a pair, (B, T) and (B,),
                1 where the second sentence does not follow the first. int64.
            types_BT: (B, T), which segment a token belongs to; zeros unless given.
            mask_BT: (B, T), true for a token, false for padding; unless given, padding is `config.pad_token`.
            reduction: "mean" over the valid targets (NaN where there is none) or "sum", which is the mean times
                `self.count(targets)`, of the second sentence as well.
            layout: `self.layout(tokens_BT, mask_BT)`, which a compiled model cannot find by itself without leaving its
                graph; found here unless given.
            chosen_M: `self.chosen(targets, layout)`, likewise.

        Returns:
            Without targets: "mlm" (B, T, V), "tokens" (B, T, labels), "classification" (B, labels), "span" (B, 2, T),
            "pretraining" (B, T, V) and (B, 2), no head (B, T, C). Logits of padding are 0, those of a span -inf. With
            targets the cross-entropy in nats, a float32 scalar ("span": mean of both ends; "pretraining": the sum).

        Raises:
            ValueError: for shapes that do not fit, tokens outside the vocabulary (on the CPU), too many positions, and
                rows that are all padding.
        """
        if layout is None:
            layout = self.layout(tokens_BT, mask_BT)
        else:
            check_tokens("Bert", tokens_BT, self.config.vocab_size, self.config.context)
            layout.check("Bert", tokens_BT)
        if targets is not None:
            self._check_targets(tokens_BT, targets)
        x = self.hidden(tokens_BT, types_BT, layout)
        head = self.config.head
        if head == "mlm":
            return self._masked(x, layout, targets, reduction, chosen_M)
        if head == "pretraining":
            masked, follows = (None, None) if targets is None else targets
            found = self._masked(x, layout, masked, reduction, chosen_M)
            assert self.next_head is not None
            next_logits_B2 = self.next_head(self._pooled(x, layout))
            if masked is None:
                return found, next_logits_B2
            loss = self.loss(next_logits_B2, follows, "mean")
            return found + (loss if reduction == "mean" else loss * (masked != IGNORE).sum())
        if self.head is None:
            return layout.unpack(x)
        if head == "classification":
            logits = self.head(self.head_dropout(self._pooled(x, layout)))
            return logits if targets is None else self.loss(logits, targets, reduction)
        logits = self.head(x if head == "span" else self.head_dropout(x))
        if head == "tokens":
            if targets is None:
                return layout.unpack(logits)
            return self.loss(logits, _packed_targets(targets, layout), reduction)
        return self._span(logits, layout, targets, reduction)

    def _check_targets(self, tokens_BT: Tensor, targets: Any) -> None:
        head, (rows, length) = self.config.head, tokens_BT.shape
        shapes = {"mlm": [(rows, length)], "tokens": [(rows, length)], "classification": [(rows,)], "span": [(rows, 2)]}
        shapes["pretraining"] = [(rows, length), (rows,)]
        if head is None:
            raise ValueError("Bert: a model without a head has no targets")
        given = targets if head == "pretraining" else (targets,)
        found = [tuple(target.shape) for target in given] if isinstance(given, (tuple, list)) else tuple(given.shape)
        if found != shapes[head]:
            raise ValueError(f"Bert: targets of head={head!r} must have shape {shapes[head]}, got {found}")

    def _masked(
        self, x: Tensor, layout: Layout, targets_BT: Tensor | None, reduction: str, chosen_M: Tensor | None
    ) -> Tensor:
        assert self.masked_head is not None
        if targets_BT is None:
            logits = self.masked_head(x, self.embedding, None, reduction)
            return layout.unpack(logits)
        targets = _packed_targets(targets_BT, layout)
        if chosen_M is None and not torch.compiler.is_compiling():
            chosen_M = _valid(targets)
        if chosen_M is not None:  # the head is the larger part of a small model, and one token in seven is masked
            x, targets = x.flatten(0, 1).index_select(0, chosen_M), targets.flatten()[chosen_M]
        return self.masked_head(x, self.embedding, targets, reduction)

    def _pooled(self, x: Tensor, layout: Layout) -> Tensor:
        """The pooler's output for each row's first token, (B, C)."""
        assert self.pooler is not None
        if layout.cu_seqlens is None:
            return self.pooler(x[:, 0])
        return self.pooler(x[0].index_select(0, layout.cu_seqlens[:-1].long()))

    def loss(self, logits: Tensor, targets: Any, reduction: str) -> Tensor:
        """The loss of a classifier's logits, as `forward` gives it where it is given the targets."""
        check_reduction(self.config, reduction)
        return ops_of(self.config).cross_entropy(
            logits.flatten(0, -2),
            targets.flatten(),
            ignore_index=IGNORE,
            reduction=reduction,
            label_smoothing=self.label_smoothing,
            dtype=torch.float32,
        )

    def _span(self, logits: Tensor, layout: Layout, targets_B2: Tensor | None, reduction: str) -> Tensor:
        logits = layout.unpack(logits, fill=-torch.inf)
        if layout.mask is not None:
            logits = logits.masked_fill(~layout.mask[:, 0, 0, :, None], -torch.inf)
        logits_B2T = logits.mT
        if targets_B2 is None:
            return logits_B2T
        check_reduction(self.config, reduction)
        ends_B2 = logits_B2T.gather(2, targets_B2.clamp(min=0)[..., None])[..., 0]
        if (seen := host_values(ends_B2.detach())) is not None and (seen == -torch.inf).any():
            raise ValueError(f"Bert: the answer of row {int((seen == -torch.inf).any(1).nonzero()[0])} lies in padding")
        # torch's: the largest finite logit of a row of kernels would be that of padding.
        loss = F.cross_entropy(
            logits_B2T.flatten(0, 1).float(), targets_B2.flatten(), ignore_index=IGNORE, reduction=reduction
        )
        return loss if reduction == "mean" else loss / 2

    @torch.no_grad()
    def vectors(
        self,
        tokens_BT: Tensor,
        *,
        pool: str | None = "mean",
        types_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
    ) -> Tensor:
        """Contextual vectors, without dropout.

        Args:
            tokens_BT, types_BT, mask_BT: as `forward`.
            pool: "mean" over a row's tokens, "first" (its first token, [CLS]), or None for one vector a token.

        Returns:
            (B, C), or (B, T, C) with zeros for padding.
        """
        if pool not in ("mean", "first", None):
            raise ValueError(f"Bert: pool must be 'mean', 'first' or None, got {pool!r}")
        with evaluating(self):
            layout = self.layout(tokens_BT, mask_BT)
            x = self.hidden(tokens_BT, types_BT, layout)
        if layout.kept_N is None and layout.mask is None:
            return x if pool is None else x.mean(1) if pool == "mean" else x[:, 0]
        x_BTC = layout.unpack(x)
        if layout.mask is not None:
            x_BTC = x_BTC * layout.mask[:, 0, 0, :, None]
        if pool is None:
            return x_BTC
        kept_BT = layout.tokens(tokens_BT.device)
        if pool == "mean":
            return x_BTC.sum(1) / kept_BT.sum(1, keepdim=True)
        return x_BTC[torch.arange(len(x_BTC), device=x_BTC.device), kept_BT.int().argmax(1)]

    def with_head(self, head: str | None, **changes: Any) -> Bert:
        """A model with a copy of this one's encoder and another head, whose weights are new: for fine-tuning.

        Args:
            head: as in `BertConfig`.
            changes: other fields: labels, dropout, head_dropout, label_smoothing, pooler, ops.

        Raises:
            ValueError: for any other field, which is the encoder's.
        """
        own = {"labels", "dropout", "head_dropout", "label_smoothing", "pooler", "ops"}
        if fixed := sorted(changes.keys() - own):
            raise ValueError(f"with_head: {', '.join(fixed)} is the encoder's, which stays")
        model = Bert(replace(self.config, head=head, **changes)).to(self.embedding.weight)
        heads = ("masked_head.", "next_head.", "head.")
        encoder = {name: weight for name, weight in self.state_dict().items() if not name.startswith(heads)}
        fresh = model.state_dict()
        model.load_state_dict({name: encoder.get(name, weight) for name, weight in fresh.items()})
        return model


def _packed_targets(targets_BT: Tensor, layout: Layout) -> Tensor:
    """The targets as `layout` packs them, of which padding has none."""
    targets = layout.pack(targets_BT)
    return targets if layout.mask is None else targets.masked_fill(~layout.mask[:, 0, 0], IGNORE)


def _valid(targets: Tensor) -> Tensor:
    return (targets.flatten() != IGNORE).nonzero()[:, 0]


class Masked(NamedTuple):
    tokens: Tensor  # (B, T), some of them replaced
    targets: Tensor  # (B, T), the original token where one was chosen, else -100


def mask_tokens(
    tokens_BT: Tensor,
    mask_token: int,
    vocab_size: int,
    *,
    special: Tensor | None = None,
    words_BT: Tensor | None = None,
    share: float = 0.15,
    generator: torch.Generator | None = None,
) -> Masked:
    """Dynamic masking for "mlm": of the tokens that are chosen 80% become `mask_token`, 10% a random token, and 10%
    stay (Devlin et al., 2018; anew at each step, Liu et al., 2019).

    Args:
        tokens_BT: (B, T) int64.
        mask_token, vocab_size: the token [MASK], and how many there are.
        special: (B, T) bool, what is never chosen: padding, [CLS], [SEP].
        words_BT: (B, T) integers, the number of the word that a token belongs to in its row: words are then chosen
            whole. None chooses tokens.
        share: how many are chosen, in (0, 1).
        generator: on tokens' device; None draws from torch's global one.

    Returns:
        Tokens and targets; at least one is chosen where there is any that may be.

    Raises:
        ValueError: for a share out of range, tokens that are none, and those outside the vocabulary.
    """
    if not 0 < share < 1:
        raise ValueError(f"mask_tokens: share must be in (0, 1), got {share}")
    check_tokens("mask_tokens", tokens_BT, vocab_size, tokens_BT.shape[-1])
    if not 0 <= mask_token < vocab_size:
        raise ValueError(f"mask_tokens: mask_token {mask_token} is outside the vocabulary of {vocab_size}")
    shape, device = tokens_BT.shape, tokens_BT.device

    def draw() -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    drawn_BT = draw()
    if words_BT is not None:  # every token of a word has its first draw
        if words_BT.shape != shape:
            raise ValueError(f"mask_tokens: words have shape {tuple(words_BT.shape)}, tokens {tuple(shape)}")
        low, high = map(int, words_BT.aminmax())
        if low < 0 or high >= shape[1]:
            raise ValueError(f"mask_tokens: words must be from 0 to {shape[1] - 1}, got {low if low < 0 else high}")
        drawn_BT = drawn_BT.gather(1, words_BT)
    if special is not None:
        if special.shape != shape:
            raise ValueError(f"mask_tokens: special has shape {tuple(special.shape)}, tokens {tuple(shape)}")
        drawn_BT = drawn_BT.masked_fill(special.bool(), 2.0)
    chosen_BT = drawn_BT < share
    if not chosen_BT.any():  # of a small batch at least one, without which there is no loss
        chosen_BT = (drawn_BT == drawn_BT.min()) & (drawn_BT < 1)
    fate_BT = draw()
    random_BT = torch.randint(vocab_size, shape, generator=generator, device=device)
    tokens = torch.where(chosen_BT & (fate_BT < 0.8), mask_token, tokens_BT)
    tokens = torch.where(chosen_BT & (fate_BT >= 0.9), random_BT, tokens)
    return Masked(tokens, torch.where(chosen_BT, tokens_BT, IGNORE))

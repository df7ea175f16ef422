"""What the models are made of.

Letters in names of tensors: B batch, T positions of this call, S positions attended to, C width, H heads, D the width
of a head, V vocabulary, L layers, N tokens of a packed batch. Where padding is left out, B is 1 and T is N.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastllm.nn
import fastllm.ops
from fastllm.models import torch_ops
from fastllm.models.config import ModelConfig
from fastllm.models.layout import KVCache, Layout
from fastllm.ops.linear_cross_entropy import default_chunk_size
from fastllm.tracing import host_values

IGNORE = -100
"""The target that takes no part in the loss, as in torch.nn.functional.cross_entropy."""


class Model(nn.Module):
    """What all models can, and all that a trainer asks of them.

        options = model.prepare(inputs, targets)  # on the CPU
        loss = model(inputs, targets, reduction="sum", **options) / model.count(targets)

    The sum and the count may be of several batches: the loss is then their mean over all targets.
    """

    config: ModelConfig

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def prepare(self, inputs: Tensor, targets: Any = None, **more: Any) -> dict[str, Any]:
        """Options of `forward` for a batch: what is to be found of it on the CPU, before `layout.to_device` moves it,
        so that no graph is left and nothing waits for a GPU; and `more`, other options.

        Raises:
            ValueError: as `forward`.
        """
        raise NotImplementedError

    def count(self, targets: Any) -> int:
        """How many of the targets take part in the loss: reduction="sum" divided by this is "mean"."""
        return int((targets != IGNORE).sum())

    def positions_computed(self, inputs: Tensor, options: dict[str, Any]) -> int:
        """How many positions are computed for a batch; options as `prepare` returned them."""
        return inputs.numel()

    @property
    def label_smoothing(self) -> float:
        """Of the loss in the mode that the model is in."""
        return self.config.label_smoothing if self.training else 0.0

    def checkpoint_activations(self, on: bool = True) -> None:
        """Whether the backward recomputes what is inside each block instead of keeping it (Chen et al., 2016): the same
        bits, dropout included, for one more forward of the blocks and far less memory."""
        for module in self.modules():
            if isinstance(module, Block):
                module.checkpointed = on


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode inside, in the mode that it was in behind."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class Scope(NamedTuple):
    """What attention needs to know beside its input."""

    layout: Layout
    rotary: tuple[Tensor, Tensor] | None = None  # cos and sin
    bias: Tensor | None = None  # (1, H, T, S), added to the scores
    cache: KVCache | None = None
    memory: Tensor | None = None  # (B, S, C), what cross-attention attends to
    memory_layout: Layout | None = None


def ops_of(config: ModelConfig) -> Any:
    """The module that has the ops which this model runs."""
    return torch_ops if config.ops == "torch" else fastllm.ops


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    module: Any = torch_ops if config.ops == "torch" else fastllm.nn
    if config.norm == "layer_norm":
        return module.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
    return module.RMSNorm(width, eps=config.norm_eps)


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """Returns (norm(sum), sum), sum = dropout(x) + residual: fused where the norm knows how."""
    if isinstance(norm, (fastllm.nn.LayerNorm, fastllm.nn.RMSNorm, torch_ops.LayerNorm, torch_ops.RMSNorm)):
        return norm(x, residual, dropout)
    return torch_ops.add_norm(norm, x, residual, dropout)  # somebody put another there


def compiled_as_one(*norms: nn.Module) -> bool:
    """Whether to leave norms of queries and keys, and the rotation behind them, to torch.compile as plain PyTorch: it
    makes one kernel of them and of what gathers their gradients. Not of modules that others watch, as FSDP2 does."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    known = (fastllm.nn.LayerNorm, fastllm.nn.RMSNorm)
    return all(type(n) in known and not n._forward_pre_hooks and not n._forward_hooks for n in norms)


def check_tokens(
    name: str, tokens_BT: Tensor, vocab_size: int, context: int, start: int = 0, what: str = "tokens"
) -> None:
    """
    Raises:
        TypeError: for tokens that are no integers; ValueError: for those that are not (B, T), are none, do not fit into
            the context behind `start` others, or (on the CPU, where the host can see them) are outside the vocabulary.
    """
    if not isinstance(tokens_BT, Tensor) or tokens_BT.dtype not in (torch.int64, torch.int32):
        found = getattr(tokens_BT, "dtype", type(tokens_BT).__name__)
        raise TypeError(f"{name}: {what} must be a tensor of int64 or int32, got {found}")
    if tokens_BT.ndim != 2 or tokens_BT.numel() == 0:
        raise ValueError(f"{name}: {what} must have shape (B, T), not empty, got {tuple(tokens_BT.shape)}")
    end = start + tokens_BT.shape[1]
    if end > context:
        raise ValueError(f"{name}: {end} positions do not fit into the context of {context}")
    if (seen := host_values(tokens_BT)) is not None:
        check_ids(name, seen, vocab_size)


def check_ids(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Raises ValueError for a token outside the vocabulary, for which the host waits."""
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name}: token {low if low < 0 else high} is outside the vocabulary of {vocab_size}")


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / D), each (context, D / 2) in float32."""
    made = fastllm.nn.RotaryEmbedding(config.head_dim, config.context, config.rope_theta, scaling=config.rope_scaling)
    cos_SD, sin_SD = made.tables(config.context)
    return cos_SD.contiguous(), sin_SD.contiguous()


def sinusoidal_table(length: int, width: int) -> Tensor:
    """(length, width): sines of position / 10000^(2 i / width) in the first half of the channels, cosines in the second
    (Vaswani et al., 2017, who alternate them; the order is that of Marian's checkpoints)."""
    rates = 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / -width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1).float()


class Embedding(nn.Embedding):
    """An embedding whose table serves other purposes, too: a tied head, positions that are added. They are computed in
    its forward, around which alone FSDP2 gathers what it shards."""

    def forward(self, x: Any, use: Callable[[Any, Tensor], Tensor] | None = None) -> Tensor:
        """The rows of `x`, or use(x, table)."""
        return super().forward(x) if use is None else use(x, self.weight)


class Linear(nn.Linear):
    """A linear layer that computes in its forward whatever needs its weight or its bias: a loss, an activation behind
    the bias."""

    def forward(self, x: Any, use: Callable[[Any, Tensor], Tensor] | None = None, activation: Any = None) -> Tensor:
        if use is not None:
            return use(x, self.weight)
        if activation is not None:
            return activation(F.linear(x, self.weight), bias=self.bias)
        return super().forward(x)


def with_weight(module: Any, x: Any, use: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """use(x, weight), in the module's forward if it is one of the above, and not what somebody put in its place."""
    return module(x, use) if isinstance(module, (Embedding, Linear)) else use(x, module.weight)


class Tables(nn.Module):
    """What rotary or sinusoidal positions look up: in float32, whatever the weights are moved to, and not saved."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        for index, table in enumerate(self._make()):
            self.register_buffer(f"table{index}", table, persistent=False)

    def _make(self) -> tuple[Tensor, ...]:
        if self.config.position == "rotary":
            return rotary_tables(self.config)
        return (sinusoidal_table(self.config.context, self.config.width),)

    def _apply(self, fn: Any, recurse: bool = True) -> Tables:
        super()._apply(fn, recurse)
        device = next(self.buffers()).device
        if device.type != "meta":
            for index, table in enumerate(self._make()):
                setattr(self, f"table{index}", table.to(device))
        return self

    def forward(self, at: Tensor | slice) -> tuple[Tensor, ...]:
        """The rows of each table at these positions."""
        return tuple(table[at] for table in self.buffers())


def make_positions(config: ModelConfig, offset: int = 0) -> tuple[Embedding | None, Tables | None]:
    """Learned positions, or the tables of others; `offset` rows of the first are no token's."""
    if config.position == "learned":
        return Embedding(config.context + offset, config.width), None
    return None, Tables(config) if config.position in ("rotary", "sinusoidal") else None


def add_positions(x: Tensor, at: Tensor | slice, learned: nn.Module | None, tables: Tables | None) -> Tensor:
    """x + the learned or sinusoidal positions `at`; rotary ones turn queries and keys instead."""
    if learned is not None:
        # Added in there: a slice of the table would be a view of memory that is freed behind the forward.
        return with_weight(learned, x, lambda x, table_SC: x + _rows(table_SC, at))
    if tables is not None and tables.config.position == "sinusoidal":
        return x + tables(at)[0].to(x.dtype)
    return x


def _rows(table_SC: Tensor, at: Tensor | slice) -> Tensor:
    return table_SC[at] if isinstance(at, slice) else F.embedding(at, table_SC)  # whose gradient is the faster


def rotary_at(at: Tensor | slice, tables: Tables | None) -> tuple[Tensor, Tensor] | None:
    if tables is None or tables.config.position != "rotary":
        return None
    return cast("tuple[Tensor, Tensor]", tables(at))


class RelativeBias(nn.Module):
    """T5's positions (Raffel et al., 2020): for each head, a learned bias of the score by the distance from query to
    key, near ones one by one, far ones in buckets that widen up to `relative_distance`."""

    def __init__(self, config: Any, causal: bool):
        super().__init__()
        self.config, self.causal = config, causal
        self.table = nn.Embedding(config.relative_buckets, config.heads)

    def forward(self, seq_q: int, seq_k: int) -> Tensor:
        """(1, H, seq_q, seq_k), of the last queries of as many positions as there are keys."""
        device = self.table.weight.device
        place_q = torch.arange(seq_k - seq_q, seq_k, device=device)[:, None]
        return self.table(self._bucket(torch.arange(seq_k, device=device) - place_q)).movedim(2, 0)[None]

    def _bucket(self, ahead: Tensor) -> Tensor:
        buckets, start = self.config.relative_buckets, 0
        if self.causal:
            distance = (-ahead).clamp(min=0)
        else:  # half of the buckets for keys that are ahead
            buckets //= 2
            start, distance = (ahead > 0) * buckets, ahead.abs()
        near = buckets // 2
        share = torch.log(distance.clamp(min=1).float() / near) / math.log(self.config.relative_distance / near)
        far = (near + share * (buckets - near)).long().clamp(max=buckets - 1)
        return start + torch.where(distance < near, distance, far)


class Attention(nn.Module):
    """Attention with grouped key and value heads: of a sequence to itself, or (`cross`) to a memory."""

    def __init__(self, config: ModelConfig, layer: int, causal: bool, cross: bool = False):
        super().__init__()
        self.config, self.layer, self.causal, self.cross = config, layer, causal, cross
        self.heads, self.kv_heads, self.head_dim = config.heads, config.num_kv_heads, config.head_dim
        inner, kv_width = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        if cross:
            self.q_proj = nn.Linear(config.width, inner, bias=config.bias)
            self.kv_proj = nn.Linear(config.width, kv_width, bias=config.bias)
        else:
            self.qkv_proj = nn.Linear(config.width, inner + kv_width, bias=config.bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.sinks else None
        self.out_proj = nn.Linear(inner, config.width, bias=config.bias)

    def forward(self, x_BTC: Tensor, scope: Scope) -> Tensor:
        if self.cross:
            y_BTHD = self._attend_memory(x_BTC, scope)
        else:
            y_BTHD = self._attend(*self._project(x_BTC, scope), scope)
        return self.out_proj(y_BTHD.flatten(2))

    def _split(self, x: Tensor, *heads: int) -> tuple[Tensor, ...]:
        """(B, T, heads * D) to (B, T, h, D) for each of `heads`."""
        return x.unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)

    def _project(self, x_BTC: Tensor, scope: Scope) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHD, k_BTHD, v_BTHD = self._split(self.qkv_proj(x_BTC), self.heads, self.kv_heads, self.kv_heads)
        ops = ops_of(self.config)
        if self.q_norm is not None and self.k_norm is not None:
            if compiled_as_one(self.q_norm, self.k_norm):
                ops = torch_ops
                q_BTHD, k_BTHD = torch_ops.norm(self.q_norm, q_BTHD), torch_ops.norm(self.k_norm, k_BTHD)
            else:
                q_BTHD, k_BTHD = self.q_norm(q_BTHD), self.k_norm(k_BTHD)
        if scope.rotary is not None:
            rotated = ops.rotary(q_BTHD.transpose(1, 2), k_BTHD.transpose(1, 2), *scope.rotary)
            q_BTHD, k_BTHD = (x.transpose(1, 2) for x in rotated)
        return q_BTHD, k_BTHD, v_BTHD

    def _options(self) -> dict[str, Any]:
        """What is the same for all of an attention's calls, but for what has its default."""
        config = self.config
        options: dict[str, Any] = {}
        if config.position == "relative":
            options["scale"] = 1.0  # T5 has it in its initial weights
        if config.window is not None and self.causal:
            options["window_size"] = (config.window - 1, -1)
        if config.softcap:
            options["softcap"] = config.softcap
        if self.sinks is not None:
            options["sinks"] = self.sinks
        return options

    def _attend(self, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scope: Scope) -> Tensor:
        layout, bias, cache = scope.layout, scope.bias, scope.cache
        if layout.cu_seqlens is not None:
            return self._attend_packed(q_BTHD, k_BTHD, v_BTHD, layout, layout)
        q_BHTD, k_BHTD, v_BHTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
        ops = ops_of(self.config)
        if cache is not None and bias is None:
            k_BHSD, v_BHSD = cache.k_LBHSD[self.layer], cache.v_LBHSD[self.layer]
            options = self._options()
            return ops.attention_kvcache(
                q_BHTD, k_BHSD, v_BHSD, cache.filled, k_BHTD, v_BHTD, **options
            ).transpose(1, 2)  # fmt: skip
        if cache is not None:
            k_BHTD, v_BHTD = cache.append(self.layer, k_BHTD, v_BHTD)
        return self._attend_rows(q_BHTD, k_BHTD, v_BHTD, layout.mask, bias)

    def _attend_rows(self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Any, bias: Tensor | None) -> Tensor:
        documents = mask is not None and mask.shape[2] > 1  # which says what is earlier, too
        if bias is not None:
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        y_BHTD = ops_of(self.config).attention(
            q_BHTD,
            k_BHSD,
            v_BHSD,
            attn_mask=mask,
            dropout_p=self.config.dropout if self.training else 0.0,
            is_causal=self.causal and not documents,
            causal_align="bottom_right",
            enable_gqa=self.heads != self.kv_heads,
            **self._options(),
        )
        return y_BHTD.transpose(1, 2)

    def _attend_packed(self, q_1NHD: Tensor, k_1NHD: Tensor, v_1NHD: Tensor, layout: Layout, keys: Layout) -> Tensor:
        rows = q_1NHD.shape[:2]
        packed = ops_of(self.config).attention_varlen(
            *(x.flatten(0, 1) for x in (q_1NHD, k_1NHD, v_1NHD)),
            layout.cu_seqlens,
            keys.cu_seqlens,
            layout.longest,
            keys.longest,
            is_causal=self.causal,
            enable_gqa=self.heads != self.kv_heads,
            dropout_p=self.config.dropout if self.training else 0.0,
            **self._options(),
        )
        return cast("Tensor", packed).unflatten(0, rows)

    def _attend_memory(self, x_BTC: Tensor, scope: Scope) -> Tensor:
        (q_BTHD,) = self._split(self.q_proj(x_BTC), self.heads)
        q_BTHD = q_BTHD if self.q_norm is None else self.q_norm(q_BTHD)
        keys, cache = scope.memory_layout, scope.cache
        assert keys is not None
        if cache is not None:
            if self.layer not in cache.memory:
                k, v = self._of_memory(scope.memory)
                cache.memory[self.layer] = k.transpose(1, 2), v.transpose(1, 2)
            k_BHSD, v_BHSD = cache.memory[self.layer]
            return self._attend_rows(q_BTHD.transpose(1, 2), k_BHSD, v_BHSD, keys.mask, None)
        k_BSHD, v_BSHD = self._of_memory(scope.memory)
        if keys.cu_seqlens is not None:  # both sides are packed, or neither is
            return self._attend_packed(q_BTHD, k_BSHD, v_BSHD, scope.layout, keys)
        q_BHTD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BTHD, k_BSHD, v_BSHD))
        return self._attend_rows(q_BHTD, k_BHSD, v_BHSD, keys.mask, None)

    def _of_memory(self, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        k_BSHD, v_BSHD = self._split(self.kv_proj(memory), self.kv_heads, self.kv_heads)
        return k_BSHD if self.k_norm is None else self.k_norm(k_BSHD), v_BSHD


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate) * up) with gate and up from one projection (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.up_proj = Linear(config.width, config.mlp_width * (2 if config.gated else 1), bias=config.bias)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(self._activated(x_BTC))

    def _activated(self, x_BTC: Tensor) -> Tensor:
        ops, kind = ops_of(self.config), self.config.mlp
        if kind == "swiglu":
            return ops.swiglu(self.up_proj(x_BTC))
        if kind == "geglu":
            return ops.geglu(self.up_proj(x_BTC))
        if kind == "relu":
            return F.relu(self.up_proj(x_BTC))
        if kind == "silu":
            return F.silu(self.up_proj(x_BTC))
        return gelu_of(self.config, self.up_proj, x_BTC)


def gelu_of(config: ModelConfig, linear: nn.Module, x: Tensor) -> Tensor:
    """gelu(linear(x)), in the form that `config.mlp` says."""
    gelu, approximate = ops_of(config).gelu, "tanh" if config.mlp == "gelu" else "none"
    if isinstance(linear, Linear) and config.ops == "fastllm":  # the op adds the bias, torch's product does
        return linear(x, activation=lambda hidden, bias: gelu(hidden, approximate, bias=bias))
    return gelu(linear(x), approximate)


class Block(nn.Module):
    """Attention, in a decoder of an encoder's output attention to that, and an MLP, with a norm and a residual each.

    Norms first, a block hands on what it would add, so that dropout and addition fuse with the next norm.
    """

    def __init__(self, config: ModelConfig, layer: int, *, causal: bool, cross: bool = False):
        super().__init__()
        self.norm_first, self.dropout, self.checkpointed = config.norm_first, config.dropout, False
        self.attention_norm = make_norm(config, config.width)
        self.attention = Attention(config, layer, causal)
        self.cross_norm = make_norm(config, config.width) if cross else None
        self.cross_attention = Attention(config, layer, causal=False, cross=True) if cross else None
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)

    def forward(self, delta: Tensor | None, x: Tensor, scope: Scope) -> tuple[Tensor | None, Tensor]:
        """Takes and returns (what is still to be added, the sum so far); where norms come last, there is nothing."""
        # In here, where FSDP2 has gathered the weights; what a cache holds would be written twice.
        if self.checkpointed and scope.cache is None and torch.is_grad_enabled():
            return checkpoint(self._forward, delta, x, scope, use_reentrant=False, preserve_rng_state=self.training)
        return self._forward(delta, x, scope)

    def _forward(self, delta: Tensor | None, x: Tensor, scope: Scope) -> tuple[Tensor | None, Tensor]:
        delta, x = self._through(self.attention_norm, self.attention, delta, x, scope)
        if self.cross_norm is not None and self.cross_attention is not None:
            delta, x = self._through(self.cross_norm, self.cross_attention, delta, x, scope)
        return self._through(self.mlp_norm, self.mlp, delta, x)

    def _through(self, norm: nn.Module, layer: nn.Module, delta: Tensor | None, x: Tensor, *scope: Scope):
        dropout = self.dropout if self.training else 0.0
        if not self.norm_first:
            return None, add_norm(norm, layer(x, *scope), x, dropout)[0]
        normed, x = (norm(x), x) if delta is None else add_norm(norm, delta, x, dropout)
        return layer(normed, *scope), x


def run_blocks(blocks: nn.ModuleList, norm: nn.Module | None, x: Tensor, scope: Scope, dropout: float) -> Tensor:
    """x through the blocks, and through the norm behind them, which there is where norms come first."""
    delta = None
    for block in blocks:
        delta, x = block(delta, x, scope)
    if norm is None:
        return x
    assert delta is not None  # there is a block at least
    return add_norm(norm, delta, x, dropout)[0]


def check_reduction(config: ModelConfig, reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        name = type(config).__name__.removesuffix("Config")
        raise ValueError(f"{name}: reduction must be 'mean' or 'sum', got {reduction!r}")


def logits_or_loss(
    config: ModelConfig,
    head: nn.Module,
    x_BTC: Tensor,
    targets_BT: Tensor | None,
    *,
    bias: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Logits (B, T, V) of the output layer `head`, an `Embedding` or a `Linear`; with targets, their loss in float32,
    for which the ops need not hold the logits whole."""
    ops = ops_of(config)
    check_reduction(config, reduction)
    options = {"ignore_index": IGNORE, "reduction": reduction, "label_smoothing": label_smoothing}
    # An adapter around the head has more to it than a weight.
    plain = isinstance(head, (Embedding, Linear)) or type(head) in (nn.Linear, nn.Embedding)
    if targets_BT is not None and plain:

        def loss(x_BTC: Tensor, weight_VC: Tensor) -> Tensor:
            return ops.linear_cross_entropy(
                x_BTC, weight_VC, targets_BT, linear_bias=bias, dtype=torch.float32, **options
            )

        return with_weight(head, x_BTC, loss)
    if isinstance(head, nn.Embedding):
        logits_BTV = with_weight(head, x_BTC, lambda x, weight: F.linear(x, weight, bias))
    else:
        logits_BTV = head(x_BTC) if bias is None else head(x_BTC) + bias
    if targets_BT is None:
        return logits_BTV
    return ops.cross_entropy(logits_BTV.flatten(0, -2), targets_BT.flatten(), dtype=torch.float32, **options)


def loss_bytes(config: ModelConfig, rows: int, itemsize: int, device: str) -> int:
    """What `logits_or_loss` takes for so many tokens in training: logits, of a chunk where the ops cut them, and with
    them the gradients of its input and of the output layer's weight; or logits, their logarithms and gradient."""
    classes, width = config.vocab_size, config.width
    if config.ops == "torch":
        return rows * classes * (itemsize + 8)
    chunk = min(rows, default_chunk_size(rows, width, classes, itemsize, device, summed=True))
    return chunk * classes * itemsize + rows * width * itemsize + classes * width * 4


def init_weights(model: nn.Module, layers: int) -> None:
    """GPT-2's: normal with standard deviation 0.02, and 0.02 / sqrt(2 * layers) where a block adds to the residual;
    biases at zero."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            scale = math.sqrt(2 * layers) if name.endswith(("out_proj", "down_proj")) else 1.0
            nn.init.normal_(module.weight, std=0.02 / scale)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

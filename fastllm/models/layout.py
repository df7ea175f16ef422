"""How the sequences of a batch lie in memory, and the keys and values of positions that are behind us."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.models.config import ModelConfig
from fastllm.tracing import host_values


def to_device(tree: Any, device: torch.device) -> Any:
    """`tree`, of dicts, lists, tuples and named tuples, with its tensors on `device`; to a GPU through pinned memory,
    without waiting for it."""
    if isinstance(tree, Tensor):
        pinned = device.type == "cuda" and tree.device.type == "cpu"
        return (tree.pin_memory() if pinned else tree).to(device, non_blocking=pinned)
    if isinstance(tree, dict):
        return {name: to_device(part, device) for name, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [to_device(part, device) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree


class Layout(NamedTuple):
    """Where the sequences of a batch lie.

    fastllm's ops take them packed, one behind the other, without what pads them (`cu_seqlens`); stock attention takes
    rows of one length, and a mask.
    """

    rows: tuple[int, int]  # (B, T), as they came
    positions: Tensor | slice  # (B, T), or (1, N) where padding is left out: a token's place in its row or document
    longest: int  # a sequence has no more tokens
    kept_N: Tensor | None = None  # (N,) the tokens, in the flattened batch, that are no padding; None: all are there
    cu_seqlens: Tensor | None = None  # (number of sequences + 1,) int32, where they start in the packed batch
    mask: Tensor | None = None  # True where a position sees another: (B, 1, 1, T), or (B, 1, T, T) of documents

    @property
    def computed(self) -> int:
        """How many positions a model computes: where padding is left out, without it."""
        return self.rows[0] * self.rows[1] if self.kept_N is None else len(self.kept_N)

    @classmethod
    def whole(cls, tokens_BT: Tensor, start: int = 0) -> Layout:
        """Rows of one length, each a sequence, of which the first `start` positions are behind us."""
        rows = tokens_BT.shape[0], tokens_BT.shape[1]
        return cls(rows, slice(start, start + rows[1]), rows[1])

    @classmethod
    def of_documents(cls, tokens_BT: Tensor, document_token: int, packed: bool) -> Layout:
        """Rows of several documents, each up to its `document_token`."""
        start_BT = torch.ones_like(tokens_BT, dtype=torch.bool)  # of a document: behind the token, or of the row
        start_BT[:, 1:] = tokens_BT[:, :-1] == document_token
        place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        positions_BT = place_T - torch.where(start_BT, place_T, 0).cummax(1).values
        rows, longest = (tokens_BT.shape[0], tokens_BT.shape[1]), tokens_BT.shape[1]
        if packed:
            cu = F.pad(start_BT.flatten().nonzero()[:, 0], (0, 1), value=start_BT.numel()).int()
            return cls(rows, positions_BT, longest, cu_seqlens=cu)
        number_BT = start_BT.cumsum(1)
        mask_BTT = (number_BT[:, :, None] == number_BT[:, None, :]) & (place_T[:, None] >= place_T)
        return cls(rows, positions_BT, longest, mask=mask_BTT[:, None])

    @classmethod
    def of_padded(cls, name: str, mask_BT: Tensor, packed: bool, always: bool = False) -> Layout:
        """Rows that are padded to one length; `whole` where nothing is padding, unless they shall `always` be packed.

        Args:
            name: whose input it is, for messages.
            mask_BT: (B, T) bool, True for a token, False for padding, wherever it lies. Positions count from the
                beginning of the row.
            packed: leave the padding out.

        Raises:
            ValueError: for a row that is all padding.
        """
        seen = host_values(mask_BT)
        if seen is not None:
            if seen.all() and not always:
                return cls.whole(mask_BT)
            if not (any_B := seen.any(1)).all():
                raise ValueError(f"{name}: row {int((~any_B).nonzero()[0])} is all padding")
        rows, longest = (mask_BT.shape[0], mask_BT.shape[1]), mask_BT.shape[1]
        positions_BT = torch.arange(longest, device=mask_BT.device).expand(rows)
        if not packed:
            return cls(rows, positions_BT, longest, mask=mask_BT[:, None, None])
        kept_N = mask_BT.flatten().nonzero()[:, 0]
        cu = F.pad(mask_BT.sum(1).cumsum(0), (1, 0)).int()
        return cls(rows, positions_BT.flatten()[kept_N][None], longest, kept_N, cu)

    def check(self, name: str, tokens_BT: Tensor) -> None:
        """Raises ValueError for tokens of another shape than those whose layout this is."""
        if tuple(tokens_BT.shape) != self.rows:
            raise ValueError(f"{name}: the layout is of {self.rows} tokens, not {tuple(tokens_BT.shape)}")

    def at(self, offset: int) -> Tensor | slice:
        """The positions, so many further on."""
        if isinstance(self.positions, slice):
            return slice(self.positions.start + offset, self.positions.stop + offset)
        return self.positions + offset

    def tokens(self, device: torch.device) -> Tensor:
        """(B, T) bool: True for a token, False for padding."""
        if self.mask is not None:
            return self.mask[:, 0, 0]
        if self.kept_N is None:
            return torch.ones(self.rows, dtype=torch.bool, device=device)
        return self.unpack(torch.ones(1, len(self.kept_N), dtype=torch.bool, device=device))

    def pack(self, x_BT: Tensor) -> Tensor:
        """(B, T) to (1, N), without padding; as it is where padding stays."""
        return x_BT if self.kept_N is None else x_BT.flatten()[self.kept_N][None]

    def unpack(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """The inverse, of (1, N, ...) to (B, T, ...), with `fill` where padding was."""
        if self.kept_N is None:
            return x
        whole = x.new_full((self.rows[0] * self.rows[1], *x.shape[2:]), fill)
        return whole.index_copy(0, self.kept_N, x[0]).unflatten(0, self.rows)


class KVCache:
    """The keys and values of every layer for up to `length` positions, allocated once."""

    def __init__(self, config: ModelConfig, batch: int, length: int, *, device: torch.device, dtype: torch.dtype):
        shape = (config.layers, batch, config.num_kv_heads, length, config.head_dim)
        self.k_LBHSD = torch.empty(shape, device=device, dtype=dtype)
        self.v_LBHSD = torch.empty(shape, device=device, dtype=dtype)
        self.filled = 0
        """Positions stored so far. The model advances it, once all layers have stored theirs."""
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer: what cross-attention attends to, keys and values (B, HK, S, D), computed once."""

    def append(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores this call's keys and values behind the layer's; returns all of them, (B, H, S, D)."""
        end = self.filled + k_BHTD.shape[2]
        for stored, new in ((self.k_LBHSD, k_BHTD), (self.v_LBHSD, v_BHTD)):
            stored[layer, :, :, self.filled : end] = new
        return self.k_LBHSD[layer, :, :, :end], self.v_LBHSD[layer, :, :, :end]

    def choose(self, rows_B: Tensor) -> None:
        """Row i goes on from what row rows_B[i] holds, as beams do."""
        for stored in (self.k_LBHSD, self.v_LBHSD):
            stored[:, :, :, : self.filled] = stored[:, rows_B, :, : self.filled]
        self.memory = {layer: (k[rows_B], v[rows_B]) for layer, (k, v) in self.memory.items()}

"""Attention, forward and backward (reference: fastllm/reference/attention.py).

    p_i = i + diagonal                               the key position that query i stands at
    t_ij = scale q_i.k_j                             softcap c: c tanh(t_ij / c)
           - slope |p_i - j| + mask_ij               ALiBi, additive mask
           -inf unless p_i - left <= j <= p_i + right
    lse_i = log(sum_j exp(t_ij) + exp(sink))         P = exp(t - lse)
    o_i = sum_j P_ij Z_ij v_j                        Z: dropout's 0 or 1 / (1 - rate)

    delta_i = o_i.do_i - dlse_i                      dv_j = sum_i P_ij Z_ij do_i
    dt_ij = P_ij (Z_ij do_i.v_j - delta_i)           ds_ij = dt_ij (1 - tanh^2) scale
    dq_i = sum_j ds_ij k_j,  dk_j = sum_i ds_ij q_i, dsink = -sum_i exp(sink - lse_i) delta_i

Softmax is online and in base 2 (Dao, FlashAttention-2, 2023, https://arxiv.org/abs/2307.08691): a program holds one
tile of queries and walks along the keys. The tiles in which every pair may see each other, nearly all of them, go
through a loop without a mask; those that the diagonal, a window's border or the sequence's end cuts go through the same
code with one. dK/dV and dQ are two kernels, so that each output has one writer, and the sums one order.

Dense tensors are (B, H, S, D) by strides. Packed ones (VARLEN) are (total, H, D): `tiles` names the sequence and the
block of each program, and sequence b is rows cu[b] to cu[b + 1].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastllm.kernels import _utils
from fastllm.kernels._attention_bwd import _attention_delta_kernel, _attention_dkdv_kernel, _attention_dq_kernel
from fastllm.kernels._attention_config import CANDIDATES, config
from fastllm.kernels._attention_fwd import _attention_fwd_kernel
from fastllm.kernels._utils import LOG2E, Config

NO_MASK, BOOL_MASK, FLOAT_MASK = 0, 1, 2


# Launchers. They assume what the op has checked.


class Scores(NamedTuple):
    """The scalar arguments of attention, as the ops pass them: window -1 is no limit."""

    dropout_p: float
    scale: float
    window_left: int
    window_right: int
    softcap: float
    bottom_right: bool


class Packed(NamedTuple):
    """Where the sequences of packed tensors lie; None for dense ones."""

    cu_q: Tensor  # (N + 1,)
    cu_k: Tensor  # (N + 1,)

    def tiles(self, of_keys: bool, block: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
        """(cu_q, cu_k, tiles (n, 2)) for programs that own blocks of queries, or of keys.

        tiles[t] is the sequence and the block of program t, longest work first, -1 past the last. What lies behind the
        last sequence belongs to one more, which has nothing to attend to: its rows come out as zeros.
        """
        own, other = (self.cu_k, self.cu_q) if of_keys else (self.cu_q, self.cu_k)
        count = own.shape[0]
        own = torch.cat([own, own.new_full((1,), total)])
        other = torch.cat([other, other[-1:]])
        order = torch.argsort(other.diff(), descending=True, stable=True)
        ends = torch.cumsum((own.diff()[order] + (block - 1)) // block, 0)
        t = torch.arange(total // block + count, device=own.device)
        at = torch.searchsorted(ends, t, right=True)
        inside = at < count
        at = at.clamp(max=count - 1)
        tiles = torch.stack([torch.where(inside, order[at], -1), ends[at] - 1 - t], 1).to(torch.int32)
        return (other, own, tiles) if of_keys else (own, other, tiles)


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _common(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None, seed: Tensor | None, scores: Scores
) -> dict[str, Any]:
    """What all three kernels take. Tensors are (B, H, S, D) views, mask (B, H, Sq, Sk) and slopes (B, H) expanded."""
    dropout_p, scale, left, right, softcap, bottom_right = scores
    kind = NO_MASK
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind, strides = (BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK), mask.stride()
        mask = mask.view(torch.uint8) if kind == BOOL_MASK else mask
    names = ("b", "h", "s", "d")
    far = 2**30  # wider than any sequence, and far from overflow when added to a position
    return {
        "q": q, "k": k, "v": v, "mask": mask, "slopes": slopes, "seeds": seed,
        **{f"stride_q{n}": s for n, s in zip(names, q.stride(), strict=True)},
        **{f"stride_k{n}": s for n, s in zip(names, k.stride(), strict=True)},
        **{f"stride_v{n}": s for n, s in zip(names, v.stride(), strict=True)},
        **{f"stride_m{n}": s for n, s in zip("bhij", strides, strict=True)},
        "stride_slope_b": 0 if slopes is None else slopes.stride(0),
        "stride_slope_h": 0 if slopes is None else slopes.stride(1),
        "heads": q.shape[1], "group": q.shape[1] // k.shape[1], "seq_q": q.shape[2], "seq_k": k.shape[2],
        "window_left": min(max(left, 0), far), "window_right": min(max(right, 0), far),
        "scale_log2": scale * LOG2E,
        "cap_in": scale / softcap if softcap else 0.0, "cap_out": softcap * LOG2E,
        "threshold": round(dropout_p * 2**24),
        "D": q.shape[3], "DV": v.shape[3], "LEFT": left >= 0, "RIGHT": right >= 0, "BOTTOM_RIGHT": bottom_right,
        "MASK": kind, "ALIBI": slopes is not None, "SOFTCAP": softcap > 0, "DROPOUT": dropout_p > 0,
        "PRECISION": _utils.precision(q.dtype),
        "BLOCK_D": _block(q.shape[3]), "BLOCK_DV": _block(v.shape[3]),
    }  # fmt: skip


def _keep_scale(dropout_p: float) -> float:
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _strides(name: str, tensor: Tensor, dimensions: str) -> dict[str, int]:
    return {f"stride_{name}{n}": s for n, s in zip(dimensions, tensor.stride(), strict=False)}


def _run(kind: str, kernel, common: dict, args: dict, packed: Packed | None) -> None:
    """Chooses the configuration, lays out the programs and launches. Blocks are of keys for dkdv, else of queries."""
    of_keys = kind == "dkdv"
    batch, heads, rows = common["k" if of_keys else "q"].shape[:3]

    def start(config: Config) -> None:
        size = config.blocks["BLOCK_N" if of_keys else "BLOCK_M"]
        blocks = triton.cdiv(rows, size)
        cu_q, cu_k, tiles = packed.tiles(of_keys, size, rows) if packed else (None, None, None)
        programs = (blocks * batch if tiles is None else tiles.shape[0]) * heads
        _utils.launch(kernel, (programs,), config, **common, **args, cu_q=cu_q, cu_k=cu_k, tiles=tiles, blocks=blocks,
                      VARLEN=packed is not None)  # fmt: skip

    names = (
        "D",
        "DV",
        "LEFT",
        "RIGHT",
        "MASK",
        "ALIBI",
        "SOFTCAP",
        "DROPOUT",
        "GRAD_K",
        "GRAD_V",
        "PRECISION",
        "group",
    )
    variant = [(common | args).get(name) for name in names]
    other = common["q" if of_keys else "k"].shape[2]
    chip, dtype = _utils.chip(common["q"].device), common["q"].dtype
    featured = any(common[name] for name in ("MASK", "ALIBI", "SOFTCAP", "DROPOUT"))
    featured |= (common["D"], common["DV"]) != (common["BLOCK_D"], common["BLOCK_DV"])  # masked loads take registers
    default = config(kind, max(common["BLOCK_D"], common["BLOCK_DV"]), dtype, featured, chip)
    key = (kind, *chip, str(dtype), *variant, packed is not None, rows.bit_length(), other.bit_length())
    with torch.cuda.device_of(common["q"]):  # tuning times on the current device
        start(_utils.choose(key, default, CANDIDATES[kind], start))


def attention_fwd(
    out: Tensor,  # (B, H, Sq, DV), last stride 1
    lse: Tensor,  # (B, H, Sq) float32, last stride 1
    q: Tensor,  # (B, H, Sq, D)
    k: Tensor,  # (B, HK, Sk, D)
    v: Tensor,  # (B, HK, Sk, DV)
    mask: Tensor | None,  # (B, H, Sq, Sk), bool or additive
    sinks: Tensor | None,  # (H,)
    slopes: Tensor | None,  # (B, H)
    seed: Tensor | None,  # (1,) int64
    scores: Scores,
    packed: Packed | None = None,
) -> None:
    common = _common(q, k, v, mask, slopes, seed, scores)
    args = {
        "o": out, "lse": lse, "sinks": sinks, "SINKS": sinks is not None,
        **_strides("o", out, "bhs"), **_strides("l", lse, "bh"), "dropout_scale": _keep_scale(scores.dropout_p),
    }  # fmt: skip
    _run("fwd", _attention_fwd_kernel, common, args, packed)


def attention_bwd(
    dq: Tensor,  # gradients like q, k and v, last stride 1
    dk: Tensor,
    dv: Tensor,
    dsinks: Tensor | None,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    scores: Scores,
    packed: Packed | None = None,
) -> None:
    batch, heads, rows, size = out.shape
    delta = torch.empty_like(lse)
    delta_config = Config({"BLOCK_M": 64, "BLOCK_DV": _block(size)}, 4, 1)
    blocks = triton.cdiv(rows, 64)
    _utils.launch(
        _attention_delta_kernel, (blocks * batch * heads,), delta_config, o=out, do=dout, dlse=dlse, delta=delta,
        **_strides("o", out, "bhs"), **_strides("do", dout, "bhsd"), **_strides("l", lse, "bh"),
        **_strides("dl", lse if dlse is None else dlse, "bhs"),
        heads=heads, seq_q=rows, blocks=blocks, DV=size, DLSE=dlse is not None,
    )  # fmt: skip
    if dsinks is not None and sinks is not None:
        # A query that sees nothing, not even a sink, has lse -inf and no part in this.
        shares = torch.exp(sinks.float()[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf)) * delta
        torch.sum(shares, (0, 2), out=dsinks) if dsinks.dtype == torch.float32 else dsinks.copy_(shares.sum((0, 2)))
        dsinks.neg_()
    common = _common(q, k, v, mask, slopes, seed, scores)
    common |= {
        "do": dout,
        "lse": lse,
        "delta": delta,
        "scale": scores.scale,
        "dropout_scale": _keep_scale(scores.dropout_p),
    }
    common |= _strides("do", dout, "bhsd") | _strides("l", lse, "bh")
    args = {"dk": dk, "dv": dv, **_strides("dk", dk, "bhs"), **_strides("dv", dv, "bhs")}
    # Two accumulators of head size 256 do not fit into the registers: dk and dv then take a pass each.
    passes = ((True, False), (False, True)) if max(common["BLOCK_D"], common["BLOCK_DV"]) > 128 else ((True, True),)
    for grad_k, grad_v in passes:
        _run("dkdv", _attention_dkdv_kernel, common, args | {"GRAD_K": grad_k, "GRAD_V": grad_v}, packed)
    _run("dq", _attention_dq_kernel, common, {"dq": dq, **_strides("dq", dq, "bhs")}, packed)

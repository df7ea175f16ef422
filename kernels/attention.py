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

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastllm.kernels import _utils
from fastllm.kernels._attention_bwd import _attention_delta_kernel, _attention_dkdv_kernel, _attention_dq_kernel
from fastllm.kernels._attention_config import CANDIDATES, SPECIALISED, config
from fastllm.kernels._attention_fwd import _attention_fwd_kernel
from fastllm.kernels._attention_hopper import (
    _attention_dkdv_hopper_kernel,
    _attention_dq_hopper_kernel,
    _attention_fwd_hopper_kernel,
)
from fastllm.kernels._attention_packed import packed_tiles
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


@dataclass
class Packed:
    """Where the sequences of packed tensors lie, for one call of a launcher; None for dense ones."""

    cu_q: Tensor  # (N + 1,)
    cu_k: Tensor  # (N + 1,)
    made: dict[tuple, Tensor] = field(default_factory=dict)

    def tiles(self, *args: Any) -> Tensor:
        """The table of `packed_tiles`, made once for each of its arguments."""
        if args not in self.made:
            self.made[args] = packed_tiles(self.cu_q, self.cu_k, *args)
        return self.made[args]


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
        "PRECISION": _utils.precision(q.dtype), "WIDE": any(map(_wide, (q, k, v))),
        "BLOCK_D": _block(q.shape[3]), "BLOCK_DV": _block(v.shape[3]),
    }  # fmt: skip


def _wide(x: Tensor) -> bool:
    """Whether offsets in a tile of x, of no more than 128 rows, may pass 2^31."""
    return 128 * x.stride(2) + x.shape[3] * x.stride(3) >= 2**31


def _keep_scale(dropout_p: float) -> float:
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _strides(name: str, tensor: Tensor, dimensions: str) -> dict[str, int]:
    return {f"stride_{name}{n}": s for n, s in zip(dimensions, tensor.stride(), strict=False)}


KERNELS = {
    "fwd": _attention_fwd_kernel, "delta": _attention_delta_kernel, "dkdv": _attention_dkdv_kernel,
    "dq": _attention_dq_kernel,
}  # fmt: skip
SPECIALISED_KERNELS = {
    "fwd": _attention_fwd_hopper_kernel, "dkdv": _attention_dkdv_hopper_kernel, "dq": _attention_dq_hopper_kernel
}  # fmt: skip
VARIANT = (
    "D", "DV", "LEFT", "RIGHT", "MASK", "ALIBI", "SOFTCAP", "DROPOUT", "GRAD_K", "GRAD_V", "PRECISION", "WIDE", "group"
)  # fmt: skip
"""What the choice of a configuration may depend on, beside chip, dtype and lengths."""


def _start(kind: str, config: Config, args: dict[str, Any], packed: Packed | None) -> None:
    """Lays out the programs and launches. Blocks are of keys for dkdv, else of queries."""
    of_keys = kind == "dkdv"
    batch, heads, rows = args["k" if of_keys else "q"].shape[:3]
    size = config.blocks["BLOCK_N" if of_keys else "BLOCK_M"]
    blocks, tiles = triton.cdiv(rows, size), None
    programs = blocks * batch * heads
    if packed:
        tiles = packed.tiles(args["q"].shape[2], args["k"].shape[2], size, of_keys)
        programs = tiles.shape[0] * heads
        # The table says where a sequence begins.
        args = args | {name: 0 for name in args if name.startswith("stride_") and re.search("[^_]b$", name)}
    kernel = (SPECIALISED_KERNELS if config.specialised else KERNELS)[kind]
    known = args | {"tiles": tiles, "blocks": blocks, "VARLEN": packed is not None}
    taken = {name: known[name] for name in kernel.arg_names if name in known and name not in config.blocks}
    _utils.launch(kernel, (programs,), config, **taken)


def _run(kind: str, args: dict[str, Any], packed: Packed | None) -> None:
    """Chooses the configuration, and launches."""
    q = args["q"]
    chip, dtype = _utils.chip(q.device), q.dtype
    featured = any(args[name] for name in FEATURES)
    featured |= (args["D"], args["DV"]) != (args["BLOCK_D"], args["BLOCK_DV"])  # masked loads take registers
    default = config(kind, max(args["BLOCK_D"], args["BLOCK_DV"]), dtype, featured, chip)
    candidates = CANDIDATES[kind]
    specialised = unsuited(chip, args) is None
    if specialised:
        candidates = [*SPECIALISED[kind][1:], default, *candidates]
        default = SPECIALISED[kind][0]
    rows, other = (args[name].shape[2] for name in ("kq" if kind == "dkdv" else "qk"))
    variant = [args.get(name) for name in VARIANT]
    key = (kind, *chip, str(dtype), *variant, packed is not None, specialised, rows.bit_length(), other.bit_length())
    with torch.cuda.device_of(q):  # tuning times on the current device
        _start(kind, _utils.choose(key, default, candidates, lambda config: _start(kind, config, args, packed)), args,
               packed)  # fmt: skip


HOPPER = ("cuda", 90)
FEATURES = ("MASK", "ALIBI", "SOFTCAP", "DROPOUT")
TRITON = (3, 6), (3, 9)
"""The Triton versions, from and to, whose compiler is known to specialise `_attention_hopper`."""


def unsuited(chip: tuple, args: dict[str, Any]) -> str | None:
    """Why the warp-specialised kernels cannot run this, or None."""
    q = args["q"]
    if chip != HOPPER:
        return "made for compute capability 9.0"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not TRITON[0] <= version <= TRITON[1]:
        return f"not tried with Triton {triton.__version__}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"made for 16 bits, not {q.dtype}"
    if args["D"] != args["DV"] or args["D"] not in (64, 128):
        return f"made for head size 64 or 128, got {args['D']} and {args['DV']}"
    if features := [name.lower() for name in FEATURES if args[name]]:
        return f"made without {' and '.join(features)}"
    for name in ("q", "k", "v", "do"):
        if (x := args.get(name)) is not None and (reason := _undescribed(name, x)):
            return reason
    return None


def _undescribed(name: str, x: Tensor) -> str | None:
    """Why no tensor descriptor can be made of x's matrices, or None."""
    # A FakeTensor has no address.
    address = x.storage_offset() * x.element_size() if isinstance(x, FakeTensor) else x.data_ptr()
    if x.stride(3) != 1 or address % 16:
        return f"{name} must be dense in the head size and begin at a multiple of 16 bytes"
    steps = [x.stride(dim) for dim in (0, 1, 2) if dim or x.shape[0] > 1]
    if any(step % 8 for step in steps) or x.stride(2) == 0 or (name in ("q", "do") and x.stride(1) == 0):
        return f"{name}'s strides must be multiples of 16 bytes, got {x.stride()}"
    return None


def describe(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None, seed: Tensor | None, scores: Scores
) -> str:
    """Which of the forward's kernels runs, where a chip has two; else nothing."""
    chip = _utils.chip(q.device)
    if chip != HOPPER:
        return ""
    reason = unsuited(chip, _common(q, k, v, mask, slopes, seed, scores))
    if reason:
        return f"not warp-specialised: {reason}"
    return "warp-specialised, or what tuning prefers" if _utils.tuning() else "warp-specialised"


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
    _run("fwd", common | args, packed)


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
    blocks = triton.cdiv(rows, 128) + (packed.cu_q.shape[0] if packed else 0)
    normals, deltas = (lse.new_empty if dsinks is None else lse.new_zeros)((2, batch, heads, 128 * blocks))
    common = _common(q, k, v, mask, slopes, seed, scores) | {
        "do": dout, "normals": normals, "deltas": deltas, "scale": scores.scale,
        "dropout_scale": _keep_scale(scores.dropout_p), **_strides("do", dout, "bhsd"), **_strides("l", deltas, "bh"),
    }  # fmt: skip
    common["WIDE"] |= _wide(dout)
    own = {
        "o": out, "lse": lse, "dlse": dlse, "DLSE": dlse is not None, **_strides("o", out, "bhs"),
        **_strides("lse", lse, "bh"), **_strides("dl", lse if dlse is None else dlse, "bhs"),
    }  # fmt: skip
    _start("delta", Config({"BLOCK_M": 128, "BLOCK_DV": min(128, _block(size))}, 8, 1), common | own, packed)
    if dsinks is not None and sinks is not None:
        # A query that sees nothing, not even a sink, has normal inf and no part in this.
        shares = torch.exp2(sinks.float()[:, None] * LOG2E - normals) * deltas
        shares = torch.where(deltas == 0, 0.0, shares)  # past a sequence's end, where normal is 0
        torch.sum(shares, (0, 2), out=dsinks) if dsinks.dtype == torch.float32 else dsinks.copy_(shares.sum((0, 2)))
        dsinks.neg_()
    args = {"dk": dk, "dv": dv, **_strides("dk", dk, "bhs"), **_strides("dv", dv, "bhs")}
    # Two accumulators of head size 256 do not fit into the registers: dk and dv then take a pass each.
    passes = ((True, False), (False, True)) if max(common["BLOCK_D"], common["BLOCK_DV"]) > 128 else ((True, True),)
    for grad_k, grad_v in passes:
        _run("dkdv", common | args | {"GRAD_K": grad_k, "GRAD_V": grad_v}, packed)
    _run("dq", common | {"dq": dq, **_strides("dq", dq, "bhs")}, packed)

"""Cross-entropy: what it needs to know of a row of logits, and the gradient (reference:
fastllm/reference/cross_entropy.py).

    t = x, or c tanh(x / c) with a softcap c       top = max_j t_j       lse = log(sum_j exp(t_j - top))
    picked = t_target - top                        mean = mean_j(t_j - top)
    dx_j = (dlse exp(t_j - top - lse) + dpicked [j = target] + dmean / n) (1 - (t_j / c)^2)

A program walks along one row. A target outside [0, n) picks nothing.

A row is cut into groups of 16 bytes of memory, wherever it starts: those that are the row's alone are its body, which
is read 16 bytes at a time, REPEAT groups of each of THREADS threads a step. The first group and the last, which
the row may share with its neighbours, are its edges, one element a thread. Column j is element k = j + lead of the
groups: `lead` elements of the first one are the row's before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels import _utils
from fastllm.kernels._math import _tanh
from fastllm.kernels._utils import Config


@triton.jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    x = x.to(tl.float32)
    if CAPPED:
        x = _tanh(x / softcap) * softcap
    return x


@triton.jit
def _groups(start, n, GROUP: tl.constexpr):
    """Of a row that starts at element `start`: the element of memory that its groups are counted from, `lead`, and
    where the last group begins."""
    first = start // GROUP * GROUP
    lead = (start - first).to(tl.int32)
    return first, lead, (lead + n - 1) // GROUP * GROUP


@triton.jit
def _edges(lead, last, n, GROUP: tl.constexpr, THREADS: tl.constexpr):
    """Each thread's element of the first group or of the last, and whether it is one of the row."""
    i = tl.arange(0, THREADS)
    k = tl.where(i < GROUP, i, last + i - GROUP)
    mine = (i < GROUP) | ((i < 2 * GROUP) & (k >= GROUP))  # one group may be the first and the last
    return k, mine & (k >= lead) & (k < lead + n)


@triton.jit
def _body(GROUP: tl.constexpr, REPEAT: tl.constexpr, THREADS: tl.constexpr):
    """The elements of a step, counted from its first. A group is one thread's."""
    return tl.arange(0, REPEAT * THREADS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _finite(highest):
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def _stats(
    logits, start, n, softcap, CAPPED: tl.constexpr, MEAN: tl.constexpr, GROUP: tl.constexpr, REPEAT: tl.constexpr,
    THREADS: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """top, lse and mean of the row at `start`. The groups at one place of the steps have a top of their own until the
    end, so that no thread waits for another."""
    first, lead, last = _groups(start, n, GROUP)
    logits += first
    edge, inside = _edges(lead, last, n, GROUP, THREADS)
    edge_x = tl.load(logits + edge, mask=inside, other=float("-inf"), eviction_policy=EVICTION)
    edge_t = tl.where(inside, _capped(edge_x, softcap, CAPPED), float("-inf"))
    highest = tl.full([REPEAT * THREADS], float("-inf"), tl.float32)
    shift = tl.zeros([REPEAT * THREADS], tl.float32)
    total = tl.zeros([REPEAT * THREADS], tl.float32)
    total_t = tl.zeros([REPEAT * THREADS], tl.float32)
    step = _body(GROUP, REPEAT, THREADS)
    for at in range(GROUP, last, REPEAT * THREADS * GROUP):
        k = at + step
        x = tl.load(logits + k, mask=k < last, other=float("-inf"), eviction_policy=EVICTION)
        t = _capped(x, softcap, CAPPED)
        if CAPPED:
            t = tl.where(k < last, t, float("-inf"))
        before, shift_before = highest, shift
        highest = tl.maximum(highest, tl.max(t, 1))
        shift = _finite(highest)
        t -= shift[:, None]
        parts = tl.sum(tl.exp2(t * 1.4426950408889634), 1)
        total = total * tl.exp2((before - shift) * 1.4426950408889634) + parts
        if MEAN:
            behind = (at - GROUP) // (REPEAT * THREADS)  # elements at each place
            total_t += (shift_before - shift) * behind + tl.sum(tl.where(k < last, t, 0.0), 1)
    top = _finite(tl.maximum(tl.max(highest, 0), tl.max(edge_t, 0)))
    sum_exp = tl.sum(total * tl.exp2((highest - top) * 1.4426950408889634), 0)
    sum_exp += tl.sum(tl.exp2((edge_t - top) * 1.4426950408889634), 0)
    left = tl.maximum(last - GROUP - tl.arange(0, REPEAT * THREADS) * GROUP, 0)
    count = (left + REPEAT * THREADS * GROUP - 1) // (REPEAT * THREADS * GROUP) * GROUP
    sum_t = tl.sum(total_t + (shift - top) * count, 0) + tl.sum(tl.where(inside, edge_t - top, 0.0), 0)
    return top, tl.log(sum_exp), sum_t / n


@triton.jit
def _picked(logits, start, at, n, softcap, CAPPED: tl.constexpr):
    """The target's logit, and whether there is one."""
    here = (at >= 0) & (at < n)
    return _capped(tl.load(logits + start + at, mask=here, other=0.0), softcap, CAPPED), here


@triton.jit
def _slope(x, j, at, top, lse, dlse, dpicked, even, softcap, CAPPED: tl.constexpr):
    t = _capped(x, softcap, CAPPED)
    # A row whose lse has no gradient is left out altogether, whatever its logits are.
    grad = tl.where(dlse == 0, 0.0, dlse * tl.exp2((t - top - lse) * 1.4426950408889634))
    grad += tl.where(j == at, dpicked, 0.0) + even
    if CAPPED:
        ratio = t / softcap
        grad = tl.where(grad == 0, 0.0, grad * (1 - ratio * ratio))  # t may be NaN in a row that is left out
    return grad


@triton.jit
def _gradient(
    logits, dlogits, start, start_d, at, top, lse, dlse, dpicked, even, n, softcap, CAPPED: tl.constexpr,
    ALIGNED: tl.constexpr, GROUP: tl.constexpr, REPEAT: tl.constexpr, THREADS: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the row at `start` to `start_d`. ALIGNED: the groups of both rows are cut alike."""
    first, lead, last = _groups(start, n, GROUP)
    logits += first
    if ALIGNED:
        dlogits += start_d // GROUP * GROUP
    else:
        dlogits += start_d - lead
    at = tl.where((at >= 0) & (at < n), at + lead, -1).to(tl.int32)
    edge, inside = _edges(lead, last, n, GROUP, THREADS)
    edge_x = tl.load(logits + edge, mask=inside, other=0.0, eviction_policy=EVICTION)
    edge_grad = _slope(edge_x, edge, at, top, lse, dlse, dpicked, even, softcap, CAPPED)
    tl.store(dlogits + edge, edge_grad.to(dlogits.dtype.element_ty), mask=inside, eviction_policy=EVICTION)
    step = _body(GROUP, REPEAT, THREADS)
    for begin in range(GROUP, last, REPEAT * THREADS * GROUP):
        k = begin + step
        x = tl.load(logits + k, mask=k < last, other=0.0, eviction_policy=EVICTION)
        grad = _slope(x, k, at, top, lse, dlse, dpicked, even, softcap, CAPPED)
        tl.store(dlogits + k, grad.to(dlogits.dtype.element_ty), mask=k < last, eviction_policy=EVICTION)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits, target, top, lse, picked, mean, stride, n, softcap, CAPPED: tl.constexpr, MEAN: tl.constexpr,
    GROUP: tl.constexpr, REPEAT: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * stride
    t, here = _picked(logits, start, tl.load(target + row), n, softcap, CAPPED)
    shift, row_lse, average = _stats(logits, start, n, softcap, CAPPED, MEAN, GROUP, REPEAT, THREADS, "")
    tl.store(top + row, shift)
    tl.store(lse + row, row_lse)
    tl.store(picked + row, tl.where(here, t - shift, 0.0))
    if MEAN:
        tl.store(mean + row, average)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits, target, top, lse, dlse, dpicked, dmean, dlogits, stride, stride_d, n, softcap,
    CAPPED: tl.constexpr, MEAN: tl.constexpr, ALIGNED: tl.constexpr, GROUP: tl.constexpr, REPEAT: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    even = 0.0
    if MEAN:
        even = tl.load(dmean + row) / n
    _gradient(
        logits, dlogits, row * stride, row * stride_d, tl.load(target + row), tl.load(top + row), tl.load(lse + row),
        tl.load(dlse + row), tl.load(dpicked + row), even, n, softcap, CAPPED, ALIGNED, GROUP, REPEAT, THREADS, "",
    )  # fmt: skip


@triton.jit
def _cross_entropy_loss_kernel(
    logits, target, scale, top, lse, picked, mean, dlogits, stride, stride_d, n, softcap, smoothing, z_loss,
    CAPPED: tl.constexpr, MEAN: tl.constexpr, ALIGNED: tl.constexpr, GROUP: tl.constexpr, STATS: tl.constexpr,
    REPEAT: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """The gradient of sum_i scale_i ((1 - e) (lse - picked) + e (lse - mean) + z (top + lse)^2), and, with STATS, these
    first: the second time, the row is still in the second-level cache."""
    row = tl.program_id(0).to(tl.int64)
    start = row * stride
    at = tl.load(target + row)
    share = tl.load(scale + row)
    if STATS:
        # Before the stats are known to all threads: after that, the first ones overwrite the row.
        t, here = _picked(logits, start, at, n, softcap, CAPPED)
        shift, row_lse, average = _stats(logits, start, n, softcap, CAPPED, MEAN, GROUP, REPEAT, THREADS, "evict_last")
        tl.store(top + row, shift)
        tl.store(lse + row, row_lse)
        tl.store(picked + row, tl.where(here, t - shift, 0.0))
        if MEAN:
            tl.store(mean + row, average)
    else:
        shift, row_lse = tl.load(top + row), tl.load(lse + row)
    dlse = share
    if z_loss > 0:
        # A row without a share may hold anything.
        dlse = share * (1 + 2 * z_loss * tl.where(share == 0, 0.0, shift + row_lse))
    even = 0.0
    if MEAN:
        even = -share * smoothing / n
    _gradient(
        logits, dlogits, start, row * stride_d, at, shift, row_lse, dlse, share * (smoothing - 1), even, n, softcap,
        CAPPED, ALIGNED, GROUP, REPEAT, THREADS, "evict_first",
    )  # fmt: skip


def _c(repeat: int, warps: int, **more: int) -> Config:
    """Warps of 32 threads, whatever the chip's are."""
    return Config({"REPEAT": repeat, "WARPS": warps, **more}, warps, 1)


CANDIDATES = [_c(repeat, warps) for repeat in (2, 4, 8) for warps in (4, 8, 16)]
LOSS_CANDIDATES = [
    *(_c(repeat, warps, STATS=1) for repeat in (2, 4) for warps in (8, 16, 32)),
    *(_c(repeat, 8, STATS=0) for repeat in (2, 4)),
]


def _group(x: Tensor) -> int:
    return 16 // x.element_size()


def _warps(n: int, group: int, repeat: int, most: int) -> int:
    """As many as one step takes to walk along the row, at most `most`."""
    return min(most, max(1, triton.next_power_of_2(n) // (32 * group * repeat)))


def config(n: int, group: int, plain: bool) -> Config:
    """Four loads of 16 bytes in flight for each thread; two with a softcap, which would spill."""
    if _utils.interpreted():
        return _c(2, 1)
    repeat = 4 if plain else 2
    return _c(repeat, _warps(n, group, repeat, 8))


def loss_config(n: int, group: int, plain: bool) -> Config:
    """Rows that are read again stay in the second-level cache (50 MB on Hopper) if few are begun at once: programs of
    32 warps, and more than 32 registers a thread, are alone on their multiprocessor, those of 16 are two or three. Two
    loads for each thread with a softcap or label smoothing; without, that would be 32 registers. Rows above 300 KiB do
    not stay, and are left to two kernels."""
    size = n * (16 // group)
    if _utils.interpreted():
        return _c(2, 1, STATS=1)
    if size > 300 * 2**10:
        return _c(4 if plain else 2, 8, STATS=0)
    repeat = 4 if plain else 2
    return _c(repeat, _warps(n, group, repeat, 32 if size > 2**17 else 16), STATS=1)


def _start(kernel, config: Config, logits: Tensor, **args) -> None:
    blocks = dict(config.blocks)
    wide = 64 if _utils.chip(logits.device)[0] == "hip" else 32
    blocks["THREADS"] = max(wide, 32 * blocks.pop("WARPS"))
    _utils.launch(
        kernel, (logits.shape[0],), Config(blocks, blocks["THREADS"] // wide, config.stages),
        fusion=args["softcap"] == 0, logits=logits, stride=logits.stride(0), n=logits.shape[1],
        CAPPED=args["softcap"] > 0, GROUP=_group(logits), **args,
    )  # fmt: skip


def _key(name: str, logits: Tensor, *rest: object) -> tuple:
    return (name, *_utils.chip(logits.device), str(logits.dtype), logits.shape[1], logits.stride(0) % 8, *rest)


def _writing(logits: Tensor, dlogits: Tensor) -> dict[str, object]:
    apart = (logits.stride(0) - dlogits.stride(0)) % _group(logits)
    return {"dlogits": dlogits, "stride_d": dlogits.stride(0), "ALIGNED": apart == 0}


def _spare(like: Tensor) -> Tensor:
    """Where candidates write while they are timed: what is computed may be in its input's memory."""
    return like.new_empty_strided(like.shape, like.stride())


def cross_entropy_fwd(
    top: Tensor,  # (N,) float32
    lse: Tensor,  # (N,) float32
    picked: Tensor,  # (N,) float32
    mean: Tensor | None,  # (N,) float32
    logits: Tensor,  # (N, V), last stride 1
    target: Tensor,  # (N,) int64
    softcap: float,
) -> None:
    def start(config: Config) -> None:
        _start(
            _cross_entropy_fwd_kernel, config, logits, target=target, top=top, lse=lse, picked=picked, mean=mean,
            softcap=float(softcap), MEAN=mean is not None,
        )  # fmt: skip

    key = _key("cross_entropy_fwd", logits, mean is None, softcap > 0)
    start(_utils.choose(key, config(logits.shape[1], _group(logits), softcap == 0), CANDIDATES, start))


def cross_entropy_bwd(
    dlogits: Tensor,  # (N, V), last stride 1; may be the logits
    dlse: Tensor,  # (N,) float32
    dpicked: Tensor,  # (N,) float32
    dmean: Tensor | None,  # (N,) float32
    logits: Tensor,  # (N, V), last stride 1
    target: Tensor,  # (N,) int64
    top: Tensor,  # (N,) float32
    lse: Tensor,  # (N,) float32
    softcap: float,
) -> None:
    def start(config: Config, out: Tensor) -> None:
        _start(
            _cross_entropy_bwd_kernel, config, logits, target=target, top=top, lse=lse, dlse=dlse, dpicked=dpicked,
            dmean=dmean, softcap=float(softcap), MEAN=dmean is not None, **_writing(logits, out),
        )  # fmt: skip

    key = _key("cross_entropy_bwd", logits, dmean is None, softcap > 0, dlogits.stride(0) % 8)
    default = config(logits.shape[1], _group(logits), softcap == 0)
    start(_utils.choose(key, default, CANDIDATES, lambda config: start(config, _spare(dlogits))), dlogits)


def cross_entropy_loss(
    top: Tensor,  # (N,) float32
    lse: Tensor,  # (N,) float32
    picked: Tensor,  # (N,) float32
    mean: Tensor | None,  # (N,) float32; wanted with label smoothing
    logits: Tensor,  # (N, V), last stride 1; become the gradient
    target: Tensor,  # (N,) int64
    scale: Tensor,  # (N,) float32, of each row's loss in their sum
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """The stats of every row and, in the logits' memory, the gradient of the loss."""

    def start(config: Config, out: Tensor) -> None:
        if not config.blocks["STATS"]:
            cross_entropy_fwd(top, lse, picked, mean, logits, target, softcap)
        _start(
            _cross_entropy_loss_kernel, config, logits, target=target, scale=scale, top=top, lse=lse, picked=picked,
            mean=mean, softcap=float(softcap), smoothing=float(label_smoothing), z_loss=float(z_loss),
            MEAN=mean is not None, **_writing(logits, out),
        )  # fmt: skip

    key = _key("cross_entropy_loss", logits, mean is None, softcap > 0)
    default = loss_config(logits.shape[1], _group(logits), softcap == 0 and mean is None)
    start(_utils.choose(key, default, LOSS_CANDIDATES, lambda config: start(config, _spare(logits))), logits)

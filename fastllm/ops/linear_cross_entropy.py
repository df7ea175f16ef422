"""The classifier and its cross-entropy, a chunk of rows at a time: the logits are never held whole.

Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, and Liger-Kernel (Hsu et al., 2024) do the
same for the same reason; this one leaves the products to torch and does the rest in the kernels of `cross_entropy`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fastllm.backends import KERNEL_DTYPES, Backend, FallbackWarning, Op, autocasts
from fastllm.ops import _cross_entropy as _ce
from fastllm.ops import _triton, _vocab_parallel
from fastllm.ops._arguments import check_dtype, integer
from fastllm.ops._autograd import Function, again, gradients, run
from fastllm.reference import linear_cross_entropy as reference
from fastllm.tracing import batched, host_values, transformed


def _reason(input: Tensor, weight: Tensor) -> str | None:
    if input.dtype not in KERNEL_DTYPES:
        return f"computes float32, bfloat16 and float16, not {input.dtype}"
    return None


def _on_cpu(supports: Callable[..., str | None]) -> Callable[..., str | None]:
    def reason(*args) -> str | None:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        if device != "cpu":
            return f"runs on cpu, the input is on {device}"
        return None if "CPU" in _ce.stats_fwd.built else "the kernels of cross_entropy were not built"

    return lambda *args: reason(*args) or supports(*args)


def _backends(supports: Callable[..., str | None], triton: Callable, cpu: Callable) -> tuple[Backend, ...]:
    return (
        Backend("triton", _triton.supports(supports), triton),
        Backend("cpu", _on_cpu(supports), cpu),
    )


SMALL = 2**25  # bytes of logits that are not worth cutting on a CPU
AMPLE = 2**30  # bytes of logits for which a GPU has room
TILE = (128, 256)  # of a product on Hopper
MULTIPROCESSORS = 132


def default_chunk_size(rows: int, hidden: int, classes: int, itemsize: int, device: str, summed: bool) -> int:
    """Rows whose logits are held at a time.

    On a CPU: as many as make them half the size of the classifier's weight. Fewer would cost a read and a write of the
    weight's gradient more often.

    On a GPU: the fewest chunks whose logits take no more memory than a gibibyte, or, where the weight's gradient is
    `summed` over them, than that sum in float32, which a single chunk does without. Of that many chunks or up to twice
    as many, those are taken that keep the multiprocessors busy best: the gradient of the input has the fewest tiles of
    the three products, and they are computed in waves of one tile for each multiprocessor."""
    row = max(classes, 1) * itemsize
    if device == "cpu":
        return max(1024 // itemsize, -(-hidden // 128) * 64, SMALL // row)
    rows = max(rows, 1)
    fewest = -(-rows // max(4 * hidden // itemsize if summed else 0, AMPLE // row, TILE[0]))

    def waves(chunks: int) -> int:
        tiles = -(-rows // (chunks * TILE[0])) * -(-hidden // TILE[1])
        return chunks * -(-tiles // MULTIPROCESSORS)

    chunks = min(range(fewest, 2 * fewest + 1), key=waves)
    return -(-rows // (chunks * TILE[0])) * TILE[0]


def _chunks(
    input: Tensor, weight: Tensor, bias: Tensor | None, size: int, summed: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk of rows with its logits, all in one buffer, which may be overwritten. `size` 0 is the default, which
    knows whether the weight's gradient is summed."""
    count, classes = input.shape[0], weight.shape[0]
    device = input.device.type
    size = size or default_chunk_size(count, input.shape[1], classes, input.itemsize, device, summed)
    # The fast products of a GPU want rows that start at a multiple of 16 bytes; these do at one of 128.
    stride = classes if device == "cpu" else -(-classes // 64) * 64
    buffer = input.new_empty(min(size, count), stride)[:, :classes]
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        logits = buffer[: rows.stop - start]
        if bias is None:
            torch.mm(input[rows], weight.t(), out=logits)
        else:
            torch.addmm(bias, input[rows], weight.t(), out=logits)
        yield rows, logits


def _fwd(input, weight, bias, target, softcap, mean, chunk_size):
    outputs = _ce.empty_stats(input, mean)
    for rows, logits in _chunks(input, weight, bias, chunk_size):
        _stats(outputs, rows, logits, target, softcap, mean)
    return outputs


def _stats(outputs, rows, logits, target, softcap, mean) -> tuple[Tensor, Tensor]:
    """Writes a chunk's part of the outputs; returns its top and lse."""
    parts = _ce.stats_fwd(logits, target[rows], None, softcap, mean)
    for output, part in zip(outputs, parts, strict=True):
        if output.numel():
            output[rows] = part
    return parts[:2]


def _fwd_triton(input, weight, bias, target, softcap, mean, chunk_size):
    if not weight.shape[0]:
        return reference.linear_cross_entropy_fwd(input, weight, bias, target, softcap, mean, chunk_size)
    outputs = _ce.empty_stats(input, mean)
    for rows, logits in _chunks(input, weight, bias, chunk_size):
        _ce.launch_fwd([output[rows] for output in outputs], logits, target[rows], softcap)
    return outputs


def _adds_in_float32(x: Tensor) -> bool:
    """Whether `torch.addmm` adds a product of such 16-bit matrices to a float32 matrix, in place."""
    return x.is_cuda and _tried_to_add(x.device, x.dtype)


@functools.cache
def _tried_to_add(device: torch.device, dtype: torch.dtype) -> bool:
    total = torch.ones(8, 8, device=device)
    ones = torch.ones(8, 8, dtype=dtype, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError) as error:
        if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):  # they say nothing of addmm
            raise
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"linear_cross_entropy: torch cannot add a product of {dtype} matrices to a float32 one on {device} "
            f"({reason}); the gradient of the weight takes a temporary one",
            FallbackWarning,
            stacklevel=2,
        )
        return False
    return True


class _Gradients:
    """Those of input, weight and bias, from one chunk's gradient of the logits after the other."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]):
        self.input, self.weight, self.bias = input, weight, bias
        self.dinput = input.new_empty(input.shape if wanted[0] else (0,))
        self.dweight = weight.new_empty(0)  # until it is known how it is summed
        self.wants_weight = wanted[1]
        size = bias.shape if wanted[2] and bias is not None else (0,)
        self.dbias = weight.new_zeros(size, dtype=torch.float32)
        self.first = True

    def add(self, dlogits: Tensor, rows: slice) -> None:
        if self.dinput.numel():
            torch.mm(dlogits, self.weight, out=self.dinput[rows])
        if self.wants_weight:
            self._add_weight(dlogits.t(), self.input[rows])
        if self.dbias.numel():
            self.dbias += dlogits.sum(0, dtype=torch.float32)
        self.first = False

    def _add_weight(self, a: Tensor, b: Tensor) -> None:
        if self.first and b.shape == self.input.shape:
            self.dweight = torch.mm(a, b)  # a single chunk: there is nothing to sum
            return
        if self.first:
            # In float32: rounded to 16 bits after each chunk, the sum would lose what is small beside it.
            acc = torch.promote_types(a.dtype, torch.float32)
            self.dweight = self.weight.new_empty(self.weight.shape, dtype=acc)
        beta = 0 if self.first else 1
        if a.dtype == self.dweight.dtype:
            torch.addmm(self.dweight, a, b, beta=beta, out=self.dweight)
        elif _adds_in_float32(a):
            torch.addmm(self.dweight, a, b, beta=beta, out_dtype=torch.float32, out=self.dweight)
        else:
            product = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a, b)
            self.dweight.copy_(product) if self.first else self.dweight.add_(product)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.first and self.wants_weight:
            self.dweight = torch.zeros_like(self.weight, memory_format=torch.contiguous_format)
        dbias = self.dbias if self.bias is None else self.dbias.to(self.bias.dtype)
        return self.dinput, self.dweight.to(self.weight.dtype), dbias


def _bwd(dlse, dpicked, dmean, input, weight, bias, target, top, lse, softcap, chunk_size, wanted):
    grads = _Gradients(input, weight, bias, wanted)
    for rows, logits in _chunks(input, weight, bias, chunk_size, wanted[1]):
        upstream = dlse[rows], dpicked[rows], None if dmean is None else dmean[rows]
        _ce.stats_bwd_in_place(*upstream, logits, target[rows], top[rows], lse[rows], softcap)
        grads.add(logits, rows)
    logits = input.new_empty(0)  # their memory is the result's
    return grads.result()


def _fwd_bwd(input, weight, bias, target, scale, label_smoothing, z_loss, softcap, chunk_size, wanted):
    mean = label_smoothing > 0
    outputs = _ce.empty_stats(input, mean)
    grads = _Gradients(input, weight, bias, wanted)
    for rows, logits in _chunks(input, weight, bias, chunk_size, wanted[1]):
        shift = _stats(outputs, rows, logits, target, softcap, mean)
        upstream = reference.loss_gradients(scale[rows], *shift, label_smoothing, z_loss)
        _ce.stats_bwd_in_place(*upstream, logits, target[rows], *shift, softcap)
        grads.add(logits, rows)
    logits = input.new_empty(0)  # their memory is the result's
    return *outputs, *grads.result()


def _fwd_bwd_triton(input, weight, bias, target, scale, label_smoothing, z_loss, softcap, chunk_size, wanted):
    if not weight.shape[0]:
        return reference.linear_cross_entropy_fwd_bwd(
            input, weight, bias, target, scale, label_smoothing, z_loss, softcap, chunk_size, wanted
        )  # fmt: skip
    outputs, scale = _ce.empty_stats(input, label_smoothing > 0), scale.contiguous()
    grads = _Gradients(input, weight, bias, wanted)
    for rows, logits in _chunks(input, weight, bias, chunk_size, wanted[1]):
        chunk = [output[rows] for output in outputs]
        _ce.launch_loss(chunk, logits, target[rows], scale[rows], label_smoothing, z_loss, softcap)
        grads.add(logits, rows)
    logits = input.new_empty(0)  # their memory is the result's
    return *outputs, *grads.result()


def _grads_fake(input, weight, bias, wanted):
    return (
        input.new_empty(input.shape if wanted[0] else (0,)),
        weight.new_empty(weight.shape if wanted[1] else (0,)),
        bias.new_empty(bias.shape) if wanted[2] and bias is not None else weight.new_empty(0),
    )


_fwd_op = Op(
    "linear_cross_entropy_fwd(Tensor input, Tensor weight, Tensor? bias, Tensor target, float softcap, bool mean, "
    "SymInt chunk_size) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy_fwd,
    fake=lambda input, weight, bias, target, softcap, mean, chunk_size: _ce.empty_stats(input, mean),
    backends=_backends(lambda input, weight, *rest: _reason(input, weight), _fwd_triton, _fwd),
)
_bwd_op = Op(
    "linear_cross_entropy_bwd(Tensor dlse, Tensor dpicked, Tensor? dmean, Tensor input, Tensor weight, Tensor? bias, "
    "Tensor target, Tensor top, Tensor lse, float softcap, SymInt chunk_size, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy_bwd,
    fake=lambda dlse, dpicked, dmean, input, weight, bias, target, top, lse, softcap, chunk_size, wanted: _grads_fake(
        input, weight, bias, wanted
    ),
    backends=_backends(lambda dlse, dpicked, dmean, input, weight, *rest: _reason(input, weight), _bwd, _bwd),
)
_fwd_bwd_op = Op(
    "linear_cross_entropy_fwd_bwd(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor scale, "
    "float label_smoothing, float z_loss, float softcap, SymInt chunk_size, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy_fwd_bwd,
    fake=lambda input, weight, bias, target, scale, label_smoothing, z_loss, softcap, chunk_size, wanted: (
        *_ce.empty_stats(input, label_smoothing > 0),
        *_grads_fake(input, weight, bias, wanted),
    ),
    backends=_backends(lambda input, weight, *rest: _reason(input, weight), _fwd_bwd_triton, _fwd_bwd),
)


@_fwd_op.differentiate
class _LinearStats(Function):
    """(top, lse, picked, mean) as `cross_entropy` has them; the backward computes the logits once more."""

    @staticmethod
    def forward(input, weight, bias, target, softcap, mean, chunk_size):
        return _fwd_op.below_autograd(input, weight, bias, target, softcap, mean, chunk_size)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, softcap, mean, chunk_size = inputs
        _LinearStats.save(ctx, tensors, outputs, mean, softcap, chunk_size)

    @staticmethod
    def save(ctx, tensors, outputs, mean, softcap, chunk_size):
        top, lse, _, _, *grads = outputs
        ctx.save_for_backward(*tensors, top, lse)
        ctx.mark_non_differentiable(top, *grads)
        ctx.mean, ctx.rest = mean, (softcap, chunk_size)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, _, dlse, dpicked, dmean):
        saved = ctx.saved_tensors
        grads = _ce.upstream(saved[-1], dlse, dpicked, dmean if ctx.mean else None)
        wanted = list(ctx.needs_input_grad[:3])
        found = gradients(_bwd_op, _formula, *grads, *saved, *ctx.rest, wanted)
        return *(grad if want else None for grad, want in zip(found, wanted, strict=True)), *(None,) * 4


def _formula(dlse, dpicked, dmean, input, weight, bias, target, top, lse, softcap, *rest):
    input = _ce.without_idle_rows(input, dlse, lse)
    _, lse, *_ = reference.linear_cross_entropy_fwd(input, weight, bias, target, softcap, False, 0)
    return reference.linear_cross_entropy_bwd(
        dlse, dpicked, dmean, input, weight, bias, target, top, lse, softcap, *rest
    )  # fmt: skip


@_fwd_bwd_op.differentiate
class _LinearStatsAndGradients(Function):
    """What stands in a graph that was captured from `_Loss`, and is differentiated like any other."""

    @staticmethod
    def forward(input, weight, bias, target, scale, label_smoothing, z_loss, softcap, chunk_size, wanted):
        return _fwd_bwd_op.below_autograd(
            input, weight, bias, target, scale, label_smoothing, z_loss, softcap, chunk_size, wanted
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, _, label_smoothing, _, softcap, chunk_size, _ = inputs
        _LinearStats.save(ctx, tensors, outputs, label_smoothing > 0, softcap, chunk_size)

    @staticmethod
    def backward(ctx, *grads):
        return *_LinearStats.backward(ctx, *grads[:4])[:4], *(None,) * 6


class _Loss(torch.autograd.Function):
    """sum_i scale_i loss_i. The gradients are computed with it, from the same logits, and wait for the backward."""

    @staticmethod
    def forward(ctx, input, weight, bias, target, scale, label_smoothing, z_loss, softcap, chunk_size):
        wanted = list(ctx.needs_input_grad[:3])
        top, lse, picked, mean, *grads = _fwd_bwd_op.below_autograd(
            input, weight, bias, target, scale, label_smoothing, z_loss, softcap, chunk_size, wanted
        )
        ctx.save_for_backward(input, weight, bias, target, scale)
        ctx.rest = label_smoothing, z_loss, softcap, chunk_size, wanted
        ctx.grads = grads
        rows = lse - picked
        if label_smoothing:
            rows = (1 - label_smoothing) * rows + label_smoothing * (lse - mean)
        if z_loss:
            rows = rows + z_loss * (top + lse).square()
        return torch.where(scale == 0, 0.0, scale * rows).sum()

    @staticmethod
    def backward(ctx, dloss):
        wanted = ctx.rest[-1]
        found, ctx.grads = ctx.grads, None
        if found is None or again():  # a second time, autograd has the first ones, and may have added to them
            args = (dloss, *ctx.saved_tensors, *ctx.rest)
            found = gradients(_fwd_bwd_op, _loss_formula, *args, compute=_loss_gradients)
        else:
            found = _scaled(found, dloss)
        return *(grad if want else None for grad, want in zip(found, wanted, strict=True)), *(None,) * 6


def _loss_gradients(dloss, *args):
    return _scaled(_fwd_bwd_op(*args)[4:], dloss)


def _loss_formula(dloss, input, weight, bias, target, scale, *rest):
    input = input.masked_fill((scale == 0)[:, None], 0.0)  # which may hold anything
    found = reference.linear_cross_entropy_fwd_bwd(input, weight, bias, target, scale, *rest)
    return _scaled(found[4:], dloss, always=True)


def _scaled(grads: Iterable[Tensor], dloss: Tensor, always: bool = False) -> tuple[Tensor, ...]:
    value = None if always or batched(dloss) else host_values(dloss)
    if value is not None and value.item() == 1:
        return tuple(grads)
    return tuple([(grad.to(dloss.dtype) * dloss).to(grad.dtype) for grad in grads])


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float | None = 0.0,
    softcap: float | None = 0.0,
    num_valid: float | Tensor | None = None,
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    return_logprobs: bool = False,
    process_group: object | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cross_entropy(input @ linear_weight.T + linear_bias, target, ...)` without the logits in memory.

    Argument names are those of `torch.nn.functional.linear_cross_entropy`. With "mean" and "sum" the gradients are
    computed in the forward, a chunk of rows at a time, and need three matrix products; with "none", return_logprobs,
    process_group and in float16 the backward computes the logits once more, a fourth. The gradient of the weight is
    summed over chunks in float32; of a single chunk there is nothing to sum.

    Args:
        input: (..., H) hidden states; float32, bfloat16, float16; float64 runs on the reference.
        linear_weight: (V, H), in input's dtype. May be an embedding's.
        target: (...) class indices, int64 or int32. (Probabilities: `cross_entropy` of whole logits.)
        linear_bias: (V,).
        weight, reduction, ignore_index, label_smoothing, z_loss, softcap, num_valid, dtype: as `cross_entropy`;
            ignore_index None is -100, as torch. Class weights do not go with label smoothing and z-loss.
        chunk_size: rows whose logits are held at a time: fewer take less memory and more time. Default on a CPU: as
            many as make the logits half the size of linear_weight, but no fewer than 256 (512 for 16 bits), or than
            fill 32 MiB. On a GPU: as many as fill 1 GiB, or, where linear_weight wants its gradient, as much as that
            takes in float32, shared out evenly.
        return_logprobs: also return the log-probability of each target, differentiable.
        process_group: of torch.distributed: linear_weight and linear_bias are this rank's rows of a vocabulary that is
            cut over its ranks in their order, input and target the same on all. The loss, and the gradient of input,
            are then the same on all ranks too. Each call asks the ranks for their sizes; not in a compiled graph.

    Returns:
        The loss, 0-d, or for "none" of target's shape. With return_logprobs
        also (...) float32 log-probabilities, 0 where the target is ignored. Differentiable;
        a second derivative runs on the reference.

    Raises:
        IndexError, TypeError, ValueError: as `cross_entropy`.
    """
    name = "linear_cross_entropy"
    for label, tensor in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {label} must be a tensor, got {type(tensor).__name__}")
    ignore_index = -100 if ignore_index is None else integer(name, "ignore_index", ignore_index)
    label_smoothing, z_loss, softcap = _ce.check_options(name, reduction, label_smoothing, z_loss, softcap, dtype)
    chunk_size = _ce.check_linear_options(name, weight, label_smoothing, z_loss, chunk_size)
    dtype = _ce.loss_dtype(input) if dtype is None else dtype
    if autocasts(input.device.type) and input.dtype != torch.float64:  # as torch's linear
        short = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(short), linear_weight.to(short)
        linear_bias = None if linear_bias is None else linear_bias.to(short)
    _check(name, input, linear_weight, target, linear_bias)
    classes, start = linear_weight.shape[0], 0
    if process_group is not None:
        classes, start = _vocab_parallel.extent(classes, linear_weight.device, process_group)
    _ce.check_weight(name, weight, classes, input)
    _ce.check_num_valid(name, num_valid, reduction)

    shape = target.shape
    x, y = input.reshape(-1, input.shape[-1]), target.reshape(-1).long().contiguous()
    _ce.check_target(name, y, classes, ignore_index)
    chunk = 0 if chunk_size is None else min(chunk_size, max(1, x.shape[0]))
    numbers = float(label_smoothing), float(z_loss), float(softcap)
    differentiated = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, linear_weight, linear_bias)
    )
    # float16 needs the scale of a GradScaler before its gradients are rounded, which only the backward knows. An
    # exported graph may be run without gradients, torch.func knows only later which it wants.
    now = reduction != "none" and not return_logprobs and process_group is None and x.dtype != torch.float16
    now = now and not torch.compiler.is_exporting() and not transformed()
    if differentiated and now:
        valid = y != ignore_index
        scale = valid.to(torch.promote_types(x.dtype, torch.float32))
        if weight is not None:
            scale = scale * weight.to(scale.dtype)[torch.where(valid, y, 0)]
        count = scale.sum() if num_valid is None else num_valid
        if reduction == "mean":
            scale = torch.where(valid, scale / count, 0.0)
        loss = _Loss.apply(x, linear_weight, linear_bias, y, scale, *numbers, chunk)
        if reduction == "mean":
            loss = loss + torch.zeros_like(loss) / count  # NaN without a target, as torch
        return loss.to(dtype)
    if process_group is None:
        stats = run(_fwd_op, x, linear_weight, linear_bias, y, softcap, label_smoothing > 0, chunk)
    else:
        x = _vocab_parallel.replicated(x, process_group)
        stats = run(_fwd_op, x, linear_weight, linear_bias, y - start, softcap, label_smoothing > 0, chunk)
        mine = (y >= start) & (y < start + linear_weight.shape[0])
        stats = (*stats[:3], stats[3] if label_smoothing else None)
        stats = _vocab_parallel.combined(stats, mine, linear_weight.shape[0] / classes, process_group)
    rows, count = _ce.row_losses(stats, y, weight, ignore_index, label_smoothing, z_loss)
    loss = _ce.reduced(rows.reshape(shape), count, reduction, num_valid).to(dtype)
    if not return_logprobs:
        return loss
    return loss, torch.where(y != ignore_index, stats[2] - stats[1], 0.0).reshape(shape)


def _check(name: str, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    for label, tensor in (("input", input), ("linear_weight", weight), ("linear_bias", bias)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {label} must be a tensor, got {type(tensor).__name__}")
        check_dtype(name, label, tensor.dtype)
        if tensor.dtype != input.dtype:
            raise TypeError(f"{name}: {label} must have input's dtype {input.dtype}, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name}: input is on {input.device}, {label} on {tensor.device}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: target must be int64 or int32, got {target.dtype}")
    if target.device != input.device:
        raise ValueError(f"{name}: input is on {input.device}, target on {target.device}")
    if input.dim() == 0 or weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"{name}: input must have shape (..., H) and linear_weight (V, H), got {tuple(input.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"{name}: target must have shape {tuple(input.shape[:-1])} for input {tuple(input.shape)}, got "
            f"{tuple(target.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: linear_bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")

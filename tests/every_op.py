"""Calls of every op that reach every path of its kernels: what tests of all ops on a GPU, and the sanitizer, run.

    python tests/every_op.py cuda              # each once, in every dtype, on the backend that is meant
    python tests/every_op.py cuda cuda-ops     # those in CUDA C++ alone; or ops by name
    python tests/every_op.py serve             # as a worker of benchmarks/gpu_run.py

`VARIANTS` names the calls, and beside each what its sizes are for.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import adamw_suite
import attention_suite
import eager
import torch
from torch import Tensor
from torch.nn import functional as F

import fastllm
from fastllm import ops, precompile
from fastllm.benchmarks._workers import cpu_seconds, serve
from fastllm.testing import assert_within_budget, check_op, dropout_factors, make, outputs_of, sample, seeded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIXTEEN = DTYPES[1:]
NORMS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
DROPOUT_NORMS = ("dropout_add_layer_norm", "dropout_add_rms_norm")
CUDA = ("adamw", *NORMS)  # CUDA C++; the others are Triton's
NO_BACKWARD = ("adamw", "attention_kvcache")
P = 0.3  # of dropout


@dataclass(frozen=True)
class Draw:
    """Draws a variant's tensors, each from a seed of its own."""

    device: str
    dtype: torch.dtype
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])

    def __call__(self, *shape: int, layout: str = "contiguous", dtype: torch.dtype | None = None) -> Tensor:
        self.seeds[0] += 1
        return make(shape, dtype or self.dtype, self.device, self.seeds[0], layout)

    def many(self, rows: int) -> int:
        """So many rows as fill a GPU's grid more than once; a CPU's share of them on a CPU."""
        return rows if self.device.startswith("cuda") else rows // 128 + 1

    def targets(self, rows: int, classes: int) -> Tensor:
        found = torch.arange(rows, device=self.device) * 7919 % classes
        found[::5] = -100
        return found


Call = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """One call of an op: (args, kwargs) from a `Draw`. `options`: AdamW's steps beside the reference."""

    op: str
    name: str
    draw: Callable[[Draw], Call]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    options: dict[str, Any] | None = None


def backend(op: str, device: str) -> str | None:
    """The backend that a call is meant for: the kernels of this project; on a CPU, what is chosen there."""
    if not device.startswith("cuda"):
        return None
    return "cuda" if op in CUDA else "triton"


# Norms (csrc/cuda/norm_fwd.cu, norm_bwd.cu). A pack is 4 float32 or 8 of 16 bits. A row is one warp's, 8 or 16 elements
# a lane, or one or more warps', 64 bytes a thread in the forward and 16 elements in the backward; past 16,384 (8,192
# backward in float32), or ragged past 4,096, rows are read again in loops, and the backward sums its columns apart.


def _norm(op: str, rows: int, n: int, layout: str = "contiguous", parameters: bool = True) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        activations = [draw(draw.many(rows), n, layout=layout) for _ in range(2 if "add_" in op else 1)]
        weights = [draw(n) if parameters else None for _ in range(2 if "layer" in op else 1)]
        return (*activations, (n,), *weights), {"p": P} if "dropout" in op else {}

    return call


NORM_SIZES: dict[str, tuple] = {
    # 16 rows a block and at most 4 blocks on each of 148 multiprocessors: the backward's blocks walk over several rows
    "warp a row": (20_000, 128),
    "16 a lane": (65, 512),
    "32 a lane": (65, 1024),  # in float32, and in the backward: two warps
    "32 a lane, partly": (65, 768),
    "32 a thread, partly": (70, 6656),  # more than the threads that 16 each may have
    "16 a thread, filled": (70, 1536),  # 32 would leave a quarter of the threads without work
    "block a row": (5000, 2048),  # at most 4 blocks of 4 rows on each multiprocessor: several rows a block again
    "block, 32 a thread": (70, 8192),  # backward: 16 a thread
    "block, longest": (70, 16384),  # backward: 32 a thread in 16 bits, loops in float32
    "loops": (70, 20480),  # and 32 rows a block of the column sums
    "ragged warp": (65, 200, "misaligned"),
    "ragged block": (700, 2047),  # in the backward two a block, where there are 350 multiprocessors or fewer
    "ragged loops": (8300, 4099),  # more rows than 256 blocks of 32: column sums over several
    "no parameters": (65, 512, "contiguous", False),
}

# With dropout (kernels/_dropout_norm.py): the next power of two a program; 32 warps a multiprocessor in the backward,
# whose programs walk over several rows where there are more.
DROPOUT_SIZES: dict[str, tuple] = {
    "warp a row": (5000, 130),
    "several warps": (1300, 1000),
    "16 warps": (300, 8192),
    "no parameters": (65, 512, "contiguous", False),
}


# AdamW (csrc/cuda/adamw.cu): chunks of 8,192 elements, twice as many with 8-bit moments, four at a time where aligned;
# about 340 tensors a launch of the step, 1,365 of the norm and 4,080 of the preparation.

CHUNKS = ((3 * 8192 + 5,), (8192,), (129, 5, 3), (127,), (3,), (1,), (0,))
ADAMW: dict[str, dict[str, Any]] = {
    "small": {"shapes": ((3, 8), (5,))},
    "chunks": {"shapes": CHUNKS},
    "many tensors": {"shapes": [(1 + i % 9,) for i in range(4200)], "max_norm": 1.0, "steps": 1},
    "unaligned": {"shapes": CHUNKS, "misaligned": True},
    "clipped": {"shapes": CHUNKS, "max_norm": 1.0},
    "amsgrad": {"shapes": CHUNKS, "amsgrad": True},
    "scaled": {"shapes": CHUNKS, "grad_scale": 3.0, "maximize": True},
    "float32 moments": {"shapes": CHUNKS, "moment_dtype": torch.float32},
    "8-bit moments": {"shapes": (*CHUNKS, (16384,), (2 * 16384 + 300,)), "moment_dtype": torch.uint8},
    "float32 master": {"shapes": CHUNKS, "master": "float32", "moment_dtype": torch.float32, "misaligned": True},
    "stochastic": {"shapes": CHUNKS, "stochastic_rounding": True, "seed": 2**40 + 7},
    "remainder, 8-bit": {"shapes": CHUNKS, "master": "remainder", "moment_dtype": torch.uint8, "max_norm": 1.0},
    "float32 gradients": {"shapes": CHUNKS, "grad_dtype": torch.float32, "moment_dtype": torch.float32},
    "bfloat16 moments": {"shapes": CHUNKS, "moment_dtype": torch.bfloat16},
    # fastllm.optim.AdamW, whose kernels read a table of addresses that is made at its first step
    "optimizer": {"optimizer": {"max_norm": 1.0}},
}
ADAMW_DTYPES = {
    "many tensors": (torch.float32,),
    "float32 master": SIXTEEN,
    "remainder, 8-bit": (torch.bfloat16,),
    "float32 gradients": (torch.bfloat16,),
    "bfloat16 moments": (torch.float32, torch.bfloat16),
}


def _adamw(options: dict[str, Any]) -> Callable[[Draw], Call]:
    """((state, gradients), what the state's step is called with): not the op's arguments, since the norm is computed on
    the way."""
    chosen = {key: value for key, value in options.items() if key != "steps"}

    def call(draw: Draw) -> Call:
        state, kwargs = adamw_suite.prepared(draw.device, dtype=draw.dtype, **chosen)
        return (state, state.grads(1)), kwargs

    return call


# Attention (kernels/_attention_config.py). On sm_90 a program has 64 or 128 queries and 32 to 128 keys, 16 to 32 in
# float32: 300 to 513 rows are several tiles in both directions, some whole, some cut by a border or by the end.
# Head size 64 and 128 are two configurations, 256 one with dk and dv apart; 72 is masked at every load; a mask, ALiBi,
# a softcap or dropout takes the featured tables. On Hopper, whole heads of 64 or 128 take kernels of their own, unless
# something lies between them. float32 has its own; 16 bits share theirs, so that float16 is run
# where it may differ: in the range of what is multiplied.

ATTENTION: dict[str, tuple] = {
    # name: head size, (heads, key heads, Sq, Sk), features, dtypes, and what lies between heads
    "causal": (64, (4, 2, 513, 513), ("causal", "gqa"), DTYPES),
    "whole tiles": (128, (2, 2, 512, 512), (), SIXTEEN),
    "window": (128, (4, 1, 300, 385), ("window", "gqa", "bottom_right"), (torch.bfloat16,)),
    "odd head": (72, (2, 2, 300, 300), ("causal",), (torch.bfloat16,)),
    "two passes": (256, (2, 1, 300, 300), ("causal", "gqa"), (torch.bfloat16,)),
    "wide head": (512, (2, 1, 300, 300), ("causal", "gqa"), (torch.bfloat16,)),
    "no descriptors": (128, (2, 1, 300, 300), ("causal", "gqa"), (torch.bfloat16,), 4),
    "bool mask": (64, (2, 2, 300, 385), ("bool_mask", "softcap", "sinks"), (torch.bfloat16,)),
    "float mask": (64, (4, 2, 300, 385), ("float_mask", "alibi", "dropout", "causal", "gqa"), DTYPES),
}
VARLEN: dict[str, tuple] = {
    # name: head size, (heads, key heads), lengths of queries and of keys, features, dtypes
    "documents": (64, (4, 2), (5, 0, 300, 513), (5, 0, 300, 513), ("causal", "gqa"), DTYPES),
    "two lengths": (128, (2, 2), (5, 0, 300, 33), (500, 4, 0, 333), (), (torch.bfloat16,)),
    "features": (64, (2, 2), (5, 300, 17), (5, 300, 17), ("softcap", "alibi", "sinks", "dropout", "window"),
                 (torch.bfloat16,)),
}  # fmt: skip
KVCACHE: dict[str, tuple] = {
    # name: head size, (heads, key heads), new queries, appended keys, capacity, lengths, features. The cache is cut
    # into as many parts as keep the multiprocessors busy, none below four blocks of 64 keys.
    "split": (128, (16, 4), 1, 0, 8192, (1, 5000, 8000), ("causal",)),
    "one part": (64, (4, 2), 4, 4, 200, (10, 150), ("causal", "window", "softcap")),
    "split, features": (64, (4, 2), 2, 2, 3000, (2000, 900), ("causal", "alibi", "sinks")),
}


def _features(draw: Draw, names: tuple[str, ...], heads: int, seq_q: int, seq_k: int) -> dict[str, Any]:
    found = attention_suite.features(names, 1, heads, seq_q, seq_k, draw.device)
    for name in {"sinks", "attn_mask"} & found.keys():
        if found[name].is_floating_point():
            found[name] = found[name].to(draw.dtype)
    return found | {"return_lse": True}


def _attention(size: int, shape: tuple, names: tuple[str, ...], gap: int = 0) -> Callable[[Draw], Call]:
    heads, kv_heads, seq_q, seq_k = shape

    def call(draw: Draw) -> Call:
        extras = _features(draw, names, heads, seq_q, seq_k)
        # As projections lay heads out.
        q = draw(1, seq_q, heads, size + gap)[..., :size].transpose(1, 2)
        k, v = (draw(1, seq_k, kv_heads, size + gap)[..., :size].transpose(1, 2) for _ in range(2))
        return (q, k, v), extras

    return call


def _varlen(size: int, heads: tuple, lengths_q: tuple, lengths_k: tuple, names: tuple) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        extras = _features(draw, names, heads[0], max(lengths_q), max(lengths_k))
        q = draw(sum(lengths_q), heads[0], size)
        k, v = (draw(sum(lengths_k), heads[1], size) for _ in range(2))
        cu = [attention_suite.cumulative(n, draw.device) for n in (lengths_q, lengths_k)]
        return (q, k, v, *cu, max(lengths_q), max(lengths_k)), extras

    return call


def _kvcache(size, heads, rows, new, capacity, lengths, names) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        extras = _features(draw, names, heads[0], rows, capacity)
        batch = len(lengths)
        q, caches = draw(batch, heads[0], rows, size), [draw(batch, heads[1], capacity, size) for _ in range(2)]
        added = [draw(batch, heads[1], new, size) for _ in range(2)] if new else []
        return (q, *caches, torch.tensor(lengths, dtype=torch.int32, device=draw.device), *added), extras

    return call


# Losses (kernels/cross_entropy.py): 8,192 classes a step. Pointwise: 2,048 elements a program of the gated activations,
# 8 heads of one position a program of rotary.


def _cross_entropy(rows: int, classes: int, **options) -> Callable[[Draw], Call]:
    return lambda draw: ((draw(rows, classes), draw.targets(rows, classes)), options)


def _linear_cross_entropy(rows: int, hidden: int, classes: int, bias: bool, **options) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        extras = {"linear_bias": draw(classes)} if bias else {}
        return (draw(rows, hidden), draw(classes, hidden) * 0.3, draw.targets(rows, classes)), extras | options

    return call


def _glu(rows: int, n: int, **options) -> Callable[[Draw], Call]:
    return lambda draw: (draw(rows, 2 * n).chunk(2, -1), options)  # halves of one projection


def _gelu(rows: int, n: int, biased: bool, **options) -> Callable[[Draw], Call]:
    return lambda draw: ((draw(draw.many(rows), n),), ({"bias": draw(n)} if biased else {}) | options)


def _rotary(heads: int, kv_heads: int, seq: int, size: int, half: int, **options) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        q, k = (draw(2, seq, h, size).transpose(1, 2) for h in (heads, kv_heads))
        angles = draw(seq + 9, half, dtype=torch.float32)
        extras = {"position_ids": torch.arange(9, 9 + seq, device=draw.device)} if options else {}
        return (q, k, angles.cos(), angles.sin()), extras | options

    return call


LOSSES = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}
POINTWISE = [
    Variant("cross_entropy", "several steps", _cross_entropy(70, 50257)),
    Variant("cross_entropy", "several steps, all options", _cross_entropy(70, 50257, **LOSSES)),
    Variant("cross_entropy", "one step, a row each", _cross_entropy(300, 1000, reduction="none")),
    # three chunks, the last of them short
    Variant("linear_cross_entropy", "chunks", _linear_cross_entropy(300, 96, 20000, False, chunk_size=128)),
    Variant("linear_cross_entropy", "chunks, all options",
            _linear_cross_entropy(300, 96, 20000, True, chunk_size=128, **LOSSES)),
    Variant("linear_cross_entropy", "a row each",
            _linear_cross_entropy(300, 96, 1000, True, chunk_size=128, reduction="none")),
    Variant("swiglu", "pieces", _glu(37, 5001)),
    Variant("geglu", "pieces", _glu(37, 5000)),
    Variant("geglu", "pieces, tanh", _glu(37, 5001, approximate="tanh")),
    # with a bias, more rows than programs, on any GPU
    Variant("gelu", "pieces", _gelu(2000, 5000, True), DTYPES[:2]),
    Variant("gelu", "pieces, tanh, alone", _gelu(37, 5001, False, approximate="tanh"), SIXTEEN[:1]),
    Variant("rotary", "blocks of heads", _rotary(130, 5, 100, 64, 32)),
    Variant("rotary", "part of a head, interleaved", _rotary(6, 5, 301, 80, 20, interleaved=True)),
]  # fmt: skip

VARIANTS: dict[str, dict[str, Variant]] = {op: {} for op in ops.__all__}
for variant in (
    *(Variant(op, "small", lambda draw, op=op: _small(op, draw)) for op in ops.__all__ if op != "adamw"),
    *(Variant(op, name, _norm(op, *sizes)) for op in NORMS for name, sizes in NORM_SIZES.items()),
    *(Variant(op, name, _norm(op, *sizes)) for op in DROPOUT_NORMS for name, sizes in DROPOUT_SIZES.items()),
    *(
        Variant("adamw", name, _adamw(options), ADAMW_DTYPES.get(name, DTYPES), options)
        for name, options in ADAMW.items()
    ),
    *(Variant("attention", name, _attention(*sizes[:3], *sizes[4:]), sizes[3]) for name, sizes in ATTENTION.items()),
    *(Variant("attention_varlen", name, _varlen(*sizes[:5]), sizes[5]) for name, sizes in VARLEN.items()),
    *(Variant("attention_kvcache", name, _kvcache(*sizes), SIXTEEN[:1]) for name, sizes in KVCACHE.items()),
    *POINTWISE,
):
    VARIANTS[variant.op][variant.name] = variant


def _small(op: str, draw: Draw) -> Call:
    args, kwargs = sample(op, draw.device, draw.dtype)
    return args, kwargs | ({"p": P} if op in DROPOUT_NORMS else {})


# Running one


def _leaves(op: str, args: tuple, kwargs: dict[str, Any]) -> dict[int | str, Tensor]:
    """What gets a gradient, by its place: not rotary's tables, masks and slopes."""
    given = {**dict(enumerate(args[:2] if op == "rotary" else args)), **kwargs}
    named = ("linear_bias", "sinks", "bias")
    return {
        place: x
        for place, x in given.items()
        if isinstance(x, Tensor) and x.is_floating_point() and (isinstance(place, int) or place in named)
    }


def _replaced(args: tuple, kwargs: dict[str, Any], leaves: dict[int | str, Tensor]) -> Call:
    args = tuple(leaves.get(i, x) for i, x in enumerate(args))
    kwargs = {key: leaves.get(key, value) for key, value in kwargs.items()}
    if kwargs.get("attn_mask") is not None and kwargs["attn_mask"].is_floating_point():
        kwargs["attn_mask"] = kwargs["attn_mask"].to(args[0].dtype)
    return args, kwargs


@dataclass(frozen=True)
class Runner:
    """A call that can be repeated, and the tensors of floating point that it reads."""

    function: Callable[[], list[Tensor]]
    inputs: list[Tensor]

    def __call__(self) -> list[Tensor]:
        return self.function()


def runner(op: str, device: str, dtype: torch.dtype, name: str = "small") -> Runner:
    """Returns a call that gives the outputs of `op` and every gradient; for adamw, what it wrote. Twice the same.

    It runs on the backend that is meant, or raises.
    """
    variant = VARIANTS[op][name]
    if variant.options is not None:
        run = _optimizer_runner if "optimizer" in variant.options else _adamw_runner
        return run(variant, device, dtype)
    args, kwargs = variant.draw(Draw(device, dtype))
    function = fastllm.use_backend(backend(op, device))(_run)
    leaves = {} if op in NO_BACKWARD else _leaves(op, args, kwargs)
    leaves = {place: x.detach().requires_grad_() for place, x in leaves.items()}
    args, kwargs = _replaced(args, kwargs, leaves)
    return Runner(functools.partial(function, op, args, kwargs, leaves), _floating([*args, *kwargs.values()]))


def _floating(values: Iterable[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]


def _again(step: Callable[[], Tensor | None], written: list[Tensor]) -> Runner:
    """The step on what `written` holds now, each time."""
    before = [x.detach().clone() for x in written]

    def run() -> list[Tensor]:
        with torch.no_grad():
            for tensor, value in zip(written, before, strict=True):
                tensor.copy_(value)
        norm = step()
        return [*(x.detach().clone() for x in written), *([] if norm is None else [norm.clone()])]

    return Runner(run, _floating(written))


def _adamw_runner(variant: Variant, device: str, dtype: torch.dtype) -> Runner:
    (state, grads), kwargs = variant.draw(Draw(device, dtype))
    step = fastllm.use_backend(backend("adamw", device))(functools.partial(state.step, grads, **kwargs))
    return _again(step, [*state.tensors().values(), *grads])


def _optimizer_runner(variant: Variant, device: str, dtype: torch.dtype) -> Runner:
    assert variant.options is not None
    step, params, optimizer = adamw_suite.optimizer_step(device, dtype, **variant.options["optimizer"])
    step()  # which makes the state

    def step_and_norm() -> Tensor | None:
        step()
        return optimizer.grad_norm

    states = [x for p in params for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    return _again(step_and_norm, [*(p.detach() for p in params), *states])


def _check_optimizer(options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Two steps beside the same on the reference on the CPU."""
    got, expected = (adamw_suite.optimizer_step(where, dtype, **options) for where in (device, "cpu"))
    for _ in range(2):
        got[0]()
        with fastllm.use_backend("reference"):
            expected[0]()
    rtol = {torch.float32: 2**-18, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for ours, reference in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(ours.detach().cpu(), reference.detach(), rtol=rtol, atol=1e-30)


def _run(op: str, args: tuple, kwargs: dict[str, Any], leaves: dict) -> list[Tensor]:
    if "dropout" in op or kwargs.get("dropout_p"):
        torch.manual_seed(0)
    outputs = [out for out in outputs_of(getattr(ops, op)(*args, **kwargs)) if isinstance(out, Tensor)]
    wanted = [out for out in outputs if out.requires_grad]
    cotangents = [torch.ones_like(out) for out in wanted]
    grads = torch.autograd.grad(wanted, list(leaves.values()), cotangents, allow_unused=True) if wanted else ()
    return [*(out.detach() for out in outputs), *(grad for grad in grads if grad is not None)]


def _stock(op: str) -> Callable:
    """The stock function of the same arguments."""
    if op in NORMS:
        return functools.partial(eager.norm, biased="layer" in op, added="add" in op)
    if op in DROPOUT_NORMS:

        def dropped(x, *rest, p):
            return eager.norm(dropout_factors(x, p).to(x.dtype) * x, *rest, biased="layer" in op, added=True)

        return dropped
    return {
        "swiglu": lambda gate, up: F.silu(gate) * up,
        "geglu": lambda gate, up, approximate="none": F.gelu(gate, approximate=approximate) * up,
        "gelu": eager.gelu,
        "rotary": lambda q, k, cos, sin, **rest: eager.rotary(q, k, cos=cos, sin=sin, **rest),
        "cross_entropy": eager.cross_entropy,
        "linear_cross_entropy": eager.linear_cross_entropy,
        "attention": lambda q, k, v, attn_mask=None, **rest: attention_suite.eager_attention(
            q, k, v, attn_mask, **rest
        ),
        "attention_varlen": lambda q, k, v, cu_q, cu_k, max_q, max_k, **rest: attention_suite.eager_varlen(
            q, k, v, cu_q, cu_k, **rest
        ),
        "attention_kvcache": attention_suite.eager_kvcache,
    }[op]


def _budget(op: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, float]:
    """What the op's formula implies for the floor of `check_op`."""
    if op in ("attention", "attention_varlen"):
        return {"roundings": attention_suite.ROUNDINGS, "cancelling": attention_suite.CANCELLING}
    if op == "cross_entropy":
        return {"cancelling": 1.0 + kwargs.get("z_loss", 0.0) * (float(args[0].float().abs().max()) + 10) ** 2}
    if op == "linear_cross_entropy":
        x, weight = (tensor.float().abs() for tensor in args[:2])
        largest = float(x.max() * weight.sum(1).max())
        cancelling = largest + kwargs.get("z_loss", 0.0) * (largest + 10) ** 2
        return {"cancelling": cancelling, "in_exponent": largest + 10}
    return {}


def check(op: str, name: str, dtype: torch.dtype, device: str) -> None:
    """Asserts that the variant's outputs and gradients are within the error budget, on the backend that is meant."""
    variant = VARIANTS[op][name]
    if variant.options is not None and "optimizer" in variant.options:
        _check_optimizer(variant.options["optimizer"], dtype, device)
        return
    with fastllm.use_backend(backend(op, device)):
        if variant.options is not None:
            got, expected = adamw_suite.beside_the_reference(device, dtype=dtype, **variant.options)
            adamw_suite.assert_same(got, expected, device)
            return
        args, kwargs = variant.draw(Draw(device, dtype))
        if op in NO_BACKWARD:
            _check_kvcache(args, kwargs)
            return
        leaves = _leaves(op, args, kwargs)
        names = list(inspect.signature(getattr(ops, op)).parameters)
        labels = [names[place] if isinstance(place, int) else place for place in leaves]

        def call(fn: Callable) -> Callable:
            def of_leaves(*values: Tensor):
                args_, kwargs_ = _replaced(args, kwargs, dict(zip(leaves, values, strict=True)))
                return fn(*args_, **kwargs_)

            kind = inspect.Parameter.POSITIONAL_ONLY
            of_leaves.__signature__ = inspect.Signature([inspect.Parameter(label, kind) for label in labels])
            of_leaves.__name__ = op
            return seeded(of_leaves)

        ours, stock = call(getattr(ops, op)), call(_stock(op))
        check_op(ours, stock, list(leaves.values()), **_budget(op, args, kwargs))


def _check_kvcache(args: tuple, kwargs: dict[str, Any]) -> None:
    """Every call appends to a cache of its own."""

    def outputs(fn: Callable, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return fn(*(x.to(dtype, copy=True) if x.is_floating_point() else x for x in args), **kwargs)

    ours, stock = outputs(ops.attention_kvcache, args[0].dtype), outputs(_stock("attention_kvcache"), args[0].dtype)
    with fastllm.use_backend("reference"):
        truth = outputs(ops.attention_kvcache, torch.float64)
    for label, *tensors in zip(("out", "lse"), ours, truth, stock, strict=True):
        assert_within_budget(*tensors, name=label)


def jobs(chosen: Callable[[str], bool] = lambda op: True) -> Iterator[dict[str, str]]:
    """Every variant in every dtype that it is for."""
    for op, variants in VARIANTS.items():
        for name, variant in variants.items():
            for dtype in variant.dtypes:
                if chosen(op):
                    word = str(dtype).removeprefix("torch.")
                    yield {"op": op, "variant": name, "dtype": word, "backend": backend(op, "cuda") or ""}


def handle(job: dict[str, Any]) -> dict[str, Any]:
    """What a worker of benchmarks/gpu_run.py does: lists the jobs, takes down what one would launch, compiles that, or
    checks it."""
    if job["do"] == "list":
        return {"jobs": list(jobs()), "start_seconds": cpu_seconds()}
    if job["do"] == "compile":
        return precompile.handle(job, lambda: None)
    op, name, dtype = job["op"], job["variant"], getattr(torch, job["dtype"])
    if job["do"] == "record":
        return precompile.handle(job, lambda: op in CUDA or runner(op, "cuda", dtype, name)())
    device = job["device"]
    warnings.simplefilter("error" if device == "cuda" else "ignore", fastllm.FallbackWarning)
    check(op, name, dtype, device)
    return {"ran": backend(op, device) or "what is chosen on a CPU"}


def main(device: str, chosen: list[str]) -> None:
    """Runs each variant once; all that are chosen, by op or as cuda-ops."""
    wanted = {op for word in chosen for op in (CUDA if word == "cuda-ops" else (word,))} or set(VARIANTS)
    count = 0
    for job in jobs(wanted.__contains__):
        runner(job["op"], device, getattr(torch, job["dtype"]), job["variant"])()
        count += 1
    if device != "cpu":
        torch.cuda.synchronize()
    print(f"{count} calls of {len(wanted)} ops")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(handle)
    else:
        main(sys.argv[1], sys.argv[2:])

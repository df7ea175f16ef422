"""That the calls of `every_op` reach the paths they are there for: by the launches that were recorded, with no GPU."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path
from typing import NamedTuple

import attention_suite
import bindings
import every_op
import pytest
import torch
from every_op import NORM_SIZES, VARIANTS

pytest.importorskip("triton")

from fastllm.backends import OPS
from fastllm.optim import adamw
from fastllm.precompile import Launch, recorded

CHIP = ("cuda", 90)
F32, BF16 = torch.float32, torch.bfloat16


def launches(op: str, variant: str, dtype: torch.dtype = BF16) -> dict[str, list[Launch]]:
    """What the call launches on an H100, by kernel."""
    with recorded(CHIP) as found:
        every_op.runner(op, "cuda", dtype, variant)()
    kernels: dict[str, list[Launch]] = {}
    for launch in found:
        kernels.setdefault(launch.kernel.fn.__name__.strip("_").removesuffix("_kernel"), []).append(launch)
    return kernels


@pytest.mark.parametrize("op", every_op.DROPOUT_NORMS)
@pytest.mark.parametrize(("variant", "warps"), [("warp a row", 1), ("several warps", 2), ("16 warps", 16)])
def test_dropout_norms_walk_over_several_rows(op, variant, warps):
    (backward,) = launches(op, variant)["dropout_norm_bwd"]
    assert backward.grid[0] < backward.args["rows"]
    assert backward.config.warps == warps


def test_losses_take_several_steps_and_chunks():
    for op, variant, steps, chunks in (
        ("cross_entropy", "several steps", 7, 1),
        ("cross_entropy", "one step, a row each", 1, 1),
        ("linear_cross_entropy", "chunks", 2, 3),
        ("linear_cross_entropy", "a row each", 1, 3),
    ):
        found = launches(op, variant)
        for kernel in ("cross_entropy_loss",) if variant == "chunks" else ("cross_entropy_fwd", "cross_entropy_bwd"):
            first, *_ = calls = found[kernel]
            blocks = first.config.blocks
            step = blocks["REPEAT"] * blocks["THREADS"] * first.args["GROUP"]
            assert -(-first.args["n"] // step) == steps, (op, variant)
            assert len({call.grid for call in calls}) == (2 if chunks > 1 else 1), "the last chunk is short"
    assert launches("cross_entropy", "several steps, all options")["cross_entropy_fwd"][0].args["CAPPED"]


def test_pointwise_ops_take_several_programs_a_row():
    for op in ("swiglu", "geglu"):
        for kernel in ("glu_fwd", "glu_bwd"):
            (launch,) = launches(op, "pieces")[kernel]
            assert launch.args["pieces"] == 3
            assert launch.args["n"] % launch.config.blocks["BLOCK"], "with a tail"
    for variant, biased in (("pieces", True), ("pieces, tanh, alone", False)):
        found = launches("gelu", variant)
        for kernel in ("gelu_fwd", "gelu_bwd"):
            (launch,) = found[kernel]
            assert launch.args["pieces"] == 3
            assert launch.args["n"] % launch.config.blocks["BLOCK"], "with a tail"
            assert (launch.args["bias"] is not None) == biased
        assert (launch.args["walkers"] < launch.args["rows"]) == biased
    for variant, copies, head_blocks, positions in (
        ("blocks of heads", False, 3, 1),
        ("part of a head, interleaved", True, 1, 4),
    ):
        for launch in launches("rotary", variant)["rotary"]:
            args, blocks = launch.args, launch.config.blocks
            assert -(-args["heads"] // blocks["BLOCK_H"]) == args["head_blocks"] == head_blocks
            assert -(-args["kv_heads"] // blocks["BLOCK_HK"]) == 1
            assert blocks["BLOCK_S"] == positions
            assert positions == 1 or args["seq"] % positions, "with a tail"
            assert (args["COPY"], args["INTERLEAVED"]) == (copies, copies)


@pytest.mark.parametrize("op", ["attention", "attention_varlen"])
def test_attention_has_several_tiles_both_ways(op):
    for variant in VARIANTS[op]:
        if variant == "small":
            continue
        for kernel, calls in launches(op, variant, VARIANTS[op][variant].dtypes[0]).items():
            for call in calls:
                blocks = call.config.blocks
                if "BLOCK_M" in blocks:
                    assert call.args["seq_q"] > 2 * blocks["BLOCK_M"], (variant, kernel)
                if "BLOCK_N" in blocks:
                    assert call.args["seq_k"] > 2 * blocks["BLOCK_N"], (variant, kernel)


def test_attention_reaches_every_table_and_feature():
    seen = [
        call.args | {"config": str(call.config), "dtype": call.args["q"].dtype}
        for op in ("attention", "attention_varlen")
        for variant in VARIANTS[op].values()
        for dtype in variant.dtypes
        for kernel, calls in launches(op, variant.name, dtype).items()
        for call in calls
        if kernel in ("attention_fwd", "attention_fwd_hopper")
    ]
    absent = {"MASK": 0, "PRECISION": "ieee"}  # of what Hopper's kernel does not know
    for name, values in {
        "LEFT": {True, False}, "RIGHT": {True, False}, "BOTTOM_RIGHT": {True, False}, "MASK": {0, 1, 2},
        "SINKS": {True, False}, "ALIBI": {True, False}, "SOFTCAP": {True, False}, "DROPOUT": {True, False},
        "VARLEN": {True, False}, "PRECISION": {"ieee"}, "dtype": {F32, BF16, torch.float16},
    }.items():  # fmt: skip
        assert {call.get(name, absent.get(name, False)) for call in seen} == values, name
    sizes = {(call["D"], "MASK" in call) for call in seen if call["dtype"] != F32}
    assert sizes == {
        (16, True),
        (64, False),
        (64, True),
        (72, True),
        (128, False),
        (128, True),
        (256, True),
        (512, True),
    }
    assert {call["group"] for call in seen} > {1}
    passes = launches("attention", "two passes")["attention_dkdv"]
    assert [(call.args["GRAD_K"], call.args["GRAD_V"]) for call in passes] == [(True, False), (False, True)]


def test_kvcache_is_cut_and_not_cut():
    for variant, cut in {"split": True, "split, features": True, "one part": False}.items():
        found = launches("attention_kvcache", variant)
        assert (found["attention_decode"][0].args["splits"] > 1) == cut
        assert (found["attention_combine"][0].config.blocks["BLOCK_S"] > 1) == cut


def test_every_pair_of_attention_features_is_in_a_group():
    for pair in attention_suite.PAIRS:
        assert any(set(pair) <= set(group) for group in attention_suite.GROUPS), pair
    assert all(not {"bool_mask", "float_mask"} <= set(group) for group in attention_suite.GROUPS)


def test_a_run_can_afford_what_is_compiled():
    texts = set()
    for job in every_op.jobs():
        texts |= every_op.handle({**job, "do": "record", "chip": CHIP})["launches"].keys()
    kernels = {json.loads(text)["kernel"] for text in texts}
    assert len(kernels) == 20, kernels  # all that there are
    assert len(texts) <= 275


# CUDA C++, in the emulation: three multiprocessors of two blocks each


class Shape(NamedTuple):
    """A launch: the types of the kernel's arguments, and its shape."""

    types: str
    grid: tuple[int, int]
    block: tuple[int, int]


@pytest.fixture
def emulated():
    """Runs a call in the emulation and returns its launches."""
    library = bindings.emulation()
    library.emulation_launches.restype = ctypes.c_char_p

    def run(op: str, variant: str, dtype: torch.dtype) -> list[Shape]:
        with bindings.bound("cuda-emulated"):
            call = every_op.runner(op, "cpu", dtype, variant)
            library.emulation_launches()
            call()
        found = []
        for line in library.emulation_launches().decode().splitlines():
            types, *numbers = line.rsplit(" ", 4)
            x, y, block_x, block_y = map(int, numbers)
            found.append(Shape(types.strip("{}<>"), (x, y), (block_x, block_y)))
        return found

    return run


# Of the forward and the backward: threads a row and rows a block; LOOPS for rows that are read again, whose columns are
# then summed apart. In float32 and in 16 bits, which is what also holds in float32 where there is no third.
# The backward takes fewer rows a block than it has the threads for where they would not fill the multiprocessors.
WARPS, ONE_WARP, LOOPS = (32, 4), (32, 1), "loops"
PATHS: dict[str, tuple] = {
    "small": (WARPS, ONE_WARP),
    "warp a row": (WARPS, (32, 16)),
    "16 a lane": (WARPS, ONE_WARP),
    "32 a lane": ((64, 1), (64, 1), WARPS, (64, 1)),
    "32 a lane, partly": ((64, 1), (64, 1), WARPS, (64, 1)),
    "32 a thread, partly": ((416, 1), (416, 1), (224, 1), (416, 1)),
    "16 a thread, filled": ((96, 1), (96, 1)),
    "block a row": ((128, 1), (128, 4), (64, 1), (128, 4)),
    "block, 32 a thread": ((512, 1), (512, 1), (256, 1), (512, 1)),
    "block, longest": ((512, 1), LOOPS, (512, 1), (512, 1)),
    "loops": ((512, 1), LOOPS),
    "ragged warp": (WARPS, ONE_WARP),
    "ragged block": ((256, 1), (256, 2)),
    "ragged loops": ((512, 1), LOOPS),
    "no parameters": (WARPS, ONE_WARP),
}


@bindings.needs_compiler
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(variant, dtype) for variant, path in PATHS.items() for dtype in (BF16, F32)[: len(path) // 2]],
    ids=str,
)
def test_norms_take_every_path(emulated, variant, dtype):
    assert set(PATHS) == {"small", *NORM_SIZES}
    forward, backward, *rest = emulated("layer_norm", variant, dtype)
    expected = PATHS[variant][:2] if dtype == F32 else PATHS[variant][-2:]
    assert forward.block == expected[0]
    apart = backward.types == "NormBwd, float"  # without parts of dweight and dbias
    assert apart == (expected[1] == LOOPS)
    assert apart or backward.block == expected[1]
    assert [launch.block for launch in rest] == [(32, 32)] * (0 if variant == "no parameters" else 1 + apart)


@bindings.needs_compiler
def test_norms_walk_over_several_rows(emulated):
    """Here and, since a multiprocessor holds at most 2,048 threads, on a GPU with up to 148 of them."""
    for variant, rows_a_block, threads in (("warp a row", 16, 512), ("block a row", 4, 512)):
        rows = NORM_SIZES[variant][0]
        backward = emulated("layer_norm", variant, F32)[1]
        assert backward.grid[0] * rows_a_block < every_op.Draw("cpu", F32).many(rows)
        assert 148 * (2048 // threads) * rows_a_block < rows
    assert NORM_SIZES["ragged loops"][0] > 256 * 32  # the most blocks of the column sums, of 32 rows at first


@pytest.mark.slow
@bindings.needs_compiler
def test_adamw_takes_several_chunks_and_launches(emulated):
    def steps(variant: str) -> list[int]:
        return [launch.grid[0] for launch in emulated("adamw", variant, F32) if launch.types.endswith("::Launch")]

    assert steps("small") == [2]
    assert steps("chunks") == [4 + 5]  # of the first tensor, and one each of the others that have elements
    assert len(steps("many tensors")) > 1
    prepared = [x for x in emulated("adamw", "many tensors", F32) if x.types.endswith("::Prepare")]
    assert len(prepared) > 1


@bindings.needs_compiler
@bindings.needs_kernels
def test_every_registered_cuda_op_is_called(monkeypatch):
    sources = (Path(__file__).parent.parent / "csrc/cuda").glob("*.cpp")
    registered = {name for source in sources for name in re.findall(r'm\.impl\("(\w+)"', source.read_text())}
    assert {"adamw_norm", "adamw_table_step", "rms_norm_bwd"} <= registered
    found = set()

    def watch(holder: object, attribute: str, name: str) -> None:
        call = getattr(holder, attribute)
        monkeypatch.setattr(holder, attribute, lambda *args: (found.add(name), call(*args))[1])

    with bindings.bound("cuda-emulated"):  # and no mode of torch's, under which AdamW makes no tables
        for op in OPS.values():
            watch(op, "call", op.name)
        watch(adamw, "make_table", "adamw_table")
        watch(adamw, "table_step", "adamw_table_step")
        for op in every_op.CUDA:
            for variant in ("small", "clipped", "optimizer") if op == "adamw" else ("small",):
                every_op.runner(op, "cpu", F32, variant)()
        monkeypatch.undo()
    assert registered - found == set()

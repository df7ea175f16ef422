"""What the machine code of the losses' and pointwise ops' Triton kernels must keep, compiled for Hopper with no GPU."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("triton")

import machine_code
from aot import compiled_for, machine_code_of, record

from fastllm.precompile import Launch

ROWS = 8192
REGISTERS = 65_536  # of a multiprocessor


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _compiled(run) -> dict[str, tuple[Launch, machine_code.Kernel]]:
    found = {}
    for launch in record("sm_90", run):
        kernel, name = machine_code_of(compiled_for(launch, "sm_90"), "sm_90"), launch.kernel.fn.__name__
        assert kernel.stack == 0, name
        found[name.strip("_").removesuffix("_kernel")] = launch, kernel
    return found


def _programs(launch: Launch, kernel: machine_code.Kernel) -> int:
    """How many share a multiprocessor, by their registers, which are handed out 8 at a time."""
    return REGISTERS // (launch.config.warps * 32 * -(-kernel.registers // 8) * 8)


def _logits(classes: int, stride: int) -> torch.Tensor:
    return _empty(ROWS, stride)[:, :classes]


# GPT-2's classes, dense and as `linear_cross_entropy` pads them, and Llama's
LAYOUTS = [(50257, 50257), (50257, 50304), (128256, 128256)]


@pytest.mark.parametrize(("classes", "stride"), LAYOUTS)
def test_cross_entropy_moves_16_bytes_at_a_time(classes, stride):
    """But for what a row may share with its neighbours: one load a thread, and the target."""
    from fastllm.kernels import cross_entropy as kernels

    logits, row, target = _logits(classes, stride), _empty(ROWS, dtype=torch.float32), _empty(ROWS, dtype=torch.int64)

    def run() -> None:
        kernels.cross_entropy_fwd(row, row, row, None, logits, target, 0.0)
        kernels.cross_entropy_bwd(logits, row, row, None, logits, target, row, row, 0.0)

    for name, (launch, kernel) in _compiled(run).items():
        (loop,) = kernel.loops()
        loads, stores = (kernel.widths(access) for access in ("LDG", "STG"))
        assert loads[128] == loop.count("LDG") == 4, name
        assert loads[16] <= 2, name
        assert loop.count("BAR", "LDS", "STS") == 0, name
        if "bwd" in name:
            assert (stores[128], stores[16]) == (loop.count("STG"), 1) == (4, 1)
        else:
            assert loop.special_clocks <= 8 * (32 + 4), "an exponential each, and one for each group of 8"
        assert _programs(launch, kernel) >= 3, name


@pytest.mark.parametrize(("classes", "stride", "most"), [(*LAYOUTS[1], 2), (*LAYOUTS[2], 1)])
def test_rows_of_the_fused_loss_stay_in_the_second_level_cache(classes, stride, most):
    """As few are begun at once as fit into 40 of its 50 MB."""
    from fastllm.kernels import cross_entropy as kernels

    logits, row, target = _logits(classes, stride), _empty(ROWS, dtype=torch.float32), _empty(ROWS, dtype=torch.int64)
    found = _compiled(lambda: kernels.cross_entropy_loss(row, row, row, None, logits, target, row, 0.0, 0.0, 0.0))
    launch, kernel = found["cross_entropy_loss"]
    assert len(kernel.loops()) == 2
    assert all(loop.count("LDG") == 4 for loop in kernel.loops())
    assert (kernel.widths("LDG")[128], kernel.widths("STG")[128]) == (8, 4)
    assert _programs(launch, kernel) == most
    assert most * 132 * 2 * classes < 40e6


@pytest.mark.parametrize("n", [11008, 14336])
def test_gates_move_16_bytes_at_a_time(n):
    from fastllm.kernels import swiglu

    x, d = _empty(ROWS, n), _empty(ROWS, 2 * n)

    def run() -> None:
        swiglu.swiglu_fwd(x, x, x)
        swiglu.swiglu_bwd(d, x, x, x)

    found = _compiled(run)
    assert [found["glu_fwd"][1].widths(each) for each in ("LDG", "STG")] == [{128: 4}, {128: 2}]
    assert [found["glu_bwd"][1].widths(each) for each in ("LDG", "STG")] == [{128: 6}, {128: 4}]
    assert len(found["glu_fwd"][1].code) <= 19 * 16, "instructions for 16 elements; with a division of 64 bits, 312"


def test_gelu_moves_16_bytes_at_a_time():
    from fastllm.kernels import gelu

    x, bias = _empty(ROWS, 12288), _empty(12288)

    def run() -> None:
        gelu.gelu_fwd(x, x, bias, False)
        gelu.gelu_bwd(x, bias, x, x, bias, False)

    found = _compiled(run)
    assert [found["gelu_fwd"][1].widths(each) for each in ("LDG", "STG")] == [{128: 4}, {128: 2}]
    launch, kernel = found["gelu_bwd"]
    (loop,) = kernel.loops()
    assert [kernel.widths(each) for each in ("LDG", "STG")] == [{128: 6}, {128: 6}]
    assert (loop.count("LDG"), loop.count("STG")) == (4, 2), "the bias is read once, its gradient written once"
    assert _programs(launch, kernel) >= launch.grid[0] // 132, "as many as are launched are there at once"


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_moves_16_bytes_at_a_time(size, interleaved):
    """But for the few heads of k, of whose halves a thread has 8."""
    from fastllm.kernels import rotary

    q, k = (_empty(4, 4096, heads, size).transpose(1, 2) for heads in (32, 8))
    table = _empty(4096, size // 2, dtype=torch.float32)
    run = functools.partial(rotary.rotary, q, k, q.clone(), k.clone(), table, table, None, interleaved, False)
    ((launch, kernel),) = _compiled(run).values()
    loads, stores = kernel.widths("LDG"), kernel.widths("STG")
    assert loads.keys() <= ({128} if interleaved else {64, 128})
    assert stores[128] >= 4
    assert max(loads.get(64, 0), stores.get(64, 0)) <= 2
    assert not kernel.has("LDS"), "pairs are parted within a thread"
    assert _programs(launch, kernel) >= 6


@pytest.mark.parametrize("centered", [False, True])
def test_norms_behind_dropout_read_a_row_ahead(centered):
    """Two programs a multiprocessor, as many as are launched."""
    from fastllm.kernels import _dropout_norm as kernels

    x, weight, row = _empty(ROWS, 4096), _empty(4096), _empty(ROWS, dtype=torch.float32)
    mean, bias = (row, weight) if centered else (None, None)
    seed = _empty(1, dtype=torch.int64)

    def run() -> None:
        kernels.fwd(x, x, mean, row, x, x, weight, bias, seed, 0.1, 1e-5)
        kernels.bwd(x, x, weight, weight if centered else weight[:0], x, x, x, mean, row, weight, seed, 0.1)

    found = _compiled(run)
    launch, forward = found["dropout_norm_fwd"]
    assert _programs(launch, forward) >= 4
    assert (forward.widths("LDG")[128], forward.widths("STG")[128]) == (8 if centered else 6, 4)
    launch, backward = found["dropout_norm_bwd"]
    assert backward.has("LDGSTS")
    assert backward.widths("LDGSTS")[128] > 0
    assert backward.widths("STG").keys() == {128}
    assert launch.grid == (132 * _programs(launch, backward),) == (264,)

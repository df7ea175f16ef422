"""Hopper's warp-specialised attention: what the compiler makes of it, and which calls take it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import aot
import machine_code
import triton

import fastllm
from fastllm import ops
from fastllm.kernels import _utils
from fastllm.ops import _triton

# At most so many instructions of a warp in the loop, for so many clocks of its group's matrix products.
LOOPS = {"fwd": {64: (650, 512), 128: (720, 1024)}, "dkdv": {64: (480, 512), 128: (520, 1024)},
         "dq": {64: (380, 384), 128: (400, 768)}}  # fmt: skip


@pytest.mark.skipif(machine_code.find_tool() is None, reason="no cuobjdump")
@pytest.mark.parametrize("size", [128, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", list(LOOPS))
def test_machine_code(kind, size):
    launches = aot.record("sm_90", lambda: aot.training(size))
    (launch,) = [launch for launch in launches if launch.kernel.fn.__name__ == f"_attention_{kind}_hopper_kernel"]
    compiled = aot.compiled_for(launch, "sm_90")
    kernel = aot.machine_code_of(compiled, "sm_90")
    assert kernel.stack == 0
    assert compiled.metadata.shared <= aot.SHARED_LIMIT["sm_90"]
    assert kernel.has("UTMALDG"), "tiles do not come through the copy engine"
    assert kernel.has("USETMAXREG"), "warps are not specialised"
    loop, (instructions, clocks) = kernel.main_loop(), LOOPS[kind][size]
    assert loop.matrix_clocks == clocks
    assert len(loop.body) <= instructions
    assert loop.count("LDG", "STG", "LDL", "STL") == 0
    assert kernel.widths("STG").keys() <= {32, 128}  # lse, and rows of 16 bytes


@pytest.mark.skipif(machine_code.find_tool() is None, reason="no cuobjdump")
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("dkdv", {"rows": 1}),
        *(
            pytest.param(kind, sizes, marks=pytest.mark.slow)
            for kind, sizes in (
                ("dkdv", {"keys": 1}),
                ("dkdv", {"kv_heads": 16, "varlen": True, "left": 256}),
                ("fwd", {"rows": 1}),
                ("dq", {"keys": 1, "kv_heads": 16}),
            )
        ),
    ],
    ids=str,
)
def test_one_of_anything_compiles(kind, sizes):
    """Numbers that are 1 are constants to Triton, unless it is told otherwise."""
    launches = aot.record("sm_90", lambda: aot.training(128, **sizes))
    (launch,) = [launch for launch in launches if launch.kernel.fn.__name__ == f"_attention_{kind}_hopper_kernel"]
    found = aot.compile(launch, "sm_90")
    assert found.copies
    assert found.regrouped
    assert found.spills <= 24
    assert found.loop_spills == 0


def test_which_calls_take_it(monkeypatch):
    monkeypatch.setattr(_utils, "chip", lambda device: ("cuda", 90))
    monkeypatch.setattr(_triton, "device_reason", lambda x: None)

    def verdict(shape=(2, 64, 8, 128), kv_heads=2, dtype=torch.float16, move=lambda x: x, **kwargs) -> str:
        batch, rows, heads, size = shape
        q, k, v = (torch.zeros(batch, rows, h, size, dtype=dtype).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
        lines = fastllm.explain(ops.attention, move(q), k, v, enable_gqa=True, **kwargs)
        return next(line.verdict for line in lines if line.backend == "triton")

    def shifted(x):
        return torch.zeros(x.numel() + 4, dtype=x.dtype)[4:].view(x.shape)

    def apart(x):
        return torch.zeros(*x.shape[:-1], x.shape[-1] + 4, dtype=x.dtype)[..., :-4]

    assert verdict() == verdict(shape=(1, 1, 2, 64)) == "runs: warp-specialised"
    assert verdict(window_size=(128, 0), sinks=torch.zeros(8)) == "runs: warp-specialised"
    no = "runs: not warp-specialised: "
    assert verdict(softcap=30.0, dropout_p=0.1) == no + "made without softcap and dropout"
    assert verdict(dtype=torch.float32) == no + "made for 16 bits, not torch.float32"
    assert verdict(shape=(2, 64, 8, 96)) == no + "made for head size 64 or 128, got 96 and 96"
    assert verdict(move=shifted) == no + "q must be dense in the head size and begin at a multiple of 16 bytes"
    assert verdict(move=apart) == no + "q's strides must be multiples of 16 bytes, got (67584, 8448, 132, 1)"
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    assert verdict() == no + "not tried with Triton 3.10.0"
    monkeypatch.setattr(_utils, "chip", lambda device: ("cuda", 80))
    assert verdict() == "runs"


def test_a_gradient_that_no_descriptor_fits_takes_the_other_kernels(monkeypatch):
    """As that of `.sum()`, whose strides are 0."""
    launches = aot.record("sm_90", lambda: aot.training(128))
    assert {launch.kernel.fn.__name__ for launch in launches} == {
        "_attention_delta_kernel", *(f"_attention_{kind}_hopper_kernel" for kind in LOOPS)
    }  # fmt: skip
    monkeypatch.setattr(aot, "_gradient", lambda x: x.new_empty(()).expand(x.shape))
    launches = aot.record("sm_90", lambda: aot.training(128))
    assert [launch.kernel.fn.__name__ for launch in launches] == [
        "_attention_fwd_hopper_kernel", "_attention_delta_kernel", "_attention_dkdv_kernel", "_attention_dq_kernel"
    ]  # fmt: skip

"""What the CUDA C++ kernels must be in machine code, which no run on a CPU can tell: docs/performance.md says why.

Of Hopper: widths of accesses and registers are the compiler's choice on each chip.
"""

from __future__ import annotations

import re

import pytest
from machine_code import Kernel, find_tool, read

from fastllm import _ext


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    """Those of the library that was built, by name."""
    if not _ext.CUDA_LIBRARY.exists() or find_tool() is None:
        pytest.skip("built without nvcc, or no cuobjdump")
    if _ext.C is None or "90" not in _ext.C.build_info()["cuda_archs"].split(";"):
        pytest.skip("not built for sm_90")
    return read(_ext.CUDA_LIBRARY, "sm_90")


def named(kernels: dict[str, Kernel], pattern: str) -> dict[str, Kernel]:
    found = {name: kernel for name, kernel in kernels.items() if re.match(pattern, name)}
    assert found, f"no kernel is called {pattern}"
    return found


BITS = {"float": 128, "__nv_bfloat16": 64, "__half": 64, "Code": 32}  # of four elements


def test_adamw_moves_four_elements_an_instruction(kernels):
    for name, kernel in named(kernels, "adamw_step_kernel<").items():
        param, grad, moment = re.findall(r"\w+", name.partition("<")[2])
        loads = [BITS[each] for each in (param, grad, moment, moment)]
        stores = [BITS[each] for each in (param, moment, moment)]
        for instruction, accesses in (("LDG", loads), ("STG", stores)):
            for bits in {128, 64} & set(accesses):
                found = kernel.widths(instruction).get(bits, 0)
                assert found >= 2 * accesses.count(bits), f"{name}: {found} {instruction} of {bits} bits"


def test_three_blocks_of_adamw_fit_a_multiprocessor(kernels):
    for name, kernel in named(kernels, "adamw_step_kernel<").items():
        assert kernel.registers <= 80, f"{name}: {kernel.registers}"


def test_adamw_has_few_special_functions_an_element(kernels):
    """A root and a quotient an element, and both again where they are not exact: more is a branch for each element."""
    kernel = kernels["adamw_step_kernel<float, float, float>"]
    specials = max(loop.count("MUFU") for loop in kernel.loops())
    assert specials <= 8 * 6, specials  # two a root and quotient, three where they are not exact, one to unscale


def test_8_bit_moments_are_decoded_and_coded_by_lookup(kernels):
    """Both of eight elements: by comparisons, coding takes more than twice as many instructions."""
    for name, kernel in named(kernels, r"adamw_step_kernel<\w+, \w+, Code>").items():
        lookups = sum(kernel.widths("LDS").values())
        assert lookups >= 8 * 4, f"{name}: {lookups}"
        assert kernel.has("LDGSTS"), f"{name}: its tables are not copied asynchronously"


PACKED = "<(float, 4|__nv_bfloat16, 8|__half, 8), "


def test_norms_store_whole_packs(kernels):
    """In the forward, all but the statistics; in the backward, the partial sums too."""
    for direction, statistics in (("fwd", 2), ("bwd", 0)):
        for name, kernel in named(kernels, f"norm_{direction}_registers{PACKED}").items():
            widths = kernel.widths("STG")
            assert set(widths) <= {32, 128}, f"{name}: {widths}"
            assert widths.get(32, 0) <= statistics, f"{name}: {widths}"


def test_a_thousand_threads_of_the_forward_of_norms_fit_a_multiprocessor(kernels):
    """All but those that keep 32 float32 numbers each."""
    for name, kernel in named(kernels, f"norm_fwd_registers{PACKED}").items():
        if "float, 4, 8" not in name:
            assert kernel.registers <= 64, f"{name}: {kernel.registers}"


def test_rows_that_fill_their_threads_take_fewer_instructions(kernels):
    """Both passes over the centered row compute it once, where no branch lies between."""
    for dtype, elements in (("__nv_bfloat16, 8, 4", 32), ("__nv_bfloat16, 8, 2", 16), ("float, 4, 4", 16)):
        other, plain = (
            kernels[f"norm_fwd_registers<{dtype}, true, {plain}>"].main_loop() for plain in ("false", "true")
        )
        fewer = other.count("FADD") - plain.count("FADD")
        assert fewer >= elements, f"{dtype}: {fewer}"
        assert len(plain.body) <= 0.75 * len(other.body), f"{dtype}: {len(plain.body)} of {len(other.body)}"


def test_the_backward_of_norms_fetches_ahead(kernels):
    for name, kernel in named(kernels, f"norm_bwd_registers{PACKED}").items():
        assert kernel.has("LDGSTS"), name
        assert kernel.registers <= 128, f"{name}: {kernel.registers}"

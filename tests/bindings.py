"""Every compiled implementation that can run here, by name, as a place to run the public functions in.

"cpu-avx2" and its like are the CPU kernels held to that instruction set. "cuda-emulated" is csrc/cuda compiled by the
C++ compiler and run by `tests/cuda_emulation`: its results are those of a GPU up to the order of no operation at all.
"cuda" is a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastllm import _ext
from fastllm.backends import OPS

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
CPU_NAMES = ("baseline", "avx2", "avx512")

needs_kernels = pytest.mark.skipif(_ext.C is None, reason="fastllm was installed without kernels")
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


def machine_isas() -> list[str]:
    """The instruction sets of the CPU kernels that this machine has."""
    if _ext.C is None:
        return []
    before, found = _ext.C.cpu_capability(), []
    for name in _ext.C.build_info()["cpu_kernels"]:
        with contextlib.suppress(ValueError):
            _ext.C.set_cpu_capability(name)
            found.append(name)
    _ext.C.set_cpu_capability(before)
    return found


ISAS = machine_isas()
NAMES = [
    *(f"cpu-{isa}" for isa in ISAS),
    pytest.param("cuda-emulated", marks=needs_compiler),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
"""For `pytest.mark.parametrize("binding", NAMES)`."""


def emulation_library() -> Path:
    """Compiles csrc/cuda for the CPU, once for each state of the sources."""
    sources = [*sorted((ROOT / "csrc").rglob("*.c*")), *sorted((ROOT / "csrc").rglob("*.h"))]
    sources += sorted((ROOT / "tests/cuda_emulation").iterdir())
    digest = hashlib.sha256(torch.__version__.encode())
    for source in sources:
        digest.update(source.read_bytes())
    library = ROOT / "build/cuda_emulation" / f"{digest.hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:  # the tests' processes all want it at once; one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile_emulation(library)
    return library


def _compile_emulation(library: Path) -> None:
    torch_dir = Path(torch.__file__).parent
    flags = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-x", "c++"]
    flags += ["-DFASTLLM_CUDA_EMULATION", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [f"-I{ROOT / 'tests/cuda_emulation'}", f"-I{torch_dir / 'include'}"]
    compiled = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), *sorted((ROOT / "csrc/cuda").glob("*.cpp"))]
    compiled.append(ROOT / "tests/cuda_emulation/emulation.cpp")
    objects = [library.with_suffix(f".{source.name}.o") for source in compiled]
    compilers = [
        subprocess.Popen([CXX, *flags, "-c", source, "-o", out]) for source, out in zip(compiled, objects, strict=True)
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(compilers)
    # -Bsymbolic: the emulation's stubs of torch's CUDA functions are used inside, even beside a torch that has CUDA.
    link = [CXX, "-shared", "-Wl,-Bsymbolic", *objects, f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    partial = library.with_suffix(".partial")
    subprocess.run([*link, "-o", partial], check=True)
    partial.rename(library)
    for out in objects:
        out.unlink()


_emulation: ctypes.CDLL | None = None


def emulation() -> ctypes.CDLL:
    """The emulation library, its kernels registered for the dispatch key CUDA."""
    global _emulation
    if _emulation is None:
        if torch.cuda.is_available():
            pytest.skip("the real CUDA kernels hold the dispatch key here")
        path = emulation_library()
        torch.ops.load_library(str(path))
        _emulation = ctypes.CDLL(str(path))
    return _emulation


@contextlib.contextmanager
def bound(name: str) -> Iterator[str]:
    """Runs every op called inside on one binding, without a fallback for what it has a kernel for.

    Yields the device that its tensors must be on.
    """
    if name == "cuda":
        yield "cuda"
    elif name == "cuda-emulated":
        emulation().emulation_set_order(0)
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        before = {op: op.call for op in OPS.values()}
        for op in before:
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastllm::{op.name}", "CUDA"):
                op.call = lambda *args, call=op.call: call.redispatch(key, *args)
        try:
            yield "cpu"
        finally:
            for op, call in before.items():
                op.call = call
    else:
        before = _ext.C.cpu_capability()
        _ext.C.set_cpu_capability(name.removeprefix("cpu-"))
        try:
            yield "cpu"
        finally:
            _ext.C.set_cpu_capability(before)

"""What was compiled, what gets installed, and what happens where the tools for it are missing."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import bindings
import pytest
import torch
from machine_code import find_tool, read

from fastllm import _ext
from fastllm.backends import OPS
from fastllm.benchmarks.gpu_run import library_state

ROOT = Path(__file__).parent.parent
EXTENSIONS = [Path(_ext.C.__file__)] if _ext.C else []
EXTENSIONS += [_ext.CUDA_LIBRARY] if _ext.CUDA_LIBRARY.exists() else []
ARCHS = ("80", "90", "100", "120")


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
@pytest.mark.parametrize("path", EXTENSIONS, ids=lambda path: path.name.split(".")[0])
def test_extensions_import_stable_symbols_only(path):
    undefined = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", path).stdout.splitlines()]
    assert undefined
    from_torch = [name for name in undefined if "torch" in name]
    assert from_torch, "it should call torch's C shims"
    assert all(re.match(r"(aoti_torch|torch)_[a-z0-9_]+$", name) for name in from_torch), from_torch
    mangled = run("c++filt", *undefined).stdout
    for namespace in ("at::", "c10::", "torch::", "caffe2::"):
        assert namespace not in mangled, [line for line in mangled.splitlines() if namespace in line]


@pytest.fixture
def setup_py(monkeypatch) -> Callable[[], dict]:
    """A call that gives setup.py's functions."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--quiet", "--version"])
    return lambda: runpy.run_path("setup.py")


def registered(key: str) -> set[str]:
    """The ops that the sources register for a dispatch key."""
    folder = ROOT / "csrc" / key.lower()
    return {name for path in folder.glob("*.cpp") for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())}


# Loads a library of CUDA kernels into any torch, and prints the ops that it registers. What it asks of a CUDA torch at
# load time is stood in for where torch has none: nothing is launched.
LOAD = """
import sys, ctypes, torch
if torch.version.cuda is None:
    ctypes.CDLL(sys.argv[2], ctypes.RTLD_GLOBAL)
import fastllm
if fastllm._ext.STATUS["CUDA"] != "loaded":
    torch.ops.load_library(sys.argv[1])
names = [name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastllm::")]
for name in names:
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastllm::{name}", "CUDA"):
        print(name)
"""


@pytest.mark.skipif(not _ext.CUDA_LIBRARY.exists(), reason="built without nvcc")
def test_the_cuda_library_registers_every_op_of_its_sources(tmp_path):
    stub = tmp_path / "libtorch_cuda.so"
    functions = "aoti_torch_get_current_cuda_stream aoti_torch_create_device_guard aoti_torch_delete_device_guard "
    functions += "torch_c10_cuda_check_msg torch_c10_cuda_free_error_msg"
    source = tmp_path / "stub.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in functions.split()))
    result = run(bindings.CXX, "-x", "c", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", source, "-o", stub)
    assert result.returncode == 0, result.stderr
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = run(sys.executable, "-c", LOAD, _ext.CUDA_LIBRARY, stub, env=environment)
    assert result.returncode == 0, result.stderr
    found = set(result.stdout.split())
    assert found == registered("CUDA")
    assert {"adamw_step", "adamw_norm", "adamw_table", "adamw_table_step"} <= found
    assert {op.name for op in OPS.values() if any(b.key == "CUDA" for b in op.backends)} <= found


@bindings.needs_kernels
def test_the_cpu_library_registers_every_op_of_its_sources():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = registered("CPU")
    assert {op.name for op in OPS.values() if any(b.key == "CPU" for b in op.backends)} <= names
    assert [name for name in names if not has(f"fastllm::{name}", "CPU")] == []


@pytest.mark.skipif(not _ext.CUDA_LIBRARY.exists(), reason="built without nvcc")
def test_the_cuda_library_is_of_these_sources(setup_py):
    digest = setup_py()["source_digest"]()
    assert f"fastllm-sources:{digest}\0".encode() in _ext.CUDA_LIBRARY.read_bytes(), "make setup"
    assert library_state(_ext.CUDA_LIBRARY) == "matches"


def test_sources_that_share_an_object_file_are_an_error(setup_py):
    names = setup_py()["object_names"]
    assert list(names(["csrc/cuda/adamw.cu", "csrc/cuda/adamw.cpp"]).values()) == ["adamw.cu.o", "adamw.cpp.o"]
    with pytest.raises(SystemExit, match=r"cuda/adamw\.cpp, .*extra/adamw\.cpp would be compiled into one object file"):
        names(["csrc/cuda/adamw.cpp", "csrc/cuda/norm.cpp", "csrc/extra/adamw.cpp"])


NVCC = """#!/bin/sh
case "$*" in
  --list-gpu-arch) printf 'compute_50\\ncompute_80\\ncompute_90\\n';;
  *) exit 1;;
esac
"""


@pytest.mark.parametrize(
    ("given", "archs", "said"),
    [
        (None, ("80", "90"), "does not know sm_100, sm_120: no CUDA kernels for them"),
        ("90;80", ("80", "90"), ""),
        ("90a", ("90a",), ""),
        ("100", SystemExit, "FASTLLM_CUDA_ARCHS='100': nvcc knows none of them; it knows 50, 80, 90"),
    ],
)
def test_architectures_that_nvcc_does_not_know_are_left_out(
    setup_py, tmp_path, monkeypatch, capsys, given, archs, said
):
    """As one of CUDA 12.6 answers."""
    nvcc = tmp_path / "a home/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "a home"))
    monkeypatch.delenv("FASTLLM_CUDA", raising=False)
    monkeypatch.delenv("FASTLLM_CUDA_ARCHS", raising=False)
    if given:
        monkeypatch.setenv("FASTLLM_CUDA_ARCHS", given)
    cuda_archs = setup_py()["cuda_archs"]
    if archs is SystemExit:
        with pytest.raises(SystemExit, match=re.escape(said)):
            cuda_archs()
    else:
        assert cuda_archs() == archs
        assert said in capsys.readouterr().out


BUILD_CUDA = """
import runpy, setuptools, sys

def only_cuda(setup=setuptools.setup, **given):
    setup(**{**given, "ext_modules": [ext for ext in given["ext_modules"] if ext.name.endswith("_C_cuda")]})

setuptools.setup = only_cuda
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(not _ext.CUDA_LIBRARY.exists(), reason="built without nvcc")
@pytest.mark.skipif(find_tool() is None, reason="no cuobjdump")
def test_cuda_kernels_do_not_spill_on_any_chip_that_a_wheel_is_for(tmp_path):
    environment = {**os.environ, "FASTLLM_CUDA_ARCHS": ";".join(ARCHS)}
    result = run(sys.executable, "-c", BUILD_CUDA, tmp_path, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert_no_spill(next(tmp_path.rglob("_C_cuda.so")), list(ARCHS))


@pytest.mark.skipif(not _ext.CUDA_LIBRARY.exists(), reason="built without nvcc")
@pytest.mark.skipif(find_tool() is None, reason="no cuobjdump")
def test_cuda_kernels_do_not_spill():
    assert_no_spill(_ext.CUDA_LIBRARY, _ext.C.build_info()["cuda_archs"].split(";"))


def assert_no_spill(library: Path, archs: list[str]) -> None:
    """ptxas puts what it cannot hold in registers on a stack frame."""
    for arch in archs:
        kernels = read(library, f"sm_{arch}")
        assert len(kernels) > 50, f"sm_{arch}: the norms alone have more kernels"
        spills = {name: kernel.stack for name, kernel in kernels.items() if kernel.stack}
        assert not spills, f"sm_{arch}: {spills}"
        registers = max(kernel.registers for kernel in kernels.values())
        print(f"sm_{arch}: {len(kernels)} kernels, at most {registers} registers, no spill")


def checkout(target: Path) -> Path:
    """A copy of the sources, without what was built."""
    ignore = shutil.ignore_patterns(
        "*.so", "__pycache__", "*.egg-info", ".*cache", "build", "dist", "runs", ".venv", ".git"
    )
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignore)
    return target


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """An sdist, and the wheel that is built from that sdist; without CUDA, which takes a minute more."""
    source = checkout(tmp_path_factory.mktemp("dist") / "source")
    result = run(sys.executable, "-m", "build", "--no-isolation", cwd=source, env={**os.environ, "FASTLLM_CUDA": "0"})
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return source / "dist"


@pytest.mark.slow
def test_sdist_contents(dist):
    (path,) = dist.glob("*.tar.gz")
    assert path.name.startswith("fastllm_kernels-")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "docs/design.md",
        "csrc/module.cpp", "csrc/math/norm.h", "csrc/cpu/isa/vec.h", "csrc/cuda/norm_fwd.cu", "csrc/cuda/device.cuh",
        "kernels/README.md", "benchmarks/harness.py", "fastllm/ops/layer_norm.py", "tests/test_layer_norm.py",
        "tests/cuda_emulation/cuda_runtime.h",
    ):  # fmt: skip
        assert name in names, f"{name} is missing from the sdist"
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_wheel_contents(dist):
    (path,) = dist.glob("*.whl")
    names = zipfile.ZipFile(path).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastllm"}
    for name in (
        "fastllm/__init__.py", "fastllm/py.typed", "fastllm/ops/rms_norm.py", "fastllm/reference/rms_norm.py",
        "fastllm/models/gpt.py", "fastllm/trainer/__init__.py", "fastllm/data/__init__.py", "fastllm/cli.py",
        "fastllm/benchmarks/harness.py", "fastllm/benchmarks/layer_norm.py", "fastllm/data/stop_words/zh.txt",
    ):  # fmt: skip
        assert name in names, f"{name} is missing from the wheel"
    assert len(names) == len(set(names))
    assert not [
        name for name in names if "kernels/__init__" in name or "test_" in name or name.endswith((".cpp", ".cu"))
    ]
    compiled = [name for name in names if name.endswith(".so")]
    assert len(compiled) == (1 if bindings.CXX else 0), compiled
    with zipfile.ZipFile(path) as archive:
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "Name: fastllm-kernels" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    required = {
        line.split()[1].split(">")[0].strip(";")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    }
    assert required == {"torch", "triton"}
    assert "fastllm = fastllm.cli:main" in entry_points


@pytest.mark.slow
@bindings.needs_compiler
def test_installed_wheel_runs_its_kernels(dist, tmp_path):
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    code = (
        "import fastllm, torch; print(fastllm.__file__); x = torch.randn(4, 64);"
        "y = fastllm.ops.rms_norm(x, (64,)); torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (64,)));"
        "print(fastllm.explain('rms_norm', x, (64,)).backend)"
    )
    result = run(sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "fastllm/__init__.py"), "cpu"]


@pytest.mark.slow
def test_install_without_a_compiler_succeeds_and_says_so(tmp_path):
    source, target, empty = checkout(tmp_path / "source"), tmp_path / "target", tmp_path / "bin"
    empty.mkdir()
    environment = {**os.environ, "PATH": str(empty), "CXX": "", "CUDA_HOME": str(empty)}
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", target, source]
    result = run(*command, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(target.rglob("*.so"))
    info = run(sys.executable, "-m", "fastllm", "info", cwd=tmp_path, env={**environment, "PYTHONPATH": str(target)})
    assert info.returncode == 0, info.stderr
    assert "not built: no C++ compiler" in info.stdout


@bindings.needs_compiler
@pytest.mark.parametrize("missing", ["torch", "pybind11"])
def test_isolated_build_stops_with_the_command_that_works(tmp_path, missing):
    """What `pip install .` meets in its isolated environment, which has no torch."""
    source = checkout(tmp_path / "source")
    code = f"import sys, runpy; sys.modules[{missing!r}] = None; sys.argv = ['setup.py', 'build_ext']; "
    code += "runpy.run_path('setup.py')"
    result = run(sys.executable, "-c", code, cwd=source)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert f"needs {missing}" in last
    assert "pip install --no-build-isolation ." in last
    assert not list(source.rglob("*.so"))


def test_no_cuda_when_told_so(setup_py, monkeypatch):
    monkeypatch.setenv("FASTLLM_CUDA", "0")
    assert setup_py()["find_nvcc"]() is None


@pytest.mark.skipif(
    not _ext.CUDA_LIBRARY.exists() or torch.version.cuda is not None,
    reason="needs CUDA kernels beside a torch without CUDA",
)
def test_cuda_kernels_beside_a_torch_without_cuda_are_left_alone():
    assert "has no CUDA" in _ext.STATUS["CUDA"]

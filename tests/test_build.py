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
from pathlib import Path

import bindings
import pytest
import torch

from fastllm import _ext

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


def cuobjdump() -> str | None:
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


@pytest.mark.skipif(not _ext.CUDA_LIBRARY.exists(), reason="built without nvcc")
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump")
def test_cuda_kernels_do_not_spill():
    """ptxas puts what it cannot hold in registers on a stack frame."""
    archs = _ext.C.build_info()["cuda_archs"].split(";")
    assert set(archs) <= set(ARCHS), "the default build compiles for these"
    kernels: dict[str, dict[str, str]] = {}
    arch = ""
    for line in run(cuobjdump(), "-res-usage", _ext.CUDA_LIBRARY).stdout.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "STACK:" in line:
            kernels.setdefault(arch, {})[name] = line.strip()
    assert sorted(kernels) == sorted(archs)
    for arch, usage in kernels.items():
        assert len(usage) > 50, f"sm_{arch}: the norms alone have more kernels"
        spills = {name: line for name, line in usage.items() if "STACK:0 " not in line or "LOCAL:0 " not in line}
        assert not spills, f"sm_{arch}: {spills}"
        registers = [int(re.search(r"REG:(\d+)", line)[1]) for line in usage.values()]
        print(f"sm_{arch}: {len(usage)} kernels, at most {max(registers)} registers, no spill")


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


def test_wheel_contents(dist):
    (path,) = dist.glob("*.whl")
    names = zipfile.ZipFile(path).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastllm"}
    for name in (
        "fastllm/__init__.py", "fastllm/py.typed", "fastllm/ops/rms_norm.py", "fastllm/reference/rms_norm.py",
        "fastllm/models/gpt.py", "fastllm/trainer/__init__.py", "fastllm/data/__init__.py", "fastllm/cli.py",
        "fastllm/benchmarks/harness.py", "fastllm/benchmarks/layer_norm.py",
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


def test_no_cuda_when_told_so(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FASTLLM_CUDA", "0")
    monkeypatch.setattr(sys, "argv", ["setup.py", "--quiet", "--version"])
    assert runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]() is None


@pytest.mark.skipif(
    not _ext.CUDA_LIBRARY.exists() or torch.version.cuda is not None,
    reason="needs CUDA kernels beside a torch without CUDA",
)
def test_cuda_kernels_beside_a_torch_without_cuda_are_left_alone():
    assert "has no CUDA" in _ext.STATUS["CUDA"]

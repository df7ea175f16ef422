"""The layout and import laws of docs/design.md."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from fastllm import ops

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastllm"


def stems(folder: Path, suffix: str = ".py") -> set[str]:
    return {path.stem for path in folder.glob(f"*{suffix}") if not path.stem.startswith("_")}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth, as absolute names; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """The parts of the package that a file imports: "ops", "backends", ..."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("fastllm.")}


COMPOSED = {"linear_cross_entropy": "cross_entropy"}
"""Ops that have no kernel but those of another."""


def test_every_op_has_its_files():
    for op in ops.__all__:
        for folder, name in {
            "fastllm/ops": f"{op}.py",
            "fastllm/reference": f"{op}.py",
            "benchmarks": f"{op}.py",
            "tests": f"test_{op}.py",
        }.items():
            assert (ROOT / folder / name).exists(), f"{op} lacks {folder}/{name}"
        stem = COMPOSED.get(op, op)
        kernels = [
            ROOT / "kernels" / f"{stem}.py",
            *(ROOT / "csrc").glob(f"c*/{stem}.cpp"),
            *ROOT.glob(f"csrc/cuda/{stem}.cu"),
        ]
        assert any(path.exists() for path in kernels), f"{op} has no kernel"


def test_no_file_without_its_op():
    assert stems(PACKAGE / "ops") == set(ops.__all__)
    assert stems(PACKAGE / "reference") == set(ops.__all__)
    assert stems(ROOT / "kernels") <= set(ops.__all__)


def test_kernels_is_not_a_package_of_its_own():
    assert not (ROOT / "kernels/__init__.py").exists()
    for folder in ("kernels", "benchmarks"):
        assert (PACKAGE / folder).is_symlink()
        assert (PACKAGE / folder).resolve() == ROOT / folder
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py")]:
        for name in imports(path):
            assert name.split(".")[0] not in ("kernels", "benchmarks"), f"{path} imports {name}"


ALLOWED = {
    # A folder's files may import, of the package: (and files of their own folder)
    "reference": set(),
    "ops": {"backends", "reference", "kernels", "tracing"},
    "nn": {"ops", "tracing"},
    "optim": {"ops", "backends", "tracing"},
    "models": {"nn", "ops", "tracing", "_extras"},
    "data": {"_command", "_extras"},
    "patching": {"ops", "backends", "testing", "tracing"},
    "trainer": {"models", "data", "optim", "backends", "_command", "_extras", "_version"},
}


@pytest.mark.parametrize("folder", ALLOWED)
def test_who_may_import_whom(folder):
    files = list((PACKAGE / folder).rglob("*.py"))
    assert files
    for path in files:
        assert ours(path) <= ALLOWED[folder] | {folder}, f"{path} imports {ours(path)}"


def test_an_op_imports_its_own_reference_and_kernel_only():
    for op in ops.__all__:
        for name in imports(PACKAGE / "ops" / f"{op}.py"):
            if name.startswith(("fastllm.reference", "fastllm.kernels")):
                assert name.endswith(f".{op}"), f"ops/{op}.py imports {name}"


def test_reference_and_kernels_import_torch_only():
    for path in PACKAGE.glob("reference/*.py"):
        outside = {n.split(".")[0] for n in imports(path)} - {"__future__", "torch", "math", "collections", "fastllm"}
        assert not outside, f"{path} imports {outside}"
    for path in ROOT.glob("kernels/*.py"):
        outside = {n.split(".")[0] for n in imports(path)} - {*sys.stdlib_module_names, "torch", "triton", "fastllm"}
        assert not outside, f"{path} imports {outside}"
        assert ours(path) <= {"kernels"}
        assert "torch.library" not in path.read_text()


def test_only_the_command_line_imports_benchmarks_and_nothing_imports_tests():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "benchmarks" and path.name != "cli.py":
            assert "benchmarks" not in ours(path), path
        assert not any(name.split(".")[0] in ("tests", "bindings") for name in imports(path)), path


def test_compiled_code_is_loaded_in_one_place():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "_ext.py":
            assert "load_library" not in path.read_text(), path
            assert not {"fastllm._C", "fastllm._C_cuda"} & imports(path), path


def test_csrc_speaks_the_stable_abi_only():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            for line in path.read_text().splitlines():
                if line.startswith("#include <") and any(part in line for part in ("torch/", "ATen/", "c10/")):
                    # The shim is the C interface that the stable ABI stands on; DLPack is another, with a version.
                    allowed = ("<torch/csrc/stable/", "<torch/headeronly/", "<torch/csrc/inductor/aoti_torch/c/shim.h>")
                    allowed += ("<ATen/dlpack.h>",)
                    assert any(part in line for part in allowed), f"{path}: {line}"


def test_device_code_includes_no_torch():
    for path in [*(ROOT / "csrc/cuda").glob("*.cu*"), *(ROOT / "csrc/math").iterdir()]:
        assert "torch/" not in path.read_text(), path

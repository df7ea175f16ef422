"""`import fastllm` and its reference work with no Triton, no compiled extension, and no extra."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import bindings
import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, path: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=path, capture_output=True, text=True)


def run(code: str, path: Path = ROOT, **environment: str) -> str:
    result = python(code, path, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def without_extensions(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "fastllm", tmp_path / "fastllm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


REFERENCE_RUNS = """
import warnings
import torch
import fastllm
x = torch.randn(4, 8, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = fastllm.ops.rms_norm(x, (8,))
        y.sum().backward()
torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,)))
print([str(w.message) for w in caught if w.category is fastllm.FallbackWarning])
print(fastllm.explain("rms_norm", x, (8,)))
"""


def test_without_extensions(without_extensions):
    output = run(REFERENCE_RUNS, without_extensions)
    warned = output.splitlines()[0]
    assert warned.count("rms_norm_fwd runs on reference") == 1, "warns once, not silently and not at every call"
    assert warned.count("rms_norm_bwd runs on reference") == 1
    assert "not built: no C++ compiler when fastllm was installed" in output
    assert "reference  runs" in output


def test_forcing_a_missing_extension_raises(without_extensions):
    result = python(
        "import torch, fastllm; fastllm.ops.rms_norm(torch.randn(2, 8), (8,))",
        without_extensions,
        FASTLLM_BACKEND="cpu",
    )
    assert result.returncode != 0
    assert "BackendUnavailable" in result.stderr
    assert "not built" in result.stderr


def test_info_without_extensions(without_extensions):
    result = subprocess.run(
        [sys.executable, "-m", "fastllm", "info"],
        env={**os.environ, "PYTHONPATH": str(without_extensions)},
        cwd=without_extensions,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "not built" in result.stdout


@pytest.mark.parametrize("name", ["_C", pytest.param("_C_cuda", marks=pytest.mark.slow)])
def test_an_extension_that_cannot_be_loaded_is_a_warning(without_extensions, name):
    import sysconfig

    suffix = sysconfig.get_config_var("EXT_SUFFIX") if name == "_C" else ".so"
    (without_extensions / "fastllm" / f"{name}{suffix}").write_bytes(b"not a shared object")
    # A torch without CUDA does not even try the CUDA kernels: pretend.
    result = python("import torch; torch.version.cuda = '13.0'; " + REFERENCE_RUNS, without_extensions)
    assert result.returncode == 0, result.stderr
    assert f"{name}" in result.stderr
    assert "was built but cannot be loaded" in result.stderr


def test_import_without_triton():
    output = run("import sys; sys.modules['triton'] = None; " + REFERENCE_RUNS)
    assert "rms_norm_fwd" in output


def test_import_is_light():
    extras = ["triton", "tokenizers", "safetensors", "tqdm", "matplotlib", "tensorboard", "pytest", "hypothesis"]
    code = (
        "import sys, torch; before = set(sys.modules); import fastllm; "
        f"print([n for n in {extras} if n in sys.modules and n not in before], "
        "[n for n in sys.modules if n.split('.')[:2] in "
        "[['fastllm', part] for part in ('models', 'trainer', 'benchmarks', 'data')]])"
    )
    assert run(code).strip() == "[] []"


def test_subpackages_are_attributes():
    """From the first time that somebody asks, and without what they are for."""
    code = """
import sys, fastllm
for package, names in ((fastllm, ("compat", "data", "models", "trainer")), (fastllm.compat, ("flash_attn",))):
    for name in names:
        assert name in dir(package), name
        assert getattr(package, name).__name__ == f"{package.__name__}.{name}"
assert {"transformers", "lightning"} <= set(dir(fastllm.compat))
assert not {"transformers", "lightning", "triton", "tokenizers"} & set(sys.modules)
assert not hasattr(fastllm, "modells")
sys.modules["lightning.pytorch"] = None
assert not hasattr(fastllm.compat, "lightning")
try:
    fastllm.compat.lightning
except AttributeError as error:
    print(error)
"""
    assert "fastllm.compat.lightning cannot be imported: " in run(code)


@bindings.needs_kernels
def test_an_unknown_cpu_capability_in_the_environment_is_an_error():
    result = python(
        "import torch, fastllm; fastllm.ops.rms_norm(torch.randn(2, 8), (8,))", FASTLLM_CPU_CAPABILITY="sse9"
    )
    assert result.returncode != 0
    assert "unknown CPU capability sse9" in result.stderr


def test_an_unknown_backend_in_the_environment_is_an_error():
    result = python("import fastllm", FASTLLM_BACKEND="cudaa")
    assert result.returncode != 0
    assert "unknown backend 'cudaa'" in result.stderr

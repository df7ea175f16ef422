"""One wheel, every torch: builds wheels, installs each into the given environments, runs there what users do, and
writes docs/compatibility.md. `make compat PYTHONS="python..."` calls it.

Wheels are built with the oldest torch among the environments and with that of the Python that runs this. An environment
needs torch, numpy, the build's requirements and pytest; transformers and the extra "train" where it has them.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs/compatibility.md"
FACTS = """
import importlib.metadata, json, platform, sys, torch
def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None
names = ("triton", "numpy", "transformers")
print(json.dumps({"torch": torch.__version__, "python": platform.python_version(), "abi": sys.implementation.cache_tag,
                  **{name: version(name) for name in names}}))
"""
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "


BEFORE = """# Compatibility

One wheel serves every torch from 2.11 on. `make compat PYTHONS=...` builds it with the oldest torch and with the
project's own, installs both into every environment, runs what users do, and writes this table.
"""
AFTER = """`import` finds every op in the CPU library, and in a CUDA build of torch every op in the CUDA library, too;
no CUDA kernel is launched. `ops`: every op, forward and backward in three dtypes, beside its reference. `compile`:
every op with `fullgraph=True`, and a GPT by Inductor. `patch`: a Llama and a GPT-2 of transformers. `train`: the
command line's train, generate and eval. `kernels`: attention's, by Triton for sm_90."""


class Absent(Exception):
    """What a check needs is not installed."""


# The checks, each run in a process of its own with the installed wheel


def check_import() -> None:
    import fastllm
    from fastllm import _ext
    from fastllm.backends import OPS

    assert ROOT not in Path(fastllm.__file__).parents, "the sources were imported, not the wheel"
    assert _ext.STATUS["CPU"] == "loaded", _ext.STATUS
    built = {op.name: op.built for op in OPS.values()}
    missing = [
        name for name, op in OPS.items() if any(b.key == "CPU" for b in op.backends) and "CPU" not in built[name]
    ]
    assert not missing, f"no CPU kernel of {missing}"
    if torch.version.cuda is not None:
        if not _ext.CUDA_LIBRARY.exists():
            raise Absent("the CUDA library: the wheel was built without nvcc")
        assert _ext.STATUS["CUDA"] == "loaded", _ext.STATUS
        expected = [name for name, op in OPS.items() if any(b.key == "CUDA" for b in op.backends)]
        missing = [name for name in expected if "CUDA" not in built[name]]
        assert expected
        assert not missing, f"no CUDA kernel of {missing}"


def check_info() -> None:
    output = subprocess.run(
        [sys.executable, "-m", "fastllm", "info"], capture_output=True, text=True, check=True
    ).stdout
    assert "cpu ops     loaded" in output, output


def check_ops() -> None:
    """Every op, forward and backward, beside its reference."""
    from every_op import DTYPES, runner

    import fastllm

    for op in fastllm.ops.__all__:
        for dtype in DTYPES:
            run = runner(op, "cpu", dtype)
            found = run()
            with fastllm.use_backend("reference"):
                expected = run()
            tolerance = 1e-4 if dtype == torch.float32 else 4e-2
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, op=op: f"{op}: {m}")


def check_compile() -> None:
    """Every op with fullgraph=True, forward and backward; a GPT by Inductor."""
    from every_op import runner

    from fastllm import models, ops

    for op in ops.__all__:
        if op == "adamw":
            continue  # it returns nothing; the optimizer's step is compiled in tests/test_optim_adamw.py
        expected = runner(op, "cpu", torch.float32)()
        with mock.patch.object(ops, op, torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")):
            found = runner(op, "cpu", torch.float32)()
        for a, b in zip(found, expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), op
            if "dropout" not in op:  # a compiled call draws another mask
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, op=op: f"{op}: {m}")
    torch.manual_seed(0)
    model = models.GPT(models.GPTConfig.llama(vocab_size=64, context=16, layers=1, heads=2, width=32))
    tokens = torch.randint(64, (2, 17))
    losses = [call(tokens[:, :-1], tokens[:, 1:]) for call in (model, torch.compile(model, fullgraph=True))]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    losses[1].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Exported(torch.nn.Module):
    """A call of an op, whose tensors are the arguments of `forward`."""

    def __init__(self, op: str, args: tuple, kwargs: dict):
        super().__init__()
        self.op, self.args, self.kwargs = op, args, kwargs

    def forward(self, *tensors):
        from fastllm import ops

        given = iter(tensors)
        args = (next(given) if isinstance(arg, torch.Tensor) else arg for arg in self.args)
        return getattr(ops, self.op)(*args, **self.kwargs)


def check_export() -> None:
    from fastllm import ops
    from fastllm.testing import sample

    for op in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "attention", "swiglu", "geglu"):
        args, kwargs = sample(op)
        tensors = tuple(arg for arg in args if isinstance(arg, torch.Tensor))
        program = torch.export.export(Exported(op, args, kwargs), tensors)
        assert f"fastllm.{op}_fwd" in str(program.graph), program.graph
        torch.manual_seed(0)
        expected = getattr(ops, op)(*args, **kwargs)
        torch.manual_seed(0)
        torch.testing.assert_close(program.module()(*tensors), expected)


def check_patch() -> None:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Absent("transformers") from error
    import fastllm

    llama = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    tokens = torch.randint(100, (2, 16), generator=torch.Generator().manual_seed(0))
    for model in (
        LlamaForCausalLM(LlamaConfig(**llama, vocab_size=100)),
        GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=32)),
    ):
        model.eval()  # no dropout
        before = model(input_ids=tokens, labels=tokens).loss
        report = fastllm.patch(model)
        ops = str(report)
        assert all(op in ops for op in ("norm", "attention", "linear_cross_entropy")), ops
        after = model(input_ids=tokens, labels=tokens).loss
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        after.backward()
        report.revert()
        assert torch.equal(model(input_ids=tokens, labels=tokens).loss, before)


def check_train() -> None:
    import importlib.util

    for module in ("tokenizers", "safetensors", "tqdm", "matplotlib", "tensorboard"):
        if importlib.util.find_spec(module) is None:
            raise Absent(module)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(TEXT * 200)
        run = [sys.executable, "-m", "fastllm"]
        out = str(Path(folder) / "run")
        sizes = {"layers": 1, "heads": 2, "width": 32, "context": 16, "vocab-size": 270, "batch-size": 2, "steps": 4}
        options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        for command in (
            ["train", "--text", str(text), "--out", out, *options],
            ["generate", out, "--prompt", "It was", "--max-new-tokens", "4"],
            ["eval", out, "--text", str(text)],
        ):
            result = subprocess.run([*run, *command], capture_output=True, text=True)
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def check_kernels() -> None:
    """What the attention launchers start on sm_90, compiled by this Triton."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise Absent("triton") from error
    import aot

    rows = [(launch, aot.compile(launch, target)) for target, _, _, launch in aot.jobs("sm_90", False)]
    assert len(rows) > 5
    for launch, found in rows:
        assert found.shared <= aot.SHARED_LIMIT["sm_90"], launch


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): function for name, function in dict(globals()).items() if name.startswith("check_")
}


# Building, installing, and the table


def facts_of(python: str) -> dict:
    python = os.path.abspath(shutil.which(python) or python)  # the checks run in a folder of their own
    output = subprocess.run([python, "-c", FACTS], capture_output=True, text=True, check=True).stdout
    return {"executable": python, **json.loads(output)}


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split(".")[:3])


def build(python: str, folder: Path) -> Path:
    """The wheel of a copy of these sources."""
    source = folder / "source"
    ignored = [".git", ".venv", "build", "runs", "dist", "*.so", "__pycache__"]
    subprocess.run(
        ["tar", "-cf", folder / "source.tar", *(f"--exclude={name}" for name in ignored), "."], cwd=ROOT, check=True
    )
    source.mkdir()
    subprocess.run(["tar", "-xf", folder / "source.tar", "-C", source], check=True)
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", folder, source]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def run_check(python: str, installed: Path, name: str) -> str:
    """ "yes", "not installed: what", or why it failed."""
    path = os.pathsep.join([str(installed), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
    command = [python, str(Path(__file__).resolve()), "--check", name]
    try:
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=installed, timeout=900)
    except subprocess.TimeoutExpired:
        return "fails: 15 minutes are over"
    if result.returncode == 0:
        return result.stdout.strip().splitlines()[-1]
    print(result.stdout[-2000:] + result.stderr[-4000:], file=sys.stderr)
    last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
    return f"fails: {last[:150]}"


def markdown(rows: list[dict]) -> str:
    head = ["torch", "Triton", "Python", "wheel built with", *CHECKS]
    lines = [BEFORE, f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["torch"], row["triton"] or "none", row["python"], row["wheel"], *(row[name] for name in CHECKS)]
        lines.append(f"| {' | '.join(cells)} |")
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    lines += ["", f"{today}, on a machine without a GPU.", AFTER]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="of the environments")
    parser.add_argument("--check", choices=CHECKS, help="run this check here, and nothing else")
    parser.add_argument("--out", type=Path, default=TABLE, help="where the table goes (default: %(default)s)")
    args = parser.parse_args()
    if args.check:
        try:
            CHECKS[args.check]()
        except Absent as absent:
            print(f"not installed: {absent}")
        else:
            print("yes")
        return 0
    own = facts_of(sys.executable)
    given = {facts["executable"]: facts for facts in (own, *map(facts_of, args.pythons))}
    environments = sorted(given.values(), key=lambda e: release(e["torch"]))
    for environment in environments:
        if environment["abi"] != own["abi"]:
            raise SystemExit(
                f"{environment['executable']}: the wheels are for {own['abi']}, this is {environment['abi']}"
            )
    rows = []
    with tempfile.TemporaryDirectory() as top:
        for number, builder in enumerate({e["executable"]: e for e in (environments[0], own)}.values()):
            print(f"building with torch {builder['torch']}", flush=True)
            folder = Path(top) / str(number)
            folder.mkdir()
            wheel = build(builder["executable"], folder)
            for place, environment in enumerate(environments):
                row = {**environment, "wheel": f"torch {builder['torch']}"}
                installed = folder / f"installed{place}"
                command = [environment["executable"], "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
                subprocess.run([*command, installed, wheel], check=True)
                with ThreadPoolExecutor(2) as pool:
                    run = functools.partial(run_check, environment["executable"], installed)
                    for name, verdict in zip(CHECKS, pool.map(run, CHECKS), strict=True):
                        row[name] = verdict
                        print(f"torch {row['torch']}, wheel of {row['wheel']}: {name}: {verdict}", flush=True)
                rows.append(row)
    args.out.write_text(markdown(rows))
    print(args.out)
    return int(any(row[name].startswith("fails") for row in rows for name in CHECKS))


if __name__ == "__main__":
    raise SystemExit(main())

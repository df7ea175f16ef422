"""What the workers of a GPU run do: its jobs, all that imports torch.

Each function takes a job and returns the fields of its answer. Imports are made inside, so that one that fails is the
answer to its job.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # as in gpu_run.py

from _plan import NO_GPU, find_sanitizer  # noqa: E402
from _workers import RESULTS, SHORT, Job, append, serve, shorten  # noqa: E402

SECONDS = {"cuda": 0.5, "cpu": 0.1}  # of timing a headline case


def handle(job: Job) -> dict[str, Any]:
    return {
        "facts": find_facts,
        "list": list_cases,
        "compiled": list_compiled,
        "record": record,
        "compile": record,
        "measure": measure,
        "tune": tune,
        "candidates": time_candidates,
        "ceilings": measure_ceilings,
        "table": table,
        "sanitize": run_sanitizer,
    }[job["do"]](job)


def find_facts(job: Job) -> dict[str, Any]:
    import torch

    from fastllm.benchmarks import harness, suite
    from fastllm.kernels import _utils

    if job["device"] == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(NO_GPU)
    found: dict[str, Any] = {"format": harness.FORMAT, **harness.environment(job["device"]), **_loaded()}
    found["file"] = suite.json_path(".", found["machine"]["name"]).name
    found["versions"]["numpy"] = _version("numpy")
    found["versions"]["nvcc"] = next((line for line in _output("nvcc", "--version") if "release" in line), None)
    if job["device"] == "cuda":
        found["chip"] = _utils.chip(torch.device("cuda"))
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.total"
        found["nvidia_smi"] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv")
    return {"facts": found}


def measure_ceilings(job: Job) -> dict[str, Any]:
    """The ceilings; their mean with those from before the cases, where these are given."""
    from fastllm.benchmarks import harness

    found = harness.measure_ceilings(job["device"])
    return {"measured": found, "ceilings": harness.mean_ceilings(job["before"], found) if job.get("before") else found}


def _loaded() -> dict[str, Any]:
    """Which compiled kernels are loaded, and whether AdamW's fast path has its table of addresses."""
    from fastllm import _ext, backends

    return {"loaded": dict(_ext.STATUS), "layout": backends.layout is not None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> list[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _cases(device: str) -> list:
    from fastllm.benchmarks import headline

    return headline.cases(device, small=device == "cpu")


def _name(case: Any) -> str:
    return f"{case.op} {case.name}"


def list_cases(job: Job) -> dict[str, Any]:
    return {"cases": [_name(case) for case in _cases(job["device"])]}


def list_compiled(job: Job) -> dict[str, Any]:
    """The headline cases in which a rival is compiled, and those in which one compiles for minutes."""
    from fastllm.benchmarks import _attention

    cases = _cases("cuda")
    compiled = [_name(case) for case in cases if case.compiled or _attention.FLEX in case.rivals]
    return {"compiled": compiled, "slow": [_name(case) for case in cases if case.slow]}


def record(job: Job) -> dict[str, Any]:
    """Takes down what a headline case, or the tuning of a call, would launch; or compiles one of those."""
    from fastllm import precompile

    def run() -> None:
        if "tune" in job:
            _tuned(job["tune"])(_try_all)
        else:
            _launches_of(_cases("cuda")[job["index"]])

    return precompile.handle(job, run)


def _launches_of(case: Any) -> None:
    """Runs a case's op, or those of its model, forward and backward, on the Triton kernels that it has."""
    from fastllm import ops
    from fastllm.benchmarks import _training_step

    if case.op == "training_step":
        for name, (args, kwargs) in _training_step.calls(*case.setup.args[:2]).items():
            _run_on_triton(getattr(ops, name), args, kwargs)
    if case.setup is not None:
        return
    for draw in filter(None, (case.args, case.check)):
        _run_on_triton(case.call or getattr(ops, case.op), draw(), case.kwargs, not case.inference)


def _run_on_triton(call: Callable, args: Sequence[Any], kwargs: dict[str, Any], backward: bool = True) -> None:
    import torch

    import fastllm
    from fastllm.backends import BackendUnavailable
    from fastllm.testing import outputs_of

    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    with fastllm.use_backend("triton"), contextlib.suppress(BackendUnavailable):
        outputs = outputs_of(call(*args, **kwargs))
        if backward:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs], allow_unused=True)


def measure(job: Job) -> dict[str, Any]:
    """A headline case, or, where the first pass has its result, what the second pass adds."""
    from fastllm.benchmarks import harness, headline

    case = _cases(job["device"])[job["index"]]
    if "first" in job:
        case = headline.second_pass(case, job["first"])
    if case is None:
        return {"result": None}
    with harness.quiet_machine(None):
        return {"result": harness.measure(case, job["device"], SECONDS[job["device"]]), **_loaded()}


def _attention(shape: dict[str, Any], choose: Callable) -> None:
    """Forward and backward of an attention call, its tiles chosen by `choose` in place of `kernels._utils.choose`."""
    from unittest import mock

    import torch

    import fastllm
    from fastllm import ops
    from fastllm.kernels import _utils
    from fastllm.testing import make

    sizes = (shape["batch"], shape["rows"], shape["size"])
    heads = (shape["heads"], shape["kv_heads"], shape["kv_heads"])
    q, k, v = (
        make((sizes[0], sizes[1], h, sizes[2]), getattr(torch, shape["dtype"]), "cuda", seed=seed)
        .transpose(1, 2)
        .requires_grad_()
        for seed, h in enumerate(heads)
    )

    with fastllm.use_backend("triton"), mock.patch.object(_utils, "choose", choose):
        out = ops.attention(q, k, v, is_causal=shape["causal"], enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def _rows(call: dict[str, Any], choose: Callable) -> None:
    """Forward and backward of an op over rows, its kernels' blocks chosen by `choose` likewise."""
    from unittest import mock

    import torch

    from fastllm import ops
    from fastllm.benchmarks import _dropout_norm, cross_entropy, linear_cross_entropy, rotary, swiglu
    from fastllm.kernels import _utils

    sizes, dtype = call["sizes"], torch.bfloat16
    case = {
        "cross_entropy": lambda: cross_entropy.case("cuda", *sizes, dtype),
        "linear_cross_entropy": lambda: linear_cross_entropy.case("cuda", *sizes, dtype),
        "swiglu": lambda: swiglu.case("cuda", sizes, dtype, "forward+backward"),
        "rotary": lambda: rotary.case("cuda", *sizes, dtype),
        "dropout_add_rms_norm": lambda: _dropout_norm.case(call["op"], "cuda", sizes, dtype, "forward+backward"),
    }[call["op"]]()
    with mock.patch.object(_utils, "choose", choose):
        _run_on_triton(case.call or getattr(ops, case.op), case.args(), case.kwargs)


def _tuned(call: dict[str, Any]) -> Callable[[Callable], None]:
    """What runs a call with a `choose` of its own."""
    return functools.partial(_rows if "op" in call else _attention, call)


def _try_all(key: tuple, default: Any, candidates: Iterable, run: Callable) -> Any:
    for config in candidates:
        run(config)
    return default


def tune(job: Job) -> dict[str, Any]:
    """Times every candidate of the call's kernels, as FASTLLM_AUTOTUNE=1 does, which it is run with. Each is
    appended to the results at once: the call's time may end before its last candidate."""
    from unittest import mock

    from fastllm.kernels import _utils

    choose, milliseconds, found = _utils.choose, _utils._milliseconds, {}
    results = Path(os.environ[RESULTS])

    def listening(key: tuple, default: Any, candidates: Iterable, run: Callable) -> Any:
        times: dict[str, float | str] = {}

        def timed(run: Callable, config: Any) -> float:
            try:
                times[str(config)] = round(milliseconds(run, config), 4)
            except Exception as error:  # one that cannot be compiled is none
                times[str(config)] = shorten(f"{type(error).__name__}: {error}")
                return float("inf")
            append(
                results,
                {"stage": "tuning", "kernel": key[0], "config": str(config), "milliseconds": times[str(config)]},
            )
            return float(times[str(config)])

        with mock.patch.object(_utils, "_milliseconds", timed):
            winner = choose(key, default, candidates, run)
        if not times:  # of another chunk, the same as before
            return winner
        kernel = key[0] if key[0] not in found else f"{key[0]}, second pass"  # dk and dv apart
        found[kernel] = {"default": str(default), "winner": str(winner), "milliseconds": times}
        return winner

    _tuned(job["tune"])(listening)
    return {"kernels": found}


def time_candidates(job: Job) -> dict[str, Any]:
    """Times every candidate of a CUDA C++ kernel in turn, some rounds of all: the medians. Without a GPU, what would be
    timed runs once, at a small size."""
    import statistics

    from fastllm import _ext, use_backend

    rounds, times = 5, {}
    run = _cuda_call(job)
    if job["device"] == "cpu":
        run()
        return {"milliseconds": {}}
    run = use_backend("cuda")(run)  # or an error: what falls back has no candidates
    from triton.testing import do_bench

    count = _ext._cuda_candidate(job["kernel"], 0)
    try:
        for _ in range(rounds):
            for which in range(count):
                _ext._cuda_candidate(job["kernel"], which)
                times.setdefault(which, []).append(do_bench(run, warmup=5, rep=20, return_mode="median"))
    finally:
        _ext._cuda_candidate(job["kernel"], 0)
    medians = {which: round(statistics.median(found), 4) for which, found in times.items()}
    shown = {key: job[key] for key in ("kernel", "dtype", "moments", "shape") if key in job}
    for which, milliseconds in medians.items():
        append(
            Path(os.environ[RESULTS]), {"stage": "tuning", **shown, "candidate": which, "milliseconds": milliseconds}
        )
    return {"milliseconds": medians}


def _cuda_call(job: Job) -> Callable[[], Any]:
    """A call that launches the kernel, on tensors of the job's shape and dtype; small ones without a GPU."""
    import torch

    from fastllm.backends import OPS
    from fastllm.optim import AdamW
    from fastllm.testing import make

    dtype, device = getattr(torch, job["dtype"]), job["device"]
    shape = job["shape"] if device == "cuda" else [min(size, 64) for size in job["shape"]]
    x = make(shape, dtype, device)
    if job["kernel"] == "adamw":
        param = torch.nn.Parameter(x)
        param.grad = make(shape, dtype, device, seed=1)
        return AdamW([param], moment_dtype=getattr(torch, job["moments"])).step
    weight, bias = (make(shape[1:], dtype, device, seed=seed) for seed in (1, 2))
    forward = OPS["layer_norm_fwd"].call
    if job["kernel"] == "norm_fwd":
        return lambda: forward(x, weight, bias, 1e-5)
    dy, (_, mean, rstd) = make(shape, dtype, device, seed=3), forward(x, weight, bias, 1e-5)
    return lambda: OPS["layer_norm_bwd"].call(dy, x, mean, rstd, weight, bias, True, True)


def table(job: Job) -> dict[str, Any]:
    from fastllm.benchmarks import suite

    return {"text": suite.table(job["data"])}


def run_sanitizer(job: Job) -> dict[str, Any]:
    command = [sys.executable, "tests/every_op.py", job["device"], job["op"]]
    if job["tool"]:
        command = [find_sanitizer() or "", "--tool", job["tool"], "--error-exitcode", "1", *command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, file=sys.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(done.stdout.strip()[-SHORT:])
    return {"said": shorten(done.stdout.strip()[-SHORT:])}


if __name__ == "__main__":
    serve(handle)

"""`fastllm bench` end to end on small cases, and what it refuses to time."""

from __future__ import annotations

import base64
import dataclasses
import importlib
import inspect
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import bindings
import pytest
import torch

from fastllm import backends, cli, ops

pytest.importorskip("pytest_benchmark")
from fastllm.benchmarks import (
    _attention,
    _norm,
    adamw,
    attention_kvcache,
    attention_varlen,
    harness,
    headline,
    linear_cross_entropy,
    models,
    suite,
)

ROOT = Path(__file__).parent.parent
NAMES = ("add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm")


def small_cases(op: str):
    def cases(device: str, quick: bool) -> list[harness.Case]:
        directions = ("forward+backward",) if quick else ("forward", "backward", "forward+backward")
        return [_norm.case(op, device, (8, 40), torch.float32, direction, target="a goal") for direction in directions]

    return cases


@pytest.fixture
def small(monkeypatch) -> None:
    """Small cases, little time, and no compiler: torch.compile runs its function as it is."""
    for op in NAMES:
        monkeypatch.setattr(importlib.import_module(f"fastllm.benchmarks.{op}"), "cases", small_cases(op))
    monkeypatch.setitem(suite.SECONDS, "cpu", 0.02)
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    monkeypatch.setattr(harness, "measure_ceilings", lambda device: {"copy_gb_s": 10.0, "matmul_fp32_tflop_s": 0.1})


def test_every_op_has_cases_for_every_device():
    assert set(ops.__all__) <= set(suite.discover())
    for op, cases in suite.discover().items():
        for device in ("cpu", "cuda"):
            found, quick = cases(device, False), cases(device, True)
            assert {case.op for case in found} == {op}
            assert len({case.name for case in found}) == len(found), "names tell cases apart"
            assert {case.name for case in quick} < {case.name for case in found}
            assert all("eager" in case.rivals or case.setup is not None for case in found)


def test_a_case_that_sets_itself_up():
    """An optimizer is no function of tensors: its contenders come ready to be called."""
    case = adamw.case("cpu", 3, 1000, torch.bfloat16, max_norm=1.0)
    assert case.bytes == 3 * 1000 * (7 + 1) * 2
    race = harness.Race(case, "cpu", 0.01)
    race.round()
    figures = race.result(0.0)["contenders"]
    assert set(figures) == {"fastllm", "eager", "torch fused"}
    assert race.skipped == {"torch.compile": "takes minutes to compile for many tensors"}
    assert race.backend in ("cpu", "reference")
    ready = {"fastllm": harness.Ready(list, list), "bad": harness.Ready(list, lambda: 1 / 0)}
    contenders = {name: lambda one=one: one for name, one in ready.items()}
    race = harness.Race(dataclasses.replace(case, setup=lambda: dict(contenders)), "cpu", 0.01)
    assert "ZeroDivisionError" in race.skipped["bad"]


def test_what_a_case_is_measured_by():
    """Matrix products where a byte comes with many operations, bytes elsewhere: decoding reads all for one row."""
    found = [case for cases in suite.discover().values() for d in ("cpu", "cuda") for case in cases(d, False)]
    for case in [*found, *headline.cases("cuda")]:
        assert (case.products is not None) == (case.flops > 16 * case.bytes), f"{case.op} {case.name}"
    assert {case.op for case in found if case.products} == {
        *("attention", "attention_varlen", "linear_cross_entropy", "models", "train"),
        *(["patch"] if "patch" in {case.op for case in found} else []),
    }


def test_bytes_and_operations_are_those_of_the_formulas():
    fp32, bf16 = torch.float32, torch.bfloat16
    x = 8 * 40
    forward = _norm.case("rms_norm", "cpu", (8, 40), fp32, "forward")
    assert forward.bytes == 2 * x * 4 + 8 * 4 + 40 * 4  # x, y; rstd; weight
    backward = _norm.case("rms_norm", "cpu", (8, 40), fp32, "backward")
    assert backward.bytes == 3 * x * 4 + 8 * 4 + 2 * 40 * 4  # dy, x, dx; rstd; weight and its gradient
    both = _norm.case("rms_norm", "cpu", (8, 40), fp32, "forward+backward")
    assert (both.bytes, both.flops) == (forward.bytes + backward.bytes, forward.flops + backward.flops)
    mixed = _norm.case("add_layer_norm", "cpu", (8, 40), bf16, "forward", parameters=fp32)
    assert mixed.bytes == 4 * x * 2 + 2 * 8 * 4 + 2 * 40 * 4  # x, residual, sum, y; mean, rstd; weight, bias
    assert mixed.name == "bf16 8x40, fp32 weight forward"


def test_end_to_end(small, tmp_path, capsys):
    assert cli.main(["bench", "rms_norm", "layer_norm", "--json", f"{tmp_path}/", "--report", f"{tmp_path}/page"]) == 0
    output = capsys.readouterr().out
    assert "[6/6] layer_norm fp32 8x40 forward+backward" in output
    assert "within the error budget on " in output
    (path,) = tmp_path.glob("*.json")
    assert re.fullmatch(r"[a-z0-9-]+\.json", path.name)

    data = json.loads(path.read_text())
    assert data["format"] == suite.FORMAT
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", data["date"])
    assert data["versions"]["torch"] == torch.__version__
    assert data["machine"]["device"] == "cpu"
    assert data["machine"]["threads"] == torch.get_num_threads()
    assert data["failed"] == []
    assert [(r["op"], r["direction"]) for r in data["results"]] == [
        (op, direction)
        for op in ("rms_norm", "layer_norm")
        for direction in ("forward", "backward", "forward+backward")
    ]
    for result in data["results"]:
        assert list(result["contenders"]) == ["fastllm", "eager", "torch.compile"]
        assert result["rounds"] >= harness.MIN_ROUNDS
        assert result["target"] == "a goal"
        for name, figures in result["contenders"].items():
            assert 0 < figures["min_ms"] <= figures["q1_ms"] <= figures["median_ms"] <= figures["q3_ms"]
            rate = harness.rates(result, name, data["ceilings"])
            assert rate["gb_s"] == pytest.approx(result["bytes"] / (figures["median_ms"] * 1e-3) / 1e9)
            assert rate["share"] == pytest.approx(rate["gb_s"] / 10)
        ours, eager = (result["contenders"][name]["median_ms"] for name in ("fastllm", "eager"))
        assert harness.rates(result, "eager", data["ceilings"])["speedup"] == pytest.approx(eager / ours)
        assert f"{eager / ours:.2f}x" in output
        assert f"{ours:.3f}" in output

    page = (tmp_path / "page" / "index.html").read_text()
    for name in ("speedup.png", "ceiling.png"):
        png = (tmp_path / "page" / name).read_bytes()
        assert png.startswith(b"\x89PNG")
        assert base64.b64encode(png).decode() in page, "the page holds its pictures"
    assert "http" not in page
    assert data["machine"]["name"] in page
    assert torch.__version__ in page


@pytest.mark.parametrize("tensor", ["output", "gradient"])
def test_a_wrong_kernel_is_not_timed(small, tensor, monkeypatch, tmp_path, capsys):
    right = ops.rms_norm

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.01

    def rms_norm(input, normalized_shape, weight=None, eps=None):
        y = right(input, normalized_shape, weight, eps)
        if y.dtype == torch.float64:
            return y
        return y * 1.01 if tensor == "output" else Wrong.apply(y)

    monkeypatch.setattr(ops, "rms_norm", rms_norm)
    monkeypatch.setattr(harness.Race, "round", lambda self: pytest.fail("a wrong kernel was timed"))
    path = tmp_path / "out.json"
    assert suite.main(["rms_norm", "--quick", "--json", str(path)]) == 1
    captured = capsys.readouterr()
    assert f"FAILED, not timed: AssertionError: rms_norm: {tensor}" in captured.err
    assert "FAILED, not timed" in captured.out
    data = json.loads(path.read_text())
    assert data["results"] == []
    assert [(f["op"], f["case"]) for f in data["failed"]] == [("rms_norm", "fp32 8x40 forward+backward")]
    assert "over the budget" in data["failed"][0]["reason"]


def test_one_wrong_op_does_not_stop_the_others(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ops, "rms_norm", lambda x, *args: x * 2)
    assert suite.main(["rms_norm", "layer_norm", "--quick", "--report", str(tmp_path)]) == 1
    assert "layer_norm  fp32 8x40 forward+backward  fastllm (" in capsys.readouterr().out
    assert "not timed" in (tmp_path / "index.html").read_text()


def test_an_interrupt_keeps_what_was_measured(small, monkeypatch, tmp_path, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "layer_norm", interrupted)
    path = tmp_path / "out.json"
    assert suite.main(["add_rms_norm", "layer_norm", "rms_norm", "--quick", "--json", str(path)]) == 1
    assert "interrupted: 2 of 3 cases were not reached" in capsys.readouterr().err
    data = json.loads(path.read_text())
    assert [result["op"] for result in data["results"]] == ["add_rms_norm"]
    assert [(failure["op"], failure["reason"]) for failure in data["failed"]] == [
        (name, "not reached: interrupted") for name in ("layer_norm", "rms_norm")
    ]


def test_a_rival_that_cannot_run_is_named(small, monkeypatch, capsys):
    def refuse(fn, **_):
        def compiled(*args):
            raise NotImplementedError("no compiler here")

        return compiled

    monkeypatch.setattr(torch, "compile", refuse)
    assert suite.main(["rms_norm", "--quick"]) == 0
    assert "torch.compile is not timed: NotImplementedError: no compiler here" in capsys.readouterr().out


def test_contenders_take_turns(small):
    race = harness.Race(small_cases("rms_norm")("cpu", True)[0], "cpu", 0.01)
    turns: list[str] = []
    for contender in race.contenders:
        contender.call = lambda _, name=contender.name: turns.append(name)
    race._turn = 0
    for _ in range(6):
        race.round()
    f, e, c = "fastllm", "eager", "torch.compile"
    assert turns == [f, e, c, c, e, f, e, c, f, f, c, e, c, f, e, e, f, c]


def test_a_rival_may_overwrite_its_gradient(small):
    case = small_cases("rms_norm")("cpu", True)[0]

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shape, weight):
            return x * weight

        @staticmethod
        def backward(ctx, dy):
            return dy.mul_(2), None, torch.ones(40)

    case.rivals["in place"] = InPlace.apply
    race = harness.Race(case, "cpu", 0.01)
    race.round()
    assert not race.skipped


def test_summary_of_known_samples():
    figures = harness.summary([0.001, 0.002, 0.003, 0.004, 0.005])
    assert figures == {"median_ms": 3.0, "q1_ms": 2.0, "q3_ms": 4.0, "min_ms": 1.0, "noise": 0.3333}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc")
def test_no_contender_faults_its_memory_in_again():
    """Whether freed blocks go back to the system depends on who ran before: it must not decide a race."""
    code = """
import resource, torch
from fastllm.benchmarks import harness

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        blocks = [torch.zeros(2**22) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

harness.keep_freed_memory()
faults(10)
print(faults(10))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100, "of 40,960 pages"


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_disturbance_sees_other_processes_and_not_its_own():
    burn = "import time; end = time.monotonic() + 1.2\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", burn]), harness.Disturbance() as others:
        time.sleep(1.0)
    cores = len(re.findall(r"^cpu\d", Path("/proc/stat").read_text(), re.M))
    assert others.share > 0.5 / cores


def test_ceilings_of_this_machine(monkeypatch):
    monkeypatch.setattr(harness, "WARMUP_ROUNDS", 0)
    monkeypatch.setattr(harness, "CEILING_ROUNDS", 2)
    monkeypatch.setitem(harness.PRODUCT_SIZE, "cpu", 128)  # a larger product of 16 bits takes seconds on some CPUs
    ceilings = harness.measure_ceilings("cpu")
    assert set(ceilings) == {"copy_gb_s", "matmul_fp32_tflop_s", "matmul_bf16_tflop_s"}
    assert all(math.isfinite(value) and value > 0 for value in ceilings.values())
    assert 0.5 < ceilings["copy_gb_s"] < 5000


def test_ceilings_are_medians_of_what_times_the_contenders(monkeypatch):
    """Rounds of 1 to 15 s, after those that warm up, in any order: the median takes 8 s, the best would take 1 s."""
    taken = iter([0.01] * harness.WARMUP_ROUNDS + [*range(15, 8, -1), *range(1, 9)])

    def turn(self, order):
        seconds = next(taken)
        for contender in order:
            contender.seconds.append(seconds)

    monkeypatch.setattr(harness.Stopwatch, "round", turn)
    ceilings = harness.measure_ceilings("cpu")
    assert ceilings["copy_gb_s"] == float(f"{2 * 2**28 / 8 / 1e9:.4g}")
    assert ceilings["matmul_bf16_tflop_s"] == float(f"{2 * 1024**3 / 8 / 1e12:.4g}")
    after = {key: 3 * value for key, value in ceilings.items()}
    assert harness.mean_ceilings(ceilings, after) == pytest.approx({k: 2 * v for k, v in ceilings.items()}, rel=1e-3)


def test_the_cache_is_flushed_by_reading():
    cache = 64 * 2**20
    scratch, total = harness.flush_memory(cache, "cpu")
    assert scratch.nbytes > 4 * cache
    places = [0, scratch.numel() // 2, scratch.numel() - 1]
    scratch[places] = torch.tensor([1.0, 2.0, 4.0])
    version = scratch._version
    harness.flush(scratch, total)
    assert total.item() == 7, "all of it is read"
    assert scratch._version == version, "nothing is written into it"
    assert scratch.count_nonzero() == 3


def test_the_order_of_a_turn_on_a_gpu(monkeypatch):
    """Prepared, flushed, kept busy, and only then timed: the ceilings' calls and the contenders' alike."""
    events: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append("event")

        def elapsed_time(self, end):
            return 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: events.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(harness, "flush_memory", lambda cache: (torch.zeros(1), torch.zeros(())))
    monkeypatch.setattr(harness, "flush", lambda scratch, total: events.append("flush"))
    contenders = [
        harness.Contender(
            name, lambda n=name: events.append(f"prepare {n}"), lambda _, n=name: events.append(f"call {n}")
        )
        for name in "ab"
    ]
    harness.Stopwatch("cuda").round(contenders)
    turns = [[f"prepare {n}", "flush", "sleep", "event", f"call {n}", "event"] for n in "ab"]
    assert events == [*turns[0], *turns[1], "synchronize"]
    assert [c.seconds for c in contenders] == [[0.005], [0.005]]
    assert all(len(c.host_seconds) == 1 for c in contenders)


@pytest.mark.parametrize(
    ("milliseconds", "host_milliseconds", "bound"),
    [(0.2, 0.9, False), (1.2, 1.1, True), (2.5, 1.1, False), (80.0, 30.0, False), (80.0, 70.0, True)],
)
def test_what_is_host_bound(small, milliseconds, host_milliseconds, bound):
    """It may take as long as the head start, and half of what the GPU takes, which then need not wait for it."""
    race = harness.Race(small_cases("rms_norm")("cpu", True)[0], "cpu", 0.01)
    for contender in race.contenders:
        contender.seconds = [milliseconds / 1e3] * race.rounds
    race.contenders[1].host_seconds = [host_milliseconds / 1e3] * race.rounds
    found = race.result(0.0)
    assert {name for name, figures in found["contenders"].items() if figures.get("host_bound")} == (
        {"eager"} if bound else set()
    )


# Fastllm on its kernels, or not at all


@pytest.fixture
def pretended_gpu(small, monkeypatch) -> None:
    """A race for "cuda" that takes CPU tensors, and times them as such."""
    monkeypatch.setattr(harness, "Stopwatch", lambda device, real=harness.Stopwatch: real("cpu"))
    monkeypatch.setattr(harness, "free_memory", lambda device: None)


def test_a_reference_is_not_timed_on_a_gpu(pretended_gpu):
    case = _norm.case("rms_norm", "cpu", (8, 40), torch.float64, "forward+backward")
    with pytest.raises(AssertionError, match="fastllm would run rms_norm_fwd on reference"):
        harness.Race(case, "cuda", 0.01)
    with pytest.warns(backends.FallbackWarning):
        assert harness.Race(dataclasses.replace(case, fallback=True), "cuda", 0.01).backend == "reference"
    assert harness.Race(case, "cpu", 0.01).backend == "reference", "on a CPU the results say so"


@bindings.needs_kernels
def test_a_fallback_that_explain_does_not_see_is_not_timed_on_a_gpu(pretended_gpu):
    """Neither the first time, when it warns, nor the second."""

    def call(x, shape, weight):
        if backends.steered():  # by `explain`, and for the float64 truth
            return ops.rms_norm(x, shape, weight)
        return ops.rms_norm(x.double(), shape, weight.double()).to(x.dtype)

    case = dataclasses.replace(small_cases("rms_norm")("cpu", True)[0], call=call)
    for _ in range(2):
        with pytest.raises(AssertionError, match="rms_norm_fwd runs on reference for cpu tensors"):
            harness.Race(case, "cuda", 0.01)
    assert harness.Race(dataclasses.replace(case, fallback=True), "cuda", 0.01).backend == "cpu"


# Rivals


def rivals_of(case: harness.Case, **rivals) -> harness.Case:
    return dataclasses.replace(case, rivals=case.rivals | rivals)


def test_a_rival_without_memory_is_skipped(small):
    """Alone, or beside the others: in its first turn after all are there."""
    calls = []

    def late(*args):
        calls.append(args)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("tried to allocate")
        return torch.nn.functional.rms_norm(*args)

    def early(*args):
        warnings.warn("that is why", stacklevel=1)
        raise torch.OutOfMemoryError("no memory")

    race = harness.Race(rivals_of(small_cases("rms_norm")("cpu", True)[0], late=late, early=early), "cpu", 0.01)
    assert [contender.name for contender in race.contenders] == ["fastllm", "eager", "torch.compile"]
    assert race.skipped == {
        "early": "OutOfMemoryError: no memory; that is why",
        "late": "OutOfMemoryError: tried to allocate",
    }


def test_which_rivals_are_timed(small):
    case = rivals_of(small_cases("rms_norm")("cpu", True)[0], slow=torch.nn.functional.rms_norm, absent="not here")
    case = dataclasses.replace(case, slow=("slow", harness.AUTOTUNED))
    result = harness.measure(case, "cpu", 0.01)
    assert set(result["contenders"]) == {"fastllm", "eager", "torch.compile"}
    assert result["skipped"] == {"absent": "not here"}
    result["contenders"] = {n: {"median_ms": t} for n, t in (("fastllm", 1), ("eager", 3), ("torch.compile", 2))}
    again = headline.second_pass(case, result)
    assert again.timed == ("torch.compile", "slow", harness.AUTOTUNED)
    assert again.name == f"{case.name}, second pass"
    assert set(harness.measure(again, "cpu", 0.01)["contenders"]) == {"fastllm", *again.timed}
    assert headline.second_pass(dataclasses.replace(case, slow=()), result) is None


def test_a_floor_is_not_the_best_rival():
    case = next(case for case in headline.cases("cuda") if case.op == "linear_cross_entropy")
    times = {"fastllm": 4, "eager": 3, "products alone": 1}
    result = {"contenders": {name: {"median_ms": ms} for name, ms in times.items()}}
    assert headline.second_pass(case, result).timed == ("eager", harness.AUTOTUNED)


def test_max_autotune_runs_without_cuda_graphs(small, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda fn, **options: modes.append(options.get("mode")) or fn)
    harness.Race(small_cases("rms_norm")("cpu", True)[0], "cpu", 0.01)
    assert modes == [None]
    case = dataclasses.replace(small_cases("rms_norm")("cpu", True)[0], slow=(harness.AUTOTUNED,))
    harness.Race(dataclasses.replace(case, timed=case.slow), "cpu", 0.01)
    assert modes == [None, None, "max-autotune-no-cudagraphs"]


def test_liger_is_listed_on_every_gpu():
    for op in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "swiglu", "geglu", "rotary"):
        for case in suite.discover()[op]("cuda", False):
            assert [name for name in case.rivals if name.startswith("Liger")], case.name
    for op in ("cross_entropy", "linear_cross_entropy"):
        for case in suite.discover()[op]("cuda", False):
            assert "Liger" in case.rivals
    assert _norm.case("add_layer_norm", "cuda", (8, 40), torch.float32, "forward").rivals["Liger"] == (
        "Liger has no add_layer_norm"
    )


def test_a_rival_that_is_not_there_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for name in [name for name in sys.modules if name.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, name)
    case = _norm.case("rms_norm", "cuda", (8, 40), torch.float32, "forward")
    assert "liger_kernel" in case.rivals["Liger"]
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    assert (
        "LinearCrossEntropyOptions" in linear_cross_entropy.case("cuda", 8, 4, 9, torch.float32).rivals["torch chunked"]
    )
    assert harness.rival(lambda: print) is print


def test_what_torch_has_computes_what_eager_computes():
    """FlexAttention with its masks, varlen_attn's signature, and the chunked loss, in whichever torch this is."""
    q, k, v = _attention.dense(1, 4, 2, 300, 16, torch.float32, "cpu")
    for left, causal in ((-1, True), (40, True), (-1, False)):
        rivals = _attention.gpu_rivals(left, causal)
        with torch.no_grad():
            expected, flex = rivals["eager"](q, k, v), rivals[_attention.FLEX](q, k, v)
        torch.testing.assert_close(flex, expected)
    masks = attention_varlen.Masks()
    args = attention_varlen.arguments(masks, (130, 7, 63), 2, 16, torch.float32, "cpu")
    with torch.no_grad():
        expected = ops.attention_varlen(*args, is_causal=True)
        for rival in (attention_varlen.eager, attention_varlen.stock, attention_varlen.flex):
            torch.testing.assert_close(rival(masks)(*args), expected)
    varlen = harness.rival(attention_varlen.torch_varlen)
    assert inspect.signature(varlen.func).bind(*args, **varlen.keywords)
    args = attention_kvcache.arguments(2, 4, 2, 50, 16, torch.float32, "cpu")
    with torch.no_grad():
        expected = ops.attention_kvcache(*args)
        for name in ("eager", "SDPA", _attention.FLEX):
            torch.testing.assert_close(attention_kvcache.gpu_rivals()[name](*args), expected)
    args = linear_cross_entropy.arguments(8, 4, 9, torch.float32, "cpu")
    chunked = harness.rival(linear_cross_entropy.chunked)
    if not isinstance(chunked, str):
        torch.testing.assert_close(chunked(*args), linear_cross_entropy.eager(*args))
    else:
        assert not hasattr(torch.nn, "LinearCrossEntropyOptions"), chunked


def test_a_long_case_is_checked_on_short_lengths():
    (case, *_) = attention_varlen.cases("cuda", False)
    assert "16 heads" in case.name
    assert "eager" not in case.timed
    assert sum(case.check.args[1]) == 1024, "(16, S, S) in float64 is 128 MB"


# Arguments


def test_unknown_op(capsys):
    assert cli.main(["bench", "no_norm"]) == 2
    assert capsys.readouterr().err == (
        "fastllm: error: unknown op 'no_norm'; known are " + ", ".join(sorted(suite.discover())) + "\n"
    )


def test_arguments_that_make_no_sense(capsys):
    assert suite.main(["--threads", "0"]) == 2
    if not torch.cuda.is_available():
        assert suite.main(["--device", "cuda"]) == 2
        assert "torch sees no GPU" in capsys.readouterr().err


def test_list_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(suite, "run", lambda *_: pytest.fail("ran"))
    assert suite.main(["rms_norm", "--device", "cuda", "--list"]) == 0
    assert "rms_norm         bf16 8192x16384 backward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "package"), [("pytest_benchmark", "pytest_benchmark"), ("matplotlib", "matplotlib")]
)
def test_a_missing_extra_names_the_command(module, package, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(suite, "run", lambda *_: pytest.fail("ran"))
    assert cli.main(["bench", "rms_norm", "--report", str(tmp_path)]) == 1
    assert 'pip install "fastllm-kernels[bench]"' in capsys.readouterr().err


def test_where_the_json_goes(tmp_path):
    name = "Fast(R) CPU @ 2.0GHz"
    assert suite.json_path(f"{tmp_path}/new/", name) == tmp_path / "new" / "fast-r-cpu-2-0ghz.json"
    assert suite.json_path(str(tmp_path), name) == tmp_path / "fast-r-cpu-2-0ghz.json"
    assert suite.json_path(f"{tmp_path}/my.json", name) == tmp_path / "my.json"


def test_a_step_of_a_model_is_timed_beside_its_products(monkeypatch):
    """The products that are replayed are those of the step, three for each matrix; losses that differ are an error."""
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    sizes = {"vocab_size": 64, "context": 16, "layers": 1, "width": 64, "heads": 1, "dropout": 0.0}
    config = models.BertConfig(**sizes)
    batches = models.masked(64, 4, 16, padded=True)[:1]
    case = models.case(("tiny", ""), models.Bert, config, lambda: batches, "", "cpu", models._bert_layout)
    found = case.setup()
    assert set(found) == {"fastllm", "eager", harness.COMPILED, models.OURS_COMPILED, models.PRODUCTS}
    eager = found["eager"]()
    with models._Recorder() as recorder:
        eager.prepare()
        eager.call()
    matrices = ("qkv", "out", "up", "down", "dense", "tied head")
    assert len(recorder.products) == 3 * len(matrices)
    ready = found[models.PRODUCTS]()
    with models._Recorder() as replayed:
        ready.call()
    shapes = [[shape for shape, *_ in both] for both in recorder.products]
    assert [[shape for shape, *_ in both] for both in replayed.products] == shapes
    monkeypatch.setitem(models.TOLERANCE, "cpu", -1.0)
    with pytest.raises(AssertionError, match="the losses on fastllm are"):
        case.setup()

"""Which implementation runs, what `explain` says of it, and that the two agree."""

from __future__ import annotations

import sys
import threading
import warnings

import bindings
import pytest
import torch

import fastllm
from fastllm import ops
from fastllm.backends import NAMES, OPS
from fastllm.testing import sample, seeded

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def test_explain_lists_every_candidate_in_order():
    explanation = fastllm.explain(ops.rms_norm, torch.randn(2, 8), (8,))
    assert [candidate.backend for candidate in explanation] == ["cuda", "cpu", "reference"]
    assert sum(candidate.chosen for candidate in explanation) == 1
    text = str(explanation)
    assert "rms_norm_fwd" in text
    assert "rejected: " in text
    assert "runs" in text


@bindings.needs_kernels
def test_explain_says_why_not():
    explanation = fastllm.explain("layer_norm", torch.randn(2, 8, dtype=torch.float64), (8,))
    assert explanation.backend == "reference"
    cpu = next(candidate for candidate in explanation if candidate.backend == "cpu")
    assert cpu.reason == "input must be float32, bfloat16 or float16, got float64"


def test_columns_line_up():
    """Also those of ops with long names, and of a call of several ops."""
    explanation = fastllm.explain("layer_norm", torch.randn(2, 8), (8,))
    args, kwargs = sample("linear_cross_entropy")
    explanation += fastllm.explain("linear_cross_entropy", args[0].requires_grad_(), *args[1:], **kwargs)
    lines = str(explanation).splitlines()
    assert len(lines) == len(explanation)
    assert len({line.index(f"  {each.backend}") for line, each in zip(lines, explanation, strict=True)}) == 1
    assert len({line.index(each.verdict) for line, each in zip(lines, explanation, strict=True)}) == 1


def test_explain_computes_nothing(monkeypatch):
    for op in OPS.values():
        monkeypatch.setattr(op, "call", lambda *args: pytest.fail("explain ran the op"))
    x = torch.randn(2, 8, requires_grad=True)
    with fastllm.use_backend("reference"):
        assert fastllm.explain("add_layer_norm", x, x, (8,)).backend == "reference"
    assert fastllm.explain("add_layer_norm", x, x, (8,)).backend in NAMES


def test_explain_of_bad_arguments_and_unknown_ops():
    with pytest.raises(ValueError, match=r"unknown op 'no_norm'; known are .*rms_norm"):
        fastllm.explain("no_norm")
    with pytest.raises(ValueError, match="'rms_norm' calls no op of fastllm"):
        fastllm.explain(torch.nn.functional.rms_norm, torch.randn(2, 8), (8,))
    with pytest.raises(ValueError, match=r"got \(2, 8\)"):
        fastllm.explain("rms_norm", torch.randn(2, 8), (7,))
    torch.nn.functional.relu(ops.rms_norm(torch.randn(2, 8), (8,)))  # and the op runs again afterwards


@pytest.mark.parametrize("op", ops.__all__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_explain_agrees_with_what_runs(op, dtype, monkeypatch):
    args, kwargs = sample(op, "cpu", dtype)
    fell_back = []
    for each in OPS.values():
        monkeypatch.setattr(
            each, "candidates", lambda *a, each=each: fell_back.append(each.name) or type(each).candidates(each, *a)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastllm.FallbackWarning)
        getattr(ops, op)(*args, **kwargs)
    chose_in_python = bool(fell_back)
    monkeypatch.undo()
    explanation = fastllm.explain(op, *args, **kwargs)
    chosen = next(b for b in OPS[explanation[-1].op].backends if b.name == explanation.backend)
    assert (chosen.key is None) == chose_in_python


@pytest.mark.parametrize("op", ops.__all__)
def test_every_op_reaches_every_backend_that_was_built(op):
    """The stable ABI checks no C++ signature against the schema: only calling it does."""
    args, kwargs = sample(op, "cpu", torch.float32)
    call = seeded(getattr(ops, op))
    with fastllm.use_backend("reference"):
        expected = call(*args, **kwargs)
    for candidate in fastllm.explain(op, *args, **kwargs):
        if candidate.reason is None:
            with fastllm.use_backend(candidate.backend):
                torch.testing.assert_close(call(*args, **kwargs), expected)


def test_every_built_cpu_kernel_is_known():
    """An op that csrc/cpu registers and Python does not declare, or the other way round, would go unused."""
    if fastllm._ext.C is None:
        pytest.skip("fastllm was installed without kernels")
    registered = {op.name for op in OPS.values() if "CPU" in op.built}
    declared = {op.name for op in OPS.values() if any(backend.name == "cpu" and backend.key for backend in op.backends)}
    assert registered == declared


def test_forced_backend_never_falls_back():
    x = torch.randn(2, 8)
    with (
        fastllm.use_backend("cuda"),
        pytest.raises(fastllm.BackendUnavailable, match=r"rms_norm_fwd: backend 'cuda' cannot run: "),
    ):
        ops.rms_norm(x, (8,))
    with (
        fastllm.use_backend("triton"),
        pytest.raises(fastllm.BackendUnavailable, match="has no backend 'triton'; it has cuda, cpu"),
    ):
        ops.rms_norm(x, (8,))
    if fastllm._ext.C is not None:
        with fastllm.use_backend("cpu"), pytest.raises(fastllm.BackendUnavailable, match="got float64"):
            ops.rms_norm(x.double(), (8,))


def test_use_backend_nests_and_ends():
    x = torch.randn(2, 8)
    usual = fastllm.explain("rms_norm", x, (8,)).backend
    with fastllm.use_backend("reference"):
        with fastllm.use_backend(None):
            assert fastllm.explain("rms_norm", x, (8,)).backend == usual
        assert fastllm.explain("rms_norm", x, (8,)).backend == "reference"
        with pytest.raises(RuntimeError, match="stop"), fastllm.use_backend(usual):
            raise RuntimeError("stop")
        assert fastllm.explain("rms_norm", x, (8,)).backend == "reference"
    assert fastllm.explain("rms_norm", x, (8,)).backend == usual
    with pytest.raises(ValueError, match="unknown backend 'gpu'; known are cuda, triton"), fastllm.use_backend("gpu"):
        pass


def test_use_backend_as_a_statement_and_as_a_decorator():
    x = torch.randn(2, 8)

    def chosen() -> str:
        return fastllm.explain("rms_norm", x, (8,)).backend

    usual = chosen()
    with fastllm.use_backend(None):  # lifts what is chosen inside, too
        fastllm.use_backend("reference")
        assert chosen() == "reference"
        fastllm.use_backend(None)
        assert chosen() == usual
        fastllm.use_backend("reference")
        with pytest.raises(ValueError, match="unknown backend"):
            fastllm.use_backend("gpu")
        assert chosen() == "reference"
    assert chosen() == usual
    decorated = fastllm.use_backend("reference")(chosen)
    assert chosen() == usual
    assert [decorated(), decorated(), chosen()] == ["reference", "reference", usual]
    assert decorated.__name__ == "chosen"


def test_use_backend_holds_in_the_backward_and_in_other_threads(monkeypatch):
    """Autograd runs the backward of GPU tensors in threads of its own, so the choice is not a thread's."""
    seen = []
    backward = OPS["rms_norm_bwd"]
    monkeypatch.setattr(
        backward, "_run_forced", lambda *args: seen.append(1) or type(backward)._run_forced(backward, *args)
    )
    x = torch.randn(2, 8, requires_grad=True)
    with fastllm.use_backend("reference"):
        y = ops.rms_norm(x, (8,))
        thread = threading.Thread(target=lambda: y.sum().backward())
        thread.start()
        thread.join()
    assert seen
    assert x.grad is not None


def test_a_fallback_warns_once_for_each_reason():
    x = torch.randn(2, 8, dtype=torch.float64)
    op = OPS["rms_norm_fwd"]
    op._warned.clear()
    with pytest.warns(fastllm.FallbackWarning, match=r"fastllm.rms_norm_fwd runs on reference for cpu tensors; cpu: "):
        ops.rms_norm(x, (8,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.rms_norm(x, (8,))


def user(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.Sequential(fastllm.nn.RMSNorm(8).double())(x)


@pytest.mark.parametrize("compiler", [None, "aot_eager", "inductor"])
def test_a_fallback_warning_points_at_the_users_line(compiler):
    torch.compiler.reset()
    call = torch.compile(user, backend=compiler) if compiler else user
    for direction in ("fwd", "bwd"):
        OPS[f"rms_norm_{direction}"]._warned.clear()
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    with pytest.warns(fastllm.FallbackWarning, match="rms_norm_fwd") as caught:
        y = call(x)
    first = user.__code__.co_firstlineno
    assert {(w.filename, w.lineno - first) for w in caught} <= {(__file__, 0), (__file__, 1)}  # compiled, its first
    with pytest.warns(fastllm.FallbackWarning, match="rms_norm_bwd") as caught:
        y.sum().backward()
    assert {(w.filename, w.lineno) for w in caught} == {(__file__, sys._getframe().f_lineno - 1)}

"""What the norms behind dropout and an addition are tested for: all that the other norms are, with the mask known."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import bindings
import pytest
import torch
from norm_suite import NormSuite
from torch import Tensor

import fastllm
from fastllm import ops
from fastllm.backends import OPS
from fastllm.testing import dropout_factors, make, seeded

P = 0.3


def factors(x: Tensor, ndim: int = 1, p: float = P) -> Tensor:
    return dropout_factors(x.flatten(-ndim), p).view(x.shape)


class DropoutNormSuite(NormSuite):
    added = True

    @property
    def op(self) -> Callable:
        return seeded(functools.partial(getattr(ops, self.name), p=P))

    @property
    def plain(self) -> Callable:
        return getattr(ops, self.name.removeprefix("dropout_"))

    def eager(self, *args, dtype: torch.dtype | None = None):
        input, residual, shape, *rest = args
        z = factors(input, len(shape)).to(input.dtype)
        return super().eager(z * input, residual, shape, *rest, dtype=dtype)

    def raw_args(self, name: str) -> list[tuple]:
        found, seed = [], torch.tensor([2**40 + 5])
        for dtype, parameters in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float32, None),
        ):
            x, residual, _, *params, eps = self.args((3, 5, 17), dtype, parameters, eps=1e-5)
            forward = (x, residual, *params, seed, P, eps)
            if name.endswith("_fwd"):
                found.append(forward)
                continue
            saved = OPS[f"{self.name}_fwd"].call(*forward)[1:]
            dy, wanted = torch.randn(3, 5, 17).to(dtype), (parameters is not None,) * len(params)
            found += [(dy, dsum, *saved, *params, seed, P, *wanted) for dsum in (dy * 2, None)]
        return found

    @bindings.needs_kernels
    def test_direct_calls_cannot_reach_foreign_memory(self):
        for direction in ("fwd", "bwd"):
            op, args = OPS[f"{self.name}_{direction}"], self.raw_args(f"{self.name}_{direction}")[0]
            main, seed = (0 if direction == "fwd" else 2), next(i for i, a in enumerate(args) if a is P) - 1
            for position, arg in enumerate(args):
                if isinstance(arg, Tensor) and position != main:
                    short = arg[..., :-1].contiguous()
                    message = "seed must be one int64" if position == seed else "must fit x in shape, dtype and device"
                    with pytest.raises(RuntimeError, match=message):
                        op.call(*args[:position], short, *args[position + 1 :])

    @pytest.fixture(autouse=True)
    def _bindings_of_these_ops(self, request):
        parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        binding = parameters.get("binding")
        if binding == "cuda-emulated":
            pytest.skip("on a GPU these ops are Triton's: tests/test_interpreter.py")
        if binding == "cuda":
            if parameters.get("width", 0) > 8192 or request.node.originalname == "test_very_long_rows":
                pytest.skip("longer than the Triton kernels' rows")
            warnings.simplefilter("error", fastllm.FallbackWarning)  # pytest restores the filters

    @pytest.mark.gpu
    def test_cuda_graph(self):
        x, residual, *rest = self.args((64, 1024), device="cuda")
        function = getattr(ops, self.name)
        function(x, residual, *rest, p=P)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, total = function(x, residual, *rest, p=P)
        sums = []
        for _ in range(2):
            graph.replay()
            kept = (total - residual).abs() > 1e-3 * x.abs()
            torch.testing.assert_close(total, x * kept / (1 - P) + residual)
            sums.append(total.clone())
        assert not torch.equal(*sums)

    # torch.manual_seed cannot be compiled: the masks of compiled calls are not known, but the rest is.

    @pytest.mark.parametrize("backend", [None, pytest.param("reference", marks=pytest.mark.slow)])
    def test_fullgraph_compile(self, backend):
        function = getattr(ops, self.name)
        torch.compiler.reset()
        with fastllm.use_backend(backend):
            compiled = torch.compile(lambda *args: function(*args, p=P), fullgraph=True, backend="aot_eager")
            for rows in (4, 6, 9):
                self.check_own_mask(compiled, self.args((rows, 24), seed=rows))

    def test_inductor(self):
        function = getattr(ops, self.name)
        torch.compiler.reset()
        self.check_own_mask(torch.compile(lambda *args: function(*args, p=P), fullgraph=True), self.args((8, 48)))

    def check_own_mask(self, call: Callable, args: tuple) -> None:
        """Against a mask read off the sum; a second call must draw another."""
        x, residual, *rest = args
        x, residual = x.requires_grad_(), residual.requires_grad_()
        outputs = call(x, residual, *rest)
        z = ((outputs[1] - residual).abs() > 1e-3 * x.abs()).float() / (1 - P)
        expected = NormSuite.eager(self, x * z, residual, *rest)  # type: ignore[arg-type]
        torch.testing.assert_close(outputs, expected)
        got, wanted = (
            torch.autograd.grad(out[0].sin().sum() + out[1].cos().sum(), (x, residual)) for out in (outputs, expected)
        )
        torch.testing.assert_close(got, wanted)
        assert not torch.equal(call(x, residual, *rest)[1], outputs[1])

    def test_export_keeps_the_op(self):
        function, args = getattr(ops, self.name), self.args((4, 16))
        tensors = tuple(arg for arg in args if isinstance(arg, Tensor))

        class Module(torch.nn.Module):
            def forward(self, x, residual, *parameters):
                return function(x, residual, (16,), *parameters, p=P)

        assert f"fastllm.{self.name}_fwd" in str(torch.export.export(Module(), tensors).graph)

    # Dropout

    def test_without_dropout_it_is_the_addition_and_the_norm(self):
        args = self.args((5, 40))
        for kwargs in ({"p": 0.0}, {"training": False}, {"p": 1.0, "training": False}):
            assert self.bits_of(self.op, args, **kwargs) == self.bits_of(self.plain, args)

    def bits_of(self, op: Callable, args: tuple, **kwargs) -> list[list]:
        leaves = [arg.detach().requires_grad_() if isinstance(arg, Tensor) else arg for arg in args]
        outputs = op(*leaves, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return [
            t.tolist() for t in (*outputs, *torch.autograd.grad(outputs[0].sin().sum() + outputs[1].sum(), tensors))
        ]

    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_everything_dropped(self, backend):
        x, residual, *rest = self.args((5, 40))
        x[0, 3], x[1, 4] = float("nan"), float("inf")
        x.requires_grad_()
        with fastllm.use_backend(backend):
            normed, total = self.op(x, residual, *rest, p=1.0)
        assert torch.equal(total, residual)
        (grad,) = torch.autograd.grad(normed.sin().sum() + total.sum(), x)
        assert torch.equal(grad, torch.zeros_like(x))

    @pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9])
    def test_how_much_is_dropped(self, p):
        x = torch.ones(200, 500)
        kept = self.op(x, torch.zeros_like(x), (500,), p=p)[1] != 0
        deviation = (p * (1 - p) / x.numel()) ** 0.5
        assert abs(1 - float(kept.double().mean()) - p) < 4 * deviation
        # neither rows nor columns nor neighbours depend on each other
        for dim in (0, 1):
            along = kept.double().mean(dim)
            assert 0.8 < float(along.var()) / (p * (1 - p) / x.shape[dim]) < 1.25
        pairs = kept[:, 1:].double() - (1 - p), kept[:, :-1].double() - (1 - p)
        assert abs(float((pairs[0] * pairs[1]).mean())) < 4 * p * (1 - p) / x.numel() ** 0.5

    @pytest.mark.parametrize("binding", bindings.NAMES)
    def test_the_mask_depends_on_seed_row_and_column_alone(self, binding):
        with bindings.bound(binding) as device:
            for shape in ((7, 2100), (9, 1001), (2, 3, 65)):
                for dtype in (torch.float32, torch.bfloat16):
                    x, residual, *rest = self.args(shape, dtype, device=device)
                    x = make(shape, dtype, device, layout="transposed").abs() + 1
                    x.requires_grad_()
                    _, total = self.op(x, residual * 0, *rest)
                    assert torch.equal(total, (x * factors(x)).to(dtype))
                    (grad,) = torch.autograd.grad(total.sum(), x)
                    assert torch.equal(grad, factors(x).to(dtype))

    def test_another_seed_another_mask(self):
        x, residual, *rest = self.args((5, 40))
        function = getattr(ops, self.name)
        torch.manual_seed(1)
        first, second = (function(x, residual, *rest)[1] for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(1)
        assert torch.equal(function(x, residual, *rest)[1], first)

    def test_no_gradient_of_the_norm_where_only_the_sum_was_used(self):
        x, residual, shape, *parameters = self.args((5, 40))
        residual[2, 3] = float("inf")  # a row whose norm is not finite
        leaves = [t.requires_grad_() for t in (x, residual, *parameters)]
        total = self.op(x, residual, shape, *parameters)[1]
        dx, dresidual, *others = torch.autograd.grad(total.sum(), leaves, allow_unused=True)
        assert torch.equal(dx, factors(x))
        assert torch.equal(dresidual, torch.ones_like(x))
        assert others == [None] * len(parameters)

    def test_errors_name_this_function_without_dropout_too(self):
        x = torch.randn(4, 8)
        with pytest.raises(ValueError, match=f"^{self.name}: residual must have shape"):
            self.op(x, x[:1], (8,), p=0.0)
        with pytest.raises(TypeError, match=f"^{self.name}: p must be a number, got 'a'"):
            self.op(x, x, (8,), p="a")

    def test_explain_draws_nothing(self):
        state = torch.get_rng_state()
        assert fastllm.explain(self.name, *self.args((4, 8)), p=P).backend == "cpu"
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
    def test_refuses_what_is_no_probability(self, p):
        with pytest.raises(ValueError, match=f"^{self.name}: p must be between 0 and 1, got {p}"):
            self.op(*self.args((5, 40)), p=p)

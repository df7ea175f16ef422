"""What swiglu and geglu are tested for. Each `test_<op>.py` subclasses `GluSuite` and adds what is its own."""

from __future__ import annotations

import functools
from collections.abc import Callable

import bindings
import pytest
import torch
from torch import Tensor

import fastllm
from fastllm import ops
from fastllm.backends import OPS
from fastllm.testing import LAYOUTS, check_op, make, poisoned_allocations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = [f"cpu-{isa}" for isa in bindings.ISAS]


class GluSuite:
    name: str  # of the op
    variants: tuple[dict, ...]  # keyword arguments
    extra: tuple  # of the registered ops, behind gate and up

    def activation(self, **kwargs) -> Callable[[Tensor], Tensor]:
        """The stock activation."""
        raise NotImplementedError

    @property
    def op(self) -> Callable:
        return getattr(ops, self.name)

    def eager(self, gate, up=None, **kwargs):
        gate, up = gate.chunk(2, -1) if up is None else (gate, up)
        return self.activation(**kwargs)(gate) * up

    def check(self, *args, grad_layout: str = "contiguous", **kwargs) -> None:
        check_op(
            functools.partial(self.op, **kwargs), functools.partial(self.eager, **kwargs), args, grad_layout=grad_layout
        )

    @pytest.mark.parametrize("binding", CPU)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n", [1, 3, 16, 127, 129, 1000, 8193])
    def test_sizes_and_dtypes(self, binding, dtype, n):
        with bindings.bound(binding):
            for kwargs in self.variants:
                self.check(make((5, n), dtype), make((5, n), dtype, seed=1), **kwargs)
                self.check(make((2, 3, 2 * n), dtype), **kwargs)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout):
        for kwargs in self.variants:
            for shape in ((4, 130), (2, 3, 33)):
                self.check(*(make(shape, seed=i, layout=layout) for i in range(2)), **kwargs)
                self.check(*(make(shape, seed=i) for i in range(2)), grad_layout=layout, **kwargs)

    @pytest.mark.parametrize("binding", CPU)
    @pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])
    def test_tiny_and_huge(self, binding, scale):
        with bindings.bound(binding):
            for kwargs in self.variants:
                for dtype in (torch.float32, torch.bfloat16):
                    self.check(make((5, 133), dtype) * scale, make((5, 133), dtype, seed=1), **kwargs)

    @pytest.mark.parametrize("binding", CPU)
    def test_special_values(self, binding):
        gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 100.0, -100.0, 1e-40] * 5)
        up = torch.ones_like(gate)
        with bindings.bound(binding):
            for kwargs in self.variants:
                ours, stock = self.op(gate, up, **kwargs), self.eager(gate, up, **kwargs)
                known = ~gate.isinf()  # there torch's own forms, and its vectors and scalars, do not agree
                torch.testing.assert_close(ours[known], stock[known], equal_nan=True)
                assert (ours[gate == torch.inf] == torch.inf).all()

    def test_large_outputs_go_around_the_cache(self):
        for shape in ((2048, 1056), (2050, 1055)):
            self.check(make(shape), make(shape, seed=1), **self.variants[0])

    def test_mixed_dtypes_promote(self):
        gate, up = make((3, 8), torch.bfloat16), make((3, 8), torch.float32, seed=1)
        assert self.op(gate, up).dtype == torch.float32
        torch.testing.assert_close(self.op(gate, up), self.eager(gate.float(), up, **self.variants[0]))

    def test_packed_is_the_two(self):
        packed = make((4, 66)).requires_grad_()
        gate, up = (x.detach().requires_grad_() for x in packed.chunk(2, -1))
        outs = self.op(packed), self.op(gate, up)
        assert torch.equal(*outs)
        grads = [
            torch.autograd.grad(out.sin().sum(), leaves) for out, leaves in zip(outs, (packed, (gate, up)), strict=True)
        ]
        assert torch.equal(grads[0][0], torch.cat(grads[1], -1))
        assert grads[0][0].is_contiguous()

    def test_empty(self):
        for shape in ((0, 4), (3, 0)):
            gate = torch.randn(shape, requires_grad=True)
            out = self.op(gate, gate.detach())
            out.sum().backward()
            assert out.shape == gate.grad.shape == shape

    def test_every_element_is_written(self):
        with poisoned_allocations():
            gate = torch.randn(6, 133, requires_grad=True)
            out = self.op(gate, gate)
            assert out.isfinite().all()
            assert torch.autograd.grad(out.sum(), gate)[0].isfinite().all()

    @pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
    def test_gradcheck_of_the_reference(self):
        gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        for kwargs in self.variants:
            assert torch.autograd.gradcheck(functools.partial(self.op, **kwargs), (gate, up))

    @pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")
    def test_opcheck(self):
        gate, up, dy = torch.randn(3, 8), torch.randn(3, 16)[:, ::2], torch.randn(8, 3).t()
        torch.library.opcheck(OPS[f"{self.name}_fwd"].call, (gate, up, *self.extra))
        torch.library.opcheck(OPS[f"{self.name}_bwd"].call, (dy, gate, up, *self.extra))

    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_fullgraph_compile(self, backend):
        torch.compiler.reset()

        def step(gate, up, packed):
            return (self.op(gate, up) + self.op(packed)).sin().sum()

        leaves = [torch.randn(shape, requires_grad=True) for shape in ((3, 8), (3, 8), (3, 16))]
        with fastllm.use_backend(backend):
            compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step)))

    def test_hostile_arguments(self):
        x = torch.randn(3, 8)
        for args, error, message in (
            (([1.0], x), TypeError, "gate must be a tensor, got list"),
            ((x, 1.0), TypeError, "up must be a tensor, got float"),
            ((x.int(), x), TypeError, "gate must be float32, bfloat16, float16 or float64, got torch.int32"),
            ((x, x[:2]), ValueError, r"up must have gate's shape \(3, 8\), got \(2, 8\)"),
            ((x, x.to("meta")), ValueError, "gate is on cpu, up on meta"),
            ((x[:, :7],), ValueError, "gate's last size must be even"),
            ((x[0, 0], x[0, 0]), ValueError, r"at least one dimension, got \(\)"),
        ):
            with pytest.raises(error, match=f"^{self.name}: .*{message}"):
                self.op(*args)

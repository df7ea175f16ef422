"""What the four norms are tested for. Each `test_<op>.py` subclasses `NormSuite` and adds what is its own."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable

import bindings
import eager
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastllm
from fastllm import ops
from fastllm.backends import OPS
from fastllm.testing import LAYOUTS, ODD_SIZES, check_op, make, poisoned_allocations

# Each path of the CUDA kernels for rows of 16 and of 32 bits, and their borders; on the CPU, the vectors' borders.
WIDTHS = (1, 3, 7, 16, 127, 129, 256, 512, 520, 1000, 1024, 2050, 4096, 4104)
WIDE = (8200, 16384)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (activations, parameters)
MIXED = [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
MIXED += [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)]


def ids(value) -> str:
    return str(value).replace("torch.", "")


class NormSuite:
    name: str  # of the op
    biased: bool
    added: bool

    @property
    def op(self) -> Callable:
        return getattr(ops, self.name)

    def eager(self, *args, dtype: torch.dtype | None = None):
        """The stock PyTorch function that the op replaces; `dtype` is that of the sum, default the input's."""
        return eager.norm(*args, biased=self.biased, added=self.added, dtype=dtype)

    def args(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        parameters: torch.dtype | None = torch.float32,
        *,
        device: str = "cpu",
        layout: str = "contiguous",
        ndim: int = 1,
        eps: float | None = None,
        seed: int = 0,
    ) -> tuple:
        """Positional arguments for the op; `parameters` None leaves weight and bias out."""
        normalized = shape[-ndim:]
        found = [make(shape, dtype, device, seed=seed + i, layout=layout) for i in range(1 + self.added)]
        found.append(normalized)
        for i in range(1 + self.biased):
            found.append(
                None if parameters is None else make(normalized, parameters, device, seed=seed + 10 + i) + (1 - i)
            )
        return (*found, *([] if eps is None else [eps]))

    def check(self, args: tuple, **kwargs) -> None:
        # Where dtypes are mixed, check_op gives eager its arguments in the wider one; the sum is rounded all the same.
        check_op(self.op, functools.partial(self.eager, dtype=args[0].dtype), args, **kwargs)

    # Values and gradients

    @pytest.mark.parametrize("binding", bindings.NAMES)
    @pytest.mark.parametrize("dtypes", MIXED, ids=ids)
    def test_dtypes(self, binding, dtypes):
        with bindings.bound(binding) as device:
            for width in (1000, 1024):
                self.check(self.args((9, width), *dtypes, device=device))

    @pytest.mark.parametrize("binding", bindings.NAMES)
    @pytest.mark.parametrize("width", WIDTHS)
    def test_widths(self, binding, width):
        rows = 11 if width < 2048 else 7  # more than the emulated GPU has resident blocks
        with bindings.bound(binding) as device:
            for dtype in (torch.float32, torch.bfloat16):
                self.check(self.args((rows, width), dtype, device=device))

    @pytest.mark.parametrize("binding", bindings.NAMES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_multiples_of_256(self, binding, dtype):
        """Rows that fill the threads of a GPU, with parameters of their own type, and their neighbours."""
        with bindings.bound(binding) as device:
            for width in (256, 512, 768, 1024, 1536, 3584, 4096, 6656, 16384):
                self.check(self.args((5, width), dtype, dtype, device=device))
            self.check(self.args((5, 4096), dtype, None, device=device))

    @pytest.mark.parametrize("binding", bindings.NAMES)
    @pytest.mark.parametrize("rows", ODD_SIZES)
    def test_row_counts(self, binding, rows):
        with bindings.bound(binding) as device:
            self.check(self.args((rows, 40), torch.bfloat16, device=device))

    @pytest.mark.slow
    @pytest.mark.parametrize("binding", bindings.NAMES)
    @pytest.mark.parametrize("width", WIDE)
    def test_wide_rows(self, binding, width):
        self.test_widths(binding, width)

    @pytest.mark.slow
    @pytest.mark.parametrize("binding", bindings.NAMES)
    def test_very_long_rows(self, binding):
        with bindings.bound(binding) as device:
            # The emulated GPU takes the same path from 16,385 elements on, and 500 times as long for them.
            for width in (20480, 20483) if binding == "cuda-emulated" else (131072, 131075):
                self.check(self.args((2, width), torch.bfloat16, device=device))

    @pytest.mark.slow
    @pytest.mark.parametrize("binding", [f"cpu-{isa}" for isa in bindings.ISAS])
    def test_large_outputs(self, binding):
        """From 8 MiB on, the CPU kernels write aligned rows around the cache."""
        with bindings.bound(binding):
            self.check(self.args((2051, 1024)))
            self.check(self.args((2051, 1025)))
            self.check(self.args((4111, 1056), torch.bfloat16))

    @pytest.mark.parametrize("binding", bindings.NAMES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, binding, layout):
        with bindings.bound(binding) as device:
            for shape in ((3, 5, 64), (4, 1000), (2, 3, 2, 33)):
                for dtype in (torch.float32, torch.bfloat16):
                    self.check(self.args(shape, dtype, device=device, layout=layout), grad_layout="contiguous")
                    self.check(self.args(shape, dtype, device=device), grad_layout=layout)

    @pytest.mark.parametrize("binding", bindings.NAMES)
    def test_no_parameters(self, binding):
        with bindings.bound(binding) as device:
            for width in (40, 1001):
                self.check(self.args((5, width), parameters=None, device=device))

    @pytest.mark.parametrize("binding", bindings.NAMES)
    def test_several_normalized_dimensions_and_leading_ones(self, binding):
        with bindings.bound(binding) as device:
            self.check(self.args((2, 3, 4, 6), ndim=2, device=device))
            self.check(self.args((4, 6), ndim=2, device=device))
            self.check(self.args((10,), device=device))
            self.check(self.args((2, 1, 3, 1, 6), device=device))
            self.check(self.args((4, 6, 8), ndim=2, device=device, layout="transposed"))

    @pytest.mark.parametrize("binding", bindings.NAMES)
    @pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (0, 0)])
    def test_empty(self, binding, shape):
        with bindings.bound(binding) as device:
            args = self.args(shape, device=device)
            leaves = [arg.requires_grad_() for arg in args if isinstance(arg, Tensor)]
            outputs = self.op(*args)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            assert all(out.shape == shape for out in outputs)
            sum(out.sum() for out in outputs).backward()
            for leaf in leaves:
                assert leaf.grad.shape == leaf.shape
                assert torch.equal(leaf.grad, torch.zeros_like(leaf))

    @pytest.mark.parametrize("binding", bindings.NAMES)
    def test_hard_values(self, binding):
        """Constant rows, a mean far above the deviation, magnitudes near 1e30, subnormals, in one batch each."""
        with bindings.bound(binding) as device:
            for width in (64, 1001):
                noise = make((6, width), torch.float32, device, seed=3)
                for rows in (
                    torch.full_like(noise, 3.25),
                    torch.zeros_like(noise),
                    noise + 1e4,
                    noise * 1e-2 + 100,
                    noise * 1e15,
                    noise * 1e-39,
                ):
                    args = list(self.args((6, width), device=device))
                    args[0] = rows
                    if self.added:
                        args[1] = torch.zeros_like(rows)
                    self.check(tuple(args))

    @pytest.mark.parametrize("binding", bindings.NAMES)
    def test_overflow_and_nan_follow_the_reference(self, binding):
        """1e30 squared is no float: what the reference makes of such a row, so does the kernel; others stay intact."""
        with bindings.bound(binding) as device:
            args = list(self.args((4, 100), device=device))
            args[0][1] *= 1e30
            args[0][2, 17] = float("nan")
            args[0][3, 5] = float("inf")
            got = self.op(*args)
            with fastllm.use_backend("reference"):
                expected = self.op(*args)
            torch.testing.assert_close(got, expected, equal_nan=True)

    def test_eps(self):
        for eps in (1e-12, 1e-3, 2.0):
            self.check(self.args((5, 64), eps=eps))
        x = torch.randn(3, 64) * 1e-4
        args = (x, x)[: 1 + self.added]
        first = self.op(*args, (64,))
        torch.testing.assert_close(first, self.eager(*args, (64,)), msg="the default eps is torch's")

    # Rows of rules

    @pytest.mark.parametrize("binding", bindings.NAMES)
    def test_every_output_element_is_written(self, binding):
        with bindings.bound(binding) as device, poisoned_allocations():
            for width in (1, 33, 1000, 1024, 4100):
                args = [
                    a.requires_grad_() if isinstance(a, Tensor) else a for a in self.args((5, width), device=device)
                ]
                outputs = self.op(*args)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                sum(out.sum() for out in outputs).backward()
                for tensor in (*outputs, *(arg.grad for arg in args if isinstance(arg, Tensor))):
                    assert not tensor.isnan().any(), f"width {width}"

    @pytest.mark.parametrize("binding", bindings.NAMES)
    def test_same_bits_every_time(self, binding):
        with bindings.bound(binding) as device:
            for shape in ((100, 129), (7, 2049)):
                runs = []
                for threads, order in itertools.product((1, 2, 5), (0, 1, 2)):
                    if binding == "cuda-emulated":
                        bindings.emulation().emulation_set_order(order)
                    elif order > 0:
                        continue
                    runs.append(self.bits(self.args(shape, device=device), threads))
                for other in runs[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))

    def bits(self, args: tuple, threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            args = [arg.requires_grad_() if isinstance(arg, Tensor) else arg for arg in args]
            outputs = self.op(*args)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            leaves = [arg for arg in args if isinstance(arg, Tensor)]
            weights = [torch.randn(out.shape, generator=torch.Generator().manual_seed(5)) for out in outputs]
            weights = [weight.to(out) for weight, out in zip(weights, outputs, strict=True)]
            return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]
        finally:
            torch.set_num_threads(before)

    def test_any_shape_and_stride(self):
        @given(
            leading=st.lists(st.integers(0, 5), max_size=3),
            width=st.integers(1, 300),
            layout=st.sampled_from(LAYOUTS),
            grad_layout=st.sampled_from(LAYOUTS),
            dtypes=st.sampled_from(MIXED),
            parameters=st.booleans(),
        )
        @settings(max_examples=40, deadline=None)
        def holds(leading, width, layout, grad_layout, dtypes, parameters):
            args = self.args((*leading, width), dtypes[0], dtypes[1] if parameters else None, layout=layout)
            # Of a constant gradient nothing is left but the roundings of what is subtracted: g rstd, both of them up to
            # 4 and more in a row of few or nearly equal elements.
            x = sum(arg.double() for arg in args[: 1 + self.added])
            spread = x.var(-1, correction=0) if self.biased else x.square().mean(-1)
            rstd = float((spread + 1e-5).rsqrt().max()) if spread.numel() else 1.0
            self.check(args, grad_layout=grad_layout, cancelling=4 * rstd)

        holds()

    def test_gradients_only_where_asked_for(self):
        args = self.args((4, 32))
        positions = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        for wanted in range(1, 2 ** len(positions)):
            leaves = [
                arg.detach().requires_grad_(bool(wanted >> positions.index(i) & 1)) if i in positions else arg
                for i, arg in enumerate(args)
            ]
            outputs = self.op(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum(out.square().sum() for out in outputs).backward()
            for i in positions:
                assert (leaves[i].grad is not None) == leaves[i].requires_grad

    def test_inputs_stay_as_they_are(self):
        args = self.args((7, 50), torch.bfloat16)
        copies = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        self.bits(args, 1)
        assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True) if isinstance(a, Tensor))

    # The reference

    def test_gradcheck_of_the_reference(self):
        for parameters in (torch.float64, None):
            args = self.args((3, 7), torch.float64, parameters)
            args = [arg.requires_grad_() if isinstance(arg, Tensor) else arg for arg in args]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fastllm.FallbackWarning)
                assert torch.autograd.gradcheck(self.op, args)

    def test_the_reference_is_torchs_function(self):
        for dtype in (torch.float64, torch.float32):
            args = self.args((5, 33), dtype, dtype)
            with fastllm.use_backend("reference"):
                torch.testing.assert_close(self.op(*args), self.eager(*args))

    # torch's machinery

    def test_opcheck(self):
        for name, op in OPS.items():
            if name.rpartition("_")[0] == self.name:
                for args in self.raw_args(name):
                    torch.library.opcheck(op.call, args)
                    torch.library.opcheck(getattr(torch.ops.fastllm, f"{name}_fallback").default, args)

    def raw_args(self, name: str) -> list[tuple]:
        """Arguments for `torch.ops.fastllm.<name>`, fwd or bwd, with and without what is optional."""
        found = []
        for dtype, parameters in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float32, None),
        ):
            args = self.args((3, 5, 17), dtype, parameters, eps=1e-5)
            forward = tuple(arg for arg in args if not isinstance(arg, tuple))  # without normalized_shape
            if name.endswith("_fwd"):
                found.append(forward)
                continue
            outputs = OPS[f"{self.name}_fwd"].call(*forward)
            parameters_ = forward[1 + self.added : -1]
            saved = outputs[1:] if self.added else (forward[0], *outputs[1:])  # (sum or x, mean?, rstd)
            dy = torch.randn(3, 5, 17).to(dtype)
            wanted = (parameters is not None,) * len(parameters_)
            for dsum in (dy * 2, None) if self.added else ((),):
                found.append((dy, *((dsum,) if self.added else ()), *saved, *parameters_, *wanted))
        return found

    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_fullgraph_compile(self, backend):
        def step(*tensors):
            args = [next(it) if isinstance(arg, Tensor) else arg for arg in args_] if (it := iter(tensors)) else []
            outputs = self.op(*args)
            return sum(out.float().square().sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,)))

        torch.compiler.reset()
        with fastllm.use_backend(backend):
            compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
            for rows in (4, 6, 9):  # the later ones with symbolic shapes
                args_ = self.args((rows, 24), seed=rows)
                tensors = [arg.requires_grad_() for arg in args_ if isinstance(arg, Tensor)]
                expected = torch.autograd.grad(step(*tensors), tensors)
                got = torch.autograd.grad(compiled(*tensors), tensors)
                torch.testing.assert_close(got, expected)

    def test_inductor(self):
        args = self.args((8, 48))
        tensors = [arg.requires_grad_() for arg in args if isinstance(arg, Tensor)]
        torch.compiler.reset()

        def step(*tensors):
            it = iter(tensors)
            outputs = self.op(*(next(it) if isinstance(arg, Tensor) else arg for arg in args))
            return sum(out.sin().sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,)))

        got = torch.autograd.grad(torch.compile(step, fullgraph=True)(*tensors), tensors)
        torch.testing.assert_close(got, torch.autograd.grad(step(*tensors), tensors))

    def test_export_keeps_the_op(self):
        name, op = self.name, self.op
        args = self.args((4, 16))
        tensors = tuple(arg for arg in args if isinstance(arg, Tensor))

        class Module(torch.nn.Module):
            def forward(self, *tensors):
                it = iter(tensors)
                return op(*(next(it) if isinstance(arg, Tensor) else arg for arg in args))

        program = torch.export.export(Module(), tensors)
        assert f"fastllm.{name}_fwd" in str(program.graph)
        torch.testing.assert_close(program.module()(*tensors), op(*args))

    def test_cpu_autocast_leaves_it_alone(self):
        with torch.autocast("cpu", torch.bfloat16):
            for dtype in (torch.float32, torch.bfloat16):
                args = self.args((4, 16), dtype)
                out, expected = self.op(*args), self.eager(*args)
                torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)  # also compares dtypes

    @pytest.mark.gpu
    def test_cuda_autocast(self):
        with torch.autocast("cuda", torch.bfloat16):
            for dtype in (torch.float32, torch.bfloat16):
                args = self.args((4, 16), dtype, device="cuda")
                torch.testing.assert_close(self.op(*args), self.eager(*args), rtol=2e-2, atol=2e-2)

    @pytest.mark.gpu
    def test_cuda_graph(self):
        args = self.args((64, 1024), torch.bfloat16, device="cuda")
        expected = self.op(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = self.op(*args)
        graph.replay()
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

    @pytest.mark.gpu
    def test_more_than_2_to_the_31_elements(self):
        """Row strides take the offsets there without the memory for it."""
        base = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
        x = base.as_strided((3, 1024), (2**30, 1))
        x.normal_()
        args = self.args((3, 1024), torch.bfloat16, device="cuda")
        strided = (x, *args[1:])
        torch.testing.assert_close(self.op(*strided), self.op(x.contiguous(), *args[1:]), rtol=0, atol=0)

    # What it refuses

    def hostile(self):
        x = torch.randn(4, 8)
        more = (x,) * self.added
        yield (x, *more, (7,)), ValueError, r"input must have shape \(\*, 7,\), got \(4, 8\)"
        yield (x, *more, (2, 4, 8)), ValueError, r"got \(4, 8\)"
        yield (x, *more, ()), ValueError, r"at least one dimension, got \(\)"
        yield (x, *more, 8), TypeError, "tuple of ints, got 8"
        yield (x, *more, (8,), torch.randn(9)), ValueError, r"weight must have shape \(8,\), got \(9,\)"
        yield (x, *more, (8,), torch.randn(8, 1)), ValueError, r"weight must have shape \(8,\), got \(8, 1\)"
        yield (
            (x, *more, (8,), torch.ones(8, dtype=torch.int64)),
            TypeError,
            "weight must be float32, bfloat16, float16 or float64, got torch.int64",
        )
        yield (x, *more, (8,), 1.0), TypeError, "weight must be a tensor or None, got float"
        yield (x, *more, (8,), torch.randn(8, device="meta")), ValueError, "input is on cpu, weight on meta"
        yield (x.int(), *more, (8,)), TypeError, "or float64, got torch.int32"
        yield (x.to(torch.complex64), *more, (8,)), TypeError, "or float64, got torch.complex64"
        yield ([1.0], *more, (8,)), TypeError, "input must be a tensor, got list"
        if self.biased:
            yield (x, *more, (8,), None, torch.randn(3)), ValueError, r"bias must have shape \(8,\), got \(3,\)"
        if self.added:
            yield (x, torch.randn(1, 8), (8,)), ValueError, r"residual must have shape \(4, 8\), got \(1, 8\)"
            yield (x, torch.ones(4, 8).int(), (8,)), TypeError, "residual must be float32.* got torch.int32"
            yield (x, x.to("meta"), (8,)), ValueError, "input is on cpu, residual on meta"
            yield (x, None, (8,)), TypeError, "residual must be a tensor, got NoneType"

    def test_hostile_arguments(self):
        for args, error, message in self.hostile():
            with pytest.raises(error, match=f"^{self.name}: .*{message}"):
                self.op(*args)

    @bindings.needs_kernels
    @pytest.mark.parametrize("binding", bindings.NAMES)
    def test_direct_calls_cannot_reach_foreign_memory(self, binding):
        """torch.ops.fastllm.* takes anything that fits the schema."""
        with bindings.bound(binding) as device:
            for direction in ("fwd", "bwd"):
                args = self.raw_args(f"{self.name}_{direction}")[0]
                args = tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args)
                op = OPS[f"{self.name}_{direction}"]
                main = 0 if direction == "fwd" else 1 + self.added  # x, or what takes its place
                for position, arg in enumerate(args):
                    if isinstance(arg, Tensor) and position != main:
                        short = arg[..., :-1].contiguous()
                        with pytest.raises(RuntimeError, match="must fit x in shape, dtype and device"):
                            op.call(*args[:position], short, *args[position + 1 :])

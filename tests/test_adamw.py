"""fastllm.ops.adamw: every kernel against the reference, bit for bit."""

from __future__ import annotations

import contextlib
import functools
import math

import bindings
import pytest
import torch
from adamw_suite import HYPER, State, assert_same, beside_the_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.adamw import adamw as torch_adamw

import fastllm
from fastllm import _ext, ops
from fastllm.ops.adamw import TABLE_GRAD, dequantize, grad_norm, join, make_table, quantize, split, step_op, table_step
from fastllm.ops.adamw import _norm as norm_op
from fastllm.reference import adamw as reference
from fastllm.testing import LAYOUTS, make


def compare(binding: str, steps: int = 3, **options) -> None:
    with bindings.bound(binding) as device:
        got, expected = beside_the_reference(device, steps, **options)
    assert_same(got, expected, binding)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "float32 moments": {"moment_dtype": torch.float32},
    "8-bit moments": {"moment_dtype": torch.uint8},
    "float32 master": {"master": "float32", "moment_dtype": torch.float32},
    "remainder": {"master": "remainder", "moment_dtype": torch.float32},
    "remainder, 8-bit": {"master": "remainder", "moment_dtype": torch.uint8},
    "stochastic": {"stochastic_rounding": True, "seed": 2**40 + 7},
    "grad_scale": {"grad_scale": 3.0},
    "late": {"step": 1e5},
}


# A remainder is what rounding to bfloat16 takes from float32.
CASES = [(d, o) for d in DTYPES for o in OPTIONS if "remainder" not in o or d == torch.bfloat16]


@pytest.mark.parametrize(("dtype", "option"), CASES, ids=str)
@pytest.mark.parametrize("binding", bindings.NAMES)
def test_kernels_equal_the_reference(binding, dtype, option):
    compare(binding, dtype=dtype, **OPTIONS[option])


@pytest.mark.parametrize("binding", bindings.NAMES)
def test_mixed_dtypes(binding):
    compare(binding, dtype=torch.bfloat16, grad_dtype=torch.float32, moment_dtype=torch.float32)
    compare(binding, dtype=torch.float32, moment_dtype=torch.bfloat16)
    with bindings.bound(binding) as device:
        mixes = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
        states = [State(dtype, moment_dtype=moment, device=device) for dtype, moment in mixes]
        whole, apart = State(torch.float32, device=device), [State(d, moment_dtype=m, device=device) for d, m in mixes]
        for name in ("params", "steps"):
            setattr(whole, name, [x for s in states for x in getattr(s, name)])
        whole.moments = [[x for s in states for x in s.moments[k]] for k in range(2)]
        whole.step([g for s in states for g in s.grads(1)])
        for one, state in zip(apart, states, strict=True):
            one.step(one.grads(1))
            assert_same(state, one)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("binding", bindings.NAMES)
def test_layouts(binding, layout):
    """Parameters and gradients with other strides than the moments have, or none that fill memory."""
    with bindings.bound(binding) as device:
        for param_layout in {layout, "contiguous"} - {"expanded", "scalar"}:
            shape = (6, 5, 130)
            param = make(shape, torch.float32, device, 1, param_layout)
            plain = param.clone(memory_format=torch.contiguous_format)
            grad = make(shape, torch.float32, device, 2, layout)
            got, expected = [torch.zeros_like(param) for _ in range(2)], [torch.zeros_like(plain) for _ in range(2)]
            steps = [torch.zeros((), device=device) for _ in range(2)]
            ops.adamw([param], [grad], [got[0]], [got[1]], [], [steps[0]], **HYPER)
            ops.adamw([plain], [grad.contiguous()], [expected[0]], [expected[1]], [], [steps[1]], **HYPER)
            for a, b in zip((param, *got), (plain, *expected), strict=True):
                assert torch.equal(a, b)
            if layout not in ("expanded", "scalar"):
                ops.adamw(
                    [param],
                    [grad],
                    [got[0]],
                    [got[1]],
                    [],
                    [steps[0]],
                    grad_scale=torch.tensor(2.0, device=device),
                    **HYPER,
                )
                assert torch.equal(grad, make(shape, torch.float32, device, 2, layout) / 2), (
                    "written back through strides"
                )


@pytest.mark.parametrize("offsets", [(1, 0, 0, 0), (0, 3, 0, 1), (1, 1, 1, 1), (5, 2, 7, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("binding", bindings.NAMES)
def test_misaligned(binding, dtype, offsets):
    n = 1003
    with bindings.bound(binding) as device:
        base = [make((n + 16,), torch.float32, device, i).abs().to(dtype) for i in range(4)]
        got = [x[offset : offset + n] for x, offset in zip(base, offsets, strict=True)]
        around = [(x[:offset].clone(), x[offset + n :].clone()) for x, offset in zip(base, offsets, strict=True)]
        expected = [x.clone() for x in got]
        for p, g, m, v in (got, expected):
            ops.adamw([p], [g], [m], [v], [], [torch.tensor(3.0, device=device)], **HYPER)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        for x, offset, (before, after) in zip(base, offsets, around, strict=True):
            assert torch.equal(x[:offset], before)
            assert torch.equal(x[offset + n :], after)


@pytest.mark.parametrize("binding", bindings.NAMES)
def test_thousands_of_tensors(binding):
    """More than one launch holds, of the step and of what comes before it."""
    compare(binding, dtype=torch.float32, shapes=[(1 + i % 9,) for i in range(2500)], steps=2)
    compare(binding, dtype=torch.float32, shapes=[(1 + i % 9,) for i in range(700)], moment_dtype=torch.uint8, steps=2)


@pytest.mark.parametrize("options", [{}, {"master": "remainder", "moment_dtype": torch.uint8}], ids=str)
@pytest.mark.parametrize("binding", bindings.NAMES)
def test_a_table_does_what_the_lists_do(binding, options):
    scalars = (None, None, None, None)
    hyper = (*HYPER.values(), 0.0, False, False, 0)
    with bindings.bound(binding) as device:
        call, call_step = make_table, table_step
        if binding == "cuda-emulated":
            key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
            call = functools.partial(make_table.redispatch, key)
            call_step = functools.partial(table_step.redispatch, key)
        got, expected = (State(torch.bfloat16, device=device, **options) for _ in range(2))
        grads = got.grads(0)
        lists = (got.params, grads, *got.moments, got.largest, got.steps, got.masters, *got.scales)
        rows = call(*lists, [], True)
        assert rows.shape[0] == len(got.params)
        for seed in range(3):
            for grad, new in zip(grads, got.grads(seed), strict=True):
                grad.copy_(new)
            call_step(got.params[0], rows, *scalars, False, *hyper)
            expected.step(expected.grads(seed))
        assert_same(got, expected)
        # A gradient elsewhere: its column.
        moved = [g.clone() for g in got.grads(3)]
        rows[:, TABLE_GRAD] = torch.tensor([g.data_ptr() for g in moved])
        call_step(got.params[0], rows, *scalars, False, *hyper)
        expected.step(expected.grads(3))
        assert_same(got, expected)
        # No table for what has to be copied first.
        strided = [make(p.shape, p.dtype, device, layout="strided") if p.numel() > 1 else p for p in got.params]
        assert call(strided, *lists[1:], [], True).shape[0] == 0


@bindings.needs_kernels
def test_a_table_step_refuses_other_tensors():
    param = torch.zeros(3)
    for rows in (torch.zeros(1, 11), torch.zeros(1, 12, dtype=torch.long), torch.zeros(11, dtype=torch.long)):
        with pytest.raises(RuntimeError, match="not a table"):
            table_step(param, rows, None, None, None, None, False, *HYPER.values(), 0.0, False, False, 0)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_emulated_result_does_not_depend_on_the_order_of_threads(order):
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        with bindings.bound("cuda-emulated"):
            bindings.emulation().emulation_set_order(order)
            state = State(dtype, moment_dtype=torch.uint8)
            norm = grad_norm(state.grads(0))
            state.step(state.grads(0), grad_norm=norm, max_norm=1.0)
            results.append(state)
            bindings.emulation().emulation_set_order(0)
            plain = State(dtype, moment_dtype=torch.uint8)
            assert torch.equal(norm, grad_norm(plain.grads(0)))
            plain.step(plain.grads(0), grad_norm=norm, max_norm=1.0)
        assert_same(state, plain)


@bindings.needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_the_result_does_not_depend_on_the_number_of_threads(threads):
    before = torch.get_num_threads()
    states, norms = [], []
    for count in (threads, 2):
        torch.set_num_threads(count)
        try:
            state = State(torch.bfloat16, shapes=[(300_001,), (7,)])
            grads = state.grads(0)
            norms.append(grad_norm(grads))
            state.step(grads, grad_norm=norms[-1], max_norm=1.0, stochastic_rounding=True)
            states.append(state)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*norms)
    assert_same(*states)


@pytest.mark.parametrize("binding", bindings.NAMES)
def test_tensors_on_the_device_decide(binding):
    with bindings.bound(binding) as device:

        def scalar(x: float) -> torch.Tensor:
            return torch.tensor(x, device=device)

        state, untouched = State(torch.float32, device=device), State(torch.float32, device=device)
        grads = state.grads(0)
        state.step(grads, found_inf=scalar(1.0), grad_scale=scalar(2.0))
        assert_same(state, untouched)
        assert torch.equal(grads[0], untouched.grads(0)[0]), "gradients stay as they are when a step is skipped"
        # lr as a tensor of float32 is that float32.
        state.step(grads, lr=scalar(1e-2), found_inf=scalar(0.0))
        untouched.step(grads, lr=scalar(1e-2).item())
        assert_same(state, untouched)


@pytest.mark.parametrize("binding", bindings.NAMES)
def test_clipping(binding):
    with bindings.bound(binding) as device:
        for dtype in DTYPES:
            state, scaled = State(dtype, device=device), State(dtype, device=device)
            grads = state.grads(0)
            norm = grad_norm(grads)
            truth = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
            assert abs(float(norm) - truth) <= 4e-7 * truth
            factor = float(0.25 * norm)
            state.step(grads, grad_norm=norm, max_norm=factor)
            clip = torch.tensor(factor, dtype=torch.float32) / (norm.cpu() + 1e-6)
            scaled.grad_dtype = torch.float32
            scaled_grads = [g.float() * float(clip) for g in grads]
            with fastllm.use_backend("reference"):
                scaled.step(scaled_grads)
            assert_same(state, scaled, binding)
            # A norm below the limit changes nothing.
            free, plain = State(dtype, device=device), State(dtype, device=device)
            free.step(grads, grad_norm=norm, max_norm=1e6)
            plain.step(grads)
            assert_same(free, plain)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("binding", bindings.NAMES)
def test_gradients_that_are_not_finite(binding, value):
    """As clip_grad_norm_ and the stock step: an infinite norm clips to zero, and to NaN where the infinity is."""
    with bindings.bound(binding) as device:
        state = State(torch.float32, shapes=[(300,)], device=device)
        grads = state.grads(0)
        grads[0][17] = value
        norm = grad_norm(grads)
        assert math.isinf(norm) if math.isinf(value) else math.isnan(norm)
        state.step(grads, grad_norm=norm, max_norm=1.0)
        bad = state.params[0].isnan()
        assert bool(bad[17])
        assert int(bad.sum()) == (1 if math.isinf(value) else 300)


@pytest.mark.parametrize("binding", bindings.NAMES)
def test_nan_and_infinite_parameters(binding):
    for options in ({}, {"master": "remainder"}, {"master": "float32"}, {"stochastic_rounding": True}):
        options = dict(options)
        kwargs = {key: options.pop(key) for key in ("stochastic_rounding",) if key in options}
        with bindings.bound(binding) as device:
            got, expected = (State(torch.bfloat16, shapes=[(300,)], device=d, **options) for d in (device, "cpu"))
            for state in (got, expected):
                for x in (state.params[0], *(m for m in state.masters if m.dtype == torch.float32)):
                    x[:4] = torch.tensor([math.nan, math.inf, -math.inf, 3.3e38])
            grads = expected.grads(0)
            got.step([g.to(device) for g in grads], **kwargs)
            with fastllm.use_backend("reference"):
                expected.step(grads, **kwargs)
        assert_same(got, expected, binding)
        assert got.params[0][:3].isnan().tolist() == [True, False, False]


# 16-bit weights


def test_join_and_split_are_exact():
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int64).to(torch.int32)
    bits[:6] = torch.tensor(
        [0, -(2**31), 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000]
    )  # ties, the largest, subnormal
    x = bits.view(torch.float32)
    x = x[~x.isnan()]
    weight, remainder = split(x)
    assert torch.equal(join(weight, remainder).view(torch.int32), x.view(torch.int32))
    # To nearest: as PyTorch rounds, but for ties.
    ties = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~ties], x[~ties].bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(dtype):
    """10,000 steps, each a fiftieth of the last bit: nearest rounding would never move."""
    n, steps = 2048, 10_000
    last_bit = 2**-7 if dtype == torch.bfloat16 else 2**-10
    lr = last_bit / 50
    param = torch.ones(n, dtype=dtype)
    m, v = torch.zeros(n, dtype=torch.float32), torch.zeros(n, dtype=torch.float32)
    step, grad = torch.zeros(()), torch.full((n,), -1.0, dtype=dtype)
    hyper = {"lr": lr, "beta1": 0.0, "beta2": 0.0, "weight_decay": 0.0, "eps": 0.0}
    stuck = param.clone()
    for _ in range(3):
        ops.adamw([stuck], [grad], [m.clone()], [v.clone()], [], [torch.zeros(())], **hyper)
    assert torch.equal(stuck, torch.ones_like(stuck))
    # Stays below 2, where the last bit would double: 50 steps make one bit.
    bits = 1 / last_bit
    taken = min(steps, int(50 * bits * 0.75))
    for _ in range(taken):
        ops.adamw([param], [grad], [m], [v], [], [step], stochastic_rounding=True, seed=5, **hyper)
    for i in range(steps - taken):  # and back and forth, on the spot
        ops.adamw([param], [grad if i % 2 else -grad], [m], [v], [], [step], stochastic_rounding=True, seed=6, **hyper)
    expected = 1 + taken * lr - ((steps - taken) % 2) * lr
    # A step moves by a bit with probability 1/50: its variance is below bit^2 / 50.
    deviation = last_bit * math.sqrt(steps / 50) / math.sqrt(n)
    assert abs(float(param.double().mean()) - expected) < 4 * deviation


def test_stochastic_rounding_draws_what_it_is_keyed_on():
    def run(seed: int = 1, index: int = 0, step: float = 0.0) -> torch.Tensor:
        param, grad = make((1000,), torch.bfloat16), make((1000,), torch.bfloat16, seed=1)
        moments = [torch.zeros(1000) for _ in range(2)]
        step_tensor = torch.tensor(step)
        hyper = {**HYPER, "beta1": 0.0, "beta2": 0.0}
        ops.adamw(
            [param],
            [grad],
            [moments[0]],
            [moments[1]],
            [],
            [step_tensor],
            stochastic_rounding=True,
            seed=seed,
            indices=[index],
            **hyper,
        )
        return param

    first = run()
    assert torch.equal(first, run())
    for other in (run(seed=2), run(seed=1 + 2**32), run(index=1), run(step=1.0)):
        assert 0.02 < float((first != other).float().mean()) < 0.98


def test_rounding_probabilities():
    """Over all 2^16 random words, a number between two of 16 bits goes up as often as its distance says."""
    random = torch.arange(2**16)
    for fraction in (1, 1000, 0x7FFF, 0x8000, 0xFFFF):
        x = torch.full((2**16,), 0x3F800000 + fraction, dtype=torch.int32).view(torch.float32)
        up = reference.round_bfloat16(x, random) > 1
        assert int(up.sum()) == fraction
        x = -torch.full((2**16,), 0x3F800000 + (fraction >> 3), dtype=torch.int32).view(torch.float32)
        up = reference.round_half(x, random) < -1
        assert int(up.sum()) == (fraction >> 3) * 8
        tiny = torch.full((2**16,), 2.0**-24 * (3 + fraction / 2**16), dtype=torch.float32)
        up = reference.round_half(tiny, random).float() > 3.5 * 2.0**-24
        assert abs(int(up.sum()) - fraction) <= 1
    assert reference.round_half(torch.tensor([65520.0, -1e9, math.inf, math.nan]), torch.full((4,), 0xFFFF)).tolist()[
        :3
    ] == [math.inf, -math.inf, math.inf]


# 8-bit moments


def dynamic_code(signed: bool) -> torch.Tensor:
    """The code by its definition: seven decades, cut into 1, 2, 4, ... equal parts (twice as many without a sign)."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        values += middles.tolist() + ([-x for x in middles.tolist()] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float64)


@pytest.mark.parametrize("signed", [True, False])
def test_the_8_bit_code(signed):
    every = torch.arange(256, dtype=torch.uint8)
    values = reference.decode(every, torch.ones(1), signed)
    torch.testing.assert_close(values.double().sort().values, dynamic_code(signed), rtol=1e-6, atol=0)
    # Each value's own code is what it is coded as (in a block whose largest is 1).
    codes, scale = reference.encode(values, signed)
    assert torch.equal(codes, every)
    assert scale.tolist() == [1.0]
    # Anything else is coded as what its part stands for: off by no more than half a part.
    x = torch.cat([10 ** torch.linspace(-7, 0, 100_000), torch.ones(1)])
    x = torch.cat([x, -x]) if signed else x
    code, scale = quantize(x, signed)
    error = (dequantize(code, scale, signed) - x).abs()
    blocks = x.view(-1)[: len(x) // 256 * 256].view(-1, 256)
    largest = blocks.abs().amax(1).repeat_interleave(256)
    relative = error[: len(largest)] / largest
    assert float(relative.max()) <= 0.45 / (64 if signed else 128) + 1e-6
    assert int((code == 0).sum()) == 0 or signed, "a second moment that is not zero is never coded as zero"


@pytest.mark.parametrize("size", [2.0**-70, 2.0**-45, 2.0**-36, 1.0, 2.0**40, 2.0**60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("binding", bindings.NAMES)
def test_8_bit_moments_of_any_size(binding, dtype, size):
    """Of gradients of eleven decades; blocks of zeros, infinities and NaN; a ragged end."""
    with bindings.bound(binding) as device:
        got, expected = (
            State(dtype, shapes=[(256 * 9 + 37,)], moment_dtype=torch.uint8, device=d) for d in (device, "cpu")
        )
        for step in range(3):
            spread = 10 ** torch.linspace(-11, 0, 256 * 9 + 37)[torch.randperm(256 * 9 + 37)]
            grads = [(g.float() * spread * size).to(dtype) for g in expected.grads(step)]
            grads[0][:300] = 0.0
            if step == 2:
                grads[0][600], grads[0][1000], grads[0][-1] = math.inf, math.nan, -math.inf
            got.step([g.to(device) for g in grads])
            with fastllm.use_backend("reference"):
                expected.step(grads)
    assert_same(got, expected, binding)


def test_quantize_keeps_the_order_of_memory():
    x = make((3, 5, 7), torch.float32, layout="transposed")
    code, scale = quantize(x, True)
    assert code.stride() == x.stride()
    assert torch.equal(dequantize(code, scale, True).sign()[x.abs() > 0.1], x.sign()[x.abs() > 0.1])


# Contract


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    moment=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
)
@settings(max_examples=30, deadline=None)
def test_any_shapes(shapes, dtype, moment):
    compare(
        "cpu-" + bindings.ISAS[-1] if bindings.ISAS else "cuda-emulated",
        dtype=dtype,
        shapes=shapes,
        moment_dtype=moment,
        steps=2,
    )


def test_float64_runs_on_the_reference():
    state, stock = State(torch.float64), State(torch.float64)
    assert (
        fastllm.explain(ops.adamw, state.params, state.grads(0), *state.moments, [], state.steps, **HYPER).backend
        == "reference"
    )
    for seed in range(3):
        grads = state.grads(seed)
        with pytest.warns(fastllm.FallbackWarning) if seed == 0 else contextlib.nullcontext():
            step_op._warned.clear() if seed == 0 else None
            state.step(grads)
        torch_adamw(
            stock.params, grads, *stock.moments, [], stock.steps, amsgrad=False, maximize=False, foreach=False, **HYPER
        )
    for a, b in zip(state.params, stock.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    assert grad_norm(state.grads(0)).dtype == torch.float64


def test_opcheck():
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"master": "remainder", "moment_dtype": torch.uint8})):
        state = State(dtype, shapes=[(5, 3), (7,)], **options)
        lists = (state.params, state.grads(0), *state.moments, state.largest, state.steps, state.masters, *state.scales)
        scalars = (
            torch.tensor(1.0),
            torch.tensor(2.0),
            torch.tensor(0.0),
            None,
            [],
            *HYPER.values(),
            1.0,
            False,
            False,
            0,
        )
        torch.library.opcheck(step_op.call, (*lists, *scalars))
        torch.library.opcheck(norm_op.call, (state.grads(0),))


def test_compile_fullgraph():
    got, expected = State(torch.float32, shapes=[(5, 3), (7,)]), State(torch.float32, shapes=[(5, 3), (7,)])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(params, grads, m, v, steps):
        ops.adamw(params, grads, m, v, [], steps, **HYPER)
        return grad_norm(grads)

    grads = got.grads(0)
    norm = step(got.params, grads, *got.moments, got.steps)
    expected.step(grads)
    assert_same(got, expected)
    assert torch.equal(norm, grad_norm(grads))


def test_explain():
    state = State(torch.float32, shapes=[(5,)])
    lines = fastllm.explain("adamw", state.params, state.grads(0), *state.moments, [], state.steps, **HYPER)
    assert [line.backend for line in lines] == ["cuda", "cpu", "reference"]
    assert lines.backend == ("cpu" if _ext.C is not None else "reference")
    assert torch.equal(state.params[0], State(torch.float32, shapes=[(5,)]).params[0]), "explain computes nothing"


def test_forced_backend_raises():
    state = State(torch.float64, shapes=[(5,)])
    with fastllm.use_backend("cpu"), pytest.raises(fastllm.BackendUnavailable, match=r"float64|no C\+\+ compiler"):
        state.step(state.grads(0))


def bad(match: str, error: type[Exception] = ValueError, **changes):
    return pytest.param(match, error, changes, id=match[:40])


@pytest.mark.parametrize(
    ("match", "error", "changes"),
    [
        bad("grads has 1 entries for 2 parameters", grads=lambda s: s.grads(0)[:1]),
        bad("state_steps has 0 entries", steps=lambda s: []),
        bad(r"grads\[1\] must have shape \(7,\), got \(6,\)", grads=lambda s: [s.grads(0)[0], torch.zeros(6)]),
        bad(r"exp_avgs\[0\] must have shape", m=lambda s: [torch.zeros(3, 5), torch.zeros(7)]),
        bad(
            r"grads\[0\] cannot be torch.int64",
            TypeError,
            grads=lambda s: [torch.zeros(5, 3, dtype=torch.long), s.grads(0)[1]],
        ),
        bad(r"exp_avg_sqs\[0\] cannot be torch.bfloat16", TypeError, v=lambda s: [x.bfloat16() for x in s.moments[1]]),
        bad("moments of 8 bits need exp_avg_scales", m=lambda s: [x.to(torch.uint8) for x in s.moments[0]]),
        bad(r"state_steps\[0\] must be one float32, got torch.float64", steps=lambda s: [x.double() for x in s.steps]),
        bad(
            r"params\[0\] must be float32, bfloat16, float16 or float64, got torch.int32",
            TypeError,
            params=lambda s: [x.int() for x in s.params],
        ),
        bad(
            r"params\[0\] must be .* got torch.float8_e4m3fn",
            TypeError,
            params=lambda s: [x.to(torch.float8_e4m3fn) for x in s.params],
        ),
        bad(
            r"grads\[1\] cannot be torch.float8_e5m2 for a parameter of torch.float32",
            TypeError,
            grads=lambda s: [s.grads(0)[0], s.grads(0)[1].to(torch.float8_e5m2)],
        ),
        bad(r"grads\[0\] must be on cpu, got meta", grads=lambda s: [g.to("meta") for g in s.grads(0)]),
        bad("params must be a list of tensors, got one", TypeError, params=lambda s: s.params[0]),
        bad(r"grads\[1\] must be a tensor, got NoneType", TypeError, grads=lambda s: [s.grads(0)[0], None]),
        bad(r"state_steps\[0\] must be a tensor, got float", TypeError, steps=lambda s: [0.0, 0.0]),
        bad(
            r"params\[1\] is expanded: its elements share memory, strides \(0,\)",
            params=lambda s: [s.params[0], torch.zeros(1).expand(7)],
        ),
    ],
)
def test_bad_tensors(match, error, changes):
    s = State(torch.float32, shapes=[(5, 3), (7,)])
    given = {
        "params": s.params,
        "grads": s.grads(0),
        "m": s.moments[0],
        "v": s.moments[1],
        "largest": [],
        "steps": s.steps,
    }
    given |= {name: change(s) for name, change in changes.items()}
    with pytest.raises(error, match=match):
        ops.adamw(*given.values(), **HYPER)


@pytest.mark.parametrize("binding", bindings.NAMES)
def test_an_expanded_gradient_is_read_but_not_written(binding):
    with bindings.bound(binding) as device:
        param, plain = (make((40, 30), torch.float32, device) for _ in range(2))
        grad = make((1, 30), torch.float32, device, seed=1).expand(40, 30)
        moments = [[torch.zeros_like(param) for _ in range(2)] for _ in range(2)]
        steps = [torch.zeros((), device=device) for _ in range(2)]
        ops.adamw([param], [grad], [moments[0][0]], [moments[0][1]], [], [steps[0]], **HYPER)
        ops.adamw([plain], [grad.contiguous()], [moments[1][0]], [moments[1][1]], [], [steps[1]], **HYPER)
        assert torch.equal(param, plain)
        scale = torch.tensor(2.0, device=device)
        with pytest.raises(RuntimeError, match="its elements share memory"):
            ops.adamw([param], [grad], [moments[0][0]], [moments[0][1]], [], [steps[0]], grad_scale=scale, **HYPER)
        assert torch.equal(param, plain), "nothing was done"


@bindings.needs_kernels
def test_8_bit_moments_in_another_order_are_refused():
    """Their scales belong to blocks in the order of memory. A gradient in another order is read in the parameter's."""

    def step(param: torch.Tensor, grad: torch.Tensor, codes: list[torch.Tensor]) -> None:
        scales = {f"{name}_scales": [torch.zeros(1)] for name in ("exp_avg", "exp_avg_sq")}
        ops.adamw([param], [grad], [codes[0]], [codes[1]], [], [torch.zeros(())], **scales, **HYPER)

    shape = (2, 3, 4, 5)
    param = make(shape, torch.float32).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="lie in another order"):
        step(param, param, [torch.zeros(shape, dtype=torch.uint8) for _ in range(2)])
    codes = [torch.zeros_like(param, dtype=torch.uint8) for _ in range(2)]
    with pytest.raises(RuntimeError, match="lie in another order"):
        step(param.contiguous(), param, codes)
    other, other_codes, grad = param.clone(), [c.clone() for c in codes], make(shape, torch.float32, seed=1)
    step(param, grad, codes)
    step(other, grad.to(memory_format=torch.channels_last), other_codes)
    for a, b in zip((param, *codes), (other, *other_codes), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, "lr must be finite and not negative, got -1.0", {"lr": -1.0}),
        (ValueError, r"lr must be a number or have one element, got shape \(2,\)", {"lr": torch.zeros(2)}),
        (ValueError, "beta1 must be in", {"beta1": 1.0}),
        (ValueError, "beta2 must be in .*, got -0.5", {"beta2": -0.5}),
        (ValueError, "eps must be finite and not negative, got nan", {"eps": math.nan}),
        (ValueError, "weight_decay must be finite and not negative, got inf", {"weight_decay": math.inf}),
        (TypeError, "seed must be an int, got float", {"seed": 0.5}),
    ],
)
def test_bad_numbers(error, match, changes):
    s = State(torch.float32, shapes=[(5,)])
    before = s.params[0].clone()
    with pytest.raises(error, match=match):
        ops.adamw(s.params, s.grads(0), *s.moments, [], s.steps, **{**HYPER, **changes})
    assert torch.equal(s.params[0], before)


def test_bad_scalars_and_masters():
    s = State(torch.float16, shapes=[(5,)])
    with pytest.raises(ValueError, match=r"found_inf must have one element, got shape \(2,\)"):
        s.step(s.grads(0), found_inf=torch.zeros(2))
    s.masters = [torch.zeros(5, dtype=torch.int16)]
    with pytest.raises(TypeError, match=r"masters\[0\] cannot be torch.int16 for a parameter of torch.float16"):
        s.step(s.grads(0))


@bindings.needs_kernels
@pytest.mark.parametrize("which", range(9))
def test_a_direct_call_with_lists_that_do_not_fit_is_an_error(which):
    """The compiled op itself must touch no memory that is not its own."""
    s = State(torch.bfloat16, shapes=[(600,), (7,)], master="float32", moment_dtype=torch.uint8)
    lists = [s.params, s.grads(0), *s.moments, [], s.steps, s.masters, *s.scales]
    scalars = (None, None, None, None, [], *HYPER.values(), 0.0, False, False, 0)
    short = list(lists)
    if lists[which]:
        short[which] = lists[which][:1]
        with pytest.raises(RuntimeError, match="adamw"):
            step_op.call(*short, *scalars)
        short[which] = [x.view(-1)[: x.numel() // 2] for x in lists[which]]
        with pytest.raises(RuntimeError, match="adamw"):
            step_op.call(*short, *scalars)


def test_nothing_to_do():
    ops.adamw([], [], [], [], [], [], **HYPER)
    state = State(torch.float32, shapes=[(0, 3)])
    state.step(state.grads(0))
    assert state.steps[0] == 1

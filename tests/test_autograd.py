"""Derivatives however they are asked for: twice, by torch.func, in exported and captured graphs, on fake tensors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from functorch.compile import aot_function, nop
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastllm
from fastllm import backends, nn, ops
from fastllm.testing import make, seeded

pytestmark = pytest.mark.filterwarnings("ignore::fastllm.FallbackWarning")


class Case(NamedTuple):
    """A call of an op as a function of the tensors that get gradients, of these shapes; `once` if its backward
    overwrites what another would need."""

    call: Callable
    shapes: tuple[tuple[int, ...], ...]
    once: bool = False
    in_place: bool = False  # vmap does not write what is batched into what is not

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [make(shape, seed=seed).to(dtype).requires_grad_() for seed, shape in enumerate(self.shapes)]

    def loss(self, *tensors: Tensor) -> Tensor:
        """A scalar whose gradient with respect to each output depends on it."""
        torch.manual_seed(0)
        return self.of(self.call(*tensors))

    @staticmethod
    def of(found: Tensor | Sequence[Tensor]) -> Tensor:
        return sum(x.sin().sum() for x in ((found,) if isinstance(found, Tensor) else found))


def norm(op: Callable, rows: tuple[int, ...] = (3, 5), **options) -> Case:
    activations = 2 if "add_" in op.__name__ else 1
    parameters = 2 if "layer" in op.__name__ else 1

    def call(*tensors: Tensor):
        return op(*tensors[:activations], tensors[-1].shape, *tensors[activations:], **options)

    return Case(call, ((*rows, 6),) * activations + ((6,),) * parameters)


TARGET = torch.tensor([2, -100, 0, 5])
COS, SIN = (f(make((8, 2), torch.float64)) for f in (torch.cos, torch.sin))
LENGTHS = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
LOSSES = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}
HEADS = ((1, 4, 5, 6), (1, 2, 7, 6), (1, 2, 7, 3))


def attention(**options) -> Callable:
    return functools.partial(ops.attention, enable_gqa=True, **options)


def varlen(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor):
    extras = {"sinks": sinks[0]} if sinks else {}
    return ops.attention_varlen(
        q, k, v, LENGTHS, LENGTHS, 4, 4, is_causal=True, enable_gqa=True, return_lse=True, **extras
    )


def rotary(q: Tensor, k: Tensor, **options):
    tables = COS.to(torch.promote_types(q.dtype, torch.float32)), SIN.to(torch.promote_types(q.dtype, torch.float32))
    return ops.rotary(q, k, *tables, **options)


CASES = {
    **{name: norm(getattr(ops, name)) for name in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")},
    "layer_norm of a vector": norm(ops.layer_norm, ()),
    "dropout_add_layer_norm": norm(ops.dropout_add_layer_norm, p=0.4),
    "dropout_add_rms_norm": norm(ops.dropout_add_rms_norm, p=0.4),
    "swiglu": Case(ops.swiglu, ((2, 5), (2, 5))),
    "swiglu packed": Case(ops.swiglu, ((2, 6),)),
    "geglu": Case(ops.geglu, ((2, 5), (2, 5))),
    "geglu exact, packed": Case(functools.partial(ops.geglu, approximate="none"), ((2, 6),)),
    "gelu": Case(lambda x, bias: ops.gelu(x, bias=bias), ((2, 5), (5,))),
    "gelu tanh, alone": Case(functools.partial(ops.gelu, approximate="tanh"), ((2, 5),)),
    "rotary": Case(rotary, ((1, 2, 3, 6), (1, 1, 3, 6))),
    "rotary with positions": Case(
        functools.partial(rotary, position_ids=torch.tensor([7, 0, 4]), interleaved=True), ((1, 2, 3, 6), (1, 1, 3, 6))
    ),
    "rotary in place": Case(
        lambda q, k: rotary(q * 1, k * 1, inplace=True), ((1, 2, 3, 6), (1, 1, 3, 6)), in_place=True
    ),
    "cross_entropy": Case(lambda x: ops.cross_entropy(x, TARGET), ((4, 7),)),
    "cross_entropy in place": Case(lambda x: ops.cross_entropy(x * 1, TARGET, inplace=True), ((4, 7),), True),
    "cross_entropy, all options": Case(lambda x: ops.cross_entropy(x, TARGET, reduction="none", **LOSSES), ((4, 7),)),
    "cross_entropy of probabilities": Case(lambda x, p: ops.cross_entropy(x, p.softmax(-1)), ((4, 7), (4, 7))),
    "cross_entropy, class weights": Case(
        lambda x: ops.cross_entropy(x, TARGET, torch.linspace(0.5, 2, 7).to(x.dtype)), ((4, 7),)
    ),
    "linear_cross_entropy": Case(lambda x, w: ops.linear_cross_entropy(x, w, TARGET), ((4, 3), (7, 3))),
    "linear_cross_entropy, all options": Case(
        lambda x, w, b: ops.linear_cross_entropy(x, w, TARGET, linear_bias=b, chunk_size=2, **LOSSES),
        ((4, 3), (7, 3), (7,)),
    ),
    "linear_cross_entropy, rows": Case(
        lambda x, w, b: ops.linear_cross_entropy(x, w, TARGET, linear_bias=b, reduction="none", return_logprobs=True),
        ((4, 3), (7, 3), (7,)),
    ),
    "attention, lse": Case(attention(is_causal=True, return_lse=True), HEADS),
    "attention, softcap": Case(attention(softcap=2.0, window_size=(2, 1)), HEADS),
    "attention, blind rows": Case(
        attention(attn_mask=torch.tensor([True] * 4 + [False])[:, None], softcap=2.0, causal_align="bottom_right"),
        HEADS,
    ),
    "attention, dropout and ALiBi": Case(attention(dropout_p=0.3, alibi_slopes=torch.linspace(0.1, 1, 4)), HEADS),
    "attention, mask and sinks": Case(
        lambda q, k, v, mask, sinks: ops.attention(q, k, v, mask, enable_gqa=True, sinks=sinks),
        (*HEADS, (5, 7), (4,)),
    ),
    "attention_varlen": Case(varlen, ((9, 4, 6), (9, 2, 6), (9, 2, 3), (4,))),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_every_op_with_a_gradient_is_here():
    without = {"adamw", "attention_kvcache"}
    assert {name.replace(",", " ").split()[0] for name in CASES} == set(ops.__all__) - without


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.once])
def test_gradients_and_theirs_are_those_of_finite_differences(name):
    inputs, call = CASES[name].inputs(), seeded(CASES[name].call)
    assert gradcheck(call, inputs, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)


@every_case
def test_a_gradient_penalty_on_the_kernels(case):
    """Where the upstream gradient is a constant, too, which autograd by itself would not follow."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        inputs = case.inputs(dtype)
        loss = case.loss(*inputs)
        penalty = sum(grad.square().sum() for grad in torch.autograd.grad(loss, inputs, create_graph=True))
        found[dtype] = torch.autograd.grad(loss + penalty, inputs)
    for ours, truth in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-3, atol=1e-4)


@every_case
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(case, use_reentrant):
    inputs = case.inputs(torch.float32)
    expected = torch.autograd.grad(case.loss(*inputs), inputs)
    case.of(checkpoint(seeded(case.call), *inputs, use_reentrant=use_reentrant)).backward()
    torch.testing.assert_close([x.grad for x in inputs], list(expected))


@every_case
def test_gradients_of_several_upstream_gradients_at_once(case):
    inputs = case.inputs(torch.float32)
    (expected,), scales = [torch.autograd.grad(case.loss(*inputs), inputs)], torch.tensor([1.0, -2.0])
    found = torch.autograd.grad(case.loss(*inputs), inputs, scales, is_grads_batched=True)
    for batch, one in zip(found, expected, strict=True):
        torch.testing.assert_close(batch, torch.stack([one, -2 * one]))


@pytest.mark.parametrize("name", ["attention, softcap", "linear_cross_entropy, all options", "layer_norm"])
def test_autocast_leaves_second_derivatives_alone(name):
    inputs = CASES[name].inputs(torch.bfloat16)

    def second(enabled: bool) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(CASES[name].loss(*inputs), inputs, create_graph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(sum(grad.float().square().sum() for grad in grads), inputs)

    assert all(map(torch.equal, second(True), second(False)))


def test_a_second_derivative_is_announced_and_not_a_kernels():
    backends.warn_again()
    x = make((4, 7)).requires_grad_()
    (grad,) = torch.autograd.grad(ops.cross_entropy(x, TARGET), x, create_graph=True)
    with fastllm.use_backend("cpu"), pytest.raises(fastllm.BackendUnavailable, match="no gradient of a gradient"):
        torch.autograd.grad(grad.sum(), x, retain_graph=True)
    with pytest.warns(fastllm.FallbackWarning, match="cross_entropy_bwd: the gradient of a gradient runs on reference"):
        torch.autograd.grad(grad.sum(), x, retain_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.autograd.grad(grad.sum(), x)


def test_a_compiled_graph_refuses_a_second_derivative():
    x = make((4, 7)).requires_grad_()
    loss = torch.compile(lambda x: ops.cross_entropy(x, TARGET).square(), backend="aot_eager", fullgraph=True)(x)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):  # the latter before torch 2.13
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x: ops.cross_entropy(x, TARGET, **LOSSES),
        lambda x: ops.linear_cross_entropy(x, torch.eye(7, dtype=x.dtype), TARGET, **LOSSES),
        lambda x: ops.linear_cross_entropy(x, torch.eye(7, dtype=x.dtype), TARGET, reduction="none", **LOSSES).sum(),
    ],
)
def test_rows_that_take_no_part_may_hold_anything(loss, dtype):
    """In the gradients' own gradients, too."""
    x = make((4, 7), dtype)
    x[1] = torch.nan  # which TARGET ignores
    x.requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert not grad.isnan().any()
    assert not second.isnan().any()
    assert second[0].any()


# torch.func


@every_case
def test_torch_func(case):
    inputs = [x.detach() for x in case.inputs(torch.float32)]
    indices = tuple(range(len(inputs)))
    expected = torch.autograd.grad(case.loss(*[x.requires_grad_() for x in inputs]), inputs)
    inputs = [x.detach() for x in inputs]
    torch.testing.assert_close(torch.func.grad(case.loss, indices)(*inputs), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match=r"fastllm\.\w+ has no forward-mode derivative"):
        torch.func.jvp(case.call, tuple(inputs), tuple(inputs))


@every_case
def test_gradients_of_each_sample(case):
    batch = 3
    inputs = [torch.stack([make(s, seed=10 * n + i) for i in range(batch)]) for n, s in enumerate(case.shapes)]
    indices = tuple(range(len(inputs)))
    # The last is often a weight, of which each sample has its own gradient.
    for shared in ((), indices[-1:]) if len(indices) > 1 and not case.in_place else ((),):
        dims = tuple(None if i in shared else 0 for i in indices)
        given = [x[0] if i in shared else x for i, x in enumerate(inputs)]
        found = torch.func.vmap(torch.func.grad(case.loss, indices), dims, randomness="same")(*given)
        for b in range(batch):
            row = [x if i in shared else x[b] for i, x in enumerate(given)]
            expected = torch.func.grad(case.loss, indices)(*row)
            torch.testing.assert_close([x[b] for x in found], list(expected), rtol=1e-5, atol=1e-6)


@every_case
def test_what_leaves_a_transformation_is_differentiated_further(case):
    inputs = case.inputs(torch.float32)
    grads = torch.func.vjp(case.loss, *inputs)[1](torch.ones(()))
    found = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)
    grads = torch.autograd.grad(case.loss(*inputs), inputs, create_graph=True)
    expected = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def leaving(x: Tensor) -> Tensor:
        left.append(x * 2)
        return left[0].sum()

    left: list[Tensor] = []
    torch.func.grad(leaving)(inputs[0])
    found = torch.autograd.grad(case.loss(*left, *inputs[1:]), inputs[0])
    expected = torch.autograd.grad(case.loss(inputs[0] * 2, *inputs[1:]), inputs[0])
    torch.testing.assert_close(found, expected)


@every_case
def test_nested_batches(case):
    inputs = [x.detach() for x in case.inputs(torch.float32)]
    grad = torch.func.grad(case.loss, tuple(range(len(inputs))))
    inner = torch.func.vmap(grad, -1, randomness="same")
    found = torch.func.vmap(inner, randomness="same")(*(x[..., None].expand(2, *x.shape, 2) for x in inputs))
    torch.testing.assert_close([x[1, 0] for x in found], list(grad(*inputs)))


def test_a_hessian_by_two_reverse_passes():
    x, w = make((2, 4), torch.float64), make((4,), torch.float64, seed=1)

    def hessian(rms_norm: Callable) -> Tensor:
        return torch.func.jacrev(torch.func.jacrev(lambda w: rms_norm(x, (4,), w, 1e-5).sin().sum()))(w)

    torch.testing.assert_close(hessian(ops.rms_norm), hessian(F.rms_norm))


@pytest.mark.parametrize("case", [case for name, case in CASES.items() if "cross_entropy" not in name])
def test_a_batch_of_nothing(case):
    """(Of which torch's own losses have none.)"""
    found = torch.func.vmap(case.call, randomness="same")(*(torch.empty(0, *shape) for shape in case.shapes))
    one = case.call(*case.inputs(torch.float32))
    for x, y in zip(*[(x,) if isinstance(x, Tensor) else x for x in (found, one)], strict=True):
        assert x.shape == (0, *y.shape)


def test_in_place_overwrites_no_leaf_from_inside_of_a_batch():
    x = make((2, 4, 7)).requires_grad_()
    before = x.detach().clone()
    torch.func.vmap(lambda x: ops.cross_entropy(x, TARGET, inplace=True))(x).sum().backward()
    assert torch.equal(x, before)
    torch.testing.assert_close(x.grad[0], torch.func.grad(lambda x: ops.cross_entropy(x, TARGET))(before[0]))


def test_a_compiled_function_has_gradients_of_each_sample():
    w, x = make((6,)), make((3, 4, 6))
    grads = torch.func.vmap(torch.func.grad(lambda w, x: ops.rms_norm(x, (6,), w).sin().sum()), (None, 0))
    torch.testing.assert_close(torch.compile(grads, backend="eager")(w, x), grads(w, x))


def test_attention_kvcache_says_that_it_has_no_gradient():
    q, k, v = (make((1, 1, n, 4)).requires_grad_() for n in (1, 8, 8))

    def call(q, k, v):
        return ops.attention_kvcache(q, k, v, 5, softcap=1.0)

    for graph in (call, make_fx(call)(q, k, v)):
        with pytest.raises(RuntimeError, match="attention_kvcache is for generation"):
            graph(q, k, v).sum().backward()


# Graphs


class Module(torch.nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.weights = torch.nn.ParameterList([x.detach() for x in case.inputs(torch.float32)])
        self.case = case

    def forward(self, scale: Tensor) -> Tensor:
        return self.case.of(self.case.call(*(weight * scale for weight in self.weights)))


def trained(module: torch.nn.Module, *args: Tensor) -> list[Tensor]:
    """The gradients of the parameters; the call draws what it draws from the same seed each time."""
    module.zero_grad()
    torch.manual_seed(0)
    module(*args).backward()
    return [parameter.grad for parameter in module.parameters()]


@every_case
def test_an_exported_module_is_trained_like_the_module(case):
    module, one = Module(case), torch.ones(())
    expected = trained(module, one)
    for strict in (False, True):
        exported = torch.export.export(module, (one,), strict=strict).module()
        with torch.no_grad():
            exported(one)
        torch.testing.assert_close(trained(exported, one), expected)
    torch.testing.assert_close(trained(module, one), expected)


class Biased(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(make((5, 5)))
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return ops.attention(x, x, x, self.bias).sin().sum()


def test_a_mask_has_its_gradient_wherever_it_was_captured():
    module, x = Biased(), make((1, 2, 5, 6))
    expected = trained(module, x)
    with torch.no_grad():
        exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(trained(exported, x), expected)
    bias = module.bias.detach()
    graph = make_fx(lambda x, bias: ops.attention(x, x, x, bias))(x, bias)
    bias.requires_grad_()
    found = torch.autograd.grad(graph(x, bias).sin().sum(), bias)
    torch.testing.assert_close(found, torch.autograd.grad(ops.attention(x, x, x, bias).sin().sum(), bias))


@pytest.mark.parametrize("grad", [False, True])
def test_a_forced_backend_is_forced_in_an_exported_graph(grad):
    module = torch.nn.Sequential(torch.nn.Linear(6, 6), nn.RMSNorm(6))
    exported, x = torch.export.export(module, (make((2, 6)),)).module(), make((2, 6))
    with fastllm.use_backend("triton"), torch.set_grad_enabled(grad), pytest.raises(fastllm.BackendUnavailable):
        exported(x)


@every_case
def test_captured_graphs_have_the_gradients(case):
    expected = torch.autograd.grad(case.loss(*(inputs := case.inputs(torch.float32))), inputs)
    for pre_dispatch in (False, True):
        graph = make_fx(lambda *x: case.call(*x), pre_dispatch=pre_dispatch)(*[x * 1 for x in inputs])
        torch.manual_seed(0)
        loss = case.of(graph(*[x * 1 for x in inputs]))
        torch.testing.assert_close(torch.autograd.grad(loss, inputs), expected)
    graph = make_fx(lambda *x: torch.autograd.grad(case.of(case.call(*x)), x))(*inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(graph(*inputs), expected)


@pytest.mark.slow
@every_case
def test_graphs_captured_with_their_backward_have_the_gradients(case):
    expected = trained(Module(case), torch.ones(()))
    torch.compiler.reset()
    module = torch.compile(Module(case), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(trained(module, torch.ones(())), expected)
    with torch.no_grad():
        torch.manual_seed(0)
        found = module(torch.ones(()))
    torch.testing.assert_close(found, case.loss(*case.inputs(torch.float32)))


@pytest.mark.slow
@every_case
def test_opcheck_with_gradients(case, monkeypatch):
    calls, below = [], backends.Op.below_autograd
    monkeypatch.setattr(
        backends.Op, "below_autograd", lambda op, *args: (calls.append((op, args)), below(op, *args))[1]
    )
    case.call(*case.inputs(torch.float32))
    monkeypatch.undo()
    op, args = calls[0]
    own = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args]
    if not case.in_place:  # opcheck writes into leaves
        torch.library.opcheck(op.call, own)


@every_case
def test_fake_tensors_pass_through_forward_and_backward(case):
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = case.inputs(torch.float32)
        grads = torch.autograd.grad(case.of(case.call(*inputs)), inputs)
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]
    assert all(isinstance(grad, FakeTensor) for grad in grads)


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (lambda y, x: ops.cross_entropy(x, y), ((4, 7),)),
        (lambda y, x, w: ops.linear_cross_entropy(x, w, y), ((4, 3), (7, 3))),
        (lambda y, q, cos: ops.rotary(q, q * 2, cos.detach(), cos.detach(), position_ids=y)[1].sum(),
         ((1, 1, 4, 6), (8, 2))),
    ],
)  # fmt: skip
def test_aot_function_takes_indices(call, shapes):
    y, case = torch.tensor([2, 0, 6, 5]), Case(functools.partial(call, torch.tensor([2, 0, 6, 5])), shapes)
    inputs = case.inputs(torch.float32)
    expected = torch.autograd.grad(case.call(*inputs), inputs, allow_unused=True)
    found = torch.autograd.grad(aot_function(call, nop)(y, *inputs), inputs, allow_unused=True)
    torch.testing.assert_close(found, expected)
    wrong = torch.tensor([2, 0, 9, 5])
    with pytest.raises(IndexError, match="9 is out"):
        call(wrong, *inputs)
    with pytest.raises(RuntimeError, match="is out"):
        make_fx(call)(y, *inputs)(wrong, *inputs)


def test_a_mode_that_only_watches_changes_no_error():
    with FlopCounterMode(display=False), pytest.raises(IndexError, match="target 9 is out"):
        ops.cross_entropy(make((1, 7)), torch.tensor([9]))


# What modules keep


@pytest.mark.parametrize("scaling", [None, {"rope_type": "dynamic", "factor": 2.0}])
def test_a_fresh_module_compiles_into_one_graph(scaling):
    q = make((1, 2, 6, 8))
    module = nn.RotaryEmbedding(8, 4, scaling=scaling)
    compiled = torch.compile(Summed(module), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), Summed(nn.RotaryEmbedding(8, 4, scaling=scaling))(q))
    torch.testing.assert_close(compiled(q), Summed(module)(q))


@pytest.mark.parametrize("scaling", [None, {"rope_type": "dynamic", "factor": 2.0}])
@pytest.mark.parametrize("first", ["inference", "export", "fake", "torch.func", "make_fx"])
def test_a_module_keeps_no_tensor_that_cannot_be_trained_with(first, scaling):
    def made() -> nn.RotaryEmbedding:
        return nn.RotaryEmbedding(8, 4, scaling=scaling)

    q = make((1, 2, 6, 8))
    expected = trained_rotary(made(), q)
    module = made()
    if first == "inference":
        with torch.inference_mode():
            module(q, q)
    elif first == "export":
        torch.export.export(Summed(module), (q,))
    elif first == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            module(q, q)
    elif first == "torch.func":
        torch.func.vmap(torch.func.grad(Summed(module)))(torch.stack([q, q]))
    else:
        make_fx(Summed(module))(q)
    torch.testing.assert_close(trained_rotary(module, q), expected)


class Summed(torch.nn.Module):
    def __init__(self, rotary: nn.RotaryEmbedding):
        super().__init__()
        self.rotary = rotary

    def forward(self, q: Tensor) -> Tensor:
        return sum(x.sin().sum() for x in self.rotary(q, q * 2))


def trained_rotary(module: nn.RotaryEmbedding, q: Tensor) -> Tensor:
    q = q.clone().requires_grad_()
    return torch.autograd.grad(Summed(module)(q), q)[0]

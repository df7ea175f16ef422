"""What joins the forward and the backward of an op, however they are called: in eager mode, in a compiled or exported
graph, under torch.func, and where a gradient is differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from fastllm import backends
from fastllm.tracing import transformed


class Function(torch.autograd.Function):
    """The base of the ops' autograd functions.

    A subclass has `forward`, which takes the op's own arguments and returns all that the op returns; `setup_context`;
    and `backward`, which calls the op's backward through `gradients`. So it can be the op's Autograd registration
    (`Op.differentiate`), and torch.func takes it. None of forward's parameters is starred: Dynamo counts them, to know
    whether ctx is one.
    """

    op_name: ClassVar[str]
    direct: ClassVar[Callable]
    """`apply`, without its inspect.signature, which doubles the time of a small call."""

    def __init_subclass__(cls) -> None:
        cls.direct = super(torch.autograd.Function, cls).apply  # type: ignore[misc]


def run(op: backends.Op, *args: Any, function: Any = None) -> Any:
    """Calls an op with its autograd function, or another that takes the same. (A call of the op itself has its own,
    too, for more time.)"""
    function = op.function if function is None else function
    if torch.compiler.is_compiling():
        # An exported graph keeps the op, whose registration then gives gradients to whoever trains the graph.
        return op(*args) if torch.compiler.is_exporting() or transformed() else function.apply(*args)
    if not torch.is_grad_enabled() and not transformed():
        return op.below_autograd(*args)
    return apply(function, *args)


def apply(function: type[Function], *args: Any) -> Any:
    """As `function.apply`, outside of graphs."""
    if transformed():
        return _transformed(function).apply(*args)
    return function.direct(*unwrap_dead_wrappers(args))


@functools.cache
def _transformed(function: type[Function]) -> Any:
    """The function as torch.func takes it. Dynamo refuses one that has these methods, and is not to look into them."""

    @torch.compiler.disable
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        # One call for each element of the batch: what is summed over rows, the gradient of a weight, then stays theirs.
        def element(x: Any, dim: Any, i: int) -> Any:
            if not isinstance(dim, int):
                return x
            return x.select(dim, i) if info.batch_size else x.new_zeros(x.movedim(dim, 0).shape[1:])

        def stacked(outputs: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(outputs))[: info.batch_size]

        results = []
        for i in range(max(info.batch_size, 1)):  # of none, zeros say what the results look like
            results.append(apply(function, *(element(x, dim, i) for x, dim in zip(args, in_dims, strict=True))))
        if isinstance(results[0], Tensor):
            return stacked(results), 0
        return tuple(map(stacked, zip(*results, strict=True))), (0,) * len(results[0])

    @torch.compiler.disable
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"fastllm.{function.op_name} has no forward-mode derivative, which jvp, jacfwd and hessian ask for; take "
            "vjp, jacrev, or jacrev of jacrev"
        )

    return type(function.__name__, (function,), {"vmap": staticmethod(vmap), "jvp": staticmethod(jvp)})


class _Gradients(Function):
    """A backward that can be differentiated again, in plain PyTorch."""

    op_name = "the gradients of an op"

    @staticmethod
    def forward(op, run, formula, *args):
        return run(*args)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.op, _, ctx.formula, *args = inputs
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        ctx.save_for_backward(*(args[i] for i in ctx.places))

    @staticmethod
    def backward(ctx, *grads):
        ctx.op.check_second_derivative(grads[0].device)
        args = list(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            args[place] = tensor
        wanted = [i for i in ctx.places if ctx.needs_input_grad[i + 3]]

        def formula(*tensors: Tensor):
            whole = list(args)
            for place, tensor in zip(wanted, tensors, strict=True):
                whole[place] = tensor
            outputs = ctx.formula(*whole)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        with backends.without_autocast(grads[0].device.type):  # the formula is computed in float32
            seconds = torch.func.vjp(formula, *(args[i] for i in wanted))[1](grads)
        found = dict(zip(wanted, seconds, strict=True))
        return None, None, None, *(found.get(i) for i in range(len(args)))


def again() -> bool:
    """In a backward: whether its gradients may be differentiated once more, or are those of a batch."""
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transformed())


def gradients(op: backends.Op, formula: Callable, *args: Any, compute: Callable | None = None) -> Any:
    """`op(*args)`, an op's backward, called by an autograd function's.

    Args:
        op: of the backward.
        compute: what computes the gradients, if not the op alone.
        formula: takes the same and returns the same, in plain PyTorch that autograd sees through: what is
            differentiated where the gradients' own gradients are asked for. What the forward saved of its own results,
            it computes once more.
    """
    if again():
        return apply(_Gradients, op, compute or op, formula, *args)
    return (compute or op)(*args)

"""The state of an AdamW step, a step of it on the reference beside one on a kernel, and their comparison."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastllm
from fastllm import ops
from fastllm.ops.adamw import dequantize, grad_norm, join
from fastllm.optim import AdamW
from fastllm.testing import make

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8}
SHAPES = ((1037, 7), (3,), (1,), (256,), (0,), (127,), (129, 5, 3), ())


class State:
    """The arguments of some steps: parameters of `shapes` and all that belongs to them."""

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        shapes=SHAPES,
        grad_dtype: torch.dtype | None = None,
        moment_dtype: torch.dtype | None = None,
        master: str | None = None,
        amsgrad: bool = False,
        device: str = "cpu",
        step: float = 0.0,
    ):
        moment_dtype = moment_dtype or dtype
        self.grad_dtype = grad_dtype or dtype
        # The same values everywhere: a GPU's generator draws others than the CPU's.
        self.params = [make(shape, dtype, seed=i).to(device) for i, shape in enumerate(shapes)]
        self.moments = [[torch.zeros_like(p, dtype=moment_dtype) for p in self.params] for _ in range(2)]
        self.largest = [torch.zeros_like(p, dtype=moment_dtype) for p in self.params] if amsgrad else []
        self.steps = [torch.tensor(step, device=device) for _ in self.params]
        self.masters: list[torch.Tensor] = []
        if master == "float32":
            self.masters = [p.float() for p in self.params]
        elif master == "remainder":
            self.masters = [torch.zeros_like(p, dtype=torch.int16) for p in self.params]
        blocks = [-(-p.numel() // 256) for p in self.params] if moment_dtype == torch.uint8 else []
        self.scales = [[torch.zeros(n, device=device) for n in blocks] for _ in range(2)]
        self.misaligned = False

    def grads(self, seed: int) -> list[torch.Tensor]:
        # Sizes from 1e-3 to 1e3, so that moments differ much inside a block.
        found = []
        for i, p in enumerate(self.params):
            spread = 10 ** make(p.shape, torch.float32, seed=7 * seed + i)
            grad = make(p.shape, torch.float32, seed=1000 * seed + i) * spread
            found.append(grad.to(p.device, self.grad_dtype))
        return list(map(_moved, found)) if self.misaligned else found

    def arguments(self, grads: list[torch.Tensor], **kwargs) -> tuple[tuple, dict]:
        """(args, kwargs) of a step."""
        lists = (self.params, grads, *self.moments, self.largest, self.steps)
        own = {"masters": self.masters, "exp_avg_scales": self.scales[0], "exp_avg_sq_scales": self.scales[1]}
        return lists, {**own, **HYPER, **kwargs}

    def step(self, grads: list[torch.Tensor], **kwargs) -> torch.Tensor | None:
        """One step; with a `max_norm` and no `grad_norm`, by the norm of `grads`, which is returned."""
        if kwargs.get("max_norm") and kwargs.get("grad_norm") is None:
            kwargs["grad_norm"] = grad_norm(grads)
        args, kwargs = self.arguments(grads, **kwargs)
        ops.adamw(*args, **kwargs)
        return kwargs.get("grad_norm")

    def misalign(self) -> None:
        """Moves every tensor, and every gradient from now on, one element past where its allocation starts."""
        self.misaligned = True
        for tensors in (self.params, *self.moments, self.largest, self.masters):
            tensors[:] = map(_moved, tensors)

    def tensors(self) -> dict[str, torch.Tensor]:
        lists = {"param": self.params, "exp_avg": self.moments[0], "exp_avg_sq": self.moments[1]}
        lists |= {"max_exp_avg_sq": self.largest, "step": self.steps, "master": self.masters}
        lists |= {"exp_avg_scale": self.scales[0], "exp_avg_sq_scale": self.scales[1]}
        return {f"{name} {i}": x for name, values in lists.items() for i, x in enumerate(values)}


def _moved(x: torch.Tensor) -> torch.Tensor:
    """The same values, one element past where their allocation starts."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def prepared(
    device: str, *, grad_scale: float | None = None, max_norm: float = 0.0, misaligned: bool = False, **options
) -> tuple[State, dict]:
    """A state on `device`, and what its `step` is called with beside gradients."""
    names = ("maximize", "stochastic_rounding", "seed")
    kwargs = {key: options.pop(key) for key in names if key in options}
    state = State(device=device, **options)
    if misaligned:
        state.misalign()
    if grad_scale is not None:
        kwargs["grad_scale"] = torch.tensor(grad_scale, device=device)
    return state, kwargs | ({"max_norm": max_norm} if max_norm else {})


def floats(state: State) -> dict[str, torch.Tensor]:
    """What a state stands for, in float32 on the CPU: 16-bit weights with their remainders, codes with their scales."""
    found = {f"param {i}": p.float() for i, p in enumerate(state.params)}
    for i, master in enumerate(state.masters):
        found[f"master {i}"] = join(state.params[i], master) if master.dtype == torch.int16 else master
    for name, moments, scales in zip(("exp_avg", "exp_avg_sq"), state.moments, state.scales, strict=True):
        for i, x in enumerate(moments):
            found[f"{name} {i}"] = dequantize(x, scales[i], name == "exp_avg") if x.dtype == torch.uint8 else x.float()
    found |= {f"max_exp_avg_sq {i}": x.float() for i, x in enumerate(state.largest)}
    found |= {f"step {i}": x for i, x in enumerate(state.steps)}
    return {name: x.cpu() for name, x in found.items()}


def assert_same(got: State, expected: State, binding: str = "") -> None:
    """Bit for bit. On a GPU, whose pow is not the host's, to some units in the last place of what is stored: a code may
    be its neighbour."""
    if binding == "cuda":
        short = {torch.uint8: 0.12, torch.bfloat16: 2**-7, torch.float16: 2**-10}
        for (name, a), b in zip(floats(got).items(), floats(expected).values(), strict=True):
            kind = expected.moments[0][0].dtype if name.startswith(("exp", "max")) else expected.params[0].dtype
            rtol = 2**-20 if name.startswith(("master", "step")) else short.get(kind, 2**-20)
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-30, equal_nan=True, msg=name)
        return
    for (name, a), b in zip(got.tensors().items(), expected.tensors().values(), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        if a.is_floating_point():
            assert torch.equal(a.isnan(), b.isnan()), f"{name}: NaN elsewhere"
            a, b = a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0)
        assert torch.equal(a, b), f"{name}: {(a != b).sum()} of {a.numel()} differ"


def beside_the_reference(device: str, steps: int = 3, **options) -> tuple[State, State]:
    """Some steps on `device`, and the same on the reference on the CPU; what `grad_scale` leaves in the gradients is
    compared at once. With `max_norm` both clip by the norm that `device` computed, which is compared, too."""
    got, kwargs = prepared(device, **options)
    expected, expected_kwargs = prepared("cpu", **options | {"misaligned": False})
    for seed in range(steps):
        grads, copies = got.grads(seed), expected.grads(seed)
        truth = torch.stack([g.double().square().sum() for g in copies]).sum().sqrt()
        norm = got.step(grads, **kwargs)
        if norm is not None:
            torch.testing.assert_close(norm.cpu().double(), truth, rtol=2**-20, atol=0)
            norm = norm.cpu()
        with fastllm.use_backend("reference"):
            expected.step(copies, grad_norm=norm, **expected_kwargs)
        if "grad_scale" in kwargs:
            for g, c in zip(grads, copies, strict=True):
                torch.testing.assert_close(g.cpu(), c, rtol=0, atol=0)
    return got, expected


def optimizer_step(
    device: str, dtype: torch.dtype, **options
) -> tuple[Callable[[], None], list[torch.nn.Parameter], AdamW]:
    """A step of `fastllm.optim.AdamW` on gradients that are new each time, as they are in training, with its parameters
    and itself. The kernels read a table of addresses there, as long as no backend is forced."""
    params = [torch.nn.Parameter(x) for x in State(dtype, device=device).params]
    optimizer = AdamW(params, **options)
    grads = State(dtype, device=device).grads(1)

    def step() -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()

    return step, params, optimizer

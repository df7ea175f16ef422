"""AdamW, drop-in for torch.optim.AdamW."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.backends import layout as layout_of
from fastllm.backends import steered
from fastllm.ops._arguments import number
from fastllm.ops._sharding import dtensor
from fastllm.ops.adamw import SPARSE, TABLE_GRAD, grad_norm, has_tables, make_table, step_op, table_step
from fastllm.optim import _state
from fastllm.optim._overlap import check_overlap
from fastllm.tracing import traced


class _Plan(NamedTuple):
    """What is the same at every step for the parameters of a group that have a gradient."""

    params: list[Tensor]
    special: bool  # DTensors or complex numbers are among them
    parts: list[list[int]]  # places of those that one call updates


def _plan(params: list[Tensor]) -> _Plan:
    # One call a device and dtype, so that what has no kernel (float64, say) slows only itself.
    kind = dtensor()
    parts: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        parts.setdefault((param.device, param.dtype), []).append(i)
    return _Plan(params, any(p.is_complex() or isinstance(p, kind) for p in params), list(parts.values()))


SHARD_SHIFT = 20  # in the index that random numbers are drawn by, above the parameter's place


class _Table(NamedTuple):
    """What a batch's tensors were when the kernels' table of them was made."""

    rows: Tensor  # empty where the kernels cannot read the tensors as they lie
    indices: list[int]
    layout: bytes
    grads: bytes  # their addresses


@dataclass
class _Batch:
    """The parameters of a group that one call updates."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    indices: list[int]  # their places among all parameters of the optimizer
    tensors: list[Tensor]  # what is updated: the parameters, their shards, or their real views
    special: bool

    def part(self, at: list[int]) -> _Batch:
        def some(values: list) -> list:
            return [values[i] for i in at]

        return replace(
            self,
            params=some(self.params),
            grads=some(self.grads),
            states=some(self.states),
            indices=some(self.indices),
            tensors=some(self.tensors),
        )

    def get(self, key: str) -> list[Tensor]:
        return [_plain(state[key]) for state in self.states] if self.special else [s[key] for s in self.states]

    def masters(self, key: str) -> list[Tensor]:
        """The masters; a parameter that needs none stands for itself."""
        return [
            _plain(state[key]) if key in state else tensor
            for state, tensor in zip(self.states, self.tensors, strict=True)
        ]


def _plain(x: Tensor) -> Tensor:
    """A DTensor's shard; of complex numbers, the pairs of real ones."""
    if isinstance(x, dtensor()):
        x = x.to_local()  # type: ignore[attr-defined]
    return torch.view_as_real(x) if x.is_complex() else x


def _place_grad(param: Tensor) -> Tensor:
    """The gradient; that of a DTensor is moved to where the parameter is placed, and stays there."""
    kind, grad = dtensor(), param.grad
    assert grad is not None
    if isinstance(grad, kind) and isinstance(param, kind) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = param.grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return grad


def _shard_number(param: Tensor) -> int:
    """Which of a DTensor's different shards is this rank's; 0 for others."""
    if not isinstance(param, dtensor()):
        return 0
    number = 0
    mesh = param.device_mesh  # type: ignore[attr-defined]
    for dim, placement in enumerate(param.placements):  # type: ignore[attr-defined]
        if not placement.is_replicate():
            number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number


def _total_norm(batches: list[_Batch], grad_scale: Tensor | None) -> Tensor:
    """The norm of all gradients, over devices and ranks too, after they are divided by `grad_scale`."""
    norms = [norm for batch in batches for norm in _norms(batch)]
    first = norms[0]
    norm = first if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([n.to(first.device) for n in norms]))
    return norm if grad_scale is None else norm / grad_scale.to(norm.device)


def _norms(batch: _Batch) -> list[Tensor]:
    kind = dtensor()
    if not any(isinstance(param, kind) for param in batch.params):
        return [grad_norm(batch.grads)]
    from torch.distributed.tensor import Partial, Replicate

    # Those that are cut alike over the same mesh are added up together; every shard counts once.
    alike: dict[Any, list[Tensor]] = {}
    for param, grad in zip(batch.params, batch.grads, strict=True):
        key = None
        if isinstance(param, kind):
            cut = tuple(not placement.is_replicate() for placement in param.placements)  # type: ignore[attr-defined]
            key = (param.device_mesh, cut)  # type: ignore[attr-defined]
        alike.setdefault(key, []).append(grad)
    norms = []
    for key, grads in alike.items():
        norm = grad_norm(grads)
        if key is not None:
            mesh, cut = key
            placements = [Partial("sum") if sharded else Replicate() for sharded in cut]
            squares = kind.from_local(norm.double().square(), mesh, placements, run_check=False)  # type: ignore[union-attr]
            norm = squares.full_tensor().sqrt().to(norm.dtype)
        norms.append(norm)
    return norms


class AdamW(torch.optim.AdamW):
    """AdamW in one pass over all parameters, drop-in for `torch.optim.AdamW`.

        p <- p (1 - lr weight_decay)
        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
        p <- p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    The constructor, param_groups and state_dict are torch's, and checkpoints load in both directions (those with 8-bit
    moments by way of an AdamW without moment_dtype; torch ignores masters). The arithmetic is in float32 whatever the
    parameters' dtype, in torch's order. In float32 on a CPU where torch uses AVX2 or AVX-512 it has the bits of torch's
    fused kernel, but for the last numel mod 16 elements of a parameter: torch's compiler may round their second moment
    once less. There, and everywhere if torch uses neither, the last bits may differ. (torch's per-tensor loop rounds
    one root in 160 the other way.) Sources: Loshchilov and Hutter,
    "Decoupled Weight Decay Regularization", 2019; for 8-bit moments Dettmers et al., "8-bit Optimizers via Block-wise
    Quantization", 2022.

    What a parameter costs, in bytes, beside its gradient:

    ============================================================== ====== ===== ==== ===
    parameter and options                                          weight extra m, v sum
    ============================================================== ====== ===== ==== ===
    float32                                                             4     0    8  12
    float32, moment_dtype=torch.bfloat16                                4     0    4   8
    float32, moment_dtype=torch.uint8                                   4     0 2.03 6.03
    bfloat16 or float16                                                 2     0    4   6
    bfloat16 or float16, moment_dtype=torch.float32                     2     0    8  10
    bfloat16 or float16, master_weights="float32"                       2     4    8  14
    bfloat16, master_weights="remainder"                                2     2    8  12
    bfloat16, master_weights="remainder", moment_dtype=torch.uint8      2     2 2.03 6.03
    bfloat16 or float16, stochastic_rounding=True                       2     0    4   6
    the same, moment_dtype=torch.uint8                                  2     0 2.03 4.03
    ============================================================== ====== ===== ==== ===

    amsgrad adds a third moment. A gradient costs as much as its weight.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as torch's. A tensor lr on a GPU is read
            there, without a sync.
        foreach, fused: accepted, and the kernel is the same with or without. As in torch, `fused` (or `capturable`)
            keeps `step` on the parameter's device, and with `fused` a GradScaler hands its scale and its verdict on
            infinities to the step, which divides the gradients on the way and waits for nothing. Without it, the
            scaler divides the gradients first and leaves out a step that would do harm, and whoever clips in between
            (Lightning) or asks whether a step was left out (Accelerate) is served.
        differentiable: refused; use torch.optim.AdamW.
        max_norm: clip the norm of all gradients together to this, as `torch.nn.utils.clip_grad_norm_` before the step
            does, but on the way: the gradients are read once for the norm, and not written. The norm before clipping
            is in `grad_norm` after the step; infinity only measures it. As there, a norm that overflows clips all to
            zero. Default: neither.
        skip_nonfinite: with max_norm, a step whose norm is infinite or NaN changes nothing. Whoever wants to know looks
            at `grad_norm`.
        master_weights: for parameters of 16 bits. "float32" keeps what they are rounded from, under state key "master";
            "remainder" keeps only the 16 bits that rounding to bfloat16 took, under "remainder": bit for bit the same
            training for 2 extra bytes instead of 4. Both round to the nearest bfloat16, ties away from zero (so that
            the two agree), to the nearest float16, ties to even. Whoever changes a parameter afterwards must delete
            its "master" or "remainder" from `state`.
        stochastic_rounding: round parameters of 16 bits up or down at random, right on average: no memory at all. The
            random numbers depend on (seed, step, index of the parameter, shard of a DTensor, element in the order of
            memory), and on nothing else: not on devices, threads or launches.
        moment_dtype: of m and v: a floating dtype, or torch.uint8 for blocks of 256 elements that share a scale, in 8
            bits each (keys "exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale"; not with amsgrad,
            nor for DTensors). Default: as torch, the parameter's; float32 with master_weights.
            A gradient whose square is infinite in float32 stops its parameter for good, and one that is infinite or NaN
            makes it NaN: its own alone, as in torch. In 8 bits too: a scale is that of the finite elements of its
            block, and negative to say that there are others. But a finite outlier takes its block's resolution: second
            moments below 1e-7 of the largest are kept as some 1e-8 of it, first ones as zero.
        seed: of stochastic_rounding.

    Attributes:
        grad_norm: 0-d tensor, the norm of all gradients before clipping, of the last step with `max_norm`; else None.

    Raises:
        ValueError: for a value out of range, parameters given twice or overlapping in memory, and options that do not
            fit the parameters.
        RuntimeError: at a step, for sparse gradients.
    """

    grad_scale: Tensor | None  # set by a GradScaler while it calls step, if `fused`
    found_inf: Tensor | None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        master_weights: str | None = None,
        stochastic_rounding: bool = False,
        moment_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        if differentiable:
            raise ValueError("AdamW: differentiable=True needs torch.optim.AdamW: a fused step has no gradient")
        if max_norm is not None and not number("AdamW", "max_norm", max_norm) > 0:
            raise ValueError(f"AdamW: max_norm must be positive, or None, got {max_norm}")
        if skip_nonfinite and max_norm is None:
            raise ValueError("AdamW: skip_nonfinite needs max_norm (math.inf only measures the norm)")
        if master_weights not in (None, "float32", "remainder"):
            raise ValueError(f"AdamW: master_weights must be None, 'float32' or 'remainder', got {master_weights!r}")
        if stochastic_rounding and master_weights:
            raise ValueError("AdamW: stochastic_rounding and master_weights exclude each other")
        allowed = (None, torch.float32, torch.bfloat16, torch.float16, torch.uint8)
        if moment_dtype not in allowed:
            raise ValueError(f"AdamW: moment_dtype must be one of {allowed}, got {moment_dtype}")
        self.max_norm = max_norm
        self.skip_nonfinite = skip_nonfinite
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.moment_dtype = moment_dtype
        self.seed = seed
        self.grad_norm: Tensor | None = None
        self._loading: Mapping[str, Any] | None = None
        self._made = False  # groups are added one by one until then, and checked against each other once
        self._plans: dict[int, _Plan] = {}
        self._tables: dict[int, _Table] = {}
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        self._made = True
        self._check_overlap()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, and refuses parameters that are given twice, overlap in memory, or do not fit the options."""
        if isinstance(param_group, dict) and isinstance(param_group.get("params"), Iterable):
            given = param_group["params"]
            given = [given] if isinstance(given, Tensor) else list(given)
            if not isinstance(param_group["params"], (Tensor, set)):
                param_group["params"] = given  # it may have been an iterator
            tensors = [item[1] if isinstance(item, tuple) else item for item in given]
            if len({id(tensor) for tensor in tensors}) < len(tensors):
                raise ValueError("AdamW: the same parameter is given twice in one group")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            if self._made:
                self._check_overlap()
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            if self.master_weights == "remainder" and param.dtype == torch.float16:
                raise ValueError(
                    "AdamW: master_weights='remainder' is for bfloat16 parameters, got torch.float16: use 'float32'"
                )
            if self.moment_dtype == torch.uint8 and (isinstance(param, dtensor()) or param.is_complex()):
                what = "complex numbers" if param.is_complex() else "a DTensor: its blocks are local"
                raise ValueError(f"AdamW: moment_dtype=torch.uint8 cannot be kept for {what}")
        if group["amsgrad"] and self.moment_dtype == torch.uint8:
            raise ValueError("AdamW: moment_dtype=torch.uint8 does not go with amsgrad")
        if group["differentiable"]:
            raise ValueError("AdamW: differentiable=True needs torch.optim.AdamW: a fused step has no gradient")

    def _check_overlap(self) -> None:
        check_overlap([_plain(p.detach()) for group in self.param_groups for p in group["params"]])

    # State

    def _options(self, group: dict[str, Any]) -> _state.Options:
        return _state.Options(
            self.master_weights, self.moment_dtype, group["amsgrad"], bool(group["capturable"] or group["fused"])
        )

    def __getstate__(self) -> dict[str, Any]:
        kept = ["max_norm", "skip_nonfinite", "master_weights", "stochastic_rounding", "moment_dtype", "seed"]
        kept += ["grad_norm", "_loading", "_made", "_step_supports_amp_scaling"]  # the last is torch's, if `fused`
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept if name in self.__dict__}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self._tables = {}, {}
        if self._loading is not None:
            # torch's load_state_dict casts every floating tensor to the parameter's dtype: take what was saved.
            for group in self.param_groups:
                self._check_group(group)
            saved = chain.from_iterable(group["params"] for group in self._loading["param_groups"])
            places = ((group, param) for group in self.param_groups for param in group["params"])
            for number, (group, param) in zip(saved, places, strict=True):
                if number in self._loading["state"]:
                    self.state[param] = _state.adopt(param, self._loading["state"][number], self._options(group))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. Takes checkpoints of torch.optim.AdamW, and of this one with other options: moments are
        converted, and masters that are missing start from the parameters at the next step."""

        def remember(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            self._loading = state_dict

        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step for every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew; called first.

        Returns:
            What the closure returned, else None.
        """
        # Named after CUDA in older versions of torch.
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            if hasattr(self, name):
                getattr(self, name)()
                break
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        batches, first = [], 0
        if grad_scale is not None:
            for param in chain.from_iterable(group["params"] for group in self.param_groups):
                # Unscaled in place below, where every element must have memory of its own.
                if param.grad is not None and not param.grad.is_sparse and 0 in param.grad.stride():
                    param.grad = param.grad.contiguous()
        for group in self.param_groups:
            batches += self._collect(group, first)
            first += len(group["params"])
        norm = None
        if self.max_norm is not None and batches:
            if any(map(operator.attrgetter("is_sparse"), chain.from_iterable(batch.grads for batch in batches))):
                raise RuntimeError(SPARSE)
            norm = self.grad_norm = _total_norm(batches, grad_scale)
            if self.skip_nonfinite:
                bad = (norm * 0 != 0).float()  # NaN, of what is not finite
                found_inf = bad if found_inf is None else bad + found_inf.to(bad.device)
        for batch in batches:
            self._run(batch, norm, grad_scale, found_inf)
        return loss

    def _collect(self, group: dict[str, Any], first: int) -> list[_Batch]:
        grads = [param.grad for param in group["params"]]
        params = group["params"]
        indices = list(range(first, first + len(params)))
        if any(map(operator.is_, grads, repeat(None))):
            chosen = [i for i, grad in enumerate(grads) if grad is not None]
            params, grads, indices = ([values[i] for i in chosen] for values in (params, grads, indices))
        if not params:
            return []
        states = list(map(self.state.__getitem__, params))
        options = self._options(group)
        if not all(states) or options.master_weights:
            _state.fill(params, states, options)
        plan = self._plans.get(first)
        if plan is None or len(plan.params) != len(params) or not all(map(operator.is_, plan.params, params)):
            plan = self._plans[first] = _plan(params)
        batch = _Batch(group, params, grads, states, indices, params, plan.special)
        if plan.special:
            batch.tensors = [_plain(param) for param in params]
            batch.grads = [_plain(_place_grad(param)) for param in params]
            # Shards are other elements: they draw other random numbers.
            batch.indices = [i + (_shard_number(p) << SHARD_SHIFT) for i, p in zip(indices, params, strict=True)]
        return [batch] if len(plan.parts) == 1 else [batch.part(at) for at in plan.parts]

    def _table(self, batch: _Batch, lists: Sequence[list[Tensor]]) -> Tensor | None:
        """The kernels' table of a batch, made when any of its tensors is another or has moved; None if it needs more
        than that. Only the gradients' addresses are expected to change: they are new at every step."""
        device = batch.tensors[0].device
        if batch.special or layout_of is None or steered() or torch.compiler.is_compiling() or traced():
            return None
        if not has_tables(device):
            return None
        try:
            layout, grads = layout_of(*lists)
        except RuntimeError:
            if any(grad.is_sparse for grad in batch.grads):
                raise RuntimeError(SPARSE) from None
            return None
        first = batch.indices[0]
        table = self._tables.get(first)
        if table is None or table.layout != layout or table.indices != batch.indices:
            if any(map(Tensor.is_neg, batch.grads)):  # their memory holds the negative
                return None
            rows = make_table(*lists, batch.indices, table is None)
            table = self._tables[first] = _Table(rows, batch.indices, layout, grads)
        elif table.grads != grads and any(map(Tensor.is_neg, batch.grads)):
            return None
        elif table.grads != grads and len(table.rows):
            table.rows[:, TABLE_GRAD] = torch.frombuffer(bytearray(grads), dtype=torch.int64)
            self._tables[first] = table._replace(grads=grads)
        return table.rows if len(table.rows) else None

    def _run(self, batch: _Batch, norm: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        group, device = batch.group, batch.tensors[0].device
        steps = batch.get("step")
        lr, (beta1, beta2) = group["lr"], group["betas"]
        unknown = traced() or device.type == "meta"  # the numbers in tensors
        # Asked for after the first step, or for want of a host that could decide about it.
        if steps[0].device != device and (group["capturable"] or group["fused"] or (unknown and found_inf is not None)):
            for state in batch.states:
                state["step"] = state["step"].to(device)
            steps = batch.get("step")
        quantized = self.moment_dtype == torch.uint8
        suffix = "_code" if quantized else ""
        lists = (
            batch.tensors,
            batch.grads,
            batch.get("exp_avg" + suffix),
            batch.get("exp_avg_sq" + suffix),
            batch.get("max_exp_avg_sq") if group["amsgrad"] else [],
            steps,
            batch.masters(_state.MASTER_KEYS[self.master_weights]) if self.master_weights else [],
            batch.get("exp_avg_scale") if quantized else [],
            batch.get("exp_avg_sq_scale") if quantized else [],
        )
        steps_apart = steps[0].device != device
        if found_inf is not None and steps_apart:
            # `step` lives on the host, which must know whether there is one.
            if found_inf.item():
                return
            found_inf = None
        on_device = isinstance(lr, Tensor) and (
            lr.device.type != "cpu" or (unknown and (lr.dtype == torch.float32 or type(lr) is not Tensor))
        )
        scalars = (norm, grad_scale, found_inf, lr if on_device else None)
        # To the CPU, the copy must have arrived before it is read.
        wait_not = device.type != "cpu"
        on = [None if x is None else x.to(device, torch.float32, non_blocking=wait_not) for x in scalars]
        hyper = (
            0.0 if on_device else float(lr),
            float(beta1),
            float(beta2),
            float(group["weight_decay"]),
            group["eps"],
            self.max_norm or 0.0,
            group["maximize"],
            self.stochastic_rounding,
            self.seed,
        )
        table = self._table(batch, lists)
        if table is not None:
            table_step(batch.tensors[0], table, *on, steps_apart, *hyper)
        else:
            for i, grad in enumerate(batch.grads):
                if grad.is_neg():  # its memory holds the negative, which the dispatcher does not undo in lists
                    batch.grads[i] = batch.params[i].grad = grad.resolve_neg()
            step_op(*lists, *on, batch.indices, *hyper)
        torch.autograd.graph.increment_version(batch.tensors)

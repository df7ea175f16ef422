"""Optimizers by name: what they do to which parameters, in one step, and their state by the parameters' names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.optim import AdamW
from fastllm.optim._state import BLOCK, MASTER_KEYS

OPTIMIZERS = ("adamw", "torch_adamw", "sgd", "adafactor", "muon")
MOMENT_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}

_BLOCK = re.compile(r"(?:(.+)\.)?blocks\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embedding|source_embedding|token_types|positions|embedding_norm|relative)\.")
_HEADS = ("head.", "masked_head.", "next_head.")


def lr_scales(names: Iterable[str], layer_decay: float = 1.0, head_lr_ratio: float = 1.0) -> dict[str, float]:
    """What the learning rate of each parameter is multiplied by, for fine-tuning: lower layers, which hold what is
    general, move less (Howard and Ruder, "ULMFiT", 2018; Clark et al., "ELECTRA", 2020).

    With d = layer_decay, block i of L has d^(L - i), embeddings (and what else comes before the blocks) have d^(L + 1),
    the norm behind the blocks and a pooler 1, heads head_lr_ratio. Encoder and decoder count their own blocks; an
    embedding that they share is that of the longer one. A tied head is an embedding.

    Args:
        names: of all parameters of a model.
        layer_decay: in (0, 1].
        head_lr_ratio: positive; for heads that are new, and so have further to go.

    Raises:
        ValueError: for a value out of range, and with a layer_decay below 1 for a model without numbered blocks.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}")
    if not 0 < head_lr_ratio < math.inf:
        raise ValueError(f"head_lr_ratio must be positive and finite, got {head_lr_ratio}")
    names = list(names)
    depths: dict[str | None, int] = {}
    for match in filter(None, map(_BLOCK.match, names)):
        depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    if layer_decay < 1 and not depths:
        raise ValueError(f"layer_decay={layer_decay} needs a model with numbered blocks")

    def scale(name: str) -> float:
        if match := _BLOCK.match(name):
            return layer_decay ** (depths[match[1]] - int(match[2]))
        if _EMBEDDING.search(name):
            return layer_decay ** (depths.get(name.partition(".")[0], max(depths.values(), default=0)) + 1)
        return head_lr_ratio if name.startswith(_HEADS) else 1.0

    return {name: scale(name) for name in names}


def make_optimizer(model: nn.Module, config: Any) -> Optimizers:
    """The optimizer that `config` names, for the parameters of `model` that have gradients.

    Matrices have weight decay; vectors (norms and biases) have none.

    Args:
        model: as it is trained: on its device, and sharded already if it will be.
        config: any object with the fields

            optimizer: "adamw" (fastllm.optim.AdamW), or of torch.optim "torch_adamw", "sgd" (its weight decay is an L2
                penalty, added to the gradient), "adafactor" (Shazeer and Stern, 2018: lr is relative to the weights'
                size; not for sharded models) and "muon" (Jordan et al., 2024) for the matrices inside blocks, each as
                it is stored (queries, keys and values are one), with fastllm.optim.AdamW for the rest. Muon's steps are
                scaled to have AdamW's size (Liu et al., 2025), so that one lr serves both.
            lr, weight_decay; beta1, beta2, eps: of AdamW; momentum: of "sgd" and "muon", in [0, 1).
            clip: the largest norm of all gradients together; 0 does not clip.
            layer_decay, head_lr_ratio: as in `lr_scales`; 1 for one rate.
            moment_dtype: None, "float32", "bfloat16" or "uint8"; master_weights: None, "float32" or "remainder": of
                "adamw" alone, as its own.

    Raises:
        ValueError: for a value out of range, an option that the optimizer lacks, and a model that it cannot train.
    """
    kind = config.optimizer
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {kind!r}")
    if config.moment_dtype not in MOMENT_DTYPES:
        raise ValueError(f"moment_dtype must be one of {tuple(MOMENT_DTYPES)}, got {config.moment_dtype!r}")
    for option in ("moment_dtype", "master_weights"):
        if kind != "adamw" and getattr(config, option) is not None:
            raise ValueError(f"{option}={getattr(config, option)!r} is for optimizer 'adamw', not for {kind!r}")
    if not 0 <= config.momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {config.momentum}")
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    scales = lr_scales([name for name, _ in model.named_parameters()], config.layer_decay, config.head_lr_ratio)

    def groups(names: Iterable[str]) -> list[dict[str, Any]]:
        found: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name in names:
            found.setdefault((named[name].ndim < 2, scales[name]), []).append(named[name])
        return [
            {
                "params": parameters,
                "lr": config.lr * scale,
                "lr_scale": scale,
                "weight_decay": 0.0 if vectors else config.weight_decay,
            }
            for (vectors, scale), parameters in sorted(found.items(), key=lambda item: item[0])
        ]

    adamw = {"betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
    optimizers: list[torch.optim.Optimizer]
    if kind == "adamw":
        optimizers = [
            AdamW(
                groups(named),
                **adamw,
                max_norm=config.clip or math.inf,
                skip_nonfinite=True,
                moment_dtype=MOMENT_DTYPES[config.moment_dtype],
                master_weights=config.master_weights,
            )
        ]
    elif kind == "torch_adamw":
        optimizers = [torch.optim.AdamW(groups(named), **adamw)]
    elif kind == "sgd":
        optimizers = [torch.optim.SGD(groups(named), momentum=config.momentum)]
    elif kind == "adafactor":
        if any(map(_sharded, named.values())):
            raise ValueError("optimizer 'adafactor' cannot train a sharded model: torch's has no step for DTensors")
        optimizers = [torch.optim.Adafactor(groups(named))]
    else:
        hidden = [name for name, parameter in named.items() if parameter.ndim == 2 and _BLOCK.match(name)]
        if not hidden:
            raise ValueError("optimizer 'muon' needs a model with matrices in numbered blocks")
        muon = torch.optim.Muon(groups(hidden), momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
        rest = groups(name for name in named if name not in set(hidden))
        optimizers = [muon, *([AdamW(rest, **adamw)] if rest else [])]
    return Optimizers(kind, optimizers, named, clip=config.clip, lr=config.lr)


class Optimizers:
    """One face over the optimizers of a model; `make_optimizer` makes it.

    Args:
        kind: one of OPTIMIZERS.
        optimizers: whose groups have "lr_scale"; a single `fastllm.optim.AdamW` must have max_norm and skip_nonfinite.
        named: the parameters by name.
        clip: the largest norm of all gradients together; 0 does not clip.
        lr: the learning rate of a group whose lr_scale is 1.
    """

    def __init__(
        self,
        kind: str,
        optimizers: Sequence[torch.optim.Optimizer],
        named: Mapping[str, nn.Parameter],
        *,
        clip: float,
        lr: float,
    ):
        self.kind, self.optimizers, self.clip, self.rate = kind, list(optimizers), clip, lr
        self._named = dict(named)
        self.waits = kind != "adamw"
        """Whether each step waits for the device: torch's optimizers cannot leave a step out by themselves."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of state, without master weights, on this rank; behind the first step."""
        tensors = [x for key, x in self._states().items() if isinstance(x, Tensor) and not _is_master(key)]
        return sum(local(x).nbytes for x in tensors) / sum(local(x).numel() for x in self._named.values())

    def set_rate(self, lr: float) -> None:
        """Gives every group the learning rate lr * lr_scale."""
        self.rate = lr
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    @torch.no_grad()
    def step(self, bad: Tensor | None = None) -> Tensor:
        """Updates the parameters that have a gradient, clipped; nothing at all if the norm of all gradients is not
        finite, or `bad` says so. Sharded parameters: all ranks take part.

        Args:
            bad: 0-d float32 on the device, the same on all ranks; non-zero leaves the step out.

        Returns:
            0-d, on the device: the norm of all gradients together before clipping, over all ranks.

        Raises:
            ValueError: where no parameter has a gradient.
        """
        grads = [parameter.grad for parameter in self._named.values() if parameter.grad is not None]
        if not grads:
            raise ValueError("no parameter has a gradient")
        if not self.waits:
            (adamw,) = self.optimizers
            assert isinstance(adamw, AdamW)
            adamw.found_inf = bad  # as a GradScaler would say it
            try:
                adamw.step()
            finally:
                adamw.found_inf = None
            assert adamw.grad_norm is not None
            return adamw.grad_norm
        norm: Any = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, dtype=torch.float32)))
        total: Tensor = norm.full_tensor() if _sharded(norm) else norm
        fine = total.isfinite() if bad is None else total.isfinite() & (bad == 0)
        if fine:
            if self.clip:
                torch.nn.utils.clip_grads_with_norm_(self._named.values(), self.clip, norm)
            for optimizer in self.optimizers:
                optimizer.step()
        return total

    def _states(self) -> dict[str, Any]:
        return {
            f"optimizer.{number}.{key}.{name}": value
            for number, optimizer in enumerate(self.optimizers)
            for name, parameter in self._named.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """The tensors of the state by "optimizer.<number>.<what it is>.<parameter>": those that the optimizer goes on
        with."""
        return {key: value for key, value in self._states().items() if isinstance(value, Tensor)}

    def state_values(self) -> dict[str, Any]:
        """The rest of the state, fit for JSON. Options of the groups are the config's, and so are not among it: a run
        may be resumed with another weight decay."""
        states = self._states()
        return {
            "optimizer": self.kind,
            "rate": self.rate,
            "tensors": sorted(key for key, value in states.items() if isinstance(value, Tensor)),
            "values": {key: value for key, value in states.items() if not isinstance(value, Tensor)},
        }

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Takes up the state that `state_tensors` (gathered) and `state_values` returned, in a model of the same
        names and shapes, sharded in any way. The weights must be loaded before. Other options of "adamw" are converted
        as `fastllm.optim.AdamW.load_state_dict` does.

        Raises:
            ValueError: for another optimizer, a tensor that is missing or too many, and a shape that does not fit,
                naming the parameter.
        """
        if values["optimizer"] != self.kind:
            raise ValueError(f"the state is that of optimizer {values['optimizer']!r}, not of {self.kind!r}")
        for key in sorted(set(values["tensors"]) - set(tensors)):
            raise ValueError(f"the optimizer's state lacks {_readable(key)}")
        for key in sorted(set(tensors) - set(values["tensors"])):
            raise ValueError(f"the optimizer's state has {_readable(key)}, which is not among what was saved")
        states: list[dict[str, dict[str, Any]]] = [{} for _ in self.optimizers]
        for key, value in {**tensors, **values["values"]}.items():
            _, number, what, name = key.split(".", 3)
            if name not in self._named:
                raise ValueError(f"the optimizer's state has {_readable(key)}, which the model does not train")
            if isinstance(value, Tensor):
                check_shape(_readable(key), value, self._named[name], _shape(what, self._named[name]))
                value = place(value, self._named[name])
            states[int(number)].setdefault(name, {})[what] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
            whole = optimizer.state_dict()
            whole["state"] = {numbers[id(self._named[name])]: entry for name, entry in state.items()}
            optimizer.load_state_dict(whole)
        self.set_rate(values["rate"])


def _is_master(key: str) -> bool:
    return key.split(".", 3)[2] in MASTER_KEYS.values()


def _readable(key: str) -> str:
    """ "optimizer.0.exp_avg.head.weight" as "exp_avg of head.weight"."""
    parts = key.split(".", 3)
    if len(parts) < 4:
        raise ValueError(f"{key!r} is not a name of an optimizer's state")
    return f"{parts[2]} of {parts[3]}"


def _shape(what: str, parameter: Tensor) -> tuple[int, ...]:
    shape = tuple(parameter.shape)
    if what == "step":
        return ()
    if what.endswith("_scale"):  # of 8-bit moments
        return (-(-parameter.numel() // BLOCK),)
    if what == "row_var":  # Adafactor's
        return (*shape[:-1], 1)
    return (*shape[:-2], 1, shape[-1]) if what == "col_var" else shape


def check_shape(what: str, value: Tensor, parameter: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError if a saved tensor has another shape than this."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)} for weights of {tuple(parameter.shape)}")


def _sharded(x: Tensor) -> bool:
    return hasattr(x, "full_tensor")  # a DTensor, whose module need not be there


def local(x: Any) -> Tensor:
    """This rank's part of a sharded tensor; others as they are."""
    return x.to_local() if _sharded(x) else x


def gather(tensors: Mapping[str, Any], keep: bool = True) -> dict[str, Tensor]:
    """Copies of whole tensors on the CPU, by the same names; if any is sharded, all ranks must call this.

    Args:
        tensors: whole or sharded.
        keep: whether this rank wants them; else it only takes part, one tensor at a time, and gets nothing.
    """
    found = {}
    for name, x in tensors.items():
        x = x.detach()
        if _sharded(x):
            # Neither gloo nor NCCL sends int16.
            x = x.int().full_tensor().short() if x.dtype == torch.int16 else x.full_tensor()
        if keep:
            found[name] = x.to("cpu", copy=True)
    return found


def place(x: Tensor, parameter: Any) -> Tensor:
    """A copy of a whole tensor where `parameter` is, and sharded as it is; of a number, one on each rank."""
    x = x.detach().to(parameter.device)
    if _sharded(parameter) and x.ndim:
        from torch.distributed.tensor import distribute_tensor

        x = distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return x.clone()  # a part would keep the whole in memory

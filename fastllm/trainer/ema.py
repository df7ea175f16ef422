"""A moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fastllm.trainer.optimizers import check_shape, local, place


class EMA:
    """The exponential moving average of the weights that are trained (Polyak and Juditsky, 1992; Tarvainen and Valpola,
    "Mean teachers", 2017).

        average <- average + (1 - d) (weight - average),    d = min(decay, (1 + t) / (10 + t))

    at update t = 0, 1, ..: the first averages are short, so that the first weights are soon forgotten. Averages are in
    float32 at least; an update needs memory for all of them once more, and waits for nothing.

    Args:
        model: as it is trained: on its device, and sharded already if it will be.
        decay: in [0, 1); weights of the last 1 / (1 - decay) steps count most.

    Raises:
        ValueError: for a decay out of range.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be in [0, 1), got {decay}")
        self.model, self.decay = model, decay
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._averages = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name, weight in self._weights.items()
        }
        self._updates = torch.zeros((), dtype=torch.int64, device=next(iter(self._weights.values())).device)

    @torch.no_grad()
    def update(self, bad: Tensor | None = None) -> None:
        """Moves the averages towards the weights; not at all where `bad`, 0-d on the device, is not zero."""
        good = torch.ones_like(self._updates) if bad is None else (bad == 0).to(self._updates.dtype)
        count = self._updates.double()
        share = ((1 - ((1 + count) / (10 + count)).clamp(max=self.decay)) * good).float()
        averages = list(map(local, self._averages.values()))
        change = torch._foreach_sub(list(map(local, self._weights.values())), averages)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(averages, change)
        self._updates += good

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model has the averages for weights; behind, its own, to the last bit."""
        kept = {name: local(weight).detach().clone() for name, weight in self._weights.items()}
        self._set({name: local(average) for name, average in self._averages.items()})
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        # What FSDP2 gathered of earlier weights is stale.
        for module in self.model.modules():
            if (reshard := getattr(module, "reshard", None)) is not None:
                reshard()
        for name, weight in self._weights.items():
            local(weight).copy_(values[name])

    def tensors(self) -> dict[str, Tensor]:
        """The state: "ema.<parameter>", and "ema.updates", their number: the tensors that this goes on with."""
        found = {f"ema.{name}": average for name, average in self._averages.items()}
        return {**found, "ema.updates": self._updates}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `tensors` returned, gathered.

        Raises:
            ValueError: for a tensor that is missing or too many, and a shape that does not fit, naming it.
        """
        known = self.tensors()
        for name in sorted(known.keys() ^ tensors.keys()):
            raise ValueError(f"the averages lack {name}" if name in known else f"the averages have {name} too many")
        for name, mine in known.items():
            check_shape(name, tensors[name], mine, tuple(mine.shape))
        for name, mine in known.items():
            local(mine).copy_(local(place(tensors[name], mine)))

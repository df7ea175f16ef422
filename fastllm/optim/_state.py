"""What AdamW keeps for a parameter, and how it is made from what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.ops.adamw import BLOCK, dequantize, join, quantize, split
from fastllm.tracing import traced

SMALL = 2**16  # elements
SHORT = (torch.bfloat16, torch.float16)
MASTER_KEYS = {"float32": "master", "remainder": "remainder"}


class Options(NamedTuple):
    """What decides the state of a group's parameters, as `AdamW` takes it."""

    master_weights: str | None
    moment_dtype: torch.dtype | None
    amsgrad: bool
    step_on_device: bool


def moment_dtype(param: Tensor, options: Options) -> torch.dtype:
    if options.moment_dtype is not None and not param.is_complex():
        return options.moment_dtype
    return torch.float32 if options.master_weights and param.dtype in SHORT else param.dtype


def lacks_master(param: Tensor, state: Mapping[str, Tensor], options: Options) -> bool:
    """Whether a master is wanted that is not there."""
    return (
        options.master_weights is not None and param.dtype in SHORT and MASTER_KEYS[options.master_weights] not in state
    )


def fill(params: Sequence[Tensor], states: Sequence[dict[str, Tensor]], options: Options) -> None:
    """Adds what is missing, as it is before the first step. Everything but step and scales is laid out like `param`."""
    new = [(param, state) for param, state in zip(params, states, strict=True) if "step" not in state]
    steps = zeros(
        [torch.empty((), device=p.device if options.step_on_device else "cpu") for p, _ in new], torch.float32
    )
    for (_, state), step in zip(new, steps, strict=True):
        state["step"] = step
    for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if options.amsgrad else [])):
        for dtype in dict.fromkeys(moment_dtype(param, options) for param, _ in new):
            alike = [(param, state) for param, state in new if moment_dtype(param, options) == dtype]
            for (param, state), moment in zip(alike, zeros([param for param, _ in alike], dtype), strict=True):
                if dtype == torch.uint8:
                    blocks = -(-param.numel() // BLOCK)
                    state[f"{name}_code"] = moment
                    state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
                else:
                    state[name] = moment
    for param, state in zip(params, states, strict=True):
        if lacks_master(param, state, options):
            if options.master_weights == "float32":
                state["master"] = param.detach().to(torch.float32, copy=True)
            else:
                state["remainder"] = torch.zeros_like(param, dtype=torch.int16)


def zeros(likes: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """torch.zeros_like(x, dtype=dtype) of each. Small ones are made empty first and given memory afterwards, so that
    what describes thousands of them lies close together: between their data, a step would take longer to find it than
    to update. Each has memory of its own, so that saving or copying the state of one parameter costs just that."""
    whole = torch.compiler.is_compiling() or traced()

    def first(x: Tensor) -> Tensor:
        if type(x) in (Tensor, torch.nn.Parameter) and x.numel() <= SMALL and x.is_contiguous() and not whole:
            return torch.empty(0, dtype=dtype, device=x.device)
        return torch.zeros_like(x, dtype=dtype)

    found = list(map(first, likes))
    for x, like in zip(found, likes, strict=True):
        if x.shape != like.shape:
            x.resize_(like.shape).zero_()
    return found


def _own(x: Any) -> Any:
    """A tensor that is a part of a larger memory, as checkpoints may hold them, as one with memory of its own."""
    if type(x) is Tensor and x.layout == torch.strided and x.untyped_storage().nbytes() > x.nbytes:
        return x.clone()
    return x


def adopt(param: Tensor, saved: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """The state of `param` from that of a checkpoint, whose options may have been others.

    Moments are converted. A master that is missing is left out, so that the next step starts it from the parameter.
    """
    state: dict[str, Any] = {}
    # torch's load_state_dict casts all it loads: codes are lost then, and masters are what they were before its steps.
    for key in ("exp_avg_code", "exp_avg_sq_code"):
        if key in saved and saved[key].dtype != torch.uint8:
            raise ValueError(
                f"AdamW: {key} was cast to {saved[key].dtype}, as torch.optim.AdamW does on loading, and is lost: "
                "load 8-bit moments into a fastllm.optim.AdamW without moment_dtype first, then that into torch's"
            )
    kept = {"master": torch.float32, "remainder": torch.int16}
    saved = {key: _own(value) for key, value in saved.items() if key not in kept or value.dtype == kept[key]}
    for key, value in saved.items():
        if key == "step":
            device = param.device if options.step_on_device else "cpu"
            step = value if isinstance(value, Tensor) else torch.tensor(float(value))
            state["step"] = step.to(torch.float32).to(device).reshape(())
        elif key not in _OWN:
            state[key] = value.to(param.device) if isinstance(value, Tensor) else value
    dtype = moment_dtype(param, options)
    for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if "max_exp_avg_sq" in saved else [])):
        signed = name == "exp_avg"
        if dtype == torch.uint8:
            if f"{name}_code" in saved:
                code, scale = (saved[f"{name}{suffix}"].to(param.device) for suffix in ("_code", "_scale"))
                if code.stride() != torch.empty_like(param).stride():
                    # Blocks follow the order of memory, and that is another.
                    moment = torch.empty_like(param, dtype=torch.float32).copy_(dequantize(code, scale, signed))
                    code, scale = quantize(moment, signed)
                state[f"{name}_code"], state[f"{name}_scale"] = code, scale
            elif name in saved:
                moment = torch.empty_like(param, dtype=torch.float32).copy_(saved[name])
                state[f"{name}_code"], state[f"{name}_scale"] = quantize(moment, signed)
        elif f"{name}_code" in saved:
            state[name] = dequantize(saved[f"{name}_code"], saved[f"{name}_scale"], signed).to(param.device, dtype)
        elif name in saved:
            state[name] = saved[name].to(device=param.device, dtype=dtype)
    if param.dtype in SHORT and options.master_weights == "float32":
        if "master" in saved:
            state["master"] = saved["master"].to(param.device)
        elif "remainder" in saved and param.dtype == torch.bfloat16:
            state["master"] = join(param.detach(), saved["remainder"].to(param.device))
    elif param.dtype in SHORT and options.master_weights == "remainder":
        if "remainder" in saved:
            state["remainder"] = saved["remainder"].to(param.device)
        elif "master" in saved:
            # Only right if the parameter is what this master rounds to, as it is after loading both.
            weight, remainder = split(saved["master"].to(param.device))
            if traced() or torch.equal(weight, param.detach()):
                state["remainder"] = remainder
    return state


_OWN = {
    "step",
    "master",
    "remainder",
    *(f"{name}{suffix}" for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") for suffix in ("", "_code", "_scale")),
}

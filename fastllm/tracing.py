"""What can be known of a tensor while somebody traces or transforms the call that it is in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_MODES = (torch._C.DispatchKey.Python, torch._C.DispatchKey.PreDispatch, torch._C.DispatchKey.Functionalize)


def traced() -> bool:
    """Whether every op is looked at: by FakeTensorMode, whose tensors hold no numbers, by make_fx, which must see what
    is written, or by any other mode."""
    return any(map(torch._C._dispatch_tls_is_dispatch_key_included, _MODES))


def host_values(x: Tensor) -> Tensor | None:
    """`x` as the host may read it. None on a GPU, where it would have to wait, and for what is being traced, which has
    no values."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or traced():
        return None
    x = unwrapped(x)
    return None if isinstance(x, FakeTensor) else x


def lasting() -> bool:
    """Whether a tensor that is made now is one like any other afterwards, and may be kept: nobody exports the call,
    transforms it, or has put a mode of tracing around it."""
    return not (torch.compiler.is_exporting() or traced() or transformed())


def transformed() -> bool:
    """Whether the call is inside of a transformation of torch.func, or of forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unwrapped(x: Tensor) -> Tensor:
    """The whole batch of vmap and the values that torch.func.grad is at."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x

"""What can be known of a tensor while somebody traces or transforms the call that it is in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_MODES = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))
_KEYS = (torch._C.DispatchKey.PreDispatch, torch._C.DispatchKey.Functionalize)


def traced() -> bool:
    """Whether the ops are taken down instead of computed, or as well: by FakeTensorMode, whose tensors hold no numbers,
    or by make_fx and its like, which must see what is written. Other modes only watch. (Not for a compiled graph.)"""
    if torch._C._len_torch_dispatch_stack() and any(map(torch._C._get_dispatch_mode, _MODES)):
        return True
    return any(map(torch._C._dispatch_tls_is_dispatch_key_included, _KEYS))


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
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return not (traced() or transformed())


def transformed() -> bool:
    """Whether the call is inside of a transformation of torch.func, or of forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def batched(x: Tensor) -> bool:
    """Whether `x` is several tensors to whoever called: inside of vmap, or as autograd's is_grads_batched has them."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def unwrapped(x: Tensor) -> Tensor:
    """The whole batch of vmap and the values that torch.func.grad is at."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x

"""fastllm: fused kernels for training language models with PyTorch.

from fastllm import nn, ops     # drop-in for torch.nn modules and torch.nn.functional functions
fastllm.patch(model)            # the same in a model that exists already: print what it returns
fastllm.explain(ops.rms_norm, x, (x.shape[-1],))   # which implementation runs, and why
"""

from fastllm import _lazy, nn, ops, optim
from fastllm._version import __version__
from fastllm.backends import BackendUnavailable, FallbackWarning, explain, use_backend
from fastllm.patching import PatchError, PatchReport, compare, patch, patched

__all__ = [
    "BackendUnavailable",
    "FallbackWarning",
    "PatchError",
    "PatchReport",
    "__version__",
    "compare",
    "explain",
    "nn",
    "ops",
    "optim",
    "patch",
    "patched",
    "use_backend",
]

__getattr__, __dir__ = _lazy.submodules(__name__, "compat", "data", "models", "trainer")

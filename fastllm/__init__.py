"""fastllm: fused kernels for training language models with PyTorch.

from fastllm import nn, ops     # drop-in for torch.nn modules and torch.nn.functional functions
fastllm.explain(ops.rms_norm, x, (x.shape[-1],))   # which implementation runs, and why
"""

from fastllm import nn, ops, optim
from fastllm._version import __version__
from fastllm.backends import BackendUnavailable, FallbackWarning, explain, use_backend

__all__ = ["BackendUnavailable", "FallbackWarning", "__version__", "explain", "nn", "ops", "optim", "use_backend"]

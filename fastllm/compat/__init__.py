"""The interfaces of other packages, over fastllm's ops."""

from fastllm import _lazy

__getattr__, __dir__ = _lazy.submodules(__name__, "flash_attn", "lightning", "transformers")

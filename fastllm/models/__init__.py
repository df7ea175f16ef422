"""Models over `fastllm.nn`, small enough to read."""

from fastllm.models.gpt import GPT, GPTConfig, KVCache
from fastllm.models.sampling import sample_token

__all__ = ["GPT", "GPTConfig", "KVCache", "sample_token"]

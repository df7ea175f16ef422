"""Models over `fastllm.nn` and `fastllm.ops`, small enough to read: GPT, BERT, the encoder-decoder Transformer, and
`fastllm.models.word2vec`."""

from fastllm.models.beam import Hypotheses, beam_search
from fastllm.models.bert import Bert, BertConfig, mask_tokens
from fastllm.models.gpt import GPT, GPTConfig
from fastllm.models.hf import load_hf, save_hf
from fastllm.models.layout import KVCache
from fastllm.models.sampling import sample_token
from fastllm.models.transformer import Transformer, TransformerConfig

__all__ = [
    "GPT",
    "Bert",
    "BertConfig",
    "GPTConfig",
    "Hypotheses",
    "KVCache",
    "Transformer",
    "TransformerConfig",
    "beam_search",
    "load_hf",
    "mask_tokens",
    "sample_token",
    "save_hf",
]

"""Text to tokens to batches."""

from fastllm.data.text import decode, encode, load_tokenizer, read_text, split_text, topics_text, train_tokenizer
from fastllm.data.windows import Dataset, RandomWindows, SequentialWindows

__all__ = [
    "Dataset",
    "RandomWindows",
    "SequentialWindows",
    "decode",
    "encode",
    "load_tokenizer",
    "read_text",
    "split_text",
    "topics_text",
    "train_tokenizer",
]

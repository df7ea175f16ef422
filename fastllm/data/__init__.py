"""Text to tokens to batches."""

from fastllm.data.text import END_OF_TEXT, read_text, split_text, topics_text
from fastllm.data.tokenizer import (
    BYTES,
    decode,
    document_token,
    encode,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from fastllm.data.windows import Dataset, RandomWindows, SequentialWindows

__all__ = [
    "BYTES",
    "END_OF_TEXT",
    "Dataset",
    "RandomWindows",
    "SequentialWindows",
    "decode",
    "document_token",
    "encode",
    "load_tokenizer",
    "read_text",
    "split_text",
    "topics_text",
    "train_tokenizer",
    "vocabulary_size",
]

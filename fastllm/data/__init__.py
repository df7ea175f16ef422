"""Text to tokens to batches."""

from fastllm.data.examples import AnswerRows, LabelledRows, MaskedWindows, PairRows
from fastllm.data.preprocess import (
    DocumentFrequency,
    Normalize,
    Pipeline,
    Segment,
    StopWords,
    read_words,
    stop_words,
)
from fastllm.data.sources import Document, Row, read_documents, read_rows
from fastllm.data.text import END_OF_TEXT, read_text, split_text, topics_text
from fastllm.data.token_file import TokenFile, TokenStream, open_tokens, tokenizer_hash, write_tokens
from fastllm.data.tokenizer import (
    BYTES,
    decode,
    document_token,
    encode,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from fastllm.data.windows import Dataset, RandomWindows, SequentialWindows, ShuffledWindows

__all__ = [
    "BYTES",
    "END_OF_TEXT",
    "AnswerRows",
    "Dataset",
    "Document",
    "DocumentFrequency",
    "LabelledRows",
    "MaskedWindows",
    "Normalize",
    "PairRows",
    "Pipeline",
    "RandomWindows",
    "Row",
    "Segment",
    "SequentialWindows",
    "ShuffledWindows",
    "StopWords",
    "TokenFile",
    "TokenStream",
    "decode",
    "document_token",
    "encode",
    "load_tokenizer",
    "open_tokens",
    "read_documents",
    "read_rows",
    "read_text",
    "read_words",
    "split_text",
    "stop_words",
    "tokenizer_hash",
    "topics_text",
    "train_tokenizer",
    "vocabulary_size",
    "write_tokens",
]

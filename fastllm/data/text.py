"""Text files and byte-level BPE tokenizers (Hugging Face's `tokenizers`, extra [train])."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastllm._extras import require

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
BYTES = 256
_CHUNK = 1 << 20  # characters that are tokenized at a time: bounds the memory


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        FileNotFoundError, IsADirectoryError, ...: as open.
        ValueError: for a file that is empty or not UTF-8, with its name and, for the latter, the offending byte.
    """
    data = Path(path).read_bytes()
    if not data:
        raise ValueError(f"{path} is empty")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}") from None


def topics_text() -> str:
    """English prose that every CPython carries: the language reference behind `help("for")`, about 370,000 characters.

    Topics quote each other at length. A paragraph that was there before is left out, since validation on text that
    was trained on would say nothing.

    Raises:
        ImportError: for a Python that was packaged without `pydoc_data`.
    """
    from pydoc_data.topics import topics

    unique: dict[tuple[str, ...], str] = {}
    for topic in topics.values():
        for paragraph in topic.split("\n\n"):
            # By words: the same paragraph is indented and wrapped differently from topic to topic.
            unique.setdefault(tuple(paragraph.split()), paragraph)
    return "\n\n".join(unique.values())


def split_text(text: str, validation: float) -> tuple[str, str]:
    """Cuts `text` in two: (what to train on, the last `validation` of it, a fraction in (0, 1)).

    Raises:
        ValueError: for a fraction out of range.
    """
    if not 0 < validation < 1:
        raise ValueError(f"the fraction of text to validate on must be in (0, 1), got {validation}")
    cut = len(text) - round(len(text) * validation)
    return text[:cut], text[cut:]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer, which encodes any text without loss.

    Args:
        texts: what to train on.
        vocab_size: how many tokens at most, among them the 256 bytes and `<|endoftext|>`; a short text yields fewer.

    Returns:
        A `tokenizers.Tokenizer`; `.save(path)` writes one JSON file that `load_tokenizer` reads.

    Raises:
        ImportError: without the extra [train].
        ValueError: for a vocabulary that the bytes alone would not fit into.
    """
    if vocab_size < BYTES + 1:
        raise ValueError(f"vocab_size must be at least {BYTES + 1} (bytes and {END_OF_TEXT}), got {vocab_size}")
    tokenizers = require("tokenizers", "train")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer's JSON file.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a file that is no tokenizer.
    """
    text = read_text(path)
    try:
        return require("tokenizers", "train").Tokenizer.from_str(text)
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    """The tokens of `text`, (n,) int32. `<|endoftext|>` in the text becomes its own token."""
    chunks = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    return torch.tensor(
        [token for encoding in tokenizer.encode_batch(chunks) for token in encoding.ids], dtype=torch.int32
    )


def decode(tokenizer: Tokenizer, tokens: Tensor) -> str:
    """The text of (n,) tokens, special ones included; bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

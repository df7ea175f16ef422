"""Tokenizers (Hugging Face's `tokenizers`, extra [train]): byte-level BPE of our own, and others from their files.

Text is encoded as it is: nothing is cut off, filled up or put around it, whatever a tokenizer's file asks for.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastllm._extras import require
from fastllm.data.text import END_OF_TEXT, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES = 256
LARGEST_VOCABULARY = 1 << 24
"""What `train_tokenizer` takes at most: `tokenizers` reserves the memory for all of it first."""

# Words as GPT-2 cuts them, but none is longer than 128 characters: the time that BPE takes to learn from a word grows
# with the square of its length, and a text without blanks (DNA, base64, minified code) would be one.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}{1,128}| ?\p{N}{1,128}| ?[^\s\p{L}\p{N}]{1,128}|\s{1,128}(?!\S)|\s{1,128}"

_CHUNK = 1 << 17  # characters that are encoded at a time, and
_BATCH = 16  # how many of these at once: both bound the memory
_OVERLAP = 1 << 11  # characters that neighbours share, to see that they agree
_LONG = 1 << 22  # characters: below it, training shows no progress
_PATIENCE = 2.0  # seconds: before it, encoding shows none

_told: set[int] = set()  # of tokenizers that change text, each of which is told of once


@contextlib.contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Turns what `tokenizers` raises, nothing narrower than Exception or a panic of Rust's, into ValueError."""
    try:
        yield
    except (ImportError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit, ValueError):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer, which encodes any text without loss.

    Takes time in proportion to the text, whatever is in it: no word is longer than 128 characters. On a terminal, long
    work shows its progress on stderr.

    Args:
        texts: what to train on. `<|endoftext|>` in them is a token of its own from the start.
        vocab_size: how many tokens at most, among them the 256 bytes and `<|endoftext|>`; a short text yields fewer.

    Returns:
        A `tokenizers.Tokenizer`; `.save(path)` writes one JSON file that `load_tokenizer` reads.

    Raises:
        ImportError: without the extra [train].
        ValueError: for a vocabulary that the bytes alone would not fit into, or of more than 2^24 tokens.
    """
    if not BYTES + 1 <= vocab_size <= LARGEST_VOCABULARY:
        raise ValueError(
            f"vocab_size must be at least {BYTES + 1} (bytes and {END_OF_TEXT}) and at most {LARGEST_VOCABULARY}, got "
            f"{vocab_size}"
        )
    tokenizers = require("tokenizers", "train")
    words = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = words.Sequence(
        [words.Split(tokenizers.Regex(_WORDS), "isolated"), words.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    long = not isinstance(texts, (list, tuple)) or sum(map(len, texts)) > _LONG
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=words.ByteLevel.alphabet(),
        show_progress=long and sys.stderr is not None and sys.stderr.isatty(),
    )
    with _errors_of("a tokenizer cannot be trained on this text"):
        tokenizer.train_from_iterator(_training_pieces(texts), trainer)
    return tokenizer


def _training_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces that bound the memory, cut in front of a blank where there is one."""
    for text in texts:
        for document in text.split(END_OF_TEXT):
            start = 0
            while start < len(document):
                end = start + _CHUNK
                if end < len(document):
                    blank = max(document.rfind(" ", start + 1, end), document.rfind("\n", start + 1, end))
                    end = blank if blank > 0 else end
                yield document[start:end]
                start = end


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer's JSON file.

    What would keep it from encoding text as it is, is taken out, with a warning that names it: truncation, padding,
    tokens put around every text (<s>, </s>), and BPE dropout, which is random. Save it, and it is gone for good.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a file that is no tokenizer.
    """
    text = read_text(path)
    with _errors_of(f"{path} is not a tokenizer"):
        tokenizer = require("tokenizers", "train").Tokenizer.from_str(text)
    if asked := _plainly(tokenizer):
        warnings.warn(f"{path} asks for {', '.join(asked)}: not done here, text is encoded as it is", stacklevel=2)
    return tokenizer


def _dropout(tokenizer: Tokenizer) -> float | None:
    return getattr(tokenizer.model, "dropout", None)


def _plainly(tokenizer: Tokenizer) -> list[str]:
    """Makes `tokenizer` encode text as it is; says what it would have done to it."""
    asked = []
    if tokenizer.truncation is not None:
        asked.append(f"truncation to {tokenizer.truncation['max_length']} tokens")
        tokenizer.no_truncation()
    if tokenizer.padding is not None:
        asked.append("padding")
        tokenizer.no_padding()
    if tokenizer.num_special_tokens_to_add(is_pair=False):
        around = [tokenizer.id_to_token(token) for token in tokenizer.encode("").ids]
        asked.append(f"{' and '.join(map(str, around))} around every text")
        tokenizer.post_processor = None
    if _dropout(tokenizer):
        asked.append(f"BPE dropout of {_dropout(tokenizer)}")
        tokenizer.model.dropout = None
    return asked


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, or a copy of it that encodes text as it is."""
    if tokenizer.truncation is None and tokenizer.padding is None and not _dropout(tokenizer):
        return tokenizer
    plain = require("tokenizers", "train").Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = tokenizer.encode_special_tokens  # which no file keeps
    _plainly(plain)
    return plain


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """How many tokens a model of this tokenizer must know: the largest token + 1, whatever holes there are below.

    Raises:
        ValueError: for a tokenizer without tokens, or one whose largest does not fit into 31 bits.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= largest < 2**31 - 1:
        raise ValueError(f"a tokenizer must have tokens from 0 to 2^31 - 2, the largest of this one is {largest}")
    return largest + 1


def document_token(tokenizer: Tokenizer) -> int | None:
    """The token that `<|endoftext|>` becomes in a text, or None where it is a text like any other."""
    tokens = _plain(tokenizer).encode(END_OF_TEXT, add_special_tokens=False).ids
    return tokens[0] if tokens == [tokenizer.token_to_id(END_OF_TEXT)] else None


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    """The tokens of `text`, (n,) int32: those that the tokenizer gives for it in one piece, in bounded memory.

    Nothing is cut off, filled up or put around it, whatever the tokenizer is set to. `<|endoftext|>` in the text
    becomes its own token, and so does every other special token of the tokenizer. One that gives another text back
    (lower case, characters that it does not know) is warned of once. On a terminal, long work shows its progress on
    stderr.

    Raises:
        ValueError: for text that is not valid Unicode, or that the tokenizer refuses.
    """
    tokenizer = _plain(tokenizer)
    bar = require("tqdm", "train").tqdm(
        total=len(text), desc="encode", unit="char", unit_scale=True, delay=_PATIENCE, disable=None, dynamic_ncols=True
    )
    parts = [torch.empty(0, dtype=torch.int32)]
    done, told = 0, False
    with bar, _errors_of("the tokenizer cannot encode this text"):
        try:
            for tokens, end in _encoded(tokenizer, text):
                told = told or _tell_of_changes(tokenizer, text[done:end], tokens)
                parts.append(torch.tensor(tokens, dtype=torch.int32))
                bar.update(end - done)
                done = end
        except TypeError:
            for place, character in enumerate(text):
                if "\ud800" <= character <= "\udfff":
                    raise ValueError(f"the text is not UTF-8: {character!r} at character {place}") from None
            raise
    return torch.cat(parts)


class _Piece:
    """The tokens of text[start:end], where in the text each begins and ends, and the number of its word."""

    def __init__(self, encoding: Any, start: int, end: int):
        self.start, self.end = start, end
        self.ids, self.spans, self.words = encoding.ids, encoding.offsets, encoding.word_ids

    def first(self, place: int) -> int:
        """The number of the first token that begins at `place` or later."""
        return bisect_left(self.spans, place - self.start, key=lambda span: span[0])

    def take(self, low: int, high: int) -> tuple[list[int], int]:
        """The tokens that begin in text[low:high], and where the last of them ends, if that is further."""
        first, end = self.first(low), self.first(high)
        return self.ids[first:end], max(
            [high, *(self.start + last for _, last in self.spans[max(first, end - 1) : end])]
        )

    def between(self, low: int, high: int) -> list[tuple[int, int, int, bool]]:
        """Tokens that lie in text[low:high]: each with its place, and whether it goes on with the word before it."""
        found = (
            (
                self.ids[i],
                self.spans[i][0] + self.start,
                self.spans[i][1] + self.start,
                i > 0 and self.words[i] == self.words[i - 1],
            )
            for i in range(self.first(low), self.first(high))
        )
        return [token for token in found if token[2] <= high]


def _windows(tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, _Piece]]:
    """Yields chunks of the text, each with where it begins, encoded with more text at both ends."""
    borders = range(0, max(1, len(text)), _CHUNK)
    for number in range(0, len(borders), _BATCH):
        some = borders[number : number + _BATCH]
        places = [(max(0, border - _OVERLAP), min(len(text), border + _CHUNK + _OVERLAP)) for border in some]
        encodings = tokenizer.encode_batch([text[start:end] for start, end in places], add_special_tokens=False)
        for border, encoding, place in zip(some, encodings, places, strict=True):
            yield border, _Piece(encoding, *place)


def _encoded(tokenizer: Tokenizer, text: str) -> Iterator[tuple[list[int], int]]:
    """Yields the tokens of the text, some at a time, each time with the place up to which they go.

    Two neighbouring chunks are joined where they have the same tokens of the same words at the same places all around
    the border, far from the ends of either: if they can, where a word begins. Where they have not (say, because words
    of a text without blanks are counted off from where it begins), the second is begun again at a token of the first,
    one from which it comes to the same tokens. A Unigram model weighs a word as a whole, up to its far end: there, only
    the beginning of a word will do.
    """
    by_word = type(tokenizer.model).__name__ == "Unigram"

    def piece(start: int, end: int) -> _Piece:
        return _Piece(tokenizer.encode(text[start:end], add_special_tokens=False), start, end)

    if tokenizer.normalizer is not None and b'"Strip"' in tokenizer.normalizer.__getstate__():
        yield tokenizer.encode(text, add_special_tokens=False).ids, len(text)  # it would strip every piece
        return
    windows = _windows(tokenizer, text)
    begun, last = next(windows)
    for border, following in windows:
        low, high = border - _OVERLAP // 2, min(len(text), border + _OVERLAP // 2)
        around = last.between(low, high)
        word = next((start for _, start, _, goes_on in around if start >= border and not goes_on), None)
        if not around or (by_word and word is None):  # nothing to go by
            agreed = False
        else:
            agreed = around == following.between(low, high)
        if not agreed and around and not by_word:
            tokens = last.between(border, high)
            for start in sorted({token[1] for token in last.between(low, border)}, reverse=True):
                if tokens and piece(start, min(len(text), border + _OVERLAP)).between(border, high) == tokens:
                    following, agreed = piece(start, following.end), True
                    break
        if not agreed:  # tokens depend on text further away: no border is safe
            last = piece(last.start, len(text))
            break
        join = border if word is None else word
        yield last.take(begun, join)
        begun, last = join, following
    yield last.ids[last.first(begun) :], len(text)


def _tell_of_changes(tokenizer: Tokenizer, text: str, tokens: list[int]) -> bool:
    """Warns once of a tokenizer that gives other text back than it was given; blanks at the ends do not count. Returns
    whether this one does."""
    back = tokenizer.decode(tokens, skip_special_tokens=False)
    if back == text or back.strip() == text.strip():
        return False
    known = hash(tokenizer.to_str())
    if known in _told:
        return True
    _told.add(known)
    text, back = text.lstrip(), back.lstrip()
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    before, after = (repr(string[max(0, at - 10) : at + 20]) for string in (text, back))
    warnings.warn(f"the tokenizer does not keep text as it is: {before} comes back as {after}", stacklevel=3)
    return True


def decode(tokenizer: Tokenizer, tokens: Tensor) -> str:
    """The text of (n,) tokens, special ones included; bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

"""Tokenizers (Hugging Face's `tokenizers`, extra [train]): byte-level BPE of our own, and others from their files.

Text is encoded as it is: nothing is cut off, filled up or put around it, whatever a tokenizer's file asks for.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
import warnings
from bisect import bisect_left
from collections import deque
from collections.abc import Generator, Iterable, Iterator
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
_PIECE = 1 << 13  # characters that are encoded at a time where the text may be cut,
_PIECES = 1 << 8  # how many of these at once,
_AROUND = 251  # and characters around a cut that show whether it may; prime, to catch who counts them off
_BLANK = re.compile(r"(?<=\S)\s(?=\S)")
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


KINDS = ("byte_bpe", "bpe", "unigram", "wordpiece")


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: str = "byte_bpe") -> Tokenizer:
    """Trains a tokenizer: statistics of the texts say which pieces of words are tokens.

    | kind | tokens | text that comes back |
    |---|---|---|
    | byte_bpe | byte pairs that occurred most (Radford et al., 2019) | any, as it was |
    | bpe | pairs of characters that occurred most (Sennrich et al., 2016) | all but unknown characters |
    | unigram | the likeliest pieces (Kudo, 2018) | all but unknown characters |
    | wordpiece | pairs of characters (Schuster and Nakajima, 2012); BERT's special tokens | blanks are lost, too |

    Takes time in proportion to the text, whatever is in it: no word is longer than 128 characters. On a terminal, long
    work shows its progress on stderr.

    Args:
        texts: what to train on. `<|endoftext|>` in them is a token of its own from the start.
        vocab_size: how many tokens at most, among them the 256 bytes and `<|endoftext|>`; a short text yields fewer.
            Where tokens are made of characters, there may be no room for rare ones: to bpe and wordpiece these are
            unknown, for unigram that is an error.
        kind: byte_bpe, bpe, unigram or wordpiece.

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
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    tokenizers = require("tokenizers", "train")
    words, models, trainers = tokenizers.pre_tokenizers, tokenizers.models, tokenizers.trainers
    long = not isinstance(texts, (list, tuple)) or sum(map(len, texts)) > _LONG
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "special_tokens": [END_OF_TEXT],
        "show_progress": long and sys.stderr is not None and sys.stderr.isatty(),
    }
    split = words.Split(tokenizers.Regex(_WORDS), "isolated")
    if kind == "byte_bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = words.Sequence([split, words.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**options, initial_alphabet=words.ByteLevel.alphabet())
    elif kind == "wordpiece":
        options["special_tokens"] += ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        parts = words.Split(tokenizers.Regex(r"[^\n]{1,100}"), "isolated")  # more would be unknown
        tokenizer.pre_tokenizer = words.Sequence([words.BertPreTokenizer(), parts])
        tokenizer.decoder = tokenizers.decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(
            **options, limit_alphabet=(vocab_size - 6) // 2
        )  # each also inside of words
    else:
        options["special_tokens"] += ["<unk>"]
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>") if kind == "bpe" else models.Unigram())
        tokenizer.pre_tokenizer = words.Sequence([split, words.Metaspace(prepend_scheme="never", split=False)])
        tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="never", split=False)
        trainer = (
            trainers.BpeTrainer(**options, limit_alphabet=vocab_size - 2)
            if kind == "bpe"
            else trainers.UnigramTrainer(**options, unk_token="<unk>")
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
    """The tokens of `text`, (n,) int32: those that the tokenizer gives for it in one piece, in bounded memory. (But for
    what hangs on text a thousand characters away, say a special token that takes as many blanks before it along.)

    Nothing is cut off, filled up or put around it, whatever the tokenizer is set to. `<|endoftext|>` in the text
    becomes its own token, and so does every other special token of the tokenizer. One that gives another text back
    (lower case, characters that it does not know) is warned of once. On a terminal, long work shows its progress on
    stderr.

    Raises:
        ValueError: for text that is not valid Unicode, or that the tokenizer refuses.
    """
    bar = require("tqdm", "train").tqdm(
        total=len(text), desc="encode", unit="char", unit_scale=True, delay=_PATIENCE, disable=None, dynamic_ncols=True
    )
    parts = [torch.empty(0, dtype=torch.int32)]
    with bar:
        for tokens, characters in encode_parts(tokenizer, [text]):
            if tokens and max(tokens) >= 2**31:
                raise ValueError(f"the tokenizer has a token {max(tokens)}, which takes more than 31 bits")
            parts.append(torch.tensor(tokens, dtype=torch.int32))
            bar.update(characters)
    return torch.cat(parts)


def encode_parts(tokenizer: Tokenizer, parts: Iterable[str], where: str = "") -> Iterator[tuple[list[int], int]]:
    """The tokens that `encode` gives for "".join(parts), some at a time, each time with how many characters they are.

    Parts are read as they are needed, and forgotten: the text may be larger than memory.

    Raises:
        ValueError: as `encode`; the message begins with `where`.
    """
    tokenizer, text = _plain(tokenizer), _Text(parts)
    done, told = 0, False
    with _errors_of(f"{where}the tokenizer cannot encode this text"):
        try:
            for tokens, end in _encoded(tokenizer, text):
                told = told or (done > 0 and _keeps_text(tokenizer))
                told = told or _tell_of_changes(tokenizer, text.cut(done, end), tokens)
                yield tokens, end - done
                done = end
        except TypeError:
            for start, part in text.parts:
                check_unicode(part, where, start)
            raise


def check_unicode(text: str, where: str = "", start: int = 0) -> None:
    """Raises ValueError for half a surrogate pair, which JSON's escapes can spell, at `start` + its place in `text`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"{text[error.start]!r} at character {start + error.start}"
        raise ValueError(f"{where}the text is not UTF-8: {place}") from None


class _Text:
    """A text in parts, of which no more is kept than is asked for."""

    def __init__(self, parts: Iterable[str]):
        self.parts: deque[tuple[int, str]] = deque()  # each with where it begins
        self.end = 0
        self._rest = iter(parts)

    def upto(self, place: int) -> int:
        """Reads on to `place`; returns it, or where the text ends, if that is nearer."""
        while self.end < place and (part := next(self._rest, None)) is not None:
            self.parts.append((self.end, part))
            self.end += len(part)
        return min(place, self.end)

    def cut(self, start: int, end: int) -> str:
        return "".join(part[max(0, start - at) : max(0, end - at)] for at, part in self.parts)

    def forget(self, place: int) -> None:
        """What is before `place` is not asked for again."""
        while self.parts and self.parts[0][0] + len(self.parts[0][1]) <= place:
            self.parts.popleft()


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


def _windows(tokenizer: Tokenizer, text: _Text, begin: int) -> Iterator[tuple[int, _Piece]]:
    """Yields chunks of the text from `begin` on, each with where it begins, encoded with more text at both ends."""
    border = begin
    while border == begin or text.upto(border + 1) > border:
        places: dict[int, tuple[int, int]] = {}
        while len(places) < _BATCH and (border == begin or text.upto(border + 1) > border):
            places[border] = max(begin, border - _OVERLAP), text.upto(border + _CHUNK + _OVERLAP)
            border += _CHUNK
        encodings = tokenizer.encode_batch([text.cut(*place) for place in places.values()], add_special_tokens=False)
        for (start, place), encoding in zip(places.items(), encodings, strict=True):
            yield start, _Piece(encoding, *place)


def _encoded(tokenizer: Tokenizer, text: _Text) -> Iterator[tuple[list[int], int]]:
    """Yields the tokens of the text, some at a time, each time with the place up to which they go."""
    if tokenizer.normalizer is not None and b'"Strip"' in tokenizer.normalizer.__getstate__():
        end = text.upto(sys.maxsize)
        yield tokenizer.encode(text.cut(0, end), add_special_tokens=False).ids, end  # it would strip every piece
        return
    rest = yield from _encoded_at_blanks(tokenizer, text)
    if rest is not None:
        yield from _encoded_with_overlap(tokenizer, text, rest)


def _encoded_at_blanks(tokenizer: Tokenizer, text: _Text) -> Generator[tuple[list[int], int], None, int | None]:
    """As `_encoded`, of short pieces, which are quick: long ones take twice the time and more a character.

    A piece ends in front of a single blank, if what is left and right of it has the same tokens apart as together. Ends
    early, and returns where, when there is no such blank; else returns None.
    """
    begin = 0
    while True:
        places, ended = [begin], False
        while len(places) <= _PIECES and not ended:
            near = places[-1] + _PIECE
            ended = text.upto(near + _OVERLAP + _AROUND) < near + _OVERLAP + _AROUND
            blank = None if ended else _BLANK.search(text.cut(near, near + _OVERLAP))
            if blank is None:
                break
            places.append(near + blank.start())
        sides = [(text.cut(p - _AROUND, p), text.cut(p, p + _AROUND)) for p in places[1:]]
        both = tokenizer.encode_batch([left + right for left, right in sides], add_special_tokens=False)
        alone = tokenizer.encode_batch_fast([side for pair in sides for side in pair], add_special_tokens=False)
        good = 0
        for whole, left, right in zip(both, alone[::2], alone[1::2], strict=True):
            at, words = len(left.ids), whole.word_ids
            if whole.ids != left.ids + right.ids or not 0 < at < len(words) or words[at - 1] == words[at]:
                break
            good += 1
        places = places[: good + 1]
        if ended and good == len(sides):
            places.append(text.end)
        pieces = [text.cut(*place) for place in itertools.pairwise(places)]
        found = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        yield [token for encoding in found for token in encoding.ids], places[-1]
        begin = places[-1]
        text.forget(begin - _OVERLAP)
        if good < len(sides) or (not ended and len(places) <= _PIECES):
            return begin
        if ended:
            return None


def _encoded_with_overlap(tokenizer: Tokenizer, text: _Text, begin: int) -> Iterator[tuple[list[int], int]]:
    """As `_encoded`, from `begin` on, where a piece may begin.

    Two neighbouring chunks are joined where they have the same tokens of the same words at the same places all around
    the border, far from the ends of either: if they can, where a word begins. Where they have not (say, because words
    of a text without blanks are counted off from where it begins), the second is begun again at a token of the first,
    one from which it comes to the same tokens. A Unigram model weighs a word as a whole, up to its far end: there, only
    the beginning of a word will do.
    """
    by_word = type(tokenizer.model).__name__ == "Unigram"

    def piece(start: int, end: int) -> _Piece:
        return _Piece(tokenizer.encode(text.cut(start, end), add_special_tokens=False), start, end)

    windows = _windows(tokenizer, text, begin)
    begun, last = next(windows)
    for border, following in windows:
        low, high = border - _OVERLAP // 2, text.upto(border + _OVERLAP // 2)
        around = last.between(low, high)
        word = next((start for _, start, _, goes_on in around if start >= border and not goes_on), None)
        if not around or (by_word and word is None):  # nothing to go by
            agreed = False
        else:
            agreed = around == following.between(low, high)
        if not agreed and around and not by_word:
            tokens = last.between(border, high)
            for start in sorted({token[1] for token in last.between(low, border)}, reverse=True):
                if not tokens or piece(start, text.upto(border + _OVERLAP)).between(border, high) != tokens:
                    continue
                following = piece(start, following.end)
                agreed = following.between(border, high) == tokens  # with all that is behind it, too
                break
        if not agreed:  # tokens depend on text further away: no border is safe
            last = piece(last.start, text.upto(sys.maxsize))
            break
        join = border if word is None else word
        yield last.take(begun, join)
        begun, last = join, following
        text.forget(last.start)
    yield last.ids[last.first(begun) :], last.end


def _keeps_text(tokenizer: Tokenizer) -> bool:
    """Whether it is by its parts that a tokenizer gives back what it was given: all bytes are tokens, and nothing is
    put in front. (To read it back takes a fifth of the time.)"""
    alphabet = require("tokenizers", "train").pre_tokenizers.ByteLevel.alphabet()
    return (
        tokenizer.normalizer is None
        and type(tokenizer.decoder).__name__ == "ByteLevel"
        and all(tokenizer.token_to_id(byte) is not None for byte in alphabet)
        and not getattr(tokenizer.pre_tokenizer, "add_prefix_space", False)
        and b'"add_prefix_space":true' not in tokenizer.pre_tokenizer.__getstate__()
    )


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
    warnings.warn(f"the tokenizer does not keep text as it is: {before} comes back as {after}", stacklevel=4)
    return True


def decode(tokenizer: Tokenizer, tokens: Tensor) -> str:
    """The text of (n,) tokens, special ones included; bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

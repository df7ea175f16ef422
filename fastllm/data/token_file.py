"""Files of tokens, memory-mapped: a corpus is encoded once, and may be larger than memory.

A file is a header of 256 bytes (`_HEADER`, then zeros), the tokens, and the places where documents begin. All of it is
little-endian. llm.c's and modded-nanogpt's shards are read, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from glob import glob
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastllm._extras import require
from fastllm.data.tokenizer import (
    _PATIENCE,
    _errors_of,
    _plain,
    _tell_of_changes,
    check_unicode,
    encode_parts,
    vocabulary_size,
)

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    from fastllm.data.sources import Document

_MAGIC = b"fastllm\0"
_VERSION = 1
# Magic, version, bytes a token, tokens, documents, where the places of these are in the file, the tokenizer's hash.
_HEADER = struct.Struct("<8sIIQQQ32s")
_HEADER_BYTES = 256
_SHARDS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # magic and version of llm.c: GPT-2's tokens, and Llama 3's
_SHARD_HEADER_BYTES = 1024  # 256 int32: magic, version, number of tokens, zeros
_BATCH = 1 << 20  # characters that are encoded at a time


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of a tokenizer, in hexadecimal: of its JSON with sorted keys and without what `encode` leaves out."""
    text = json.dumps(json.loads(_plain(tokenizer).to_str()), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class TokenStream:
    """A stream of tokens: a file of them, several behind each other, or a part of either.

    Attributes:
        tokens: (n,) uint16 or uint32 in NumPy, memory-mapped; of several files something that is indexed like it, by
            a slice or an array.
        documents: (documents + 1,) uint64, where each begins, and the number of tokens; None where it is not known.
        tokenizer_hash: of the tokenizer that they come from; None where it is not known.
    """

    def __init__(self, tokens: Any, documents: np.ndarray | None, tokenizer_hash: str | None):
        self.tokens, self.documents, self.tokenizer_hash = tokens, documents, tokenizer_hash

    def __len__(self) -> int:
        return len(self.tokens)

    def digest(self) -> str:
        """A hash by which another stream is noticed: of the number of tokens, and some of them from end to end."""
        numpy = require("numpy", "train")
        places = numpy.unique(numpy.linspace(0, len(self) - 1, 1 << 16).astype(numpy.int64))
        head = f"{self.tokenizer_hash} {len(self)} ".encode()
        return hashlib.sha256(head + self.tokens[places].astype("<u4").tobytes()).hexdigest()

    def end_token(self) -> int | None:
        """The token behind each document; None if there is not the same behind all of them, or nobody knows where they
        are."""
        if self.documents is None or len(self.documents) < 2:
            return None
        numpy = require("numpy", "train")
        ends = numpy.unique(numpy.asarray(self.documents[1:], numpy.int64)) - 1
        found = numpy.unique(self.tokens[ends[ends >= 0]])
        return int(found[0]) if len(found) == 1 else None

    def split(self, validation: float) -> tuple[TokenStream, TokenStream]:
        """Views: (what to train on, the last `validation` of the tokens, a fraction in (0, 1)).

        The cut is moved to the nearest border of documents, if it moves by a tenth of the shorter part at most.

        Raises:
            ValueError: for a fraction out of range, or one that leaves a part without tokens.
        """
        if not 0 < validation < 1:
            raise ValueError(f"the fraction of tokens to validate on must be in (0, 1), got {validation}")
        total = len(self)
        cut = total - round(total * validation)
        if not 0 < cut < total:
            raise ValueError(f"{validation} of {total} tokens leaves nothing to train or to validate on")
        if self.documents is None:
            first = second = None
        else:
            numpy = require("numpy", "train")
            after = int(numpy.searchsorted(self.documents, cut))
            border = min((int(self.documents[i]) for i in (after - 1, after)), key=lambda place: abs(place - cut))
            if 0 < border < total and abs(border - cut) * 10 <= min(cut, total - cut):
                cut = border
            after = int(numpy.searchsorted(self.documents, cut))
            first, second = self.documents[:after], self.documents[after:] - numpy.uint64(cut)
            first = numpy.append(first, numpy.uint64(cut))
            if second[0]:  # the rest of the document that is cut
                second = numpy.insert(second, 0, 0)
        return tuple(  # type: ignore[return-value]
            TokenStream(tokens, documents, self.tokenizer_hash)
            for tokens, documents in ((self.tokens[:cut], first), (self.tokens[cut:], second))
        )


class TokenFile(TokenStream):
    """A file that `write_tokens` wrote.

    Raises:
        FileNotFoundError, ...: as open.
        ValueError: for a file that is none, is of another version, is damaged or was cut short, with what is wrong.
    """

    def __init__(self, path: str | Path):
        numpy = require("numpy", "train")
        self.path = path = Path(path)
        with open(path, "rb") as file:
            head = file.read(_HEADER_BYTES)
        if not head.startswith(_MAGIC):
            raise ValueError(f"{path} is no file of tokens: it begins with {head[:8]!r}")
        size = path.stat().st_size
        if len(head) < _HEADER_BYTES:
            raise ValueError(f"{path} has {size} bytes, the header alone has {_HEADER_BYTES}")
        _, version, width, count, documents, place, digest = _HEADER.unpack_from(head)
        if version != _VERSION:
            raise ValueError(f"{path} has version {version} of the format, only {_VERSION} can be read")
        if width not in (2, 4) or count == 0 or not 0 <= place - _HEADER_BYTES - width * count < 8 or place % 8:
            raise ValueError(f"{path} is damaged: {count} tokens of {width} bytes, documents' places at {place}")
        _check_size(path, size, place + 8 * (documents + 1))
        starts = numpy.memmap(path, "<u8", "r", place, (documents + 1,))
        if starts[0] != 0 or starts[-1] != count or not (starts[1:] >= starts[:-1]).all():
            raise ValueError(f"{path} is damaged: its documents' places are not sorted from 0 to {count}")
        super().__init__(numpy.memmap(path, f"<u{width}", "r", _HEADER_BYTES, (count,)), starts, digest.hex())


def _check_size(path: Path, size: int, expected: int) -> None:
    if size != expected:
        what = "was cut short" if size < expected else "is damaged"
        raise ValueError(f"{path} {what}: it has {size} bytes, by its header {expected}")


def _open_shard(path: Path) -> TokenStream:
    """A shard of llm.c or modded-nanogpt, or a file of our own."""
    numpy = require("numpy", "train")
    with open(path, "rb") as file:
        head = file.read(12)
    if head.startswith(_MAGIC) or len(head) < 12:
        return TokenFile(path)
    magic, version, count = struct.unpack("<3i", head)
    if (magic, version) not in _SHARDS:
        raise ValueError(f"{path} is no file of tokens: it begins with {head[:8]!r}")
    dtype = numpy.dtype(_SHARDS[magic, version])
    if count < 1:
        raise ValueError(f"{path} is damaged: {count} tokens")
    _check_size(path, path.stat().st_size, _SHARD_HEADER_BYTES + dtype.itemsize * count)
    return TokenStream(numpy.memmap(path, dtype, "r", _SHARD_HEADER_BYTES, (count,)), None, None)


class _Joined:
    """Arrays behind each other, indexed as one by a slice or by an array of places that are not negative."""

    ndim = 1

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts, self.dtype = [part for part in parts if len(part)], parts[0].dtype
        self.ends = require("numpy", "train").cumsum([len(part) for part in self.parts])
        self.shape = (int(self.ends[-1]) if self.parts else 0,)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return require("numpy", "train").concatenate(self.parts, dtype=dtype)

    def __getitem__(self, key: Any) -> Any:
        numpy = require("numpy", "train")
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                raise ValueError(f"the step of a slice must be 1, got {step}")
            begins = [int(end) - len(part) for end, part in zip(self.ends, self.parts, strict=True)]
            return _Joined(
                [part[max(0, start - at) : max(0, stop - at)] for at, part in zip(begins, self.parts, strict=True)]
            )
        key = numpy.asarray(key)
        found = numpy.empty(key.shape, self.dtype)
        number = numpy.searchsorted(self.ends, key, side="right")
        if key.size and (key.min() < 0 or number.max() == len(self.parts)):
            raise IndexError(f"there are {len(self)} tokens, asked for {key.min()} to {key.max()}")
        for i in numpy.unique(number):
            here = number == i
            found[here] = self.parts[i][key[here] - (self.ends[i] - len(self.parts[i]))]
        return found[()]


def open_tokens(paths: str | Path | Sequence[str | Path]) -> TokenStream:
    """Opens files of tokens, each our own or a shard of llm.c or modded-nanogpt, as one stream.

    Args:
        paths: files and patterns (`shards/train_*.bin`, in the order of their names), one or several.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a file that is none or is damaged, and files that do not belong together.
    """
    numpy = require("numpy", "train")
    files: list[str] = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        found = [str(path)] if Path(path).exists() else sorted(glob(str(path), recursive=True))
        if not found:
            raise FileNotFoundError(f"there is no file {path}")
        files += found
    if not files:
        raise ValueError("open_tokens: no path was given")
    streams = [_open_shard(Path(file)) for file in files]
    if len(streams) == 1:
        return streams[0]
    kinds = [(stream.tokens.dtype.name, stream.tokenizer_hash) for stream in streams]
    for file, kind in zip(files, kinds, strict=True):
        if kind != kinds[0]:
            raise ValueError(f"{file} and {files[0]} differ in dtype or tokenizer: {kind}, {kinds[0]}")
    tokens = _Joined([stream.tokens for stream in streams])
    documents = [stream.documents for stream in streams if stream.documents is not None]
    if len(documents) < len(streams):
        return TokenStream(tokens, None, streams[0].tokenizer_hash)
    ends = tokens.ends.astype(numpy.uint64)
    begins = [own[:-1] + (end - own[-1]) for own, end in zip(documents, ends, strict=True)]
    return TokenStream(tokens, numpy.concatenate([*begins, ends[-1:]]), streams[0].tokenizer_hash)


def is_token_files(paths: Sequence[str]) -> bool:
    """Whether these paths are of files of tokens, by the ending .tokens or .bin of the first."""
    return bool(paths) and str(paths[0]).endswith((".tokens", ".bin"))


class _Tokens(NamedTuple):
    tokens: np.ndarray
    starts: np.ndarray  # of documents, counted from the first of these tokens


class _Encoder(NamedTuple):
    """Encodes short documents, many at once, and long ones in pieces."""

    tokenizer: Tokenizer
    dtype: str
    end: tuple[int, ...]  # the token behind each document, if there is one

    def batch(self, documents: list[tuple[str, str]]) -> _Tokens:
        """The tokens of these (text, place)."""
        numpy = require("numpy", "train")
        with _errors_of(f"{documents[0][1]} to {documents[-1][1]}: the tokenizer cannot encode a text"):
            try:
                encodings = self.tokenizer.encode_batch_fast([text for text, _ in documents], add_special_tokens=False)
            except TypeError:
                for text, place in documents:
                    check_unicode(text, f"{place}: ")
                raise
        ids = [encoding.ids for encoding in encodings]
        ends = numpy.cumsum([len(some) + len(self.end) for some in ids])
        tokens = chain.from_iterable(chain.from_iterable((some, self.end) for some in ids))
        return _Tokens(numpy.fromiter(tokens, self.dtype, count=int(ends[-1])), numpy.concatenate([[0], ends[:-1]]))

    def long(self, parts: Iterable[str], place: str) -> Iterator[_Tokens]:
        """The tokens of one document, some at a time."""
        numpy = require("numpy", "train")
        starts = numpy.zeros(1, numpy.int64)
        for tokens, _ in encode_parts(self.tokenizer, parts, f"{place}: "):
            yield _Tokens(numpy.fromiter(tokens, self.dtype, len(tokens)), starts)
            starts = starts[:0]
        yield _Tokens(numpy.array(self.end, self.dtype), starts)


_encoder: _Encoder  # of a worker process


def _start_worker(encoder: _Encoder, encode_special_tokens: bool) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder.tokenizer.encode_special_tokens = encode_special_tokens  # which is lost on the way here
    _encoder = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(documents: list[tuple[str, str]]) -> _Tokens:
    return _encoder.batch(documents)


def _grouped(documents: Iterable[Document]) -> Iterator[list[tuple[str, str]] | tuple[Iterator[str], str]]:
    """Yields lists of short documents, (text, place) each, about `_BATCH` characters in all, and for a longer one
    (its parts, place): these must be read before the next are asked for."""
    documents = iter(documents)
    batch: list[tuple[str, str]] = []
    size = 0
    for document in documents:
        parts, known, length = _parts(document, documents), [], 0
        for part in parts:
            known.append(part)
            length += len(part)
            if length > _BATCH:
                break
        else:
            batch.append(("".join(known), document.place))
            size += length
        if batch and (size >= _BATCH or length > _BATCH):
            yield batch
            batch, size = [], 0
        if length > _BATCH:
            yield chain(known, parts), document.place
    if batch:
        yield batch


def _parts(first: Document, documents: Iterator[Document]) -> Iterator[str]:
    """The parts of a document that begins with `first` and goes on in `documents`."""
    part: Document | None = first
    while part is not None:
        yield part.text
        if part.last:
            return
        part = next(documents, None)
    raise ValueError(f"{first.place}: the last part of the document is missing")


def _encoded(documents: Iterable[Document], encoder: _Encoder, pool: Executor, ahead: int) -> Iterator[_Tokens]:
    """The documents' tokens in order; the pool works on `ahead` batches at most."""
    work = _work if isinstance(pool, ProcessPoolExecutor) else encoder.batch
    pending: deque[tuple[str, Future[_Tokens]]] = deque()
    told = False

    def results(most: int) -> Iterator[_Tokens]:
        nonlocal told
        while len(pending) > most:
            text, future = pending.popleft()
            found = future.result()
            # Reading all of it back would take a sixth of the time: of each batch the first text is.
            end = found.starts[1] if len(found.starts) > 1 else len(found.tokens)
            ids = found.tokens[: end - len(encoder.end)].tolist()
            told = told or _tell_of_changes(encoder.tokenizer, text, ids)
            yield found

    for group in _grouped(documents):
        if isinstance(group, list):
            pending.append((group[0][0], pool.submit(work, group)))
            yield from results(ahead)
        else:  # the tokenizer's own threads share it out
            yield from results(0)
            yield from encoder.long(*group)
    yield from results(0)


def write_tokens(
    path: str | Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    end: int | None,
    processes: int | None = None,
    total_bytes: int | None = None,
) -> TokenFile:
    """Encodes documents into a file of tokens; neither has to fit into memory.

    Each document has the tokens that `encode` gives for its text. The file is written under another name, synced to
    disk and then renamed, and is the same whatever the number of processes. On a terminal, long work shows its progress
    on stderr. Of a tokenizer that gives other text back than it was given, a warning tells where a sample shows it.

    Args:
        path: of the file, which is replaced if it is there.
        documents: `read_documents` gives them.
        tokenizer: of any kind.
        end: the token that is put behind each document, as `document_token`; None for none.
        processes: None or 1 for this one, in which `tokenizers` runs its own threads. Several are started anew, so that
            a script that asks for them needs `if __name__ == "__main__":`.
        total_bytes: how much text there is about, for the progress.

    Returns:
        The file, opened.

    Raises:
        OSError: for what the disk says.
        ValueError: for an argument out of range, documents without a token, and text that is not valid Unicode or that
            the tokenizer refuses.
        RuntimeError: where a worker process ended early.
    """
    path, tokenizer = Path(path), _plain(tokenizer)
    vocabulary = vocabulary_size(tokenizer)
    if end is not None and not 0 <= end < vocabulary:
        raise ValueError(f"write_tokens: the end token {end} is outside the vocabulary of {vocabulary}")
    processes = 1 if processes is None else processes
    if processes < 1:
        raise ValueError(f"write_tokens: processes must be at least 1, got {processes}")
    encoder = _Encoder(tokenizer, "<u2" if vocabulary <= 1 << 16 else "<u4", () if end is None else (end,))
    pool: Executor
    if processes == 1:  # two threads: while one turns its tokens into an array, the other's are found
        pool, ahead = ThreadPoolExecutor(2), 2
    else:
        start = (encoder, tokenizer.encode_special_tokens)
        context = get_context("spawn")
        pool, ahead = ProcessPoolExecutor(processes, context, _start_worker, start), 2 * processes
    partial = path.with_name(f".{path.name}.partial")
    bar = require("tqdm", "train").tqdm(
        total=total_bytes, desc=path.name, unit="B", unit_scale=True, delay=_PATIENCE, disable=None, dynamic_ncols=True
    )
    try:
        with bar:
            found = _encoded(_watched(documents, bar), encoder, pool, ahead)
            _write(partial, found, encoder, tokenizer_hash(tokenizer))
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except BrokenProcessPool as error:
        raise RuntimeError(f"{path}: a worker process ended early; did the memory suffice?") from error
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        pool.shutdown(cancel_futures=True)
        partial.unlink(missing_ok=True)
    return TokenFile(path)


def _watched(documents: Iterable[Document], bar: Any) -> Iterator[Document]:
    """Shows how much has been read, and documents a second."""
    count = 0
    for document in documents:
        yield document
        count += document.last
        if bar.update(len(document.text.encode(errors="surrogatepass"))):
            bar.set_postfix_str(f"{count / bar.format_dict['elapsed']:,.0f} documents/s", refresh=False)


def _write(partial: Path, found: Iterable[_Tokens], encoder: _Encoder, digest: str) -> None:
    numpy = require("numpy", "train")
    # The places of all documents may not fit into memory either.
    with open(partial, "wb") as file, tempfile.TemporaryFile(dir=partial.parent) as places:
        file.write(bytes(_HEADER_BYTES))
        count = documents = 0
        for tokens, starts in found:
            file.write(tokens.tobytes())
            places.write((starts + count).astype("<u8").tobytes())
            count, documents = count + len(tokens), documents + len(starts)
        if count == 0:
            raise ValueError(f"{partial.name[1:].removesuffix('.partial')}: {documents} documents have no token")
        file.write(bytes(-file.tell() % 8))
        place = file.tell()
        places.write(struct.pack("<Q", count))
        places.seek(0)
        shutil.copyfileobj(places, file, 1 << 20)
        file.seek(0)
        width = numpy.dtype(encoder.dtype).itemsize
        file.write(_HEADER.pack(_MAGIC, _VERSION, width, count, documents, place, bytes.fromhex(digest)))
        file.flush()
        os.fsync(file.fileno())

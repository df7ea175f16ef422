"""Documents and rows from files: .txt, .jsonl, .csv, .tsv and .parquet, all but the last also as .gz or .zst, which are
read as a stream; and from a `datasets.Dataset`.

Nothing is left out in silence, and an error names the file and the line.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastllm._extras import require
from fastllm.data.text import END_OF_TEXT, check_encoding

PART = 1 << 22
"""Characters: longer documents come in parts of at most about so many."""

NAMES: dict[str, tuple[str, ...]] = {
    "text": ("text", "content", "sentence"),
    "label": ("label", "class", "category"),
    "source": ("source", "src"),
    "target": ("target", "tgt"),
    "question": ("question",),
    "answer": ("answer",),
    "context": ("context",),
}
"""The names that a field's column may have, whatever their case, unless another is asked for."""

KINDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "labelled": ("label", "text"),
    "pair": ("source", "target"),
    "qa": ("question", "answer", "context"),
}
"""The fields of each kind of rows, in the order of the columns of a file without a header."""

ENDINGS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
_PACKED = (".gz", ".zst")
_HEAD = 1 << 16  # bytes by which the encoding is judged
_CHUNK = 1 << 20  # bytes that are read at a time
_SURROGATE = re.compile("[\ud800-\udfff]")

Paths = Any
"""A str or Path, or a sequence of them: files, folders, globs; or a `datasets.Dataset`."""


class Document(NamedTuple):
    """A document, or a part of one."""

    text: str
    last: bool
    """False for all parts of a long document but its last."""
    place: str
    """ "file:line" of where the document or part begins."""


class Row(NamedTuple):
    """One example."""

    fields: dict[str, str]
    place: str
    """ "file:line"; in .parquet and datasets the number of the row stands for the line."""


def read_documents(paths: Paths, columns: Mapping[str, str | int] | None = None) -> Iterator[Document]:
    """Reads texts, in order.

    A .txt file, and any file whose ending says nothing else, is one document, or several with `<|endoftext|>` behind
    each: a line end behind that goes with it, and so does what is blank up to the end of the file. In other files each
    row is a document; a `<|endoftext|>` in it ends one, too. Documents of more than 4 million characters come in parts,
    cut behind a line end, or else a blank, where there is one.

    Args:
        paths: a str or Path, or a sequence of them. Folders are read with all below, in the order of names, but only
            files whose endings are known; globs likewise in the order of names. Or a `datasets.Dataset`.
        columns: {"text": name}: the column of the text, if not text, content or sentence; its number from 0 for a file
            without a header.

    Raises:
        FileNotFoundError: for a path or glob that leads nowhere.
        ImportError: for .parquet and .zst without the extra [data].
        ValueError: with file and line, for what is empty, damaged, no UTF-8, or not of its format, and for a column
            that is missing, with those that there are.
    """
    files = _sources(paths)
    plain = [isinstance(file, Path) and _ending(file) not in _READERS for file in files]
    if columns and all(plain):
        raise ValueError(f"{files[0]} is text without columns, but columns are given: {dict(columns)}")
    for file, is_plain in zip(files, plain, strict=True):
        if is_plain:
            yield from _documents(_pieces(file), str(file), 1)
        else:
            for row in _rows(file, "text", columns):
                yield from _documents([row.fields["text"]], row.place, None)


def read_rows(paths: Paths, kind: str, columns: Mapping[str, str | int] | None = None) -> Iterator[Row]:
    """Reads examples, in order.

    | kind | fields | without a header |
    |---|---|---|
    | text | text | text |
    | labelled | text, label | label, text |
    | pair | source, target | source, target |
    | qa | question, answer, and context, "" where there is none | question, answer, or with context behind them |

    The first line of a .csv or .tsv file is a header if one of its cells is a name of a column (`NAMES`); else its
    columns go by position. A .csv file may have quoted cells; in a .tsv file quotes are text. Lines without a
    character are no rows.

    Args:
        paths: as `read_documents`. For the kind "text" that function reads them: whole documents are the rows.
        kind: text, labelled, pair or qa.
        columns: field to the name of its column, or to its number from 0: then the file has no header, and every field
            needs one.

    Raises:
        as read_documents, and ValueError for an unknown kind or field.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "text":
        parts: list[Document] = []
        for part in read_documents(paths, columns):
            parts.append(part)
            if part.last:
                yield Row({"text": "".join(text for text, _, _ in parts)}, parts[0].place)
                parts = []
        return
    for file in _sources(paths):
        yield from _rows(file, kind, columns)


def text_bytes(paths: Paths) -> int | None:
    """How many bytes of text there are, or None where some are packed or beside other columns."""
    files = _sources(paths)
    plain = all(
        isinstance(file, Path) and _ending(file) not in _READERS and file.suffix.lower() not in _PACKED
        for file in files
    )
    return sum(file.stat().st_size for file in files) if plain else None


def _sources(paths: Paths) -> list[Any]:
    """The files, and datasets, that `paths` stand for."""
    if _is_dataset(paths) or isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    found = [file for path in paths for file in ([path] if _is_dataset(path) else _files(path))]
    if not found:
        raise ValueError("no files to read")
    return found


def _is_dataset(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "datasets"


def column_choice(columns: Mapping[str, str]) -> dict[str, str | int] | None:
    """`columns` of `read_rows` from words: those that are numbers mean places, all others names."""
    found = {field: int(name) if name.isdecimal() else name for field, name in columns.items()}
    return found or None  # type: ignore[return-value]


def _files(path: str | Path) -> list[Path]:
    if not str(path):
        raise ValueError("the name of a file must not be empty")
    if Path(path).is_dir():
        files = sorted(_below(Path(path), {os.path.realpath(path)}))
        known = [file for file in files if _ending(file) in ENDINGS]
        if not known:
            raise ValueError(f"{path} has no files that end in {', '.join(ENDINGS)}")
        if passed := [file for file in files if _ending(file) not in ENDINGS]:
            warnings.warn(
                f"{path}: {len(passed)} of {len(files)} files are passed over, {passed[0]} among them: their names do "
                f"not end in {', '.join(ENDINGS)}",
                stacklevel=2,
            )
        return known
    if Path(path).exists() or not glob.has_magic(str(path)):
        return [Path(path)]
    names = sorted(glob.glob(str(path), recursive=True))
    if not names:
        raise FileNotFoundError(f"no file matches {path}")
    # A folder that ** finds has its files among the names already.
    return [Path(name) for name in names if not Path(name).is_dir()] or [f for name in names for f in _files(name)]


def _ending(path: Path) -> str:
    """The ending that says how a file is laid out, without .gz or .zst."""
    path = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    return path.suffix.lower()


def _below(folder: Path, above: set[str]) -> Iterator[Path]:
    """The files in a folder and in those below it, linked ones too, unless they lead back up.

    Raises:
        FileNotFoundError: for a link that leads nowhere.
    """
    for entry in folder.iterdir():
        if entry.is_dir():
            if (real := os.path.realpath(entry)) not in above:
                yield from _below(entry, above | {real})
        elif entry.is_file() or entry.is_symlink():
            entry.stat()  # which names a link that leads nowhere
            yield entry


def is_plain(path: str | Path) -> bool:
    """Whether `path` is no folder or glob, and by its ending text as it is: neither compressed nor rows."""
    path = Path(path)
    return not (path.is_dir() or glob.has_magic(str(path)) or path.suffix.lower() in (*ENDINGS[1:], *_PACKED))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked, behind its byte order mark."""
    with contextlib.ExitStack() as stack:
        try:
            stream: BinaryIO = stack.enter_context(path.open("rb"))
            if path.suffix.lower() == ".gz":
                stream = stack.enter_context(gzip.open(stream))  # type: ignore[assignment]
            elif path.suffix.lower() == ".zst":
                # Arrow's: zstandard's own reader takes a truncated file for a whole one.
                stream = require("pyarrow", "data").CompressedInputStream(stream, "zstd")
            file = stack.enter_context(io.BufferedReader(stream, _CHUNK))  # type: ignore[type-var, arg-type]
            head = file.peek(_HEAD)[:_HEAD]
            if not head.removeprefix(codecs.BOM_UTF8):
                raise ValueError(f"{path} is empty")
            check_encoding(path, head)
            if head.startswith(codecs.BOM_UTF8):
                file.read(len(codecs.BOM_UTF8))
            yield file
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{path} is truncated or damaged: {error}") from error


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> ValueError:
    try:
        check_encoding(path, error.object[:_HEAD], 0.0)
    except ValueError as other:
        return other
    return ValueError(f"{path}:{line} is not UTF-8 text: byte 0x{error.object[error.start]:02x}")


def _pieces(path: Path) -> Iterator[str]:
    """The text of a file, some at a time."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with _opened(path) as file:
        while True:
            data = file.read(_CHUNK)
            try:
                piece = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, line + error.object[: error.start].count(b"\n"), error) from None
            line += piece.count("\n")
            yield piece
            if not data:
                return


def _lines(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, error) from None


def _parts(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The text up to a marker, True; or up to a cut, False."""
    rest, between = "", False
    for piece in pieces:
        *ended, rest = (rest + piece).split(END_OF_TEXT)
        for text in ended:
            yield text, True
            between = True
        while len(rest) > PART + len(END_OF_TEXT):  # so that no marker is cut, which may have begun at the end
            cut = rest.rfind("\n", PART // 2, PART) + 1 or rest.rfind(" ", PART // 2, PART) + 1 or PART
            yield rest[:cut], False
            rest, between = rest[cut:], False
    if rest.strip() or not between:
        yield rest, True


def _documents(pieces: Iterable[str], name: str, line: int | None) -> Iterator[Document]:
    """Documents of a file that begins in this line, or of a row that is at this place."""
    begins, later = True, False
    for text, last in _parts(pieces):
        if begins and later and (end := re.match("\r?\n", text)):
            text = text[end.end() :]
            line = None if line is None else line + 1
        place = name if line is None else f"{name}:{line}"
        if begins and last and not text.strip():
            raise ValueError(f"{place}: the document is empty")
        yield Document(text, last, place)
        line = None if line is None else line + text.count("\n")
        begins, later = last, later or last


def _rows(file: Any, kind: str, columns: Mapping[str, str | int] | None) -> Iterator[Row]:
    """The rows of one file or dataset."""
    columns = dict(columns or {})
    if unknown := [field for field in columns if field not in KINDS[kind]]:
        raise ValueError(f"rows of the kind {kind} have the fields {', '.join(KINDS[kind])}, not {unknown[0]!r}")
    numbered = any(isinstance(column, int) for column in columns.values())
    name = "dataset" if _is_dataset(file) else str(file)
    read = _read_dataset if _is_dataset(file) else _READERS.get(_ending(file))
    if read is None:
        raise ValueError(f"{file}: rows of the kind {kind} come from files that end in {', '.join(_READERS)}")
    if numbered and read is not _read_cells:
        raise ValueError(f"{name}: columns have numbers in .csv and .tsv files only, names here: got {columns}")
    chosen: dict[str, Any] = {}
    there: list[Any] | None = None
    for line, row in read(file, kind, columns):
        place = f"{name}:{line}"
        if list(row) != there:  # of .jsonl, a row may have other keys than the one before
            there = list(row)
            chosen = _choose(kind, there, columns, place)
        values = {field: _checked(field, row[column], place) for field, column in chosen.items()}
        if kind == "qa":
            values.setdefault("context", "")
        yield Row(values, place)
    if there is None:
        raise ValueError(f"{name} has no rows")


def _choose(kind: str, there: list[Any], columns: Mapping[str, str | int], place: str) -> dict[str, Any]:
    """The column of each field."""
    chosen = {}
    for field in KINDS[kind]:
        if field in columns:
            found = [column for column in there if column == columns[field]]
        elif there and isinstance(there[0], int):
            found = [KINDS[kind].index(field)] if not columns and KINDS[kind].index(field) in there else []
        else:
            found = [column for column in there if column.strip().casefold() in NAMES[field]]
        if len(found) > 1:
            raise ValueError(f"{place} has several columns for {field}, {' and '.join(found)}: choose one by columns")
        if found:
            chosen[field] = found[0]
        elif field in columns or field != "context":
            wanted = repr(columns[field]) if field in columns else f"{field} ({', '.join(NAMES[field])})"
            raise ValueError(
                f"{place} has no column {wanted}: there are {', '.join(map(str, there))}; columns chooses others"
            )
    return chosen


def _checked(field: str, value: Any, place: str) -> str:
    if field == "label" and isinstance(value, int):
        value = str(value)
    if field == "context" and value is None:
        value = ""
    if not isinstance(value, str):
        raise ValueError(f"{place}: {field} is no text but {value!r:.60}")
    if not value.strip() and field != "context":
        raise ValueError(f"{place}: {field} is empty")
    if not value.isascii() and (found := _SURROGATE.search(value)):
        raise ValueError(f"{place}: {field} is not Unicode text, it has {found[0]!r} at character {found.start()}")
    return value


_Columns = Mapping[str, "str | int"]


def _read_json(path: Path, kind: str, columns: _Columns) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip("\r\n"):
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is not a JSON object: {line.strip()[:60]}")
        yield number, row


def _read_cells(path: Path, kind: str, columns: _Columns) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    """Rows of .csv and .tsv: by the names of their header, or by numbers."""
    lines = (_split_csv if _ending(path) == ".csv" else _split_tabs)(path)
    number, first = next(lines, (1, []))
    named = {name for field in KINDS[kind] for name in NAMES[field]}
    if columns:
        header = not any(isinstance(column, int) for column in columns.values())
    else:
        header = any(cell.strip().casefold() in named for cell in first)
    keys: list[Any] = first if header else list(range(len(first)))
    if len(set(keys)) < len(keys):
        raise ValueError(f"{path}:{number} names a column twice: {', '.join(keys)}")
    if not header and not columns and not len(KINDS[kind]) - (kind == "qa") <= len(first) <= len(KINDS[kind]):
        raise ValueError(
            f"{path}:{number} is no header, none of its cells being {', '.join(sorted(named))}, and without one there "
            f"should be {len(KINDS[kind])} columns ({', '.join(KINDS[kind])}), not {len(first)}; columns chooses others"
        )
    for line, cells in lines if header else itertools.chain([(number, first)], lines):
        if len(cells) != len(keys):
            raise ValueError(f"{path}:{line} has {len(cells)} cells, the first line has {len(keys)}")
        yield line, dict(zip(keys, cells, strict=True))


def _split_tabs(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(_lines(path), 1):
        line = line.removesuffix("\n").removesuffix("\r")
        if line:
            yield number, line.split("\t")


def _split_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), (1 << 31) - 1))  # it would refuse cells of 131,072 characters
    reader = csv.reader(_lines(path), strict=True)
    number = 1
    try:
        for cells in reader:
            if cells:
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{number} is not CSV: {error}") from error


def _read_parquet(path: Path, kind: str, columns: _Columns) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    parquet = require("pyarrow.parquet", "data")
    with path.open("rb") as stream:
        try:
            file = parquet.ParquetFile(stream)
            names = file.schema_arrow.names
            chosen = list(_choose(kind, names, columns, str(path)).values())
            number = 1
            for batch in file.iter_batches(1024, columns=chosen):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
        except require("pyarrow", "data").ArrowException as error:
            raise ValueError(f"{path} is damaged, or no Parquet file: {error}") from error


def _read_dataset(dataset: Any, kind: str, columns: _Columns) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    """Rows of a `datasets.Dataset` or IterableDataset; numbers of labels become their names, where it has names."""
    if isinstance(dataset, dict):
        raise ValueError(f"a {type(dataset).__name__} has several parts, {', '.join(dataset)}: choose one")
    named = {
        name: feature for name, feature in (dataset.features or {}).items() if type(feature).__name__ == "ClassLabel"
    }
    for number, row in enumerate(dataset, 1):
        for name, feature in named.items():
            if isinstance(row[name], int) and 0 <= row[name] < feature.num_classes:
                row[name] = feature.int2str(row[name])
        yield number, row


_READERS = {".jsonl": _read_json, ".csv": _read_cells, ".tsv": _read_cells, ".parquet": _read_parquet}

"""`fastllm data inspect | tokenize`: what files hold and what preprocessing makes of it, and files of tokens."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastllm._command import check_folder, integer
from fastllm._extras import require
from fastllm.data import preprocess, sources
from fastllm.data.text import END_OF_TEXT
from fastllm.data.tokenizer import KINDS, encode, load_tokenizer, train_tokenizer

VOCAB_SIZE = 32768
_SHOWN = 240  # characters of a line

_STEPS_HELP = """Steps are for classical models and word vectors. For training a language model remove no words: it must
predict every word, function words carry the grammar, and text without them is text that nobody writes."""


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers `commands`."""
    data = commands.add_parser("data", help="look at files of text and examples; turn text into files of tokens")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")

    inspect = actions.add_parser(
        "inspect", help="show some lines, what each step makes of them, and counts", description=_STEPS_HELP
    )
    _add_files(inspect)
    inspect.add_argument("--kind", choices=sources.KINDS, default="text", help="of rows (default %(default)s)")
    inspect.add_argument("--lines", type=integer, default=3, help="how many to show (default %(default)s)")
    inspect.add_argument("--tokenizer", metavar="JSON", help="show the tokens, too")
    steps = inspect.add_argument_group("steps", "in this order")
    steps.add_argument("--steps", metavar="JSON", help="saved steps, instead of all below")
    steps.add_argument("--normalize", choices=preprocess.FORMS, metavar="FORM", help=", ".join(preprocess.FORMS))
    steps.add_argument("--lower", action="store_const", const=True, help="lower case")
    steps.add_argument("--half-width", action="store_const", const=True, help="full-width letters to those of ASCII")
    steps.add_argument("--segment", choices=preprocess.METHODS, metavar="HOW", help=", ".join(preprocess.METHODS))
    steps.add_argument("--dictionary", metavar="FILE", help="words to segment by, one a line")
    steps.add_argument("--stop-words", nargs="+", metavar="LIST", help="drop these: en, zh, or a file, one word a line")
    steps.add_argument("--min-documents", type=integer, help="drop words that are in fewer documents")
    steps.add_argument("--max-share", type=float, help="drop words that are in a larger share of the documents")
    steps.add_argument("--save-steps", metavar="JSON", help="write the steps, fitted, to this file")

    tokenize = actions.add_parser("tokenize", help="write the tokens of text into a file that training maps")
    _add_files(tokenize)
    tokenize.add_argument("--out", required=True, metavar="FILE", help="such as corpus.tokens")
    tokenize.add_argument("--tokenizer", metavar="JSON", help="use this tokenizer instead of training one")
    tokenize.add_argument("--vocab-size", type=integer, help=f"of the tokenizer to train (default {VOCAB_SIZE})")
    tokenize.add_argument("--tokenizer-kind", choices=KINDS, help=f"of the tokenizer to train (default {KINDS[0]})")
    tokenize.add_argument(
        "--end", default=END_OF_TEXT, metavar="TOKEN", help="put behind documents (default %(default)s)"
    )
    tokenize.add_argument("--processes", type=integer, help="default: one, with the tokenizer's own threads")


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help=f"files ({', '.join(sources.ENDINGS)}), folders, globs"
    )
    parser.add_argument("--columns", nargs="+", metavar="FIELD=COLUMN", help="such as text=body, or text=0 by position")


def run(args: argparse.Namespace) -> int:
    """Runs what `add_parser` parsed; returns the exit code."""
    return _inspect(args) if args.action == "inspect" else _tokenize(args)


def _check_file(path: str, option: str) -> None:
    if not path or Path(path).is_dir():
        raise ValueError(f"{option} must name a file, got {path!r}")
    check_folder(Path(path).parent, option)


def _columns(args: argparse.Namespace) -> dict[str, str | int]:
    columns = {}
    for given in args.columns or ():
        field, _, column = given.partition("=")
        if not field or not column:
            raise ValueError(f"--columns takes FIELD=COLUMN, such as text=body, got {given!r}")
        columns[field] = column
    return sources.column_choice(columns) or {}


def _pipeline(args: argparse.Namespace) -> preprocess.Pipeline:
    names = ("normalize", "lower", "half_width", "segment", "dictionary", "stop_words", "min_documents", "max_share")
    given = [name for name in names if getattr(args, name) is not None]
    if args.steps is not None:
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} cannot be given with --steps: the file has the steps")
        return preprocess.Pipeline.load(args.steps)
    steps: list[preprocess.Step] = []
    if args.normalize or args.lower or args.half_width:
        steps.append(preprocess.Normalize(args.normalize, bool(args.lower), bool(args.half_width)))
    if args.segment is not None:
        words = [] if args.dictionary is None else preprocess.read_words(args.dictionary)
        steps.append(preprocess.Segment(args.segment, tuple(words)))
    elif args.dictionary is not None:
        raise ValueError("--dictionary needs --segment")
    if args.stop_words is not None:
        shipped = [name for name in args.stop_words if name in preprocess.LANGUAGES]
        added = [word for name in args.stop_words if name not in shipped for word in preprocess.read_words(name)]
        steps.append(preprocess.StopWords((*preprocess.stop_words(*shipped), *added)))
    if args.min_documents is not None or args.max_share is not None:
        bounds = {name: getattr(args, name) for name in ("min_documents", "max_share") if name in given}
        steps.append(preprocess.DocumentFrequency(**bounds))
    return preprocess.Pipeline(steps)


def _rows(args: argparse.Namespace) -> Iterator[tuple[sources.Row, bool]]:
    """Rows, True; or parts of documents and whether each is the last."""
    columns = _columns(args)
    if args.kind == "text":
        found = (
            (sources.Row({"text": text}, place), last)
            for text, last, place in sources.read_documents(args.files, columns)
        )
    else:
        found = ((row, True) for row in sources.read_rows(args.files, args.kind, columns))
    return require("tqdm", "train").tqdm(found, desc="read", unit=" rows", delay=2, disable=None)


def _texts(row: sources.Row) -> dict[str, str]:
    """What preprocessing is for."""
    return {field: text for field, text in row.fields.items() if field != "label" and text}


def _inspect(args: argparse.Namespace) -> int:
    if args.lines < 0:
        raise ValueError(f"--lines must not be negative, got {args.lines}")
    pipeline = _pipeline(args)
    if args.save_steps is not None:
        _check_file(args.save_steps, "--save-steps")
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    if not pipeline.is_fitted:
        rows = sources.read_rows(args.files, args.kind, _columns(args))
        pipeline.fit(text for row in rows for text in _texts(row).values())
    if args.save_steps is not None:
        pipeline.save(args.save_steps)

    characters: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    number, left = 0, args.lines
    for row, last in _rows(args):
        number += last
        characters.update({field: len(text) for field, text in _texts(row).items()})
        labels.update([row.fields["label"]] if "label" in row.fields else [])
        if left > 0:
            left -= _show(row, left, pipeline, tokenizer)
    print(f"{'documents' if args.kind == 'text' else 'rows':<20}{number:>12,}")
    for field, count in characters.items():
        print(f"characters, {field:<8}{count:>12,}  {count / number:,.1f} on average")
    for label, count in labels.most_common():
        print(f"label {label:<14}{count:>12,}  {count / number:.1%}")
    return 0


def _show(row: sources.Row, limit: int, pipeline: preprocess.Pipeline, tokenizer: Any) -> int:
    """Prints a row; of a document without a label, its first lines with something in them. Returns how many."""
    shown = [_texts(row)]
    if list(row.fields) == ["text"]:
        lines = (line.rstrip("\r") for line in row.fields["text"].split("\n"))
        shown = [{"text": line} for line in itertools.islice(filter(str.strip, lines), limit)]
    print(row.place)
    if "label" in row.fields:
        print(f"  {'label':<22}{row.fields['label']}")
    for texts in shown:
        for field, text in texts.items():
            print(f"  {field:<22}{_cut(text)}")
            result: Any = text
            for name, result in pipeline.trace(text):
                print(f"    {name:<20}{_cut(' | '.join(result) if isinstance(result, list) else result)}")
            if tokenizer is not None:
                text = result if isinstance(result, str) else " ".join(result)
                tokens = [tokenizer.decode([token], skip_special_tokens=False) for token in encode(tokenizer, text)]
                print(f"    {f'{len(tokens)} tokens':<20}{_cut(' | '.join(tokens))}")
    print()
    return len(shown)


def _cut(text: str) -> str:
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def _tokenize(args: argparse.Namespace) -> int:
    from fastllm.data.token_file import write_tokens

    _check_file(args.out, "--out")
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {args.processes}")
    columns = _columns(args)
    if Path(args.out).exists():
        raise FileExistsError(f"{args.out} is there already: delete it, or choose another --out")
    if args.tokenizer is not None:
        for name in ("vocab_size", "tokenizer_kind"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} cannot be given with --tokenizer: it is the tokenizer's")
        tokenizer = load_tokenizer(args.tokenizer)
    elif args.end != END_OF_TEXT:
        raise ValueError(f"--end {args.end!r}: a tokenizer that is trained here ends documents with {END_OF_TEXT}")
    else:
        texts = (document.text for document in sources.read_documents(args.files, columns))
        size = VOCAB_SIZE if args.vocab_size is None else args.vocab_size
        tokenizer = train_tokenizer(texts, size, args.tokenizer_kind or KINDS[0])
        path = Path(args.out).with_suffix(".tokenizer.json")
        tokenizer.save(str(path))
        print(path)
    end = tokenizer.token_to_id(args.end)
    if end is None:
        raise ValueError(f"--end: {args.tokenizer} has no token {args.end!r} to put behind documents")
    documents, total = sources.read_documents(args.files, columns), sources.text_bytes(args.files)
    written = write_tokens(args.out, documents, tokenizer, end=end, processes=args.processes, total_bytes=total)
    assert written.documents is not None
    count = len(written.documents) - 1
    print(f"{args.out}: {len(written.tokens):,} tokens, {count:,} documents, {written.tokens.dtype}")
    return 0

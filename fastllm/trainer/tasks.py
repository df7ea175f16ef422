"""From a run's configuration to a model and the batches to train it on."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastllm import data
from fastllm.data import examples, order, preprocess, sources, token_file
from fastllm.models import GPTConfig, mask_tokens
from fastllm.models.layers import Model
from fastllm.trainer import checkpoint
from fastllm.trainer.config import DataConfig, RunConfig, TrainConfig, typed
from fastllm.trainer.memory import check_memory

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB_SIZE = 2048
SMALL = {"context": 128, "layers": 4, "heads": 4, "width": 256}
"""The size of a model of which nothing is said."""
PAD, CLS, SEP, MASK = "[PAD]", "[CLS]", "[SEP]", "[MASK]"
ROWS = {"classification": "labelled", "seq2seq": "pair", "question_answering": "qa"}
"""By objective: the kind of rows that it reads; the others read text."""

_KINDS = {
    objective: checkpoint.ARCHITECTURES[name]
    for objective, name in (
        ("causal_lm", "GPT"),
        ("masked_lm", "Bert"),
        ("classification", "Bert"),
        ("seq2seq", "Transformer"),
        ("question_answering", "GPT"),
    )
}
_SPECIAL = {
    "causal_lm": (),
    "masked_lm": (PAD, CLS, SEP, MASK),
    "classification": (PAD, CLS),
    "seq2seq": (PAD,),
    "question_answering": (),
}
_UNMASKED = (PAD, CLS, SEP, data.END_OF_TEXT)
_ASKED = {"text", "source", "question", "context"}  # fields that are preprocessed
_NEW = ("head.", "masked_head.", "next_head.", "pooler.")  # weights that a model may have and the one before it not


class Task(NamedTuple):
    """What a `Trainer` is made of.

    Attributes:
        model, train, validation, tokenizer: its arguments.
        saved: what a checkpoint's config.json holds beside model and train.
        size: the data's, in words.
        epoch: rows or windows that are there to train on.
        said: lines about weights that are new.
    """

    model: Model
    train: Any
    validation: Any
    tokenizer: Tokenizer | None
    saved: dict[str, Any]
    size: str
    epoch: int
    said: list[str]


def build(config: RunConfig, device: torch.device, resumed: Path | None = None) -> Task:
    """The task that `config` describes. Seeds torch's generator, from which the weights are drawn.

    Args:
        config: of the run; where one is resumed, with the model of its checkpoint.
        device: to train on, for a look at its memory.
        resumed: the checkpoint, whose tokenizer is taken.

    Raises:
        ValueError: for data that does not fit, naming it.
        OSError: for files that cannot be read.
    """
    objective = config.data.objective
    if not config.data.text:
        raise ValueError("--text must not be empty")
    start = None
    for name, values in (("preset", config.model), ("tokenizer", dataclasses.asdict(config.data))):
        if resumed is None and config.model.get("init") is not None and values.get(name) is not None:
            raise ValueError(f"{name} cannot be given with init: it is that run's")
    if (init := config.model.get("init")) is not None and resumed is None:
        start = checkpoint.load_model(init)
        if not isinstance(start[0], _KINDS[objective][0]):
            raise ValueError(f"init: {init} is a {type(start[0]).__name__}, which does not learn {objective}")
    if start is None:
        _check_size(config, device, None, vocab_size=data.BYTES + 1)  # before long work
    return (_rows if objective in ROWS else _language)(config, device, resumed, start)


def model_config(config: RunConfig, begun: Any = None, **needed: Any) -> Any:
    """The configuration of the model.

    Args:
        config: of the run.
        begun: configuration of the model whose weights to begin with, or None.
        needed: fields that the data decides.

    Raises:
        ValueError: for a name that is no field, with the nearest one, and values that do not fit.
    """
    _, kind = _KINDS[config.data.objective]
    fields = {field.name for field in dataclasses.fields(kind)}
    given = typed(kind, config.model, "model", ("preset", "init", "architecture"))
    needed = {name: value for name, value in needed.items() if name in fields}
    if begun is not None:
        return dataclasses.replace(begun, **{**given, **needed})
    preset = config.model.get("preset")
    if preset is None and kind is GPTConfig:
        preset = "llama"
    if preset in ("gpt2", "llama") and kind is GPTConfig:
        return getattr(GPTConfig, preset)(**{**SMALL, **given, **needed})
    if preset is not None:
        return kind.preset(preset, **{**given, **needed})
    return kind(**{**SMALL, **given, **needed})


def _check_size(
    config: RunConfig, device: torch.device, begun: Any, tokenizer: Tokenizer | None = None, **needed: Any
) -> Any:
    """The configuration of the model, which has to fit into memory, and its vocabulary the tokenizer."""
    size = config.model.get("vocab_size")
    if tokenizer is not None:
        needed |= {"vocab_size": data.vocabulary_size(tokenizer), "pad_token": tokenizer.token_to_id(PAD)}
        if size is not None and size < needed["vocab_size"]:
            raise ValueError(f"model: vocab_size {size} is less than the tokenizer's {needed['vocab_size']} tokens")
    if size is not None:
        needed["vocab_size"] = size
    shape = model_config(config, begun, **needed)
    check_size(shape, device, config.train)
    return shape


def check_size(shape: Any, device: torch.device, config: TrainConfig) -> None:
    """Raises ValueError for training that takes more memory than there is."""
    check_memory(shape, device, batch_size=config.batch_size, accumulate=config.accumulate)


def _make_model(config: RunConfig, shape: Any, start: Any) -> tuple[Model, list[str]]:
    """The model, and what is to be said of its weights: those that are new, and those of a run that are not taken."""
    torch.manual_seed(config.train.seed)
    model = _KINDS[config.data.objective][0](shape)
    if start is None:
        return model, []
    weights, fresh = start[0].state_dict(), model.state_dict()
    new: list[str] = []
    for name, weight in fresh.items():
        if name not in weights or weights[name].shape != weight.shape:
            if not name.startswith(_NEW):
                was = tuple(weights[name].shape) if name in weights else "not there"
                raise ValueError(f"init: {name} has shape {tuple(weight.shape)}, in {config.model['init']} {was}")
            weights[name] = weight
            new.append(name)
    model.load_state_dict({name: weights[name] for name in fresh})
    left = [name for name in start[0].state_dict() if name not in fresh or name in new]
    said = ("new weights", new), (f"weights of {config.model['init']} that are not taken", left)
    return model, [f"{what}: {', '.join(names)}" for what, names in said if names]


def _tokenizer(config: DataConfig, objective: str, texts: Any, resumed: Path | None, start: Any) -> Tokenizer:
    """The checkpoint's, the one given, or one that is trained on the texts, with the objective's special tokens."""
    if resumed is not None:
        return checkpoint.load_checkpoint_tokenizer(resumed)
    if start is not None:
        if start[1] is None:
            raise ValueError("init: that run has no tokenizer")
        tokenizer = start[1]
    elif config.tokenizer is not None:
        tokenizer = data.load_tokenizer(config.tokenizer)
    else:
        tokenizer = data.train_tokenizer(texts, VOCAB_SIZE if config.vocab_size is None else config.vocab_size)
    if new := [token for token in _SPECIAL[objective] if tokenizer.token_to_id(token) is None]:
        if start is not None:
            raise ValueError(f"init: the tokenizer of that run lacks {', '.join(new)}")
        tokenizer.add_special_tokens(new)
    return tokenizer


def check_tokenizer(path: str | Path, tokenizer: Tokenizer, config: Any) -> None:
    """Raises ValueError for a tokenizer with more tokens than the model knows."""
    size = data.vocabulary_size(tokenizer)
    if size > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {path} is another model's: it has {size} tokens, the model {config.vocab_size}"
        )


def read_texts(files: Sequence[str], columns: dict[str, str]) -> str:
    """All documents of these files, folders or globs, with `<|endoftext|>` between them.

    Raises:
        ValueError: for columns of a file that is plain text, and what `read_documents` says.
    """
    if "" in files:
        raise ValueError("--text must not be empty")
    pieces = []
    for document in sources.read_documents(files, sources.column_choice(columns)):
        pieces += [document.text, data.END_OF_TEXT] if document.last else [document.text]
    return "".join(pieces[:-1])


def _check_length(what: str, tokens: int, context: int, option: str) -> None:
    if tokens < context + 1:
        raise ValueError(
            f"a window of --context {context} tokens and their targets needs {context + 1} tokens, the text has only "
            f"{tokens} in the {what} {option}"
        )


def _document_token(
    source: DataConfig, resumed: Path | None, tokenizer: Tokenizer | None, several: bool, end: int | None
) -> int | None:
    """The token by which attention is kept inside a document, if it is: `end` if there are several documents, or the
    flag asks for it; the checkpoint's where a run goes on.

    Raises:
        ValueError: for a flag that does not fit, and documents without such a token.
    """
    if resumed is not None and tokenizer is not None:
        saved = checkpoint.load_config(resumed)
        check_tokenizer(resumed, tokenizer, checkpoint.model_config(saved))
        had = saved["model"].get("document_token") is not None
        if source.document_mask is not None and source.document_mask != had and (had or several):
            flag = "--document-mask" if source.document_mask else "--no-document-mask"
            how = "with" if had else "without"
            raise ValueError(f"{flag} cannot be given with --resume: {resumed} is one {how}")
        return saved["model"].get("document_token")
    masks = several if source.document_mask is None else source.document_mask
    if masks and end is None:
        raise ValueError(
            f"{source.tokenizer or 'this data'} has no special token {data.END_OF_TEXT}, by which documents are "
            "told apart: add it, or give --no-document-mask, which takes it for text like any other"
        )
    return end if masks else None


def _language(config: RunConfig, device: torch.device, resumed: Path | None, start: Any) -> Task:
    """Windows of text, whose next token, or masked tokens, are to be found."""
    source = config.data
    if token_file.is_token_files(source.text):
        tokens, held_out, tokenizer, several, end = _token_files(source, resumed, start)
    else:
        text = read_texts(source.text, source.columns)
        several = data.END_OF_TEXT in text
        text, validation = (
            (text, read_texts(source.valid, source.columns))
            if source.valid
            else data.split_text(text, source.validation)
        )
        tokenizer = _tokenizer(source, source.objective, [text], resumed, start)
        tokens, held_out = data.encode(tokenizer, text), data.encode(tokenizer, validation)
        end = data.document_token(tokenizer)
    document_token = _document_token(source, resumed, tokenizer, several, end)
    begun, size = start[0].config if start else None, {}
    if tokenizer is None and "vocab_size" not in config.model and begun is None:
        if source.vocab_size is None:
            raise ValueError(f"{source.text[0]} has no tokenizer beside it: give --tokenizer, or --vocab-size")
        size = {"vocab_size": source.vocab_size}
    shape = _check_size(config, device, begun, tokenizer, document_token=document_token, head="mlm", **size)
    window = shape.context
    count = f"{len(tokens):,} tokens"
    _check_length(count, len(tokens), window, "to train on: give more text, or a smaller --context")
    _check_length(
        f"{len(held_out):,} tokens",
        len(held_out),
        window,
        f"to validate on (--validation {source.validation}): give more text, a larger --validation, or smaller "
        "--context",
    )
    seed = config.train.seed
    kind: Any = data.ShuffledWindows if source.order == "shuffled" else data.RandomWindows
    train: Any = kind(tokens, window, seed)
    held: Any = data.SequentialWindows(held_out, window)
    if source.objective == "masked_lm":
        train, held = (masked_windows(windows, tokenizer, shape, seed) for windows in (train, held))
    model, said = _make_model(config, shape, start)
    return Task(
        model,
        train,
        held,
        tokenizer,
        {"data": dataclasses.asdict(source)},
        f"{count} to train on, {len(held_out):,} to validate on",
        max(1, len(tokens) // window - 1),
        said,
    )


def masked_windows(windows: Any, tokenizer: Any, shape: Any, seed: int) -> Any:
    """Windows of which some tokens are masked, to be found."""
    return examples.MaskedWindows(
        windows,
        mask_tokens,
        mask_token=tokenizer.token_to_id(MASK),
        vocab_size=shape.vocab_size,
        special_tokens=[token for token in map(tokenizer.token_to_id, _UNMASKED) if token is not None],
        seed=seed,
    )


def open_tokens(files: Sequence[str], tokenizer: Tokenizer | None, place: Any) -> token_file.TokenStream:
    """These files of tokens.

    Raises:
        ValueError: for those of another tokenizer than the one from `place`, as far as they say.
    """
    if "" in files:
        raise ValueError("--text must not be empty")
    tokens = token_file.open_tokens(files)
    if tokenizer is not None and tokens.tokenizer_hash not in (None, token_file.tokenizer_hash(tokenizer)):
        raise ValueError(f"{files[0]} was written with another tokenizer than {place}")
    return tokens


def _token_files(source: DataConfig, resumed: Path | None, start: Any) -> tuple[Any, Any, Tokenizer | None, bool, Any]:
    """What to train and to validate on, the tokenizer, whether there are several documents, and the token that ends
    one."""
    path = source.tokenizer
    beside = Path(source.text[0]).with_suffix(".tokenizer.json")
    if path is None and beside.exists():
        path = str(beside)
    if resumed is not None:
        tokenizer = checkpoint.load_checkpoint_tokenizer(resumed) if (resumed / "tokenizer.json").exists() else None
    else:
        tokenizer = start[1] if start is not None else None if path is None else data.load_tokenizer(path)
    if source.objective == "masked_lm" and (tokenizer is None or tokenizer.token_to_id(MASK) is None):
        raise ValueError(
            f"{source.text[0]}: masked_lm needs a tokenizer that has {PAD} and {MASK}, as fastllm data tokenize "
            "--tokenizer-kind wordpiece trains it"
        )
    tokens = open_tokens(source.text, tokenizer, path or resumed)
    train, held_out = (
        (tokens, open_tokens(source.valid, tokenizer, path or resumed))
        if source.valid
        else tokens.split(source.validation)
    )
    if tokens.documents is not None:
        return train, held_out, tokenizer, len(tokens.documents) > 2, tokens.end_token()
    end = None if tokenizer is None else data.document_token(tokenizer)
    return train, held_out, tokenizer, end is not None, end  # where documents begin in a shard, that token alone says


def _rows(config: RunConfig, device: torch.device, resumed: Path | None, start: Any) -> Task:
    """Rows of a file: classification, pairs, questions and their answers."""
    source, objective = config.data, config.data.objective
    rows = list(sources.read_rows(source.text, ROWS[objective], sources.column_choice(source.columns)))
    if source.valid:
        held_out = list(sources.read_rows(source.valid, ROWS[objective], sources.column_choice(source.columns)))
    else:
        # A file may be sorted by label: any of its rows, always the same.
        places = order.permuted(range(len(rows)), len(rows), 0)
        cut = len(rows) - max(1, round(len(rows) * source.validation))
        rows, held_out = [rows[i] for i in sorted(places[:cut])], [rows[i] for i in sorted(places[cut:])]
    if not rows or not held_out:
        raise ValueError(f"{', '.join(source.text)}: {len(rows)} rows to train on, {len(held_out)} to validate on")
    saved: dict[str, Any] = {"data": dataclasses.asdict(source)}
    if resumed is not None:
        saved["preprocessing"] = checkpoint.load_config(resumed)["preprocessing"]
    elif source.preprocessing is not None:
        pipeline = preprocess.Pipeline.load(source.preprocessing)
        if not pipeline.is_fitted:
            pipeline.fit([text for row in rows for name, text in row.fields.items() if name in _ASKED])
        saved["preprocessing"] = pipeline.to_dict()
    else:
        saved["preprocessing"] = None
    rows, held_out = _preprocessed(rows, saved), _preprocessed(held_out, saved)
    texts = (text for row in rows for name, text in row.fields.items() if name != "label")
    tokenizer = _tokenizer(source, objective, texts, resumed, start)
    end = data.document_token(tokenizer)
    needed: dict[str, Any] = {"document_token": end, "end_token": end}
    if objective == "classification":
        # Of all rows of --text: a label may have been held out with its only row.
        labels = sorted({row.fields["label"] for row in (rows if source.valid else rows + held_out)})
        saved["labels"] = labels
        needed |= {"head": "classification", "labels": max(2, len(labels))}
    elif end is None:
        raise ValueError(f"{source.tokenizer} has no special token {data.END_OF_TEXT}, with which an answer ends")
    shape = _check_size(config, device, start[0].config if start else None, tokenizer, **needed)
    train = _row_set(objective, rows, tokenizer, shape, saved, seed=config.train.seed)
    held = _row_set(objective, held_out, tokenizer, shape, saved, shuffle=False)
    model, said = _make_model(config, shape, start)
    return Task(
        model,
        train,
        held,
        tokenizer,
        saved,
        f"{len(rows):,} rows to train on, {len(held_out):,} to validate on",
        len(train),
        said,
    )


def held_out(objective: str, files: list[str], saved: dict[str, Any], tokenizer: Tokenizer, shape: Any) -> Any:
    """The rows of files for a model that was trained on others, in their order.

    Args:
        objective: one of `ROWS`.
        files: to read.
        saved: config.json of the model's checkpoint.
        tokenizer, shape: the model's.
    """
    rows = list(sources.read_rows(files, ROWS[objective], sources.column_choice(saved["data"]["columns"])))
    rows = _preprocessed(rows, saved)
    return _row_set(objective, rows, tokenizer, shape, saved, shuffle=False)


def _preprocessed(rows: list[Any], saved: dict[str, Any]) -> list[Any]:
    """The rows, whose questions, not whose answers, have gone through the run's steps.

    Raises:
        ValueError: for a row of which nothing is left, naming it.
    """
    if saved["preprocessing"] is None:
        return rows
    pipeline, found, empty = preprocess.Pipeline.from_dict(saved["preprocessing"]), [], []
    for row in rows:
        fields = dict(row.fields)
        for name in _ASKED & fields.keys():
            words = pipeline(fields[name])
            fields[name] = words if isinstance(words, str) else " ".join(words)
            if row.fields[name] and not fields[name] and name == "text":
                empty.append(row.place)
            elif row.fields[name] and not fields[name]:
                raise ValueError(
                    f"{row.place}: preprocessing leaves nothing of its {name} {row.fields[name]!r}, all of whose words "
                    "are stop words, or in fewer documents than DocumentFrequency asks for"
                )
        found.append(row._replace(fields=fields))
    if empty:
        warnings.warn(
            f"preprocessing leaves nothing of {len(empty):,} of {len(rows):,} texts, {empty[0]} first", stacklevel=3
        )
    return found


def _encoded(tokenizer: Tokenizer, rows: list[Any], text: Any) -> list[list[int]]:
    """The tokens of what `text` makes of each row's fields."""
    texts = [text(row.fields) for row in rows]
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _labelled(rows: Any, tokenizer: Tokenizer, shape: Any, saved: dict[str, Any], options: dict[str, Any]) -> Any:
    first = tokenizer.token_to_id(CLS)
    numbers = {label: number for number, label in enumerate(saved["labels"])}
    for row in rows:
        if row.fields["label"] not in numbers:
            raise ValueError(f"{row.place}: the label {row.fields['label']!r} is none of those trained on")
    tokens = [[first, *one] for one in _encoded(tokenizer, rows, lambda fields: fields["text"])]
    return examples.LabelledRows(tokens, [numbers[row.fields["label"]] for row in rows], pad=shape.pad_token, **options)


def _pairs(rows: Any, tokenizer: Tokenizer, shape: Any, saved: dict[str, Any], options: dict[str, Any]) -> Any:
    sources, targets = (_encoded(tokenizer, rows, operator.itemgetter(side)) for side in ("source", "target"))
    return examples.PairRows(sources, targets, pad=shape.pad_token, end=shape.end_token, **options)


def question_prompt(fields: dict[str, str]) -> str:
    """What a model that answers questions is given: the context, if any, and the question, a line each."""
    return "".join(f"{fields[name]}\n" for name in ("context", "question") if fields.get(name))


def prompt(text: str, saved: dict[str, Any]) -> str:
    """What a run is asked to continue by `text`: of one that answers questions, as its questions were.

    Args:
        text: a prompt, or a question, before which its context may stand, a line each.
        saved: config.json of the model's checkpoint.
    """
    if saved.get("data", {}).get("objective") != "question_answering":
        return text
    row = sources.Row({"question": text}, "--prompt")
    return question_prompt(_preprocessed([row], saved)[0].fields)


def _answers(rows: Any, tokenizer: Tokenizer, shape: Any, saved: dict[str, Any], options: dict[str, Any]) -> Any:
    prompts = _encoded(tokenizer, rows, question_prompt)
    answers = _encoded(tokenizer, rows, operator.itemgetter("answer"))
    return examples.AnswerRows(prompts, answers, end=shape.document_token, **options)


def _row_set(
    objective: str, rows: list[Any], tokenizer: Tokenizer, shape: Any, saved: dict[str, Any], **options: Any
) -> Any:
    """The data set of rows; those that are too long are cut, which is warned of."""
    make = {"classification": _labelled, "seq2seq": _pairs, "question_answering": _answers}[objective]
    places = [row.place for row in rows]
    return make(
        rows, tokenizer, shape, saved, {"context": shape.context, "truncate": True, "places": places, **options}
    )

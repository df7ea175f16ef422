"""Text to words in named steps, which are saved with all that they know and rerun to the same result."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastllm._extras import require
from fastllm.data.text import read_text

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
LANGUAGES = ("en", "zh")
METHODS = ("jieba", "forward", "bidirectional", "whitespace")
_HALF_WIDTH = {0x3000: " ", **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}}
# What maximum matching never cuts: a run of Latin letters and digits, or one character.
_ATOM = re.compile(r"(?:[0-9A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff])+|[^\s]")


def _checked_words(words: Any, what: str) -> tuple[str, ...]:
    if isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"{what} must be strings in a list, got {words!r:.60}")
    if bad := [word for word in words if word.split() != [word]]:
        raise ValueError(f"{what} must be words without blanks, got {bad[0]!r}")
    return tuple(words)


def _one_of(value: Any, values: tuple[str, ...], what: str) -> None:
    if value not in values:
        raise ValueError(f"{what} must be one of {', '.join(map(str, values))}, got {value!r}")


@dataclass(frozen=True)
class Normalize:
    """Text to text: one way to write what looks the same.

    Args:
        form: of Unicode (Standard Annex 15): NFC, NFD, NFKC or NFKD; None for none.
        lower: in lower case.
        half_width: full-width letters, digits, punctuation and blanks, as among Chinese, become those of ASCII. NFKC
            does that and more, such as ² to 2.
    """

    form: str | None = "NFC"
    lower: bool = False
    half_width: bool = False
    name: ClassVar[str] = "normalize"
    takes: ClassVar[type] = str

    def __post_init__(self) -> None:
        if self.form is not None:
            _one_of(self.form, FORMS, "form")

    def __call__(self, text: str) -> str:
        text = text.translate(_HALF_WIDTH) if self.half_width else text
        text = self._in_form(text)
        return self._in_form(text.lower()) if self.lower else text

    def _in_form(self, text: str) -> str:
        return text if self.form is None else unicodedata.normalize(self.form, text)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Segment:
    """Text to words; what is blank parts words and is none.

    Args:
        method: "jieba" (extra [data]), "whitespace", or maximum matching with the words of `dictionary` alone:
            "forward" takes the longest word from the left, again and again; "bidirectional" does so from either end and
            keeps what has fewer words, then fewer words of one character, then that from the right. A run of Latin
            letters and digits stays whole; any other character that begins no word is one.
        dictionary: words that are known, jieba's own besides.
        hmm: whether jieba finds words that are in no dictionary, by its hidden Markov model.
    """

    method: str = "jieba"
    dictionary: tuple[str, ...] = ()
    hmm: bool = True
    name: ClassVar[str] = "segment"
    takes: ClassVar[type] = str

    def __post_init__(self) -> None:
        _one_of(self.method, METHODS, "method")
        object.__setattr__(self, "dictionary", _checked_words(self.dictionary, "dictionary"))
        if bool(self.dictionary) != (self.method in METHODS[1:3]) and self.method != "jieba":
            needed = "takes no" if self.dictionary else "needs a"
            raise ValueError(f"segmentation by {self.method} {needed} dictionary")

    def __call__(self, text: str) -> list[str]:
        if self.method == "whitespace":
            return text.split()
        if self.method == "jieba":
            return [word for word in _jieba(self.dictionary).cut(text, HMM=self.hmm) if word.strip()]
        return [word for run in text.split() for word in self._match(_ATOM.findall(run))]

    @functools.cached_property
    def _words(self) -> tuple[set[str], int]:
        """The dictionary, and how many atoms its longest word has."""
        return set(self.dictionary), max(len(_ATOM.findall(word)) for word in self.dictionary)

    def _match(self, atoms: list[str]) -> list[str]:
        known, longest = self._words
        left, start = [], 0
        while start < len(atoms):
            ends = range(min(len(atoms), start + longest), start, -1)
            end = next((end for end in ends if "".join(atoms[start:end]) in known), start + 1)
            left.append("".join(atoms[start:end]))
            start = end
        if self.method == "forward":
            return left
        right, end = [], len(atoms)
        while end:
            starts = range(max(0, end - longest), end)
            start = next((start for start in starts if "".join(atoms[start:end]) in known), end - 1)
            right.append("".join(atoms[start:end]))
            end = start
        return min((right[::-1], left), key=lambda words: (len(words), sum(len(word) == 1 for word in words)))


@functools.lru_cache(8)
def _jieba(dictionary: tuple[str, ...]) -> Any:
    jieba = require("jieba", "data")
    jieba.setLogLevel("WARNING")
    tokenizer = jieba.Tokenizer()
    for word in dictionary:
        tokenizer.add_word(word)
    return tokenizer


@dataclass(frozen=True)
class StopWords:
    """Words to words without those of a list, whatever their case.

    Args:
        words: the list, such as `[*stop_words("zh"), "记者"]`.
    """

    words: tuple[str, ...]
    name: ClassVar[str] = "stop_words"
    takes: ClassVar[type] = list

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", _checked_words(self.words, "words"))

    @functools.cached_property
    def _set(self) -> set[str]:
        return {word.casefold() for word in self.words}

    def __call__(self, words: list[str]) -> list[str]:
        return [word for word in words if word.casefold() not in self._set]


@dataclass(frozen=True)
class DocumentFrequency:
    """Words to words without rare ones and those that are nearly everywhere, as counted in a corpus (`Pipeline.fit`).

    Args:
        min_documents: a word that is in fewer documents is dropped, and so is one that the corpus does not have.
        max_share: a word that is in a larger share of the documents is dropped.
        words: what is kept; None before it was fitted.
    """

    min_documents: int = 1
    max_share: float = 1.0
    words: tuple[str, ...] | None = None
    name: ClassVar[str] = "document_frequency"
    takes: ClassVar[type] = list

    def __post_init__(self) -> None:
        if self.min_documents < 1:
            raise ValueError(f"min_documents must be at least 1, got {self.min_documents}")
        if not 0 < self.max_share <= 1:
            raise ValueError(f"max_share must be in (0, 1], got {self.max_share}")
        if self.words is not None:
            object.__setattr__(self, "words", _checked_words(self.words, "words"))

    def fitted(self, documents: Iterable[list[str]]) -> DocumentFrequency:
        """This step with the words of these documents.

        Raises:
            ValueError: where no document is given, or no word is left.
        """
        counts: Counter[str] = Counter()
        number = 0
        for words in documents:
            counts.update(set(words))
            number += 1
        kept = [word for word, n in counts.items() if self.min_documents <= n and n / number <= self.max_share]
        if not kept:
            raise ValueError(
                f"no word of {number} documents is in at least {self.min_documents} and at most a share of "
                f"{self.max_share} of them"
            )
        return dataclasses.replace(self, words=tuple(sorted(kept)))

    @functools.cached_property
    def _set(self) -> set[str]:
        return set(self.words or ())

    def __call__(self, words: list[str]) -> list[str]:
        if self.words is None:
            raise ValueError("document_frequency has not been fitted: call Pipeline.fit with the texts of a corpus")
        return [word for word in words if word in self._set]


Step = Any
"""Normalize, Segment, StopWords or DocumentFrequency."""
STEPS: dict[str, Any] = {step.name: step for step in (Normalize, Segment, StopWords, DocumentFrequency)}


class Pipeline:
    """Steps, one after the other: `Pipeline([Normalize("NFKC"), Segment("jieba"), StopWords(stop_words("zh"))])`.

    Called with a text, it gives the words, or a text where no step segments.

    Args:
        steps: those that take words behind one that makes them.

    Raises:
        TypeError, ValueError: for steps that do not fit together.
    """

    def __init__(self, steps: Iterable[Step]):
        self.steps = list(steps)
        words = False
        for step in self.steps:
            if type(step) not in STEPS.values():
                raise TypeError(f"a step must be one of {', '.join(STEPS)}, got {step!r:.60}")
            if (step.takes is list) != words:
                raise ValueError(
                    f"{step.name} takes {'words' if step.takes is list else 'text'}: it must come "
                    f"{'behind' if step.takes is list else 'before'} segment, and segment but once"
                )
            words = words or step.name == "segment"

    def __call__(self, text: str) -> str | list[str]:
        value: Any = text
        for step in self.steps:
            value = step(value)
        return value

    def trace(self, text: str) -> Iterator[tuple[str, str | list[str]]]:
        """Yields the name of each step with what it makes of what the one before it made."""
        value: Any = text
        for step in self.steps:
            value = step(value)
            yield step.name, value

    @property
    def is_fitted(self) -> bool:
        return all(step.words is not None for step in self.steps if isinstance(step, DocumentFrequency))

    def fit(self, texts: Iterable[str]) -> Pipeline:
        """Fits the steps that count a corpus, in order, anew where they have been; returns this pipeline.

        Args:
            texts: one a document; more than one such step goes through them as often.

        Raises:
            ValueError: for a mere iterator where it would be needed twice, and for a corpus that leaves no word.
        """
        places = [place for place, step in enumerate(self.steps) if isinstance(step, DocumentFrequency)]
        if len(places) > 1 and iter(texts) is texts:
            raise ValueError(f"{len(places)} steps are fitted, each on all texts: give a list of them, not an iterator")
        for place in places:
            before = Pipeline(self.steps[:place])
            bar = require("tqdm", "train").tqdm(texts, desc="fit", unit="document", delay=2, disable=None)
            self.steps[place] = self.steps[place].fitted(before(text) for text in bar)  # type: ignore[misc]
        return self

    def to_dict(self) -> dict[str, Any]:
        """Steps with all their words, and the versions of what they rest on."""
        steps = [{"step": step.name} for step in self.steps]
        for step, state in zip(self.steps, steps, strict=True):
            fields = dataclasses.asdict(step).items()
            state.update({name: list(value) if isinstance(value, tuple) else value for name, value in fields})
        return {"version": 1, "steps": steps, "libraries": self._libraries()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Pipeline:
        """Of what `to_dict` gave; other versions than those that it was saved with are warned of.

        Raises:
            ValueError: for what is no pipeline.
        """
        try:
            if state["version"] != 1:
                raise ValueError(f"version {state['version']} is not known, only 1 is")
            steps = []
            for fields in state["steps"]:
                _one_of(fields["step"], tuple(STEPS), "a step")
                steps.append(STEPS[fields["step"]](**{key: fields[key] for key in fields if key != "step"}))
            pipeline, saved = cls(steps), dict(state["libraries"])
        except (KeyError, TypeError, ValueError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"this is no saved pipeline: {what}") from error
        for name, version in pipeline._libraries().items():
            if saved.get(name) != version:
                warnings.warn(
                    f"these steps were saved with {name} {saved.get(name)}, here is {version}: some words may differ",
                    stacklevel=2,
                )
        return pipeline

    def save(self, path: str | Path) -> None:
        """Writes one JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Pipeline:
        """Reads what `save` wrote.

        Raises:
            OSError: as open.
            ValueError: for a file that is no pipeline, by its name.
        """
        text = read_text(path)
        try:
            return cls.from_dict(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _libraries(self) -> dict[str, str]:
        found = {"Unicode": unicodedata.unidata_version}
        if any(isinstance(step, Segment) and step.method == "jieba" for step in self.steps):
            found["jieba"] = require("jieba", "data").__version__
        return found


def stop_words(*languages: str) -> list[str]:
    """The lists of stop words that come with fastllm (fastllm/data/stop_words): 199 in "en" and 288 in "zh".

    They are function words, written down for this project from general knowledge. Words that negate are not among them:
    without "not", a sentence says the opposite.

    Raises:
        ValueError: for another language.
    """
    for language in languages:
        _one_of(language, LANGUAGES, "language")
    folder = Path(__file__).parent / "stop_words"
    return [word for language in languages for word in read_words(folder / f"{language}.txt")]


def read_words(path: str | Path) -> list[str]:
    """The words of a file, one a line; lines that are blank or begin with "# " are none.

    Raises:
        OSError: as open.
        ValueError: as `read_text`, and for a line with several words, by its number.
    """
    words = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip() and not line.startswith("# "):
            if len(line.split()) > 1:
                raise ValueError(f"{path}:{number} should have one word, not {line.strip()[:60]!r}")
            words.append(line.strip())
    if not words:
        raise ValueError(f"{path} has no words")
    return words

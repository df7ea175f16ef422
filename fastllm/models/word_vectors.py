"""Words and their vectors: neighbours, analogies, and word2vec's text format."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


class WordVectors:
    """Words and their vectors.

    Args:
        words: V strings, all different.
        vectors: (V, D), converted to float32 on the CPU.

    Raises:
        ValueError: where the two do not fit together, or a word is there twice.
    """

    def __init__(self, words: Iterable[str], vectors: Tensor):
        self.words = list(words)
        if vectors.ndim != 2 or len(vectors) != len(self.words):
            raise ValueError(
                f"vectors must have the shape (V, D) for V={len(self.words)} words, got {tuple(vectors.shape)}"
            )
        self.vectors = vectors.detach().to("cpu", torch.float32).contiguous()
        self._index = {word: i for i, word in enumerate(self.words)}
        if len(self._index) < len(self.words):
            twice = next(word for i, word in enumerate(self.words) if self._index[word] != i)
            raise ValueError(f"the word {twice!r} is there twice")

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self._index

    def __getitem__(self, word: str) -> Tensor:
        """The vector of `word`, (D,).

        Raises:
            KeyError: for a word that has none.
        """
        return self.vectors[self._find(word)]

    def _find(self, word: str) -> int:
        try:
            return self._index[word]
        except KeyError:
            raise KeyError(f"the word {word!r} has no vector") from None

    def similarity(self, a: str, b: str) -> float:
        """The cosine of the angle between the vectors of two words.

        Raises:
            KeyError: for a word that has no vector.
        """
        return float(F.cosine_similarity(self[a].double(), self[b].double(), dim=0))

    def nearest(self, word: str | Tensor, k: int = 10) -> list[tuple[str, float]]:
        """The k words whose vectors have the largest cosine with that of `word`, which is left out, or with a vector
        (D,): (word, cosine), the largest first; fewer, where there are no more.

        Raises:
            KeyError: for a word that has no vector.
            ValueError: for k < 1, and a vector of another shape.
        """
        if isinstance(word, str):
            return self._nearest(self[word], k, {self._find(word)})
        if word.shape != self.vectors.shape[1:]:
            raise ValueError(f"the vector must have the shape ({self.vectors.shape[1]},), got {tuple(word.shape)}")
        return self._nearest(word, k, set())

    def analogy(self, a: str, b: str, c: str, k: int = 1) -> list[tuple[str, float]]:
        """The k words d for "a is to b as c is to d", by 3CosAdd (Mikolov, Yih and Zweig, 2013): those nearest to
        b - a + c, where each has length 1, without a, b and c. Returns what `nearest` does.

        Raises:
            KeyError: for a word that has no vector.
            ValueError: for k < 1.
        """
        given = [self._find(word) for word in (a, b, c)]
        a_D, b_D, c_D = F.normalize(self.vectors[given], dim=-1)
        return self._nearest(b_D - a_D + c_D, k, set(given))

    def _nearest(self, vector_D: Tensor, k: int, without: set[int]) -> list[tuple[str, float]]:
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be a positive int, got {k!r}")
        cosine_V = F.normalize(self.vectors, dim=-1) @ F.normalize(vector_D.to(self.vectors), dim=0)
        best, order = cosine_V.topk(min(len(self), k + len(without)))
        found = zip(order.tolist(), best.tolist(), strict=True)
        return [(self.words[i], cosine) for i, cosine in found if i not in without][:k]

    def save(self, path: str | Path) -> None:
        """Writes word2vec's text format: "V D" on the first line, then a word and its D numbers on each.

        The numbers have nine digits, which give the same float32 when they are read.

        Raises:
            ValueError: for a word that is empty, has whitespace in it, or cannot be UTF-8. Nothing is written then.
        """
        for word in self.words:
            if word.split() != [word]:
                raise ValueError(f"the word {word!r} cannot be saved: the text format separates words by whitespace")
            if any("\ud800" <= character <= "\udfff" for character in word):
                raise ValueError(f"the word {word!r} cannot be saved: it is not UTF-8")
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(f"{len(self)} {self.vectors.shape[1]}\n")
            for word, row in zip(self.words, self.vectors, strict=True):
                file.write(f"{word} {' '.join(format(x, '.9g') for x in row.tolist())}\n")

    @classmethod
    def load(cls, path: str | Path) -> WordVectors:
        """Reads word2vec's text format, as `save`, gensim or word2vec's C code write it.

        Raises:
            ValueError: for a file that is not such; the message has the line.
        """
        words: dict[str, int] = {}
        numbers = array("f")
        with open(path, "rb") as file:
            header = file.readline().split()
            if len(header) != 2 or not all(part.isdigit() and int(part) for part in header):
                raise ValueError(f"{path}, line 1: expected the number of words and the width of vectors")
            count, dim = map(int, header)
            for number, line in enumerate(file, 2):
                where = f"{path}, line {number}"
                # Not str.split(): a word may have a no-break space in it.
                parts = line.strip(b" \t\r\n").split(b" ")
                if parts == [b""] and len(words) == count:
                    continue  # blank lines at the end
                if len(words) == count:
                    raise ValueError(f"{where}: more than the {count} words of the first line")
                if len(parts) != dim + 1:
                    raise ValueError(f"{where}: expected a word and {dim} numbers, got {len(parts)} parts")
                try:
                    word = parts[0].decode("utf-8")
                except UnicodeDecodeError:
                    raise ValueError(f"{where}: the word {parts[0]!r} is not UTF-8") from None
                if word in words:
                    raise ValueError(f"{where}: the word {word!r} was on line {words[word]}")
                try:
                    row = array("f", map(float, parts[1:]))
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
                if not all(map(math.isfinite, row)):
                    raise ValueError(f"{where}: a number is not finite")
                words[word] = number
                numbers.extend(row)
        if len(words) < count:
            raise ValueError(f"{path}, line {len(words) + 2}: the file ends after {len(words)} of {count} words")
        return cls(words, torch.frombuffer(numbers, dtype=torch.float32).view(count, dim))

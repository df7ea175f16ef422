"""Word vectors: skip-gram and CBOW with negative sampling (Mikolov et al., 2013, arXiv 1301.3781 and 1310.4546).

For a word c at some position, a word o near it and words n drawn as noise, skip-gram lowers

    -log sigmoid(in[c] . out[o]) - sum over `negatives` words n of log sigmoid(-in[c] . out[n])

and CBOW the same with the mean of in[o] over the window instead of in[c], once a position, and out[c] instead of
out[o]. Plain PyTorch on the CPU, with gradients by hand: a span of T neighbouring positions shares its K words of noise
(after Ji et al., 2016, arXiv 1604.04661), each of them weighed by negatives / K, which leaves the expected gradient as
it is. The scores of a span are then one matrix product, T x (context and noise), and each gradient is another.

Letters in names of tensors: B spans of a batch, T positions of a span, C positions of its context (T and a window on
either side), K words of noise, N words to be scored, D the width of a vector, V vocabulary.
"""

from __future__ import annotations

import math
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm._extras import require
from fastllm.models.config import check_positive
from fastllm.models.word_vectors import WordVectors

_SPAN = 16  # T, unless the rate is high, and K, unless there are more negatives
_BATCH = 1024  # positions whose steps are made at once, at most
_OF_A_WORD, _OF_A_NOISE_WORD = 3.0, 15.0  # rates that may add up for a word in a batch, and for one draw of noise
_CHUNK = 1 << 18  # words of the corpus for which windows are made at a time; none reaches over its end
_LOSS_EVERY = 8  # batches
_BOUND = 1e4  # of what is in a vector, far from all that is of use
_PATIENCE = 2.0  # seconds before a progress bar is shown
_TRIAL, _PAUSES = 8, (0.02, 0.5)  # batches in another number of threads, and seconds of batches between two trials


@dataclass(frozen=True)
class Word2VecConfig:
    """How to train word vectors. The defaults are gensim's, except that skip-gram is the architecture.

    Attributes:
        architecture: "skip_gram" or "cbow".
        dim: width of a vector.
        window: the most words on either side that are context; each position draws its own from 1 to `window`.
        negatives: words of noise for each pair (skip-gram) or position (CBOW), drawn by counts^noise_exponent.
        min_count: what is rarer in the corpus is left out, before windows are made.
        sample: a word of relative frequency f is kept with probability sqrt(sample / f) + sample / f each time that it
            occurs, if that is less than 1; 0 keeps all.
        noise_exponent: as above; 0 draws all words alike.
        learning_rate, min_learning_rate: the rate falls linearly from the first to the second.
        epochs: passes over the corpus.
        seed: of everything that is drawn.

    Raises:
        ValueError: for a value that does not fit, naming it.
    """

    architecture: str = "skip_gram"
    dim: int = 100
    window: int = 5
    negatives: int = 5
    min_count: int = 5
    sample: float = 1e-3
    noise_exponent: float = 0.75
    learning_rate: float = 0.025
    min_learning_rate: float = 1e-4
    epochs: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in ("skip_gram", "cbow"):
            raise ValueError(f"Word2VecConfig: architecture must be skip_gram or cbow, got {self.architecture!r}")
        check_positive(self, "dim", "window", "negatives", "min_count", "epochs")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63:
            raise ValueError(f"Word2VecConfig: seed must be an int in [0, 2^63), got {self.seed!r}")
        if not 0 <= self.sample < math.inf:
            raise ValueError(f"Word2VecConfig: sample must not be negative, got {self.sample}")
        if not math.isfinite(self.noise_exponent):
            raise ValueError(f"Word2VecConfig: noise_exponent must be finite, got {self.noise_exponent}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"Word2VecConfig: learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"Word2VecConfig: min_learning_rate must be in [0, learning_rate={self.learning_rate}], got "
                f"{self.min_learning_rate}"
            )


class Corpus(NamedTuple):
    """Sentences as numbers of their words, one after the other."""

    words: list[str]  # from the most frequent on
    counts_V: Tensor  # int64
    tokens: Tensor  # (n,) int32, indices into `words`
    sentence: Tensor  # (n,) int32, the number of the sentence of each token


def read_corpus(sentences: Iterable[Iterable[str]], min_count: int) -> Corpus:
    """Reads `sentences` once. Words that occur less than `min_count` times are left out.

    Raises:
        TypeError: for a sentence that is a string, and a word that is not.
        ValueError: where there are no words, or none that is frequent enough.
    """
    known: defaultdict[Any, int] = defaultdict()
    known.default_factory = known.__len__  # a new word's number
    ids, lengths = array("i"), array("q")
    bar = require("tqdm", "train").tqdm(
        sentences, desc="words", unit="sentence", delay=_PATIENCE, disable=None, dynamic_ncols=True
    )
    for sentence in bar:
        if isinstance(sentence, (str, bytes)):
            raise TypeError(f"a sentence must be a list of words, got the string {sentence[:40]!r}")
        before = len(ids)
        ids.extend(map(known.__getitem__, sentence))
        lengths.append(len(ids) - before)
    for word in known:
        if not isinstance(word, str):
            raise TypeError(f"a word must be a string, got {word!r}")
    if not ids:
        raise ValueError("the corpus is empty: there is no word in its sentences")
    tokens = torch.frombuffer(ids, dtype=torch.int32)
    sentence_of = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(
        torch.frombuffer(lengths, dtype=torch.int64)
    )
    counts, order = tokens.bincount().sort(descending=True, stable=True)
    frequent = int((counts >= min_count).sum())
    if not frequent:
        raise ValueError(f"no word occurs min_count={min_count} times; the most frequent one occurs {counts[0]} times")
    rank = torch.empty(len(known), dtype=torch.int32)
    rank[order] = torch.arange(len(known), dtype=torch.int32)
    tokens = rank[tokens]
    kept = tokens < frequent
    names = list(known)
    return Corpus([names[i] for i in order[:frequent].tolist()], counts[:frequent], tokens[kept], sentence_of[kept])


def keep_probability(counts_V: Tensor, sample: float) -> Tensor:
    """(V,) float64, with which an occurrence of each word takes part in an epoch, as in word2vec's C code."""
    if sample == 0:
        return torch.ones(len(counts_V), dtype=torch.float64)
    ratio_V = sample * counts_V.sum() / counts_V.double()
    return (ratio_V.sqrt() + ratio_V).clamp(max=1)


def noise_distribution(counts_V: Tensor, exponent: float) -> Tensor:
    """(V,) float64, the probability of each word to be drawn as noise."""
    return (counts_V.double().log() * exponent).softmax(0)


class Spans(NamedTuple):
    """Positions in spans of T, with what each is to be predicted from."""

    context_BC: Tensor  # words; those of the span itself are [:, window : window + T]
    pairs_BTC: Tensor  # bool, whether a position and a place in the context are a pair
    noise_BK: Tensor  # words

    @property
    def words_BT(self) -> Tensor:
        positions, places = self.pairs_BTC.shape[1:]
        return self.context_BC.narrow(1, (places - positions) // 2, positions)


class Sampler:
    """Draws what an epoch sees of a corpus: words, windows and noise."""

    def __init__(self, corpus: Corpus, config: Word2VecConfig, generator: torch.Generator):
        self.window, self.generator = config.window, generator
        self.keep_V = keep_probability(corpus.counts_V, config.sample)
        cumulative_V = noise_distribution(corpus.counts_V, config.noise_exponent).cumsum(0)
        self.cumulative_V = cumulative_V / cumulative_V[-1]
        # Steps that are made at once overshoot where they all move one word: few positions for few words, and for a
        # high rate. A position is window + 1 pairs on average; CBOW takes a third of that, by trial (docs/word2vec.md).
        pairs = (config.window + 1) / (1 if config.architecture == "skip_gram" else 3)
        steps = config.learning_rate * pairs * (config.negatives + 1)
        kept_V = self.keep_V * corpus.counts_V
        positions = max(1, min(_BATCH, int(_OF_A_WORD / (steps * float(kept_V.max() / kept_V.sum())))))
        self.span = max(1, min(_SPAN, positions, int(_OF_A_NOISE_WORD / steps)))
        self.batch = positions // self.span
        """Spans whose steps are made at once."""
        self.shared = max(_SPAN, config.negatives)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def noise(self, *shape: int) -> Tensor:
        """Words by `noise_distribution`, int64."""
        return torch.searchsorted(self.cumulative_V, self._uniform(*shape), right=True)

    def spans(self, tokens: Tensor, sentence: Tensor) -> Spans:
        """All spans of a piece of the corpus, the last one filled up with positions that see nothing."""
        kept = self._uniform(len(tokens)) < self.keep_V[tokens]
        tokens, sentence = tokens[kept].long(), sentence[kept]
        n = len(tokens)
        lengths = sentence.unique_consecutive(return_counts=True)[1]
        last = (lengths.cumsum(0) - 1).repeat_interleave(lengths)
        first = last + 1 - lengths.repeat_interleave(lengths)
        reach = torch.randint(1, self.window + 1, (n,), generator=self.generator)
        place = torch.arange(n)
        fill = -n % self.span
        to_context = self.window - place // self.span * self.span  # turns a place in the piece into one in a context
        low = F.pad(torch.maximum(place - reach, first) + to_context, (0, fill), value=1)
        high = F.pad(torch.minimum(place + reach, last) + to_context, (0, fill), value=0)
        low_BT1, high_BT1 = (x.view((n + fill) // self.span, self.span, 1) for x in (low, high))
        place_C = torch.arange(self.span + 2 * self.window)
        itself_T1 = place_C[self.window : self.window + self.span, None]
        pairs_BTC = (place_C >= low_BT1) & (place_C <= high_BT1) & (place_C != itself_T1)
        padded = F.pad(tokens, (self.window, self.window + max(fill, self.span - n)))
        context_BC = padded.unfold(0, len(place_C), self.span)[: len(pairs_BTC)]
        return Spans(context_BC, pairs_BTC, self.noise(len(pairs_BTC), self.shared))

    def batches(self, tokens: Tensor, sentence: Tensor) -> Iterator[tuple[Spans, float]]:
        """The spans of a piece in random order, and the share of the piece that was seen before each batch.

        Neighbouring spans have words in common; together in a batch, their steps would add up.
        """
        spans = self.spans(tokens, sentence)
        order = torch.randperm(len(spans.noise_BK), generator=self.generator)
        shuffled = [tensor[order] for tensor in spans]
        for start in range(0, len(order), self.batch):
            yield Spans(*(tensor[start : start + self.batch] for tensor in shuffled)), start / len(order)


def train_step(
    inputs_VD: Tensor,
    outputs_VD: Tensor,
    spans: Spans,
    architecture: str,
    negatives: int,
    rate: float,
    with_loss: bool = False,
) -> float | None:
    """One step of gradient descent on both tables, in place; returns the mean loss before it, if it is asked for.

    Noise that happens to be the word sought counts as noise, as the formula has it.
    """
    words_BT = spans.words_BT
    noise = negatives / spans.noise_BK.shape[1]
    pairs_BTC = spans.pairs_BTC.to(inputs_VD.dtype)
    context_BT1 = pairs_BTC.sum(-1, keepdim=True)
    if architecture == "skip_gram":
        targets_BP, positive_BTP = spans.context_BC, pairs_BTC
        noise_BT1 = noise * context_BT1
        hidden_BTD = F.embedding(words_BT, inputs_VD)
    else:
        some_BT1 = context_BT1.clamp(max=1)  # 0 for a word that has no context
        targets_BP, positive_BTP = words_BT, some_BT1 * torch.eye(words_BT.shape[1], dtype=inputs_VD.dtype)
        noise_BT1 = noise * some_BT1
        hidden_BTD = torch.bmm(pairs_BTC / context_BT1.clamp(min=1), F.embedding(spans.context_BC, inputs_VD))
    scored_BN = torch.cat((targets_BP, spans.noise_BK), 1)
    scored_BND = F.embedding(scored_BN, outputs_VD)
    weight_BTN = torch.cat((positive_BTP, noise_BT1.expand(-1, -1, spans.noise_BK.shape[1])), -1)
    positives = targets_BP.shape[1]
    slope_BTN = torch.bmm(hidden_BTD, scored_BND.mT)  # the scores, as yet
    loss = None
    if with_loss:  # softplus(-score) = softplus(score) - score
        total = (F.softplus(slope_BTN) * weight_BTN).sum() - (slope_BTN[..., :positives] * positive_BTP).sum()
        loss = float(total / positive_BTP.sum().clamp(min=1))
    slope_BTN.sigmoid_()
    slope_BTN[..., :positives] -= 1
    slope_BTN.mul_(weight_BTN).mul_(-rate)
    hidden_step_BTD, scored_step_BND = torch.bmm(slope_BTN, scored_BND), torch.bmm(slope_BTN.mT, hidden_BTD)
    outputs_VD.index_add_(0, scored_BN.flatten(), scored_step_BND.flatten(0, 1))
    if architecture == "skip_gram":
        inputs_VD.index_add_(0, words_BT.flatten(), hidden_step_BTD.flatten(0, 1))
    else:
        # The mean's step goes to each word of the context undivided, as in word2vec's C code and gensim: a learning
        # rate that grows with the number of words.
        context_step_BCD = torch.bmm(pairs_BTC.mT, hidden_step_BTD)
        inputs_VD.index_add_(0, spans.context_BC.flatten(), context_step_BCD.flatten(0, 1))
    return loss


class Threads:
    """Gives batches one thread or all of torch's, whichever was faster when last tried; the vectors are the same bits.

    The products of a batch take microseconds. Where other programs want the processor too, threads wait for each other
    far longer than they compute.
    """

    def __enter__(self) -> Threads:
        self.most = torch.get_num_threads()
        self.pause = _PAUSES[0]
        self.limit: float | None = None  # seconds in which a trial must be done; None outside of one
        self._start(1)
        return self

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.most)

    def _start(self, threads: int) -> None:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        self.threads, self.seconds, self.batches = threads, 0.0, 0
        self.began = time.perf_counter(), time.thread_time()

    def _waited(self) -> bool:
        """Whether one thread alone has had to wait for a processor: more would wait for each other as well."""
        wall, own = time.perf_counter() - self.began[0], time.thread_time() - self.began[1]
        return own < 0.9 * wall

    def took(self, seconds: float) -> None:
        """A batch is done."""
        self.seconds += seconds
        self.batches += 1
        other = 1 + self.most - self.threads
        if self.limit is None:
            if self.most > 1 and self.seconds > self.pause:
                if self.threads > 1 or not self._waited():
                    self.limit = 0.9 * self.seconds / self.batches * _TRIAL
                    self._start(other)
                else:
                    self._start(1)
        elif self.seconds > self.limit:  # no need to see the rest of it
            # To go back to one thread is tried often: it costs little, and other programs may begin at any time.
            self.pause, self.limit = min(2 * self.pause, _PAUSES[1]) if other == 1 else _PAUSES[0], None
            self._start(other)
        elif self.batches == _TRIAL:
            self.pause, self.limit = _PAUSES[0], None
            self._start(self.threads)


def train_word2vec(
    sentences: Iterable[Iterable[str]],
    config: Word2VecConfig | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> WordVectors:
    """Trains word vectors on the CPU. On a terminal, long work shows its progress on stderr.

    One thread or all of torch's compute, whichever is faster at the time; torch.set_num_threads is put back at the end.

    Args:
        sentences: lists of words; read once, and kept in memory as 8 bytes a word.
        config: None means the defaults.
        on_epoch: is called after each epoch with its number, from 0, and its mean loss: that of a pair (skip-gram) or
            of a position (CBOW), in every eighth batch before its step.

    Returns:
        The input vectors, in the order of falling counts. The same sentences and seed give the same bits on the same
        machine, whatever the number of threads.

    Raises:
        TypeError: for a sentence that is a string, and a word that is not.
        ValueError: where there are no words, or none that occurs min_count times.
        FloatingPointError: where the vectors grow beyond all bounds.
    """
    config = config or Word2VecConfig()
    corpus = read_corpus(sentences, config.min_count)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (len(corpus.words), config.dim)
    inputs_VD = (2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1) / config.dim
    outputs_VD = torch.zeros(shape, dtype=torch.float32)
    sampler = Sampler(corpus, config, generator)
    n = len(corpus.tokens)
    bar = require("tqdm", "train").tqdm(
        total=config.epochs * n,
        desc="word2vec",
        unit="word",
        unit_scale=True,
        delay=_PATIENCE,
        disable=None,
        dynamic_ncols=True,
    )
    with bar, Threads() as threads:
        for epoch in range(config.epochs):
            total, count = 0.0, 0
            for start in range(0, n, _CHUNK):
                piece = slice(start, start + _CHUNK)
                size = len(corpus.tokens[piece])
                for number, (spans, share) in enumerate(sampler.batches(corpus.tokens[piece], corpus.sentence[piece])):
                    done = (epoch * n + start + share * size) / (config.epochs * n)
                    rate = config.learning_rate + done * (config.min_learning_rate - config.learning_rate)
                    started = time.perf_counter()
                    loss = train_step(
                        inputs_VD,
                        outputs_VD,
                        spans,
                        config.architecture,
                        config.negatives,
                        rate,
                        with_loss=number % _LOSS_EVERY == 0,
                    )
                    threads.took(time.perf_counter() - started)
                    if loss is not None:
                        total, count = total + loss, count + 1
                bar.update(size)
            if not inputs_VD.abs().max() < _BOUND:  # false for NaN
                raise FloatingPointError(f"epoch {epoch}: vectors grow beyond bounds; a lower learning_rate may help")
            if count:
                bar.set_postfix(loss=f"{total / count:.3f}", refresh=False)
            if on_epoch is not None:
                on_epoch(epoch, total / count if count else math.nan)
    return WordVectors(corpus.words, inputs_VD)

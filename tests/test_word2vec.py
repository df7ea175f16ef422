"""Word vectors: what is drawn, the step against autograd, neighbours, and the text format."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastllm.data import topics_text
from fastllm.models import word2vec
from fastllm.models.word2vec import (
    Sampler,
    Spans,
    Threads,
    Word2VecConfig,
    WordVectors,
    keep_probability,
    noise_distribution,
    read_corpus,
    train_step,
    train_word2vec,
)

ARCHITECTURES = ("skip_gram", "cbow")


def topics(words: int = 6, number: int = 4, sentences: int = 400, length: int = 8) -> list[list[str]]:
    """Sentences of one topic each: words of a topic occur in the same contexts, words of two topics never."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(words, (sentences, length), generator=generator).tolist()
    return [[f"{i % number}.{word}" for word in row] for i, row in enumerate(drawn)]


def sampler(sentences: list[list[str]], seed: int = 0, **changes) -> tuple[Sampler, torch.Tensor, torch.Tensor]:
    config = Word2VecConfig(**{"min_count": 1, "sample": 0.0, **changes})
    corpus = read_corpus(sentences, config.min_count)
    return Sampler(corpus, config, torch.Generator().manual_seed(seed)), corpus.tokens, corpus.sentence


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "glove"}, "architecture must be skip_gram or cbow, got 'glove'"),
        ({"dim": 0}, "dim must be a positive int, got 0"),
        ({"window": 2.5}, "window must be a positive int, got 2.5"),
        ({"negatives": 0}, "negatives must be a positive int, got 0"),
        ({"min_count": True}, "min_count must be a positive int, got True"),
        ({"epochs": -1}, "epochs must be a positive int, got -1"),
        ({"seed": -1}, r"seed must be an int in \[0, 2\^63\), got -1"),
        ({"sample": -0.1}, "sample must not be negative, got -0.1"),
        ({"sample": math.nan}, "sample must not be negative, got nan"),
        ({"noise_exponent": math.inf}, "noise_exponent must be finite, got inf"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"min_learning_rate": 0.1}, r"min_learning_rate must be in \[0, learning_rate=0.025\], got 0.1"),
    ],
)
def test_config_names_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        Word2VecConfig(**changes)


def test_corpus():
    corpus = read_corpus(iter([["b", "a", "c"], [], ["a", "b", "a"], ["d"]]), 2)
    assert corpus.words == ["a", "b"]
    assert corpus.counts_V.tolist() == [3, 2]
    assert corpus.tokens.tolist() == [1, 0, 0, 1, 0]
    assert corpus.sentence.tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("sentences", "error", "message"),
    [
        ([], ValueError, "the corpus is empty"),
        ([[], []], ValueError, "the corpus is empty"),
        ([["a", "b", "a"]], ValueError, "no word occurs min_count=5 times; the most frequent one occurs 2 times"),
        (["a sentence"], TypeError, "a sentence must be a list of words, got the string 'a sentence'"),
        ([["a", 3]], TypeError, "a word must be a string, got 3"),
    ],
)
def test_what_cannot_be_trained_on(sentences, error, message):
    with pytest.raises(error, match=message):
        train_word2vec(sentences)


def test_vectors_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match=r"epoch 0: .* a lower learning_rate"):
        train_word2vec(topics(2, 1), Word2VecConfig(learning_rate=1e9, epochs=1))


def test_frequent_words_are_kept_less_often():
    counts = torch.tensor([8000, 1500, 400, 100])
    share = counts.double() / 10_000
    keep = keep_probability(counts, 0.02)
    torch.testing.assert_close(keep, ((0.02 / share).sqrt() + 0.02 / share).clamp(max=1))
    assert keep.tolist() == pytest.approx([0.025 + math.sqrt(0.025), 2 / 15 + math.sqrt(2 / 15), 1.0, 1.0])
    assert keep_probability(counts, 0.0).tolist() == [1.0] * 4
    words = [[str(word) for word, count in enumerate(counts.tolist()) for _ in range(count)]]
    sampling, tokens, sentence = sampler(words, sample=0.02)
    spans = sampling.spans(tokens, sentence)
    seen = spans.words_BT[spans.pairs_BTC.any(-1)].bincount(minlength=4)
    deviation = (counts * keep * (1 - keep)).sqrt()
    assert ((seen - counts * keep).abs() <= 4 * deviation + 1).all(), seen


@pytest.mark.parametrize("exponent", [0.75, 0.0, 1.0])
def test_noise(exponent):
    counts = torch.tensor([1000, 100, 50, 3])
    power = counts.double() ** exponent
    probability = noise_distribution(counts, exponent)
    torch.testing.assert_close(probability, power / power.sum())
    words = [[str(word)] * count for word, count in enumerate(counts.tolist())]
    drawn = sampler(words, noise_exponent=exponent)[0].noise(100, 1000)
    deviation = (probability * (1 - probability) / drawn.numel()).sqrt()
    assert ((drawn.flatten().bincount(minlength=4) / drawn.numel() - probability).abs() <= 4 * deviation).all()


@pytest.mark.parametrize("rate", [0.025, 0.2])
@pytest.mark.parametrize("window", [1, 5, 20])
def test_windows(window, rate):
    """Every word occurs once, so that a pair of words says where in the corpus it is from."""
    lengths = [1, 7, 40, 2, 3, 111, 30]
    places = [(sentence, place) for sentence, length in enumerate(lengths) for place in range(length)]
    sentences = [[f"{s}.{p}" for s, p in places if s == sentence] for sentence in range(len(lengths))]
    sampling, tokens, sentence = sampler(sentences, window=window, learning_rate=rate)
    assert (
        sampling.span
        == {(1, 0.025): 16, (5, 0.025): 16, (20, 0.025): 4, (1, 0.2): 6, (5, 0.2): 2, (20, 0.2): 1}[window, rate]
    )
    reaches = []
    for _ in range(5):
        batches = [spans for spans, _ in sampling.batches(tokens, sentence)]
        seen: dict[int, list[int]] = {}
        for spans in batches:
            for b, t, c in spans.pairs_BTC.nonzero().tolist():
                seen.setdefault(int(spans.words_BT[b, t]), []).append(int(spans.context_BC[b, c]))
        for word, (number, place) in enumerate(places):
            context = [places[other] for other in seen.get(word, [])]
            assert all(other_number == number for other_number, _ in context)
            distances = [other - place for _, other in context]
            reach = max(map(abs, distances), default=0)
            expected = range(max(-reach, -place), min(reach, lengths[number] - 1 - place) + 1)
            assert sorted(distances) == [d for d in expected if d]
            if lengths[number] == 111 and window <= place < 111 - window:
                reaches.append(reach)
    counts = torch.tensor(reaches).bincount(minlength=window + 1)
    assert counts[0] == 0
    share = len(reaches) / window
    assert ((counts[1:] - share).abs() < 5 * math.sqrt(share) + 1).all(), "uniform from 1 to window"


def loss(architecture: str, inputs: torch.Tensor, outputs: torch.Tensor, spans: Spans, negatives: int) -> torch.Tensor:
    """The formula of the module's docstring, written out."""
    total = torch.zeros((), dtype=torch.float64)
    for words_T, context_C, pairs_TC, noise_K in zip(spans.words_BT, *spans, strict=True):
        share = negatives / len(noise_K)
        for word, pairs_C in zip(words_T, pairs_TC, strict=True):
            context = context_C[pairs_C]
            if architecture == "skip_gram":
                for other in context:
                    total = total - F.logsigmoid(inputs[word] @ outputs[other])
                    total = total - share * F.logsigmoid(-(outputs[noise_K] @ inputs[word])).sum()
            elif len(context):
                sum_D = inputs[context].sum(0)
                mean_D = (sum_D / len(context)).detach() + sum_D - sum_D.detach()  # the gradient goes on undivided
                total = total - F.logsigmoid(mean_D @ outputs[word])
                total = total - share * F.logsigmoid(-(outputs[noise_K] @ mean_D)).sum()
    return total


@pytest.mark.parametrize("negatives", [5, 20])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_is_that_of_the_formula(architecture, negatives):
    sentences = [["a"], *topics(5, 2, sentences=7, length=6), ["b", "c"]]
    sampling, tokens, sentence = sampler(sentences, negatives=negatives, window=3)
    spans = sampling.spans(tokens, sentence)
    assert spans.noise_BK.shape[1] == max(16, negatives)
    generator = torch.Generator().manual_seed(1)
    tables = [torch.randn(13, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)]
    expected_loss = loss(architecture, *tables, spans, negatives)
    expected_loss.backward()
    stepped = [table.detach().clone() for table in tables]
    mean = train_step(*stepped, spans, architecture, negatives, 0.1, with_loss=True)
    for after, before in zip(stepped, tables, strict=True):
        torch.testing.assert_close(after, before.detach() - 0.1 * before.grad, rtol=1e-12, atol=1e-12)
    pairs = spans.pairs_BTC.sum() if architecture == "skip_gram" else spans.pairs_BTC.any(-1).sum()
    assert mean == pytest.approx(expected_loss.item() / pairs.item())


def test_shared_noise_has_the_expected_gradient_of_noise_for_each_pair():
    probability = noise_distribution(torch.tensor([50, 10, 5]), 0.75)
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    context, pairs = torch.tensor([[0, 0, 1, 2, 0, 0]]), torch.zeros(1, 2, 6, dtype=torch.bool)
    pairs[0, 0, 3] = True  # word 1 sees word 2
    noise = torch.arange(3).repeat_interleave((probability * 1_000_000).round().long())[None]
    before = inputs[1].clone()
    train_step(inputs, outputs.clone(), Spans(context, pairs, noise), "skip_gram", 5, 1.0)
    score = outputs @ before
    expected = (1 - score[2].sigmoid()) * outputs[2] - 5 * (probability * score.sigmoid()) @ outputs
    torch.testing.assert_close(inputs[1] - before, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("words", "number", "rate"), [(6, 4, 0.025), (6, 4, 0.1), (6, 40, 0.05)])
def test_words_of_the_same_contexts_are_neighbours(architecture, words, number, rate):
    config = Word2VecConfig(architecture=architecture, dim=16, epochs=15, sample=0.0, learning_rate=rate)
    losses: list[float] = []
    wv = train_word2vec(topics(words, number, 100 * number), config, lambda epoch, loss: losses.append(loss))
    assert len(wv) == words * number
    assert len(losses) == 15
    assert losses[-1] < 0.9 * losses[0]
    for word in wv.words:
        for other, _ in wv.nearest(word, words - 1):
            assert other.split(".")[0] == word.split(".")[0], (word, wv.nearest(word, words))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_seed_gives_the_same_bits(architecture, monkeypatch, threads):
    sentences = [line.split() for line in topics_text()[:60_000].splitlines()]

    def train(seed: int, count: int) -> torch.Tensor:
        torch.set_num_threads(count)
        # Without trials, all in that number of threads.
        monkeypatch.setattr(Threads, "took", lambda self, seconds: self._start(count))
        config = Word2VecConfig(architecture=architecture, epochs=2, seed=seed)
        vectors = train_word2vec(sentences, config).vectors
        assert torch.get_num_threads() == count
        return vectors

    first = train(3, 1)
    state = torch.random.get_rng_state()
    for count in (1, 2, 3):
        assert torch.equal(first, train(3, count))
    assert torch.equal(state, torch.random.get_rng_state()), "torch's own generator is left alone"
    assert not torch.equal(first, train(4, 1))


def test_the_faster_number_of_threads_is_kept(threads, monkeypatch):
    waited = False
    monkeypatch.setattr(Threads, "_waited", lambda self: waited)

    def used(one: float, all_of_them: float) -> list[int]:
        torch.set_num_threads(3)
        with Threads() as choice:
            found = []
            for _ in range(2000):
                found.append(choice.threads)
                assert torch.get_num_threads() == choice.threads
                choice.took(one if choice.threads == 1 else all_of_them)
        assert torch.get_num_threads() == 3
        return found

    slower = used(0.001, 0.010)
    assert slower[:20] == [1] * 20
    assert 3 <= slower.count(3) <= 10, "a trial is given up as soon as it is lost, and comes less and less often"
    assert used(0.001, 0.0008).count(3) / 2000 > 0.7
    assert used(0.001, 0.00095).count(1) > 1800, "a little faster is not enough"
    waited = True
    assert used(0.001, 0.0008).count(1) == 2000


def test_long_corpora_are_trained_piece_by_piece(monkeypatch):
    monkeypatch.setattr("fastllm.models.word2vec._CHUNK", 1000)
    wv = train_word2vec(topics(), Word2VecConfig(dim=16, epochs=15, sample=0.0))
    assert all(other[0] == word[0] for word in wv.words for other, _ in wv.nearest(word, 5))


def test_nothing_left_by_subsampling_and_words_alone_in_their_sentences():
    sentences = [["a"], ["b"]] * 10
    wv = train_word2vec(sentences, Word2VecConfig(dim=3, sample=1e-12))
    assert wv.words == ["a", "b"]
    assert torch.equal(wv.vectors, train_word2vec(sentences, Word2VecConfig(dim=3, architecture="cbow")).vectors)


COMPASS = WordVectors(
    ["king", "queen", "man", "woman", "apple"],
    torch.tensor([[3.0, 0.0, 4.0], [0.0, 3.0, 4.0], [2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [-1.0, -1.0, -1.0]]),
)


def test_word_vectors():
    assert len(COMPASS) == 5
    assert "king" in COMPASS
    assert "prince" not in COMPASS
    assert COMPASS["queen"].tolist() == [0.0, 3.0, 4.0]
    assert COMPASS.similarity("king", "queen") == pytest.approx(16 / 25)
    assert COMPASS.similarity("king", "man") == pytest.approx(3 / 5)
    assert COMPASS.nearest("king", 2) == [("queen", pytest.approx(0.64)), ("man", pytest.approx(0.6))]
    assert len(COMPASS.nearest("king", 100)) == 4
    assert COMPASS.nearest(torch.tensor([0.0, 9.0, 0.0]), 1) == [("woman", pytest.approx(1.0))]
    assert COMPASS.nearest(COMPASS["king"].double(), 1) == [("king", pytest.approx(1.0))]
    assert COMPASS.analogy("man", "king", "woman") == [("queen", pytest.approx(0.96, abs=0.05))]
    assert [word for word, _ in COMPASS.analogy("man", "king", "woman", 10)] == ["queen", "apple"]


def test_analogy_is_3cosadd():
    unit = F.normalize(COMPASS.vectors, dim=1)
    vector = unit[0] - unit[2] + unit[3]
    expected = F.cosine_similarity(unit[1], vector, dim=0).item()
    assert COMPASS.analogy("man", "king", "woman")[0][1] == pytest.approx(expected)


def test_word_vectors_name_what_does_not_fit():
    for call in (
        lambda: COMPASS["prince"],
        lambda: COMPASS.nearest("prince"),
        lambda: COMPASS.similarity("king", "prince"),
        lambda: COMPASS.analogy("king", "queen", "prince"),
    ):
        with pytest.raises(KeyError, match="the word 'prince' has no vector"):
            call()
    for k in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"k must be a positive int, got {k}"):
            COMPASS.nearest("king", k)
        with pytest.raises(ValueError, match=f"k must be a positive int, got {k}"):
            COMPASS.analogy("man", "king", "woman", k)
    with pytest.raises(ValueError, match=r"the vector must have the shape \(3,\), got \(2,\)"):
        COMPASS.nearest(torch.zeros(2))
    with pytest.raises(ValueError, match=r"the shape \(V, D\) for V=1 words, got \(2, 3\)"):
        WordVectors(["a"], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="the word 'a' is there twice"):
        WordVectors(["a", "b", "a"], torch.zeros(3, 3))


GOLDEN = "3 2\n</s> 0.5 -1\nGrüße 1.00000001e-10 3.40282347e+38\nnaïve\u00a0x 0.100000001 -0\n"


def test_the_text_format(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text(GOLDEN, encoding="utf-8")
    wv = WordVectors.load(path)
    assert wv.words == ["</s>", "Grüße", "naïve\u00a0x"]
    assert wv.vectors.dtype == torch.float32
    assert torch.equal(wv.vectors, torch.tensor([[0.5, -1.0], [1e-10, 3.40282347e38], [0.1, -0.0]]))
    wv = WordVectors(["</s>", "Grüße", "x"], wv.vectors)
    wv.save(path)
    assert path.read_bytes() == GOLDEN.replace("naïve\u00a0x", "x").encode()


@pytest.mark.parametrize(
    "text",
    [
        "2 3 \n</s> 0.001329 0.004415 -0.001957 \nthe -0.1 2.5 1e-05 \n",  # word2vec's C code: blanks behind numbers
        "2 3\n</s> 0.001329 0.004415 -0.001957\nthe -0.1 2.5 1e-05",  # no last line end
        "2 3\r\n</s> 0.001329 0.004415 -0.001957\r\nthe -0.1 2.5 1e-05\r\n\r\n",
    ],
)
def test_what_others_write(tmp_path, text):
    path = tmp_path / "vectors.txt"
    path.write_bytes(text.encode())
    wv = WordVectors.load(path)
    assert wv.words == ["</s>", "the"]
    torch.testing.assert_close(wv.vectors, torch.tensor([[0.001329, 0.004415, -0.001957], [-0.1, 2.5, 1e-05]]))


def test_every_float32_comes_back(tmp_path):
    bits = torch.randint(-(2**31), 2**31, (100, 7), generator=torch.Generator().manual_seed(0)).int()
    vectors = bits.view(torch.float32).nan_to_num(0.0, 1.0, -1.0)
    WordVectors(map(str, range(100)), vectors).save(tmp_path / "vectors.txt")
    assert torch.equal(WordVectors.load(tmp_path / "vectors.txt").vectors, vectors)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "line 1: expected the number of words and the width"),
        (b"a 1 2\nb 3 4\n", "line 1: expected the number of words and the width"),
        (b"2 0\na\nb\n", "line 1: expected"),
        (b"2 2\na 1 2\n", "line 3: the file ends after 1 of 2 words"),
        (b"2 2\na 1 2\n\nb 3 4\n", "line 3: expected a word and 2 numbers, got 1 parts"),
        (b"1 2\na 1 2\nb 3 4\n", "line 3: more than the 1 words of the first line"),
        (b"2 2\na 1 2\nb 3\n", "line 3: expected a word and 2 numbers, got 2 parts"),
        (b"2 2\na 1 2\nb 3 4 5\n", "line 3: expected a word and 2 numbers, got 4 parts"),
        (b"2 2\na 1 2\nb 3 x\n", "line 3: could not convert string to float"),
        (b"2 2\na 1 2\nb 3 nan\n", "line 3: a number is not finite"),
        (b"2 2\na 1 2\nb 3 1e39\n", "line 3: a number is not finite"),
        (b"2 2\na 1 2\na 3 4\n", "line 3: the word 'a' was on line 2"),
        (b"2 2\na 1 2\n\xff 3 4\n", r"line 3: the word b'\\xff' is not UTF-8"),
    ],
)
def test_a_damaged_file_is_an_error_with_its_line(tmp_path, text, message):
    path = tmp_path / "vectors.txt"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"{path.name}, {message}"):
        WordVectors.load(path)


@pytest.mark.parametrize("word", ["new york", "", " a", "a\n", "a\u00a0b", "\ud800"])
def test_words_that_the_format_cannot_hold(tmp_path, word):
    with pytest.raises(ValueError, match="cannot be saved"):
        WordVectors(["a", word], torch.zeros(2, 3)).save(tmp_path / "vectors.txt")
    assert not (tmp_path / "vectors.txt").exists()


def test_gensim_reads_what_we_write_and_the_reverse(tmp_path):
    gensim = pytest.importorskip("gensim.models")
    vectors = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    WordVectors(["</s>", "Grüße", "世界"], vectors).save(tmp_path / "ours.txt")
    theirs = gensim.KeyedVectors.load_word2vec_format(str(tmp_path / "ours.txt"))
    assert theirs.index_to_key == ["</s>", "Grüße", "世界"]
    assert torch.equal(torch.from_numpy(theirs.vectors), vectors)
    theirs.save_word2vec_format(str(tmp_path / "theirs.txt"))
    ours = WordVectors.load(tmp_path / "theirs.txt")
    assert ours.words == theirs.index_to_key
    assert torch.equal(ours.vectors, vectors)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_gensims(architecture, monkeypatch):
    """Both trained for as long; then the mean loss of their tables over the corpus, with the same draws."""
    gensim = pytest.importorskip("gensim.models")
    sentences = [line.lower().split() for line in topics_text().splitlines()]
    config = Word2VecConfig(architecture=architecture, dim=50)
    tables = []
    monkeypatch.setattr(word2vec, "train_step", lambda *args, **kw: tables.append(args[:2]) or train_step(*args, **kw))
    train_word2vec(sentences, config)
    model = gensim.Word2Vec(
        sentences, vector_size=50, sg=architecture == "skip_gram", min_count=5, sample=1e-3, workers=1, seed=1
    )
    corpus = read_corpus(sentences, config.min_count)
    order = [model.wv.key_to_index[word] for word in corpus.words]
    tables.append([torch.from_numpy(table[order]) for table in (model.wv.vectors, model.syn1neg)])

    def mean_loss(inputs: torch.Tensor, outputs: torch.Tensor) -> float:
        drawn = Sampler(corpus, config, torch.Generator().manual_seed(5)).batches(corpus.tokens, corpus.sentence)
        losses = [train_step(inputs, outputs, spans, architecture, 5, 0.0, with_loss=True) for spans, _ in drawn]
        return sum(losses) / len(losses)

    ours, theirs = mean_loss(*tables[-2]), mean_loss(*tables[-1])
    assert ours == pytest.approx(theirs, rel=0.02)

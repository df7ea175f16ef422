"""Steps of preprocessing against what they should make, and that they are saved with all that they know."""

from __future__ import annotations

import itertools
import json
import pickle
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm import data
from fastllm.data import DocumentFrequency, Normalize, Pipeline, Segment, StopWords, preprocess, read_words, stop_words

WORDS = ("研究", "研究生", "生命", "起源", "的", "生命起源", "T恤", "New")
TEXTS = ["我 爱 北京", "我 爱 上海", "他 在 上海 上海"]


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        (Normalize("NFC"), "e\u0301 ² Ａ", "é ² Ａ"),
        (Normalize("NFKC"), "e\u0301 ² Ａ\u3000", "é 2 A "),
        (Normalize("NFD", lower=True), "É", "e\u0301"),
        (Normalize(None, half_width=True), "Ａ１！\u3000～² e\u0301", "A1! ~² e\u0301"),
        (Normalize("NFKC", lower=True), "Ⅷ İ", "viii i\u0307"),
        (Normalize("NFC", lower=True), "J\u030c", "\u01f0"),  # which has no capital of its own
        (Segment("whitespace"), " a\tb\u3000c\n", ["a", "b", "c"]),
        (Segment("forward", WORDS), "研究生命起源", ["研究生", "命", "起源"]),
        (Segment("bidirectional", WORDS), "研究生命起源", ["研究", "生命起源"]),
        (Segment("forward", WORDS), "买T恤 iPhone4，New York", ["买", "T恤", "iPhone4", "，", "New", "York"]),
        (Segment("bidirectional", ("Tea",)), "Teatime", ["Teatime"]),
        (Segment("bidirectional", ("ab", "bc")), "a b", ["a", "b"]),
        (StopWords(("The", "的")), ["the", "cat", "的", "THE"], ["cat"]),
    ],
)
def test_steps(step, text, expected):
    assert step(text) == expected


def test_bidirectional_matching_prefers_fewer_words_then_fewer_single_characters():
    step = Segment("bidirectional", ("甲乙", "乙丙丁", "丙", "丁戊", "戊"))
    assert step("甲乙丙丁") == ["甲", "乙丙丁"]  # the left: 甲乙 丙 丁
    fewer = Segment("bidirectional", ("甲乙", "丙丁", "戊己", "乙丙丁戊己"))
    assert fewer("甲乙丙丁戊己") == ["甲", "乙丙丁戊己"]  # the left has none of one character, but three
    assert step("甲乙丙丁戊") == ["甲乙", "丙", "丁戊"]  # both ways
    assert Segment("bidirectional", ("甲乙", "乙丙"))("甲乙丙") == ["甲", "乙丙"]  # even: that from the right
    assert Segment("forward", ("甲乙", "乙丙"))("甲乙丙") == ["甲乙", "丙"]


@settings(deadline=None)
@given(st.text("甲乙丙", max_size=9), st.lists(st.text("甲乙丙", min_size=1, max_size=4), min_size=1, max_size=6))
def test_maximum_matching_keeps_the_text_and_takes_the_longest_word(text, words):
    for method in ("forward", "bidirectional"):
        found = Segment(method, tuple(words))(text)
        assert "".join(found) == text
        assert all(len(word) == 1 or word in words for word in found)
    place = 0
    for word in Segment("forward", tuple(words))(text):
        longest = max((len(w) for w in words if text.startswith(w, place)), default=1)
        assert len(word) == longest
        place += longest


def test_jieba_with_words_of_the_users_own():
    pytest.importorskip("jieba")
    text = "我在上海 买 iPhone，石墨烯薄膜"
    assert Segment("jieba", hmm=False)(text) == ["我", "在", "上海", "买", "iPhone", "，", "石墨", "烯", "薄膜"]
    step = Segment("jieba", ("石墨烯薄膜",))
    assert step(text)[-1] == "石墨烯薄膜"
    assert Segment("jieba")(text)[-1] == "薄膜"  # of the step, not of the process
    assert pickle.loads(pickle.dumps(step))(text) == step(text)


def test_document_frequency():
    texts = [text.split() for text in TEXTS]
    assert DocumentFrequency(2).fitted(texts).words == ("上海", "我", "爱")
    assert DocumentFrequency(2, 0.5).fitted([*texts, ["我"]]).words == ("上海", "爱")
    step = DocumentFrequency(1, 0.5).fitted(texts)
    assert step(["北京", "我", "nowhere", "他"]) == ["北京", "他"]
    with pytest.raises(ValueError, match=r"document_frequency has not been fitted: call Pipeline.fit"):
        DocumentFrequency(2)(["a"])
    with pytest.raises(ValueError, match=r"no word of 3 documents is in at least 3 and at most a share of 1.0"):
        DocumentFrequency(3).fitted(texts)


def test_a_pipeline_is_saved_with_all_that_it_knows(tmp_path):
    path = tmp_path / "steps.json"
    words = tmp_path / "words.txt"
    words.write_text("# a comment\n北京\r\n\n上海\n", encoding="utf-8")
    pipeline = Pipeline(
        [
            Normalize("NFKC", True),
            Segment("bidirectional", tuple(read_words(words))),
            StopWords(("我",)),
            DocumentFrequency(2),
        ]
    )
    assert not pipeline.is_fitted
    assert pipeline.fit(iter(TEXTS)) is pipeline
    pipeline.save(path)
    words.unlink()
    loaded = Pipeline.load(path)
    assert loaded.is_fitted
    assert loaded.to_dict() == pipeline.to_dict() == json.loads(path.read_text(encoding="utf-8"))
    assert loaded.steps == pipeline.steps
    text = "我爱Ｓｈａｎｇｈａｉ上海，北京"
    assert loaded(text) == pipeline(text) == ["爱", "上海"]
    assert [name for name, _ in loaded.trace(text)] == ["normalize", "segment", "stop_words", "document_frequency"]
    assert list(loaded.trace(text))[1][1] == ["我", "爱", "shanghai", "上海", ",", "北京"]
    assert Pipeline([])(text) == text


def test_other_versions_are_warned_of(tmp_path):
    pytest.importorskip("jieba")
    state = Pipeline([Segment("jieba")]).to_dict()
    Pipeline.from_dict(state)
    state["libraries"] = {"jieba": "0.1", "Unicode": preprocess.unicodedata.unidata_version}
    with pytest.warns(UserWarning, match=r"saved with jieba 0.1, here is 0.4"):
        Pipeline.from_dict(state)


def test_several_steps_are_fitted_in_order():
    pipeline = Pipeline([Segment("whitespace"), DocumentFrequency(2), DocumentFrequency(1, 0.7)])
    with pytest.raises(ValueError, match="2 steps are fitted, each on all texts: give a list"):
        pipeline.fit(iter(TEXTS))
    assert pipeline.fit([*TEXTS, "上海"])("我 爱 北京 上海") == ["我", "爱"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normalize("NFX"), "form must be one of NFC, NFD, NFKC, NFKD, got 'NFX'"),
        (lambda: Segment("words"), "method must be one of jieba, forward, bidirectional, whitespace, got 'words'"),
        (lambda: Segment("forward"), "segmentation by forward needs a dictionary"),
        (lambda: Segment("whitespace", ("a",)), "segmentation by whitespace takes no dictionary"),
        (lambda: Segment("forward", ("New York",)), "dictionary must be words without blanks, got 'New York'"),
        (lambda: StopWords(("",)), "words must be words without blanks, got ''"),
        (lambda: DocumentFrequency(0), "min_documents must be at least 1, got 0"),
        (lambda: DocumentFrequency(1, 1.5), r"max_share must be in \(0, 1\], got 1.5"),
        (lambda: stop_words("de"), "language must be one of en, zh, got 'de'"),
        (lambda: Pipeline([StopWords(("a",))]), "stop_words takes words: it must come behind segment"),
        (lambda: Pipeline([Segment("whitespace"), Normalize()]), "normalize takes text: it must come before segment"),
        (lambda: Pipeline.from_dict({"version": 2}), "no saved pipeline: version 2 is not known"),
        (lambda: Pipeline.from_dict({"version": 1}), "no saved pipeline: it lacks 'steps'"),
        (
            lambda: Pipeline.from_dict({"version": 1, "steps": [{"step": "stem"}], "libraries": {}}),
            "a step must be one of normalize, segment, stop_words, document_frequency, got 'stem'",
        ),
        (
            lambda: Pipeline.from_dict({"version": 1, "steps": [{"step": "normalize", "upper": 1}], "libraries": {}}),
            "no saved pipeline: .* unexpected keyword argument 'upper'",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_files_that_are_none(tmp_path):
    path = tmp_path / "file"
    for text, message in (("[]", "file: this is no saved pipeline"), ("{", "file: "), ("", "file is empty")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Pipeline.load(path)
    path.write_text("上海\n北京 3 ns\n", encoding="utf-8")
    with pytest.raises(ValueError, match="file:2 should have one word, not '北京 3 ns'"):
        read_words(path)
    path.write_text("\n# nothing\n")
    with pytest.raises(ValueError, match="file has no words"):
        read_words(path)


def test_stop_words():
    en, zh = stop_words("en"), stop_words("zh")
    assert stop_words("en", "zh") == [*en, *zh]
    assert {"the", "of"} <= set(en)
    assert {"的", "了", "因为"} <= set(zh)
    assert not {"not", "no", "不", "没有"} & {*en, *zh}
    assert (len(en), len(zh)) == (199, 288)  # as the docstring says
    for words in (en, zh):
        assert len(set(words)) == len(words)


TEXT = "研究生命的起源，the origin of life. " * 40 + data.topics_text()[:10_000]


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe", "unigram", "wordpiece"])
def test_every_kind_of_tokenizer(kind):
    tokenizer = data.train_tokenizer([TEXT], 600, kind)
    text = f"{TEXT}<|endoftext|>of life"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = data.encode(tokenizer, text)
    assert len(caught) == (kind == "wordpiece")  # which is told of
    back = data.decode(tokenizer, tokens)
    assert "".join(back.split()) == "".join(text.split())
    assert (back == text) is (kind != "wordpiece")
    assert data.document_token(tokenizer) == 0
    assert data.vocabulary_size(tokenizer) <= 600
    assert len(tokens) < len(TEXT) * 0.6
    assert tokenizer.token_to_id("[MASK]") == (5 if kind == "wordpiece" else None)


def test_tokenizers_of_characters_keep_to_their_size():
    many = "".join(map(chr, itertools.chain(range(0x4E00, 0x5000), range(0x4E00, 0x4E40))))
    for kind in ("bpe", "wordpiece"):
        assert data.vocabulary_size(data.train_tokenizer([many], 300, kind)) <= 300
    with pytest.raises(ValueError, match="cannot be trained on this text: The vocabulary is not large enough"):
        data.train_tokenizer([many], 300, "unigram")
    with pytest.raises(ValueError, match="kind must be one of byte_bpe, bpe, unigram, wordpiece, got 'words'"):
        data.train_tokenizer([many], 300, "words")


def test_the_default_tokenizer_is_what_it_was():
    assert data.train_tokenizer([TEXT], 300).to_str() == data.train_tokenizer([TEXT], 300, "byte_bpe").to_str()
    assert data.train_tokenizer(["ab ab ab"], 300).encode("ab ab").tokens == ["ab", "Ġab"]

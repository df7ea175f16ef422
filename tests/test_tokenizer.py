"""Tokenizers, our own and others': text is encoded as it is, in pieces that come to the tokens of the whole."""

from __future__ import annotations

import functools
import json
import random
import warnings

import pytest
import torch

from fastllm import data

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

PROSE = data.topics_text()[:60_000]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def trained(model, trainer, pre_tokenizer, **parts) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([PROSE], trainer)
    return tokenizer


def bpe(pre_tokenizer, **parts) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<unk>"], show_progress=False)
    return trained(models.BPE(unk_token="<unk>"), trainer, pre_tokenizer, **parts)


def of_bytes(pre_tokenizer, **parts) -> Tokenizer:
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=ALPHABET, show_progress=False
    )
    return trained(models.BPE(), trainer, pre_tokenizer, decoder=decoders.ByteLevel(), **parts)


def without_words() -> Tokenizer:
    """As Llama 2's: the whole text is one word, with a blank put before it."""
    tokenizer = json.loads(bpe(pre_tokenizers.Metaspace()).to_str())
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, blank]}
    tokenizer["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(tokenizer))


def with_mask(tokenizer: Tokenizer) -> Tokenizer:
    """As RoBERTa's: a token that takes the blanks before it along."""
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


MAKERS = {
    "ours": lambda: data.train_tokenizer([PROSE], 1000),
    "GPT-2": lambda: of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "RoBERTa": lambda: of_bytes(pre_tokenizers.ByteLevel(), post_processor=processors.ByteLevel(trim_offsets=True)),
    "Llama 2": without_words,
    "Metaspace": lambda: bpe(pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()),
    "Unigram": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        normalizer=normalizers.NFKC(),
    ),
    "BERT": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=1000, special_tokens=["<unk>"], show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
        normalizer=normalizers.BertNormalizer(),
    ),
    "stripping": lambda: of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.Strip()),
    "mask": lambda: with_mask(of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False))),
    "4 characters": lambda: bpe(pre_tokenizers.Split(Regex(r"[\s\S]{1,4}"), "isolated")),
    "64 characters": lambda: bpe(pre_tokenizers.Split(Regex(r"[\s\S]{1,64}"), "isolated")),
    "37 characters": lambda: bpe(pre_tokenizers.Split(Regex(r"[\s\S]{1,37}"), "isolated")),
}


@functools.cache
def make(name: str) -> Tokenizer:
    return MAKERS[name]()


def texts() -> dict[str, str]:
    draw = random.Random(5)
    bits = ["the ", "cat\n", "don't", "   ", "\r\n", "<|endoftext|>", "Grüße", "世界", "🦜", "e\u0301", "12345", "x=1;"]
    return {
        "prose": PROSE[:12_000],
        "mixed": "".join(draw.choice([*bits, " " * draw.randint(1, 300)]) for _ in range(3000)),
        "DNA": "".join(draw.choices("ACGT", k=10_000)),
        "one letter": "x" + "a" * 10_000,
        "no blanks": "".join(chr(draw.randint(0x4E00, 0x4E40)) for _ in range(6000)),
        "a sea of blanks": "x " * 3000 + " " * 9000 + "y" * 200,
        "blanks": "a" + " " * 7000 + "b" + "\n" * 3001,
        "markers": "<|endoftext|>" * 500,
        "a mask behind blanks": "x " * 3000 + " " * 400 + "<mask> y " * 900,
    }


def never(tokenizer, text):
    """In place of `_encoded_at_blanks`: cuts nowhere."""
    return 0
    yield


@pytest.mark.parametrize("blanks", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_pieces_come_to_the_tokens_of_the_whole(name, blanks, monkeypatch):
    """Neither a word nor a special token is cut where a piece ends, and nothing is put in front of the next."""
    if not blanks:
        monkeypatch.setattr(data.tokenizer, "_encoded_at_blanks", never)
    monkeypatch.setattr(data.tokenizer, "_PIECE", 512)
    monkeypatch.setattr(data.tokenizer, "_PIECES", 7)
    monkeypatch.setattr(data.tokenizer, "_CHUNK", 2048)
    monkeypatch.setattr(data.tokenizer, "_OVERLAP", 1024)
    tokenizer = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some change text
        for kind, text in texts().items():
            whole = tokenizer.encode(text, add_special_tokens=False).ids
            assert data.encode(tokenizer, text).tolist() == whole, kind


def test_a_unigram_word_is_weighed_as_a_whole(monkeypatch):
    """Which of two equally likely ways to cut it is taken, may hang on its far end."""
    monkeypatch.setattr(data.tokenizer, "_CHUNK", 128)
    monkeypatch.setattr(data.tokenizer, "_OVERLAP", 64)
    trainer = trainers.UnigramTrainer(vocab_size=20, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer, draw = Tokenizer(models.Unigram()), random.Random(0)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([f"{'a' * k}{'b' * (k % 5)} {'ab' * k} {'aab' * k}" for k in range(1, 60)], trainer)
    for kinds in (["a", "aa", "aaa", "b"], ["a", "aa", "aaa", "b", "ab "]):
        for _ in range(20):
            text = "".join(draw.choices(kinds, k=draw.randint(300, 900)))
            assert data.encode(tokenizer, text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_pieces_that_end_at_blanks_are_those_of_prose(monkeypatch):
    """The quick way is taken by the tokenizers that people train, to the end."""
    monkeypatch.setattr(data.tokenizer, "_PIECE", 512)
    monkeypatch.setattr(data.tokenizer, "_encoded_with_overlap", None)
    for name in ("ours", "GPT-2"):
        whole = make(name).encode(PROSE[:12_000], add_special_tokens=False).ids
        assert data.encode(make(name), PROSE[:12_000]).tolist() == whole


def test_memory_is_bounded_by_pieces(monkeypatch):
    monkeypatch.setattr(data.tokenizer, "_encoded_at_blanks", never)
    monkeypatch.setattr(data.tokenizer, "_CHUNK", 2048)
    lengths = []
    original = data.tokenizer._Piece

    def spy(encoding, start, end):
        lengths.append(end - start)
        return original(encoding, start, end)

    monkeypatch.setattr(data.tokenizer, "_Piece", spy)
    for text in texts().values():
        data.encode(make("ours"), text)
    assert max(lengths) <= 2048 + 3 * data.tokenizer._OVERLAP


def test_words_are_those_of_gpt2_up_to_their_limit():
    ours, theirs = make("ours").pre_tokenizer, make("GPT-2").pre_tokenizer
    for text in (PROSE, "I'll  say\t\n 'tis 12,5 — Grüße 世界🦜 \r\n end  "):
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)
    for text in ("A" * 1000, "7" * 1000, "=" * 1000, " " * 1000, " 世" + "界" * 999, "🦜" * 1000):
        words = [text[start:end] for _, (start, end) in ours.pre_tokenize_str(text)]
        assert "".join(words) == text
        assert max(map(len, words)) <= 129  # a blank and 128 characters


def test_a_text_that_is_one_word_trains_in_linear_time():
    """What a word costs grows with the square of its length, so the longest one decides."""
    text = "".join(random.Random(0).choices("ACGT", k=300_000))
    tokenizer = data.train_tokenizer([text], 600)
    assert max(map(len, tokenizer.get_vocab())) <= 128
    assert data.decode(tokenizer, data.encode(tokenizer, text)) == text
    words = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert max(end - start for _, (start, end) in words) <= 128


def test_training_in_pieces_cuts_no_word(monkeypatch):
    whole = data.train_tokenizer([PROSE], 500).to_str()
    monkeypatch.setattr(data.tokenizer, "_CHUNK", 1000)
    assert data.train_tokenizer([PROSE], 500).to_str() == whole


def test_the_marker_is_not_learned_as_words():
    """It is a token of its own already."""
    vocabulary = data.train_tokenizer(["a<|endoftext|>b " * 500], 300).get_vocab()
    assert [token for token in vocabulary if "endof" in token] == ["<|endoftext|>"]


def test_ours_are_lossless_and_say_nothing(recwarn, capsys):
    for text in (*texts().values(), "", " ", "\0", "\ufeff", "<|endoftext|", "a<|endoftext|>"):
        assert data.decode(make("ours"), data.encode(make("ours"), text)) == text
    assert not recwarn.list
    assert capsys.readouterr() == ("", "")  # no progress where stderr is no terminal


TEMPLATE = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1000), ("</s>", 1001)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.enable_truncation(5), "truncation to 5 tokens"),
        (lambda t: t.enable_padding(length=500), "padding"),
        (lambda t: setattr(t, "post_processor", TEMPLATE), "<s> and </s> around every text"),
        (lambda t: setattr(t.model, "dropout", 0.5), "BPE dropout of 0.5"),
    ],
)
def test_text_is_encoded_as_it_is(change, said, tmp_path, recwarn):
    text = PROSE[:500]
    plain = data.train_tokenizer([PROSE], 1000)
    expected = data.encode(plain, text)
    document = data.document_token(plain)
    changed = Tokenizer.from_str(plain.to_str())
    changed.add_special_tokens(["<s>", "</s>"])
    change(changed)
    before = changed.to_str()
    assert torch.equal(data.encode(changed, text), expected)
    assert data.document_token(changed) == document
    assert changed.to_str() == before  # what the caller holds stays as it was
    changed.save(str(tmp_path / "tokenizer.json"))
    with pytest.warns(UserWarning, match=rf"tokenizer.json asks for {said}: not done here"):
        loaded = data.load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode(text).ids == expected.tolist() == data.encode(loaded, text).tolist()
    loaded.save(str(tmp_path / "again.json"))
    recwarn.clear()
    assert torch.equal(data.encode(data.load_tokenizer(tmp_path / "again.json"), text), expected)
    assert not recwarn.list


def test_special_tokens_in_the_text_are_tokens():
    tokenizer = data.train_tokenizer([PROSE], 300)
    tokenizer.add_special_tokens(["<s>"])
    assert data.encode(tokenizer, "<s>").tolist() == [tokenizer.token_to_id("<s>")]
    tokenizer.encode_special_tokens = True
    assert len(data.encode(tokenizer, "<s>")) > 1


@pytest.mark.parametrize(("name", "text"), [("BERT", "Hello  World"), ("Metaspace", "the 世界 cat")])
def test_a_tokenizer_that_changes_text_is_told_of_once(name, text, monkeypatch, recwarn):
    monkeypatch.setattr(data.tokenizer, "_told", set())
    with pytest.warns(UserWarning, match="the tokenizer does not keep text as it is: .* comes back as"):
        data.encode(make(name), text)
    recwarn.clear()
    data.encode(make(name), text)
    assert not recwarn.list


def with_vocabulary(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_a_vocabulary_may_have_holes():
    tokenizer = with_vocabulary({"a": 0, "b": 41})
    assert data.vocabulary_size(tokenizer) == 42
    tokenizer.add_special_tokens(["<s>"])
    assert data.vocabulary_size(tokenizer) == 1 + max(tokenizer.get_vocab().values())
    with pytest.raises(ValueError, match="the largest of this one is -1"):
        data.vocabulary_size(Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match="the largest of this one is 4294967295"):
        data.vocabulary_size(with_vocabulary({"a": 2**32 - 1}))


def test_the_document_token_must_be_a_token_in_text():
    assert data.document_token(make("ours")) == 0
    assert data.document_token(make("BERT")) is None
    # In the vocabulary, but what cuts text into words cuts it, too.
    assert data.document_token(with_vocabulary({"a": 0, "<|endoftext|>": 1})) is None


def test_errors():
    for size in (-1, 256, 2**24 + 1, 10**30):
        with pytest.raises(ValueError, match=f"vocab_size must be at least 257 .* got {size}"):
            data.train_tokenizer([PROSE], size)
    with pytest.raises(ValueError, match=r"the text is not UTF-8: '\\udcff' at character 1"):
        data.encode(make("ours"), "a\udcff")
    unknown = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="the tokenizer cannot encode this text: WordLevel"):
        data.encode(unknown, "b")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\0" * 99, b'{"model": {}}', b"[" * 10**5, b"\xff\xfe\0"])
def test_whatever_is_in_a_file_is_an_error_with_its_name(content, tmp_path):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json"):
        data.load_tokenizer(tmp_path / "bad.json")


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    (tmp_path / "bom.json").write_text(make("ours").to_str(), encoding="utf-8-sig")
    assert data.load_tokenizer(tmp_path / "bom.json").to_str() == make("ours").to_str()

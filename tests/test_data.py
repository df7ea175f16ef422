"""Text, tokenizers and batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm import data
from fastllm._extras import require

TEXT = "the cat sat on the mat; the dog sat on the log. " * 20


def test_require_names_the_command():
    assert require("math", "train").pi > 3
    with pytest.raises(ImportError, match=r'no_such_package.*pip install "fastllm-kernels\[train\]"'):
        require("no_such_package.part", "train")


def test_read_text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("Grüße, 世界\r\n".encode())
    assert data.read_text(path) == "Grüße, 世界\r\n"
    path.write_bytes(b"ok \xff\xfe")
    with pytest.raises(ValueError, match="text is not UTF-8 text: byte 0xff at offset 3"):
        data.read_text(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="text is empty"):
        data.read_text(path)


def test_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffGrüße\r\n\ufeff".encode())
    assert data.read_text(path) == "Grüße\r\n\ufeff"  # of the file, not of the text
    path.write_bytes("\ufeff".encode())
    with pytest.raises(ValueError, match="text is empty"):
        data.read_text(path)
    path.write_bytes("\ufeff".encode() + b"ab\xff")
    with pytest.raises(ValueError, match="byte 0xff at offset 5"):
        data.read_text(path)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
@pytest.mark.parametrize("text", ["ab", "The cat sat.\n" * 9000, "Grüße, 世界 🦜\n", ("世界" * 4 + "。\n") * 9])
def test_other_encodings_of_unicode_are_named(tmp_path, text, encoding, mark):
    path = tmp_path / "text"
    path.write_bytes((mark + text).encode(encoding))
    with pytest.raises(
        ValueError, match=f"text is {encoding}: convert it to UTF-8, for example by iconv -f {encoding}"
    ):
        data.read_text(path)


@pytest.mark.parametrize("text", ["a\0b\0", "\0" * 100, "a\0" + "b" * 100, "ab\0\0" * 50, "世\0界" * 9, "\0a", "\0"])
def test_zeros_in_utf8_are_text(tmp_path, text):
    text = "The cat sat. " * 10 + text
    (tmp_path / "text").write_bytes(text.encode())
    assert data.read_text(tmp_path / "text") == text


def test_topics_text_has_no_paragraph_twice():
    text = data.topics_text()
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    assert len(text) > 100_000
    assert len(set(paragraphs)) == len(paragraphs)


def test_split_text_cuts_the_end_off():
    assert data.split_text("0123456789", 0.2) == ("01234567", "89")
    with pytest.raises(ValueError, match=r"must be in \(0, 1\), got 1"):
        data.split_text("text", 1)
    for length in range(1, 40):  # wherever the cut is, the marker stays whole
        first, second = data.split_text("a" * length + "<|endoftext|>" + "b" * 40, 0.5)
        assert first + second == "a" * length + "<|endoftext|>" + "b" * 40
        assert "<|endoftext|>" in (first + " ") or "<|endoftext|>" in second


def test_tokenizer_is_lossless_and_survives_its_file(tmp_path):
    tokenizer = data.train_tokenizer([TEXT], 300)
    assert 257 < tokenizer.get_vocab_size() <= 300
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = data.load_tokenizer(tmp_path / "tokenizer.json")
    for text in (TEXT, " leading", "Grüße,\n\n\t世界 \0 🦜", ""):
        tokens = data.encode(tokenizer, text)
        assert tokens.dtype == torch.int32
        assert data.decode(tokenizer, tokens) == text
        assert torch.equal(data.encode(loaded, text), tokens)
    assert len(data.encode(tokenizer, TEXT)) < len(TEXT) / 2


def test_tokenizer_is_the_same_every_time():
    assert data.train_tokenizer([TEXT], 300).to_str() == data.train_tokenizer([TEXT], 300).to_str()


def test_end_of_text_is_one_token():
    tokenizer = data.train_tokenizer([TEXT], 300)
    assert tokenizer.token_to_id("<|endoftext|>") in data.encode(tokenizer, "a<|endoftext|>b").tolist()
    assert data.decode(tokenizer, data.encode(tokenizer, "a<|endoftext|>b")) == "a<|endoftext|>b"


def test_long_text_is_encoded_in_pieces(monkeypatch):
    tokenizer = data.train_tokenizer([TEXT], 300)
    monkeypatch.setattr(data.tokenizer, "_CHUNK", 7)
    assert data.decode(tokenizer, data.encode(tokenizer, TEXT)) == TEXT


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .* got 256"):
        data.train_tokenizer([TEXT], 256)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json is not a tokenizer"):
        data.load_tokenizer(tmp_path / "bad.json")


def test_random_windows():
    windows = data.RandomWindows(torch.arange(100, dtype=torch.int32), 8, seed=5)
    inputs, targets = windows.batch(3, 4000)
    assert inputs.shape == targets.shape == (4000, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))
    assert set(inputs[:, 0].tolist()) == set(range(92))  # the last window ends with the last token


def test_random_windows_depend_on_seed_and_index_alone():
    tokens = torch.arange(10_000)
    windows = data.RandomWindows(tokens, 8, seed=5)
    first = windows.batch(7, 16)[0]
    windows.batch(8, 16)
    torch.manual_seed(123)
    assert torch.equal(windows.batch(7, 16)[0], first)
    assert not torch.equal(windows.batch(8, 16)[0], first)
    assert not torch.equal(data.RandomWindows(tokens, 8, seed=6).batch(7, 16)[0], first)


@settings(deadline=None, max_examples=50)
@given(context=st.integers(1, 20), extra=st.integers(1, 100), size=st.integers(1, 9))
def test_sequential_windows_score_every_token_once(context, extra, size):
    tokens = torch.arange(context + extra)
    windows = data.SequentialWindows(tokens, context)
    scored = []
    for index in range(-(-len(windows) // size)):
        inputs, targets = windows.batch(index, size)
        valid = targets != -100
        assert torch.equal(targets[valid], inputs[valid] + 1)
        scored += targets[valid].tolist()
    assert scored == tokens[1:].tolist()
    with pytest.raises(IndexError, match="there are only"):
        windows.batch(-(-len(windows) // size), size)


@pytest.mark.parametrize("kind", [data.RandomWindows, data.SequentialWindows])
def test_windows_reject_what_does_not_fit(kind):
    kind(torch.arange(9), 8)
    with pytest.raises(ValueError, match="needs 9 tokens, the text has only 8"):
        kind(torch.arange(8), 8)
    with pytest.raises(ValueError, match=r"shape \(n,\), got \(3, 4\)"):
        kind(torch.zeros(3, 4), 2)

"""Files of tokens: the tokens that `encode` gives, whatever the documents' parts and the number of processes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import struct
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fastllm import data
from fastllm.data import token_file

tokenizers = pytest.importorskip("tokenizers")

PROSE = data.topics_text()[:50_000]
OURS = data.train_tokenizer([PROSE], 700)
END = data.document_token(OURS)


class Document(NamedTuple):
    text: str
    last: bool = True
    place: str = "corpus:1"


def whole(*texts: str) -> list[Document]:
    return [Document(text, place=f"corpus:{number}") for number, text in enumerate(texts, 1)]


def some_texts(count: int = 40) -> list[str]:
    draw = random.Random(0)
    cuts = [draw.randrange(len(PROSE)) for _ in range(count)]
    return ["", *(PROSE[cut : cut + draw.randrange(900)] for cut in cuts), "Grüße, 世界 🦜", "a<|endoftext|>b", ""]


def documents_of(stream: data.TokenStream) -> list[list[int]]:
    borders = stream.documents.tolist()
    return [stream.tokens[a:b].tolist() for a, b in itertools.pairwise(borders)]


def write(path, texts, tokenizer=OURS, end=END, **options) -> data.TokenFile:
    return data.write_tokens(path, whole(*texts), tokenizer, end=end, **options)


@pytest.mark.parametrize("end", [END, None])
def test_documents_have_the_tokens_that_encode_gives(tmp_path, end):
    texts = some_texts()
    file = write(tmp_path / "tokens", texts, end=end)
    behind = [] if end is None else [end]
    assert documents_of(file) == [data.encode(OURS, text).tolist() + behind for text in texts]
    assert file.tokens.dtype == np.uint16
    assert len(file) == file.tokens.size == file.documents[-1]
    assert isinstance(file.tokens, np.memmap)
    assert file.tokenizer_hash == data.tokenizer_hash(OURS)
    assert os.listdir(tmp_path) == ["tokens"]


def test_the_header_is_what_the_documentation_says(tmp_path):
    file = write(tmp_path / "tokens", ["abc", "de"])
    content = (tmp_path / "tokens").read_bytes()
    assert content[:8] == b"fastllm\0"
    assert struct.unpack_from("<II", content, 8) == (1, 2)
    count, documents, place = struct.unpack_from("<QQQ", content, 16)
    assert (count, documents) == (len(file), 2)
    assert content[40:72].hex() == file.tokenizer_hash
    assert np.frombuffer(content, "<u2", count, 256).tolist() == file.tokens.tolist()
    assert place % 8 == 0
    assert np.frombuffer(content, "<u8", 3, place).tolist() == file.documents.tolist()
    assert len(content) == place + 3 * 8


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    vocabulary = {f"w{number}": number for number in range(65_537)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    file = write(tmp_path / "tokens", ["w65536 w3", "w0"], tokenizer, None)
    assert file.tokens.dtype == np.uint32
    assert file.tokens.tolist() == [65536, 3, 0]
    vocabulary.pop("w65536")
    small = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    assert write(tmp_path / "tokens", ["w65535"], small, None).tokens.dtype == np.uint16


@pytest.mark.parametrize("size", [1, 37, 1000, 2048, 100_000])
def test_a_document_in_parts_has_the_tokens_of_the_whole(size, tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "_BATCH", 3000)
    monkeypatch.setattr(data.tokenizer, "_CHUNK", 2048)
    monkeypatch.setattr(data.tokenizer, "_OVERLAP", 512)
    texts = ["short", PROSE[:9000], "", PROSE[9000:9500], PROSE[9500 : 9500 + 4096], "x" * 7000, "end"]
    documents = []
    for text in texts:
        parts = [text[at : at + size] for at in range(0, len(text), size)]
        documents += [Document(part, False) for part in parts] + [Document("")]
    file = data.write_tokens(tmp_path / "tokens", documents, OURS, end=END)
    assert documents_of(file) == [[*OURS.encode(text).ids, END] for text in texts]
    for missing in (documents[:-1], [Document(PROSE, False), Document(PROSE, False)]):
        with pytest.raises(ValueError, match="corpus:1: the last part of the document is missing"):
            data.write_tokens(tmp_path / "other", missing, OURS, end=END)
    assert os.listdir(tmp_path) == ["tokens"]


@pytest.mark.parametrize("blanks", [True, False])
def test_a_long_document_is_not_held_in_memory(blanks, monkeypatch):
    monkeypatch.setattr(data.tokenizer, "_CHUNK", 1000)
    monkeypatch.setattr(data.tokenizer, "_BATCH", 2)
    monkeypatch.setattr(data.tokenizer, "_PIECE", 1000)
    monkeypatch.setattr(data.tokenizer, "_PIECES", 2)
    if not blanks:
        monkeypatch.setattr(data.tokenizer, "_encoded_at_blanks", lambda tokenizer, text: (yield from iter(())) or 0)
    held = []
    init = data.tokenizer._Text.forget

    def forget(text, place):
        init(text, place)
        held.append(sum(len(part) for _, part in text.parts))

    monkeypatch.setattr(data.tokenizer._Text, "forget", forget)
    parts = (PROSE[at : at + 500] for at in range(0, len(PROSE), 500))
    found = [token for tokens, _ in data.tokenizer.encode_parts(OURS, parts) for token in tokens]
    assert found == OURS.encode(PROSE).ids
    assert len(held) > 20
    assert max(held) < 10_000


def test_processes_write_the_same_bytes_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "_BATCH", 1000)
    texts = [*some_texts(), PROSE[:5000], *some_texts(9)]
    one = write(tmp_path / "one", texts)
    write(tmp_path / "two", texts, processes=2)
    assert one.path.read_bytes() == (tmp_path / "two").read_bytes()
    assert not multiprocessing.active_children()

    def ends(how):
        yield from whole(*texts)
        how()
        yield from whole(*texts)

    def kill():
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match=r"three: a worker process ended early"):
        data.write_tokens(tmp_path / "three", ends(kill), OURS, end=END, processes=2)
    with pytest.raises(KeyboardInterrupt):
        data.write_tokens(tmp_path / "three", ends(interrupt), OURS, end=END, processes=2)
    assert not multiprocessing.active_children()
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_what_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "tokens"
    write(path, ["before"])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"corpus:2: the text is not UTF-8: '\\ud800' at character 3"):
        write(path, ["fine", "abc\ud800", "fine"])
    with pytest.raises(ValueError, match=r"corpus:1: the text is not UTF-8: '\\udfff' at character 1200000"):
        write(path, ["a" * 1_200_000 + "\udfff"])
    with pytest.raises(ValueError, match="tokens: 0 documents have no token"):
        write(path, [])
    with pytest.raises(ValueError, match="end token 700 is outside the vocabulary of 700"):
        write(path, ["a"], end=700)
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        write(path, ["a"], processes=0)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    with pytest.raises(ValueError, match="corpus:1 to corpus:2: the tokenizer cannot encode a text: WordLevel"):
        write(path, ["a", "b"], words, None)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["tokens"]
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "no" / "tokens", ["a"])


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/tokens'"):
        write(tmp_path / "tokens", ["a"])
    assert os.listdir(tmp_path) == []


def test_a_tokenizer_that_changes_text_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(data.tokenizer, "_told", set())
    lower = data.train_tokenizer([PROSE.lower()], 300)
    lower.normalizer = tokenizers.normalizers.Lowercase()
    with pytest.warns(UserWarning, match="does not keep text as it is: 'ABC' comes back as 'abc'"):
        write(tmp_path / "tokens", ["ABC", "d"], lower, None)


def test_the_hash_is_of_what_encodes(tmp_path):
    OURS.save(str(tmp_path / "tokenizer.json"))
    again = data.load_tokenizer(tmp_path / "tokenizer.json")
    known = data.tokenizer_hash(OURS)
    assert len(known) == 64
    again.enable_truncation(5)
    assert data.tokenizer_hash(again) == known
    shuffled = json.loads(OURS.to_str())
    shuffled = {key: shuffled[key] for key in sorted(shuffled, reverse=True)}
    assert data.tokenizer_hash(tokenizers.Tokenizer.from_str(json.dumps(shuffled))) == known
    assert data.tokenizer_hash(data.train_tokenizer([PROSE], 600)) != known


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b"text" * 100, r"tokens is no file of tokens: it begins with b'texttext'"),
        (lambda b: b[:100], "tokens has 100 bytes, the header alone has 256"),
        (lambda b: b[:-1], r"tokens was cut short: it has 327 bytes, by its header 328"),
        (lambda b: b + b"\0", r"tokens is damaged: it has 329 bytes, by its header 328"),
        (lambda b: b[:8] + b"\2" + b[9:], "has version 2 of the format, only 1 can be read"),
        (lambda b: b[:12] + b"\3" + b[13:], "is damaged: 18 tokens of 3 bytes, documents' places at 296"),
        (
            lambda b: b[:-16] + bytes([99]) + b[-15:],
            "tokens is damaged: its documents' places are not sorted from 0 to 18",
        ),
        (
            lambda b: b[:-8] + bytes([17]) + b[-7:],
            "tokens is damaged: its documents' places are not sorted from 0 to 18",
        ),
    ],
)
def test_damage_is_named(damage, message, tmp_path):
    path = tmp_path / "tokens"
    write(path, ["\0" * 7, "", "\1" * 8])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        data.TokenFile(path)


def shard(path, tokens, magic=20240520, version=1, dtype="<u2"):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype).tobytes())


def test_shards_are_one_stream(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 1000)
    for number, (start, end) in enumerate([(0, 333), (333, 334), (334, 1000)]):
        shard(tmp_path / f"train_{number}.bin", tokens[start:end])
    stream = data.open_tokens(str(tmp_path / "train_*.bin"))
    assert len(stream) == 1000
    assert stream.documents is stream.tokenizer_hash is None
    assert np.asarray(stream.tokens).tolist() == tokens.tolist()
    assert stream.tokens[np.array([[999, 0], [332, 333]])].tolist() == tokens[[[999, 0], [332, 333]]].tolist()
    assert stream.tokens[334] == tokens[334]
    assert np.asarray(stream.tokens[300:900][10:500]).tolist() == tokens[310:800].tolist()
    for bad in (1000, -1):
        with pytest.raises(IndexError, match=f"there are 1000 tokens, asked for {bad}"):
            stream.tokens[np.array([bad])]
    first, second = stream.split(0.3)
    assert (len(first), len(second)) == (700, 300)
    assert np.asarray(second.tokens).tolist() == tokens[700:].tolist()
    assert second.documents is None
    for kind in (data.RandomWindows, data.ShuffledWindows, data.SequentialWindows):
        for index in range(3):
            for ours, theirs in zip(
                kind(stream, 7, seed=2).batch(index, 40),
                kind(torch.from_numpy(tokens), 7, 2).batch(index, 40),
                strict=True,
            ):
                assert ours.dtype == torch.int64
                assert torch.equal(ours, theirs)


def test_shards_of_llama_3_and_damaged_ones(tmp_path):
    path = tmp_path / "a.bin"
    shard(path, [128_000, 5], 20240801, 7, "<u4")
    assert data.open_tokens(path).tokens.tolist() == [128_000, 5]
    shard(tmp_path / "b.bin", [1, 2])
    with pytest.raises(
        ValueError, match=r"b.bin and .*a.bin differ in dtype or tokenizer: \('uint16', None\), \('uint32', None\)"
    ):
        data.open_tokens([path, tmp_path / "b.bin"])
    with pytest.raises(FileNotFoundError, match=r"there is no file .*\*\.tokens"):
        data.open_tokens([path, tmp_path / "*.tokens"])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"a.bin was cut short: it has 1029 bytes, by its header 1032"):
        data.open_tokens(path)
    shard(path, [1], version=3)
    with pytest.raises(ValueError, match=r"a.bin is no file of tokens"):
        data.open_tokens(path)


def test_several_files_of_our_own(tmp_path):
    texts = some_texts()
    write(tmp_path / "a", texts[:11])
    write(tmp_path / "b", texts[11:])
    both, one = data.open_tokens([tmp_path / "a", tmp_path / "b"]), write(tmp_path / "c", texts)
    assert np.asarray(both.tokens).tolist() == one.tokens.tolist()
    assert both.documents.tolist() == one.documents.tolist()
    assert both.tokenizer_hash == one.tokenizer_hash
    write(tmp_path / "d", texts, data.train_tokenizer([PROSE], 600), None)
    with pytest.raises(ValueError, match=r"d and .*a differ in dtype or tokenizer: \('uint16', '"):
        data.open_tokens([tmp_path / "a", tmp_path / "d"])


@pytest.mark.parametrize("validation", [0.1, 0.37, 0.5, 0.9])
def test_split_cuts_between_documents(tmp_path, validation):
    file = write(tmp_path / "tokens", some_texts(200))
    first, second = file.split(validation)
    assert first.tokens.tolist() + second.tokens.tolist() == file.tokens.tolist()
    assert documents_of(first) + documents_of(second) == documents_of(file)  # none is cut
    assert abs(len(second) - validation * len(file)) <= 0.1 * min(len(first), len(second)) + 100
    assert first.tokenizer_hash == file.tokenizer_hash


def test_split_cuts_a_document_that_is_long(tmp_path):
    file = write(tmp_path / "tokens", ["a", "\0" * 1000, "b"], end=None)
    first, second = file.split(0.5)
    assert first.documents.tolist() == [0, 1, 501]
    assert second.documents.tolist() == [0, 500, 501]
    for fraction in (0, 1, -0.5):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\), got"):
            file.split(fraction)
    with pytest.raises(ValueError, match="of 1002 tokens leaves nothing"):
        file.split(1e-5)


def test_the_end_token_is_the_one_behind_each_document(tmp_path):
    file = write(tmp_path / "a", ["ab", "cd", "e"])
    assert file.end_token() == data.document_token(OURS)
    whole = data.write_tokens(
        tmp_path / "b", [data.Document("ab", True, ""), data.Document("cd", True, "")], OURS, end=None
    )
    assert whole.end_token() is None

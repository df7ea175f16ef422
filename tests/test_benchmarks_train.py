"""`fastllm bench train` on small shapes: what it compares trains alike, and it runs end to end."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("pytest_benchmark")
from fastllm import data
from fastllm.benchmarks import harness, suite, train

TEXT = "the quick brown fox jumps over the lazy dog; " * 40
TINY = train.Shape(2, 2, 16, 9, 3, dropout=0.0, log_interval=2, turn=2, rounds=(3, 3))


class Pipe:
    """Asks for a number of steps, once."""

    def __init__(self, steps: int):
        self.orders, self.answers = [steps], []

    def recv(self) -> int:
        if not self.orders:
            raise EOFError
        return self.orders.pop()

    def send(self, answer: tuple[list[float], float]) -> None:
        self.answers.append(answer)


def losses(name: str, shape: train.Shape, folder) -> list[float]:
    pipe = Pipe(train.STEPS + 2)
    job = train.Job(shape, train.characters(TEXT), "cpu", str(folder))
    with pytest.raises(EOFError):
        train.LOOPS[name](job, train.Turns(pipe, "cpu"))
    ((found, waited),) = pipe.answers
    assert waited >= 0
    return found


def test_all_contenders_have_the_same_losses(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    expected = losses("eager", TINY, tmp_path)
    assert len(expected) == train.STEPS
    assert expected[0] == pytest.approx(3.3, abs=0.2), "log of 28 characters, at first"
    for number, name in enumerate(train.LOOPS):
        folder = tmp_path / str(number)
        folder.mkdir()
        train.check(name, losses(name, TINY, folder), expected, "cpu")
    with pytest.raises(AssertionError, match="the first losses of fastllm are"):
        train.check("fastllm", [expected[0] + 0.002, *expected[1:]], expected, "cpu")


def test_dropout_is_where_nanogpt_has_it(tmp_path):
    """The same weights in training mode: with dropout, other losses than without, of the same size."""
    without = losses("eager", TINY, tmp_path)[0]
    for name in ("eager", "fastllm"):
        folder = tmp_path / name
        folder.mkdir()
        found = losses(name, TINY._replace(dropout=0.5), folder)[0]
        assert found != without
        assert found == pytest.approx(without, abs=0.2)


def test_the_learning_rate_is_the_trainers():
    from fastllm.trainer.schedule import learning_rate

    options = {"schedule": "cosine", "steps": train.TRAIN.steps, "warmup": train.TRAIN.warmup, "peak": train.TRAIN.lr}
    for step in (0, 99, 100, 2500, 4999):
        assert train.rate(step) == pytest.approx(learning_rate(step, floor=1e-4, **options))


def test_documents_differ_and_have_their_size():
    found = train.documents(data.topics_text(), 50_000)
    texts = [document.text for document in found]
    assert len(set(texts)) == len(texts)
    assert 50_000 <= sum(map(len, texts)) < 60_000
    assert all(document.last for document in found)


def test_end_to_end(monkeypatch, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text(TEXT, encoding="utf-8")
    names = ("fastllm", "eager")
    monkeypatch.setattr(train, "cases", lambda device, quick, text: [train.case("tiny", TINY, text, device, names)])
    monkeypatch.setattr(harness, "measure_ceilings", lambda device: {"copy_gb_s": 10.0, "matmul_fp32_tflop_s": 0.1})
    path = tmp_path / "found.json"
    assert suite.main(["train", "--quick", "--threads", "1", "--text", str(text), "--json", str(path)]) == 0
    assert "waits for data" in capsys.readouterr().out
    (result,) = json.loads(path.read_text())["results"]
    assert result["skipped"] == {}
    assert list(result["contenders"]) == list(names)
    assert 0 <= result["contenders"]["fastllm"]["data_wait"] < 1
    assert "data_wait" not in result["contenders"]["eager"]
    table = train.markdown([result])
    assert f"| fastllm | {1e3 * 2 * 3 * 9 / result['contenders']['fastllm']['median_ms']:,.0f} |" in table


def test_tokenizing(monkeypatch):
    contenders = train.tokenizing("the quick brown fox " * 500, 20_000)
    assert set(contenders) == {"fastllm", "encode_batch", "encode_batch_fast", train.TWO}
    assert contenders["fastllm"]().call().tokens.size > 5_000
    contenders["encode_batch"]().call()
    monkeypatch.setattr(data, "write_tokens", lambda path, some, *_, **__: data.TokenStream(torch.zeros(1), None, None))
    with pytest.raises(AssertionError, match="other tokens"):
        train.tokenizing("the quick brown fox " * 500, 20_000)

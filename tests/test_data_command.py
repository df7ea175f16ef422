"""`fastllm data`: what is shown and written, and that docs/data.md says what is so."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from fastllm import cli, data
from fastllm.data import Pipeline

ROOT = Path(__file__).parent.parent
NEWS = "体育\tＡ队在上海绝杀\n财经\t上海棉花涨价\n体育\t上海队的首胜\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("news.tsv").write_text(NEWS, encoding="utf-8")
    Path("words.txt").write_text("上海\n棉花\n绝杀\n", encoding="utf-8")
    Path("text.txt").write_text("One.\n\nTwo two.\r\n<|endoftext|>\nThree.\n", newline="")
    return tmp_path


def squeezed(out: str) -> list[str]:
    return [" ".join(line.split()) for line in out.splitlines() if line]


STEPS = [
    "--normalize=NFKC",
    "--lower",
    "--segment=forward",
    "--dictionary=words.txt",
    "--stop-words",
    "zh",
    "words.txt",
]


def inspect(*arguments: str, capsys) -> str:
    assert cli.main(["data", "inspect", *arguments]) == 0
    return capsys.readouterr().out


def test_inspect_shows_every_step_and_counts(capsys):
    out = inspect("news.tsv", "--kind=labelled", "--lines=1", *STEPS, capsys=capsys)
    assert squeezed(out) == [
        "news.tsv:1",
        "label 体育",
        "text Ａ队在上海绝杀",
        "normalize a队在上海绝杀",
        "segment a | 队 | 在 | 上海 | 绝杀",
        "stop_words a | 队",
        "rows 3",
        "characters, text 19 6.3 on average",
        "label 体育 2 66.7%",
        "label 财经 1 33.3%",
    ]


def test_steps_are_fitted_on_the_files_saved_and_rerun(capsys):
    fitted = ["--kind=labelled", *STEPS[:4], "--max-share=0.7"]
    first = inspect("news.tsv", *fitted, "--save-steps=steps.json", capsys=capsys)
    assert "document_frequency a | 队 | 在 | 绝杀" in squeezed(first)
    assert Pipeline.load("steps.json")("上海和棉花") == ["棉花"]
    Path("words.txt").unlink()
    assert inspect("news.tsv", "--kind=labelled", "--steps=steps.json", capsys=capsys) == first


def test_inspect_of_text_shows_lines_and_tokens(capsys):
    data.train_tokenizer(["One"], 257).save("tokenizer.json")
    out = inspect("text.txt", "--lines=3", "--tokenizer=tokenizer.json", "--lower", capsys=capsys)
    assert squeezed(out) == [
        "text.txt:1",
        "text One.",
        "normalize one.",
        "4 tokens o | n | e | .",
        "text Two two.",
        "normalize two two.",
        "8 tokens t | w | o | | t | w | o | .",
        "text.txt:5",
        "text Three.",
        "normalize three.",
        "6 tokens t | h | r | e | e | .",
        "documents 2",
        "characters, text 23 11.5 on average",
    ]


def test_pairs_and_questions(capsys):
    Path("a.csv").write_text("Q,A,context\nwho?,me,\nwhy?,so,here\n")
    columns = ["--columns", "question=Q", "answer=A"]
    out = inspect("a.csv", "--kind=qa", *columns, capsys=capsys)
    assert re.findall(r"^  (\w+) +(.+)", out, re.MULTILINE) == [
        ("question", "who?"),
        ("answer", "me"),
        ("question", "why?"),
        ("answer", "so"),
        ("context", "here"),
    ]
    out = inspect("news.tsv", "--kind=pair", "--columns", "source=1", "target=0", "--lines=0", capsys=capsys)
    assert re.findall(r"characters, (\w+) +(\d+)", out) == [("source", "19"), ("target", "6")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=steps.json", "--lower"], "--lower cannot be given with --steps"),
        (["--dictionary=words.txt"], "--dictionary needs --segment"),
        (["--stop-words", "en"], "stop_words takes words: it must come behind segment"),
        (["--columns", "text"], "--columns takes FIELD=COLUMN, such as text=body, got 'text'"),
        (["--columns", "label=1"], "rows of the kind text have the fields text, not 'label'"),
        (["--lines=-1"], "--lines must not be negative, got -1"),
    ],
)
def test_inspect_errors(arguments, message, capsys):
    assert cli.main(["data", "inspect", "news.tsv", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.fixture
def written(monkeypatch) -> list:
    """What a stand-in for `write_tokens` was called with; it gives three tokens in two documents."""
    calls: list = []

    def write_tokens(path, documents, tokenizer, **options):
        calls.append((path, list(documents), tokenizer, options))
        return types.SimpleNamespace(tokens=torch.zeros(3, dtype=torch.uint16).numpy(), documents=[0, 2, 3])

    module = types.ModuleType("fastllm.data.token_file")
    module.write_tokens = write_tokens
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_tokenize_trains_a_tokenizer(written, capsys):
    Path("out").mkdir()
    assert cli.main(["data", "tokenize", "text.txt", "--out=out/a.tokens", "--vocab-size=260", "--processes=2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "out/a.tokenizer.json",
        "out/a.tokens: 3 tokens, 2 documents, uint16",
    ]
    ((path, documents, tokenizer, options),) = written
    assert path == "out/a.tokens"
    assert [document.text for document in documents] == ["One.\n\nTwo two.\r\n", "Three.\n"]
    assert options == {"end": tokenizer.token_to_id("<|endoftext|>"), "processes": 2, "total_bytes": 37}
    assert data.load_tokenizer("out/a.tokenizer.json").to_str() == tokenizer.to_str()


def test_tokenize_with_a_tokenizer(written, capsys):
    text = data.train_tokenizer(["a"], 260).to_str().replace("<|endoftext|>", "</s>")
    Path("t.json").write_text(text, encoding="utf-8")
    tokenize = ["data", "tokenize", "text.txt", "--out=a.tokens", "--tokenizer=t.json"]
    assert cli.main([*tokenize, "--end=</s>"]) == 0
    assert written[0][2].to_str() == text
    assert not Path("a.tokenizer.json").exists()
    for more, message in (
        ([], "--end: t.json has no token '<|endoftext|>'"),
        (["--vocab-size=300"], "--vocab-size cannot be given with --tokenizer"),
        (["--tokenizer-kind=bpe"], "--tokenizer-kind cannot be given with --tokenizer"),
        (["--processes=0"], "--processes must be at least 1, got 0"),
        (["--out=."], "--out must name a file, got '.'"),
    ):
        assert cli.main([*tokenize, *more]) == 1
        assert message in capsys.readouterr().err
    assert len(written) == 1


def test_docs(capsys):
    """Every block of docs/data.md runs, in order."""
    pytest.importorskip("jieba")
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(bash|python)\n(.*?)```", text, re.S)
    assert [language for language, _ in blocks] == ["bash", "python", "bash", *["python"] * 2, "bash", *["python"] * 2]
    for language, code in blocks:
        if language == "python":
            exec(code, {})
            continue
        for line in code.replace("\\\n", " ").splitlines():
            if line.startswith("fastllm "):
                assert cli.main(line.split()[1:]) == 0
            else:
                subprocess.run(["sh", "-c", line], check=True)
    out = capsys.readouterr().out
    assert "label 体育 2 66.7%" in squeezed(out)
    assert "news.tsv:3 体育 上海队的首场胜利\n" in out
    assert "['The cat sat on the mat.\\n', 'The dog sat on the log.\\n']" in out
    assert "normalize 上海队的首场胜利" in squeezed(out)
    assert "document_frequency 上海队" in squeezed(out)

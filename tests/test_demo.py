"""The demo, from text to PNG, with a few steps of it."""

from __future__ import annotations

import re

import pytest
import torch

from fastllm import demo
from fastllm.models import GPTConfig


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(demo, "MODEL", GPTConfig.llama(context=48, layers=2, heads=2, width=32, qk_norm=True))
    monkeypatch.setattr(demo, "VOCAB_SIZE", 400)
    monkeypatch.setattr(demo, "BATCH_SIZE", 4)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="aot_eager"))
    torch._dynamo.reset()


def test_demo(tmp_path, capsys):
    assert demo.main(steps=4, out=str(tmp_path / "demo"), rounds=3) == 0
    output = capsys.readouterr().out
    match = re.search(r"validation loss ([\d.]+), perplexity ([\d.]+), ([\d.]+) bits per byte", output)
    loss, perplexity, bits = map(float, match.groups())
    assert 5 < loss < 7
    assert perplexity == pytest.approx(2.718282**loss, rel=0.01)
    assert 0 < bits < 8
    samples = [line[4:] for line in output.splitlines() if line.startswith("  > ")]
    assert [sample[: len(prompt)] for sample, prompt in zip(samples, demo.PROMPTS, strict=True)] == list(demo.PROMPTS)
    contenders = ("fastllm", "fastllm, torch.compile", "fastllm, forced to its reference")
    for name in (*contenders, "PyTorch eager", "torch.compile"):
        row = re.search(
            rf"^{re.escape(name)} +([\d.]+)  ([\d.]+) \.\. ([\d.]+) +([\d,]+) +([\d.]+)x(.*)$", output, re.M
        )
        assert float(row[2]) <= float(row[1]) <= float(row[3])
        assert (float(row[6]) if row[6].strip() else 0.0) < 1e-4
    assert (tmp_path / "demo/loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo/checkpoint-4/model.safetensors").exists()
    # A second demo replaces the first.
    assert demo.main(steps=2, out=str(tmp_path / "demo"), rounds=2) == 0
    assert [path.name for path in (tmp_path / "demo").glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_table_says_why_compile_cannot_run(tmp_path, capsys, monkeypatch):
    def no_compiler(model):
        def fail(*args, **kwargs):
            raise RuntimeError("no C++ compiler\nmore")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert demo.main(steps=1, out=str(tmp_path), rounds=2) == 0
    assert re.search(
        r"^torch.compile +cannot run here: RuntimeError: no C\+\+ compiler$", capsys.readouterr().out, re.M
    )

"""Every example runs, and its loss falls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
NEEDS = {
    "hf_trainer": "accelerate",
    "accelerate_loop": "accelerate",
    "lightning_fit": "lightning",
    "kernels_layers": "kernels.layer",  # `kernels` alone is also a folder of this repository
}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs(path):
    pytest.importorskip("transformers")
    pytest.importorskip(NEEDS.get(path.stem, "torch"))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert result.returncode == 0, result.stderr
    losses = [float(x) for x in re.findall(r"loss'?:? '?(\d+\.\d+)", result.stdout)]
    assert len(losses) >= 2, result.stdout
    assert losses[-1] < losses[0], result.stdout
    if path.stem in ("plain_loop", "hf_trainer", "accelerate_loop"):
        assert "linear_cross_entropy" in result.stdout


def test_there_are_examples():
    assert len(EXAMPLES) >= 5


def test_the_examples_of_the_language_models_run(capsys):
    text = (Path(__file__).parent.parent / "docs/language_models.md").read_text()
    found = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(found) == 3
    for code in found:
        torch.manual_seed(0)
        exec(code, {})
    gpt, bert, pair = capsys.readouterr().out.splitlines()
    assert gpt == "the quick brown fox jumps over the lazy dog"
    assert bert == "torch.Size([16, 3]) torch.Size([16, 128])"
    source, target = (eval(part + "]") for part in pair.split("]")[:2])
    assert target == [*source[::-1], 1]

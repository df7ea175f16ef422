"""A run that is killed again and again ends with the bits of one that was never stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastllm.trainer.log import read_metrics

HERE = Path(__file__).parent
KILLS = 20


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_twenty_kills(ranks, parallel, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(HERE / "kills.py"), str(tmp_path), str(ranks), parallel, str(KILLS), "7"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert result.stdout.endswith("passed\n"), result.stdout + result.stderr
    (straight,) = (tmp_path / "straight").glob("checkpoint-260")
    (killed,) = (tmp_path / "killed").glob("checkpoint-260")
    names = sorted(path.name for path in straight.iterdir())
    assert names == sorted(path.name for path in killed.iterdir())
    for name in ("model.safetensors", "ema.safetensors", "state.safetensors", "state.json", "tokenizer.json"):
        assert (straight / name).read_bytes() == (killed / name).read_bytes(), name
    timed = ("tokens_per_second", "data_wait")
    rows = [read_metrics(path.parent / "metrics.csv") for path in (straight, killed)]
    untimed = [[{name: x for name, x in row.items() if name not in timed} for row in some] for some in rows]
    assert untimed[0] == untimed[1]
    assert not list((tmp_path / "killed").glob(".checkpoint*")), "what was killed in the midst of writing is removed"
    assert len(untimed[0]) == 260

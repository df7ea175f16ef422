"""fastllm.nn and GPT under FSDP2, sharded as a whole, by blocks and module by module, in two processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

HERE = Path(__file__).parent


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in ("more", "compiled")]


@pytest.mark.parametrize("case", ["eager", *SLOW])
def test_gradients_are_those_of_the_whole_model(case, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", HERE / "distributed_models.py", case, str(rank), tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output

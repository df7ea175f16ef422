"""AdamW over DTensors, in two processes that talk over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

HERE = Path(__file__).parent


def run(case: str, folder: Path, world: int = 2) -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    ranks = [
        subprocess.Popen(
            [sys.executable, HERE / "distributed_adamw.py", case, str(rank), str(world), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
        assert "passed" in output


@pytest.mark.parametrize(
    "case",
    [
        "fsdp",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("tensor_parallel", "masters", "placed", "stochastic")
        ),
    ],
)
def test_two_ranks(case, tmp_path):
    run(case, tmp_path)


@pytest.mark.slow
def test_four_ranks_in_two_dimensions(tmp_path):
    run("two_dimensions", tmp_path, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 1), (1, 2), (2, 2)])
def test_checkpoints_on_another_number_of_ranks(saved_by, loaded_by, tmp_path):
    run("save", tmp_path, saved_by)
    run("load", tmp_path, loaded_by)

"""AdamW over DTensors, in two processes that talk over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def run(case: str, folder: Path, world: int = 2) -> None:
    run_ranks("distributed_adamw.py", case, world, folder, world=world)


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

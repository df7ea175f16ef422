"""A patched model over two processes has the loss of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in ("ddp", "fsdp-after", "fsdp-before") for name in ("gpt2", "llama", "bert")),
        ("tensor-parallel", "norms"),
    ],
)
def test_two_processes(kind, name, tmp_path):
    script = Path(__file__).parent / "distributed_patch.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), kind, name, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)[-3000:]

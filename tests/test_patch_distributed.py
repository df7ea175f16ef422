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
@pytest.mark.parametrize("kind", ["ddp", "fsdp-after", "fsdp-before", "tensor-parallel"])
def test_two_processes(kind, tmp_path):
    script = Path(__file__).parent / "distributed_patch.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), kind, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)[-3000:]

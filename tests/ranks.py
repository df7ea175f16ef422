"""Scripts that are run as ranks, each a process of its own: python SCRIPT CASE RANK ..."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run_ranks(script: str, case: str, *more: Any, world: int = 2, timeout: float = 120, ignore: bool = False) -> None:
    """Starts `script` once a rank, and waits: each must say "passed" and end well.

    Args:
        script: a file beside this one.
        case: what it is to do.
        more: its arguments behind the rank.
        world: how many ranks.
        timeout: seconds that they may take.
        ignore: whether their warnings are not shown.
    """
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    python = [sys.executable, *(["-W", "ignore"] if ignore else [])]
    ranks = [
        subprocess.Popen(
            [*python, str(HERE / script), case, str(rank), *map(str, more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
        assert "passed" in output

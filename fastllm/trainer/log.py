"""Metrics of a run: `metrics.csv`, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import importlib.util
import os
from pathlib import Path

COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "validation_loss")


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`; a value that was not measured at a step is missing from its row.

    A last line that a killed process left unfinished is dropped.
    """
    with open(path, newline="") as file:
        lines = [line for line in file if line.endswith("\n")]
    return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]


class MetricsLog:
    """Writes a row a step.

    Args:
        out: directory, which exists.
        step: number of steps already taken. What is logged of later ones, by a run that was killed after its last
            checkpoint, is dropped.
    """

    def __init__(self, out: Path, step: int = 0):
        path = out / "metrics.csv"
        kept = [row for row in read_metrics(path) if row["step"] <= step] if step and path.exists() else []
        partial = path.with_suffix(".tmp")
        # Line-buffered: what was logged survives a kill.
        self._file = open(partial, "w", newline="", buffering=1)  # noqa: SIM115
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        for row in kept:
            self._writer.writerow({**row, "step": int(row["step"])})
        os.replace(partial, path)
        self._board = None
        if importlib.util.find_spec("tensorboard") is None:
            print('TensorBoard is not installed, so only metrics.csv is written (pip install "fastllm-kernels[train]")')
        else:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs `values`, by the names of COLUMNS, as those of step `step`, the first being 1."""
        self._writer.writerow({"step": step, **values})
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

"""Metrics of a run: `metrics.csv`, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import importlib.util
import os
import threading
from pathlib import Path

from fastllm.trainer._files import writing

COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "validation_loss")


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`; a value that was not measured at a step is missing from its row.

    A last line that a killed process left unfinished is dropped.

    Raises:
        ValueError: for a file that is something else, or damaged, with the number of the line.
    """
    rows: list[dict[str, float]] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in file if line.endswith("\n")]
        for row in csv.DictReader(lines):
            rows.append({name: float(value) for name, value in row.items() if value})
            if "step" not in rows[-1]:
                raise ValueError("it has no step")
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{path} is damaged at line {len(rows) + 2}: {error}; without the file, a run can be resumed"
        ) from error
    return rows


class MetricsLog:
    """Writes a row a step.

    Args:
        out: directory, which exists.
        step: number of steps already taken. What is logged of later ones, by a run that was killed after its last
            checkpoint, is dropped.

    Raises:
        OSError: here and later, for what the disk says, naming the file.
        ValueError: for a `metrics.csv` that is damaged.
    """

    def __init__(self, out: Path, step: int = 0):
        path = out / "metrics.csv"
        kept = [row for row in read_metrics(path) if row["step"] <= step] if step and path.exists() else []
        partial = path.with_suffix(".tmp")
        self._path, self._board_path, self._board = path, out / "tensorboard", None
        with writing(path):
            # Line-buffered: what was logged survives a kill.
            self._file = open(partial, "w", newline="", buffering=1, encoding="utf-8")  # noqa: SIM115
            self._writer = csv.DictWriter(self._file, COLUMNS)
            self._writer.writeheader()
            for row in kept:
                self._writer.writerow({**row, "step": int(row["step"])})
            os.replace(partial, path)
        if importlib.util.find_spec("tensorboard") is None:
            print('TensorBoard is not installed, so only metrics.csv is written (pip install "fastllm-kernels[train]")')
        else:
            from torch.utils.tensorboard import SummaryWriter

            self._hook = threading.excepthook
            threading.excepthook = self._of_a_thread
            with writing(self._board_path):
                self._board = SummaryWriter(str(self._board_path), purge_step=step + 1)

    def _of_a_thread(self, args: threading.ExceptHookArgs) -> None:
        # TensorBoard's own thread meets a full disk first; the next call raises it again, to be said once and in full.
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            self._hook(args)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs `values`, by the names of COLUMNS, as those of step `step`, the first being 1."""
        with writing(self._path):
            self._writer.writerow({"step": step, **values})
        if self._board is not None:
            with writing(self._board_path):
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files. What could not be written was an error already, or is one now."""
        try:
            with writing(self._path):
                self._file.close()
        finally:
            if self._board is not None:
                try:
                    with writing(self._board_path):
                        self._board.flush()
                        self._board.close()
                finally:
                    threading.excepthook = self._hook

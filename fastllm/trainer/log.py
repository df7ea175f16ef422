"""Metrics of a run: `metrics.csv`, TensorBoard where it is installed, and Weights & Biases for who asks."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

from fastllm._extras import require
from fastllm.trainer._files import reading, writing

COLUMNS = (
    *("step", "loss", "learning_rate", "grad_norm", "tokens_per_second"),
    *("mfu", "data_wait", "validation_loss", "accuracy", "skipped"),
)
EVERY = 1.0
"""Seconds between what TensorBoard is handed: to wake its thread for every step takes longer than the table does."""


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


def _start_wandb(out: Path, step: int) -> Any:
    """A run of Weights & Biases by the name of the folder, in a project by that of its parent.

    Its id is kept in `wandb-id.txt`, by which a resumed run goes on with it. W&B keeps what it has of the steps that a
    resumed run repeats.
    """
    wandb = require("wandb", "wandb")
    path, folder = out / "wandb-id.txt", out.resolve()
    known = None
    if step and path.exists():
        with reading(path):
            known = path.read_text(encoding="utf-8").strip() or None
    project, name = (re.sub(r"[/\\#?%:]", "-", part) or None for part in (folder.parent.name, folder.name))
    try:
        run = wandb.init(project=project, name=name, dir=str(out), id=known, resume="allow" if known else None)
    except wandb.Error as error:
        raise ValueError(f"Weights & Biases cannot log {out}: {error}") from error
    with writing(path):
        path.write_text(f"{run.id}\n", encoding="utf-8")
    return run


class MetricsLog:
    """Writes a row a step.

    Args:
        out: directory, which exists.
        step: number of steps already taken. What is logged of later ones, by a run that was killed after its last
            checkpoint, is dropped.
        wandb: log to Weights & Biases, too; its own settings (WANDB_MODE=offline and others) are heeded.

    Raises:
        ImportError: for wandb where it is not installed.
        OSError: here and later, for what the disk says, naming the file.
        ValueError: for a `metrics.csv` that is damaged, and for what W&B says against a run.
    """

    def __init__(self, out: Path, step: int = 0, *, wandb: bool = False):
        path = out / "metrics.csv"
        kept = [row for row in read_metrics(path) if row["step"] <= step] if step and path.exists() else []
        columns = dict.fromkeys((*COLUMNS, *(name for row in kept for name in row)))  # none of another version is lost
        self._wandb = _start_wandb(out, step) if wandb else None
        partial = path.with_suffix(".tmp")
        self._path, self._board_path = path, out / "tensorboard"
        self._board: Any = None
        self._pending: list[tuple[int, float, dict[str, float]]] = []  # for TensorBoard: step, time and values
        with writing(path):
            # Line-buffered: what was logged survives a kill.
            self._file = open(partial, "w", newline="", buffering=1, encoding="utf-8")  # noqa: SIM115
            self._writer = csv.DictWriter(self._file, list(columns))
            self._writer.writeheader()
            for row in kept:
                self._writer.writerow({**row, "step": int(row["step"])})
            os.replace(partial, path)
        if importlib.util.find_spec("tensorboard") is None:
            print('TensorBoard is not installed, so only metrics.csv is written (pip install "fastllm-kernels[train]")')
        else:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import SummaryWriter

            self._summary, self._hook = Summary, threading.excepthook
            threading.excepthook = self._of_a_thread
            with writing(self._board_path):
                writer = SummaryWriter(str(self._board_path), purge_step=step + 1, max_queue=1000)
                self._board = writer.file_writer

    def _of_a_thread(self, args: threading.ExceptHookArgs) -> None:
        # TensorBoard's own thread meets a full disk first; the next call raises it again, to be said once and in full.
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            self._hook(args)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs `values`, by the names of COLUMNS, as those of step `step`, the first being 1."""
        with writing(self._path):
            self._writer.writerow({"step": step, **values})
        if self._board is not None:
            now = time.time()
            self._pending.append((step, now, dict(values)))
            if now - self._pending[0][1] >= EVERY:
                self._write_board()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def _write_board(self) -> None:
        # One event of all values: add_scalar makes one of each, which takes several times as long.
        with writing(self._board_path):
            for step, now, values in self._pending:
                summary = self._summary(
                    value=[self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
                )
                self._board.add_summary(summary, step, now)
        self._pending.clear()

    def close(self) -> None:
        """Closes the files. What could not be written was an error already, or is one now."""
        try:
            if self._wandb is not None:
                self._wandb.finish()
            with writing(self._path):
                self._file.close()
        finally:
            if self._board is not None:
                try:
                    self._write_board()
                    with writing(self._board_path):
                        self._board.flush()
                finally:
                    try:
                        with writing(self._board_path):
                            self._board.close()  # waits for the thread, which may have an error to say by our hook
                    finally:
                        threading.excepthook = self._hook

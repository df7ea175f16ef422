"""What the command lines share: errors of one line, and a look at where results go before the work is done."""

from __future__ import annotations

import argparse
import errno
import os
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastllm: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def integer(text: str) -> int:
    """The type of an argument that is an int."""
    number = int(text)
    if abs(number) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text[:30]}{'...' * (len(text) > 30)} has more than 64 bits")
    return number


integer.__name__ = "int"  # so argparse calls it in an error


def check_folder(path: str | Path, option: str) -> None:
    """Sees that `path` is a directory that can be written to, or can become one. Makes nothing.

    Raises:
        OSError: for what stands in the way, by its name.
        ValueError: for an empty path, naming the option.
    """
    if not str(path):
        raise ValueError(f"{option} must not be empty")
    folder = Path(path).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

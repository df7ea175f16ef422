"""What the command lines share: errors of one line, and a look at where results go before the work is done."""

from __future__ import annotations

import argparse
import errno
import os
import tempfile
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


def _exists(path: Path) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_folder(path: str | Path, option: str) -> None:
    """Sees that `path` is a directory that can be written to, or can become one. Leaves nothing there.

    Raises:
        OSError: for what stands in the way, by its name.
        ValueError: for an empty path, naming the option.
    """
    if not str(path):
        raise ValueError(f"{option} must not be empty")
    folder = Path(path).absolute()
    while not _exists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    try:  # root may write anywhere, so says os.access, in /proc and on a disk that is read-only, too
        os.rmdir(tempfile.mkdtemp(dir=folder))
    except OSError as error:
        raise OSError(error.errno, f"cannot be written to: {error.strerror}", str(folder)) from error

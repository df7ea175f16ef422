"""What goes wrong with a file, said in one way whatever library meets it."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path


def _errno(error: BaseException) -> int | None:
    """The system's error number in `error` or in what it was raised from; safetensors and tokenizers write it only."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        if match := re.search(r"\(os error (\d+)\)", str(cause)):
            return int(match[1])
        cause = cause.__cause__ or cause.__context__
    return None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises OSError with the name of the file for whatever the system says meanwhile.

    torch says "unexpected pos" of a full disk, and a file that is open says no name.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        number = _errno(error)
        if number is not None:
            raise OSError(number, os.strerror(number), str(path)) from error
        if isinstance(error, OSError):
            raise OSError(f"{path} cannot be written: {error}") from error
        raise


@contextlib.contextmanager
def reading(path: Path, hint: str = "", verdict: str = "cannot be loaded") -> Iterator[None]:
    """Opens the file once to see that it can be; then whatever goes wrong is an error that names it.

    Raises:
        OSError: for what the system says.
        ValueError: for all else: whatever is in a file, reading it must not end in another error.
    """
    try:
        path.open("rb").close()
        yield
    except (ImportError, MemoryError):
        raise
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path} cannot be read: {error}{hint}") from error
        raise OSError(error.errno, f"{os.strerror(error.errno)}{hint}", str(path)) from error
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        # torch goes on to say how to load it without any check.
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in what:
            what = "it is damaged, or no state of a training run"
        elif isinstance(error, KeyError):
            what = f"it lacks {what}"
        what = what.removeprefix(f"{path} ")
        raise ValueError(f"{path} {verdict}: {what[:400]}{hint}") from error

"""SIGTERM and SIGINT as requests to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Yields a list to which each SIGTERM and SIGINT adds its name; the second one of a kind does what it always did.

    Outside of the main thread, which alone may have handlers, the list stays empty.
    """
    asked: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before: dict[int, object] = {}

    def ask(number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        asked.append(name)
        signal.signal(number, before[number])  # type: ignore[arg-type]
        # Not by sys.stderr, which the progress bar may be in the midst of writing to, and then refuses.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: finishing the step and saving; once more stops at once\n".encode())

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, before[number])  # type: ignore[arg-type]

"""A contender in a process of its own, which is asked and answers through a pipe."""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Worker:
    """A process that runs `work(pipe, *args)`, which answers what it receives until that raises EOFError.

    What it sends may be an exception, which `ask` raises. It ends with this object.
    """

    def __init__(self, work: Callable[..., None], *args: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        process = context.Process(target=work, args=(other, *args), daemon=True)
        process.start()
        other.close()
        self._end = weakref.finalize(self, self._stop, self.pipe, process)

    @staticmethod
    def _stop(pipe: Connection, process: Any) -> None:
        pipe.close()
        process.join(10)

    def ask(self, order: Any) -> Any:
        self.pipe.send(order)
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

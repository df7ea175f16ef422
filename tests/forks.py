"""Processes that are forked from one that has imported everything, since importing torch takes seconds.

A test starts them by `Forks`; `fork` is for scripts that have done the imports themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def fork(function: str, args: list[Any], log: Path, ranks: int = 1) -> list[int]:
    """Calls `function`, "module:name", with `args` in a process a rank; its return value is the exit code.

    Args:
        function: as above; modules of the tests can be named.
        args: fit for JSON.
        log: gets what all ranks print.
        ranks: more than one form a group of processes (gloo), whose store is a file beside the log.

    Returns:
        The process ids, by rank.
    """
    store = log.with_suffix(".store")
    store.unlink(missing_ok=True)
    found = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            found.append(child)
            continue
        code: Any = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(opened, 1)
            os.dup2(opened, 2)
            if ranks > 1:
                import torch.distributed as dist

                dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
            module, _, name = function.partition(":")
            code = getattr(importlib.import_module(module), name)(*args)
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code or 0)
    return found


def command(argv: list[str], before: str = "") -> int:
    """Runs `fastllm`, behind some code that may change what it will do."""
    from fastllm import cli

    exec(before, {})
    return cli.main(argv)


class Forks:
    """Forks on behalf of a test. A context manager."""

    def __enter__(self) -> Forks:
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONUNBUFFERED", None)  # streams are as they are for a user
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def _ask(self, *request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def start(self, function: str, *args: Any, log: Path, ranks: int = 1) -> list[int]:
        """As `fork`."""
        return self._ask("fork", function, args, str(log), ranks)

    def wait(self, children: list[int], timeout: float = 60) -> list[int]:
        """The exit codes, as subprocess has them, of children that end in time."""
        deadline = time.monotonic() + timeout
        while None in (codes := self._ask("poll", children)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {timeout} s, exit codes are {codes}")
            time.sleep(0.01)
        return codes

    def run(self, function: str, *args: Any, log: Path, ranks: int = 1, timeout: float = 60) -> list[int]:
        """Starts and waits."""
        return self.wait(self.start(function, *args, log=log, ranks=ranks), timeout)


def _serve() -> None:
    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        kind, *request = json.loads(line)
        if kind == "fork":
            function, args, log, ranks = request
            reply: list[Any] = fork(function, args, Path(log), ranks)
            codes |= dict.fromkeys(reply)
        else:
            for child in request[0]:
                if codes[child] is None:
                    ended, status = os.waitpid(child, os.WNOHANG)
                    codes[child] = os.waitstatus_to_exitcode(status) if ended else None
            reply = [codes[child] for child in request[0]]
        print(json.dumps(reply), flush=True)
    for child, code in codes.items():
        if code is None:
            os.kill(child, 9)


if __name__ == "__main__":
    import torch
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.utils.tensorboard
    import tqdm  # noqa: F401

    from fastllm.trainer import command as _  # noqa: F401

    torch.set_num_threads(1)
    _serve()

"""Optional dependencies, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports and returns `module`, which the extra `extra` of this package installs.

    Raises:
        ImportError: where it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there and misses something of its own
        raise ImportError(
            f'{package} is not installed; this installs it: pip install "fastllm-kernels[{extra}]"', name=package
        ) from error

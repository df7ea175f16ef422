"""Submodules that are imported when somebody asks for them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType


def submodules(package: str, *names: str) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, with these submodules as attributes."""

    def getattribute(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:  # help() and hasattr() know what to do about this one only
            raise AttributeError(f"{package}.{name} cannot be imported: {error}") from error

    return getattribute, lambda: sorted({*vars(sys.modules[package]), *names})

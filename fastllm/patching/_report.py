"""What `patch` did, module by module, and how to take it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fastllm.patching._forward import Forward, ours


@dataclass(frozen=True)
class Entry:
    """One module, or one part of the model that is no module of its own.

    Attributes:
        path: of the module, as `named_modules` has it; "" is the model itself.
        was: its class, or what it did.
        now: the op of fastllm that runs instead; None where it was left.
        backend: which backend runs the op on the module's device.
        reason: why it was left; None where it was replaced.
    """

    path: str
    was: str
    now: str | None = None
    backend: str | None = None
    reason: str | None = None


class PatchError(RuntimeError):
    """Something matched and was not replaced (`strict=True`), or a patch cannot be taken back."""


class PatchReport(list):
    """A list of `Entry`. Prints as a table in which modules that differ in their layer's number alone share a row."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._undo: list[Callable[[], None]] = []
        self._reverted = False

    @property
    def replaced(self) -> list[Entry]:
        return [entry for entry in self if entry.now is not None]

    @property
    def left(self) -> list[Entry]:
        """What matched and was not replaced."""
        return [entry for entry in self if entry.now is None]

    def to_dict(self) -> dict[str, Any]:
        """{"model": class name, "entries": [...]}, of plain strings."""
        return {"model": type(self.model).__name__, "entries": [asdict(entry) for entry in self]}

    def set_forward(self, module: nn.Module, forward: Forward) -> None:
        """Gives this one module another forward, of its own; state, hooks and class stay."""
        module.__dict__["forward"] = forward
        name = type(module).__name__

        def undo() -> None:
            if not ours(module.__dict__.get("forward"), forward.proven):
                raise PatchError(f"revert: the forward of a {name} was replaced by somebody else after the patch")
            del module.__dict__["forward"]

        self._undo.append(undo)

    def on_revert(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def revert(self) -> None:
        """Gives the model back as it was. A second call does nothing.

        Raises:
            PatchError: where a forward that the patch set has been replaced meanwhile; the others are taken back.
        """
        errors = []
        while self._undo:
            try:
                self._undo.pop()()
            except PatchError as error:
                errors.append(error)
        self.clear()
        self._reverted = True
        if errors:
            raise errors[0]

    def __str__(self) -> str:
        if self._reverted:
            return f"{type(self.model).__name__}: reverted"
        if not self:
            return f"{type(self.model).__name__}: nothing in it that fastllm knows to replace"
        rows: dict[tuple[str, ...], list[str]] = {}
        for entry in self:
            path = ".".join("*" if part.isdigit() else part for part in entry.path.split("."))
            now = f"{entry.now} ({entry.backend})" if entry.now else f"left: {entry.reason}"
            rows.setdefault((path, entry.was, now), []).append(entry.path or "(model)")
        table = [("modules", "path", "was", "now")]
        for (path, was, now), paths in rows.items():
            table.append((str(len(paths)), paths[0] if len(paths) == 1 else path, was, now))
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        return "\n".join(
            "  ".join([row[0].rjust(widths[0]), row[1].ljust(widths[1]), row[2].ljust(widths[2]), row[3]]).rstrip()
            for row in table
        )

    __repr__ = __str__

"""fastllm in Lightning: `Trainer(callbacks=[PatchCallback()])`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fastllm.patching import PatchReport, patch


class PatchCallback(Callback):
    """Patches the module's models while it is fitted.

    Args:
        **kwargs: as `fastllm.patch` takes them.

    Attributes:
        reports: one for each child of the module, while they are patched.
    """

    def __init__(self, **kwargs: Any):
        self.kwargs = kwargs
        self.reports: list[PatchReport] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The module's own forward belongs to Lightning; models of transformers in it are found as they are.
        self.reports = [patch(child, **self.kwargs) for child in pl_module.children()]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while self.reports:
            self.reports.pop().revert()

"""fastllm in transformers' Trainer.

Trainer(model, args, ..., callbacks=[PatchCallback()],
        optimizer_cls_and_kwargs=(fastllm.optim.AdamW, {"lr": args.learning_rate}))
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fastllm.patching import PatchReport, patch


class PatchCallback(TrainerCallback):
    """Patches the model when training begins and takes that back when it ends.

    Args:
        **kwargs: as `fastllm.patch` takes them.

    Attributes:
        report: what was replaced, while it is.
    """

    def __init__(self, **kwargs: Any):
        self.kwargs = kwargs
        self.report: PatchReport | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)  # of a training that did not come to its end
        self.report = patch(model, **self.kwargs)
        if state.is_world_process_zero:
            print(self.report)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.report is not None:
            self.report.revert()

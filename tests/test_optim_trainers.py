"""AdamW in other people's trainers, where they are installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from optim_suite import assert_as_torchs_fused

from fastllm.optim import AdamW


def installed(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


class Regression(torch.nn.Module):
    """In the form that the trainers below call. Its one parameter is a whole vector of any instruction set."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(16, 1, bias=False)

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.mse_loss(self.linear(x)[:, 0], labels)}


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": x, "labels": x.sum()} for x in torch.randn(32, 16, generator=generator)]


@installed("transformers")
@installed("accelerate")
def test_hugging_face_trainer(tmp_path):
    import transformers

    weights = []
    for kind in (AdamW, torch.optim.AdamW):
        model = Regression()
        args = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=8,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = transformers.Trainer(
            model, args, train_dataset=rows(), optimizer_cls_and_kwargs=(kind, {"lr": 1e-2, "fused": True})
        )
        trainer.train()
        assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), kind)
        weights.append(list(model.parameters()))
    assert_as_torchs_fused(*weights)


@installed("accelerate")
def test_accelerate():
    import accelerate

    weights = []
    for kind in (AdamW, torch.optim.AdamW):
        accelerator = accelerate.Accelerator(cpu=True)
        model = Regression()
        loader = torch.utils.data.DataLoader(rows(), batch_size=8)
        model, optimizer, loader = accelerator.prepare(model, kind(model.parameters(), lr=1e-2, fused=True), loader)
        for batch in loader:
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
        weights.append(list(model.parameters()))
    assert_as_torchs_fused(*weights)


@installed("lightning")
def test_lightning(tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, kind):
            super().__init__()
            self.model, self.kind = Regression(), kind

        def training_step(self, batch, _):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return self.kind(self.parameters(), lr=1e-2, fused=True)

    weights = []
    for kind in (AdamW, torch.optim.AdamW):
        module = Module(kind)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(rows(), batch_size=8))
        weights.append(list(module.parameters()))
    assert_as_torchs_fused(*weights)


@installed("lightning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_clips_in_mixed_precision(tmp_path, precision, fused):
    """It refuses to with fused optimizers, whose step divides by the scale that it would have to clip under."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, kind):
            super().__init__()
            self.model, self.kind, self.seen = Regression(), kind, []

        def training_step(self, batch, _):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return self.kind(self.parameters(), lr=1e-2, fused=fused)

        def on_before_optimizer_step(self, optimizer):
            self.seen.append(self.model.linear.weight.grad.clone())

    results = []
    for kind in (AdamW, torch.optim.AdamW):
        module = Module(kind)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, precision=precision, gradient_clip_val=0.5,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(rows(), batch_size=8)
        if fused:
            with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
                trainer.fit(module, loader)
            continue
        trainer.fit(module, loader)
        results.append((module.seen, list(module.parameters())))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


@installed("accelerate")
@pytest.mark.parametrize("fused", [None, True])
def test_accelerate_is_told_of_skipped_steps(fused):
    """As with torch's: without fused. It holds a schedule back then."""
    import accelerate
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    skipped = []
    for kind in (AdamW, torch.optim.AdamW):
        model, scaler = torch.nn.Linear(4, 4), torch.amp.GradScaler("cpu")
        optimizer = AcceleratedOptimizer(kind(model.parameters(), fused=fused), device_placement=False, scaler=scaler)
        skipped.append([])
        for overflow in (False, True, False):
            scaler.scale(model(torch.ones(2, 4)).sum()).backward()
            if overflow:
                model.weight.grad[0, 0] = float("inf")
            optimizer.step()
            skipped[-1].append(optimizer.step_was_skipped)
            optimizer.zero_grad()
    assert skipped[0] == skipped[1] == [False, not fused, False]

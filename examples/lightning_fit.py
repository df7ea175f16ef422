"""Lightning: a callback patches the models inside of the module while it is fitted."""

import lightning
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastllm
from fastllm.compat.lightning import PatchCallback


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch, index):
        loss = self.model(input_ids=batch, labels=batch).loss
        print(f"step {index} loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self):
        return fastllm.optim.AdamW(self.parameters(), lr=3e-3)


torch.manual_seed(0)
callback = PatchCallback()
trainer = lightning.Trainer(
    max_steps=8,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    callbacks=[callback],
)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.randint(512, (32, 32)), batch_size=4))
assert not callback.reports  # taken back

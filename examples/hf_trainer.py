"""transformers' Trainer: a callback patches the model, and the optimizer is fastllm's."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fastllm
from fastllm.compat.transformers import PatchCallback

torch.manual_seed(0)
config = GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
tokens = torch.randint(512, (4, 32)).repeat(8, 1)
dataset = [{"input_ids": row, "labels": row} for row in tokens]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=4,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=dataset,
        callbacks=[PatchCallback()],
        optimizer_cls_and_kwargs=(fastllm.optim.AdamW, {"lr": arguments.learning_rate}),
    )
    print(trainer.train())

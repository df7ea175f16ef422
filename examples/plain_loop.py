"""A training loop of your own: one line patches the model, another takes the fused optimizer."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastllm

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config).train()

report = fastllm.patch(model)
print(report)

optimizer = fastllm.optim.AdamW(model.parameters(), lr=3e-3, max_norm=1.0)  # clips on the way
tokens = torch.randint(512, (4, 32))
for step in range(10):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.4f} norm {optimizer.grad_norm.item():.2f}")

report.revert()  # the model is as it was, trained

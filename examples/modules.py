"""A model of your own: modules of fastllm.nn instead of torch's, with the same arguments and state_dicts."""

import torch

import fastllm


class Block(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = fastllm.nn.RMSNorm(width)
        self.mlp = fastllm.nn.SwiGLU(width, 3 * width)

    def forward(self, delta: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = self.norm.add(delta, residual)  # residual + delta, and its norm, in one pass
        return self.mlp(normed), residual


torch.manual_seed(0)
width, classes = 64, 512
embedding, block = torch.nn.Embedding(classes, width), Block(width)
head = fastllm.nn.LinearCrossEntropyLoss(width, classes)  # classifier and loss; the logits are not held whole
optimizer = fastllm.optim.AdamW([*embedding.parameters(), *block.parameters(), *head.parameters()], lr=3e-3)
tokens = torch.randint(classes, (4, 32))
for step in range(10):
    x = embedding(tokens[:, :-1])
    delta, residual = block(x, torch.zeros_like(x))
    loss = head(delta + residual, tokens[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.4f}")

"""A model that calls scaled_dot_product_attention: torch's own switch gives it fastllm's kernels on CUDA. Elsewhere the
switch changes nothing."""

import torch
from torch.nn import functional as F
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from fastllm.compat import torch_attention


class Attention(torch.nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, S, D)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
embedding, attention, head = torch.nn.Embedding(256, 64), Attention(64, 4), torch.nn.Linear(64, 256)
model = torch.nn.Sequential(embedding, attention, head).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
tokens = torch.randint(256, (4, 33), device=device)

torch_attention.register()
activate_flash_attention_impl("fastllm")
print(f"flash attention is {current_flash_attention_impl()}'s")
for step in range(10):
    with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.4f}")
restore_flash_attention_impl()
